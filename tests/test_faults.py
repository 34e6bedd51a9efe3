"""What a cheap machine does to an experiment: kills, signals, a full disk, diverging runs, long work.

Each case has a short form here and a long one in the campaign (`python -m pytest tests -m campaign`).
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

resource = pytest.importorskip('resource', reason='file-size limits and /proc: Linux')

from conftest import NARROW_ARGS, ROOT, command, environment, live, times
from test_bench import TORCHRUN, finished, outcomes, records, rows_of, wait_for

TINY = [*NARROW_ARGS, 'opt.batch_size=16', 'opt.train_epochs=1', 'net.tta_level=0']  # 30 ms a run
TWO_ARMS = ['--quiet', *TINY, '--versus', ROOT / 'airbench94_baseline.py']
TITLE, HEAD = 'modified, ', 'trial  run'  # how the first line and that of the column heads begin


@pytest.fixture(scope='module')
def tiny_dir(baseline, tmp_path_factory):
    """A data directory of 32 training and 16 test images."""
    folder = tmp_path_factory.mktemp('tiny')
    for split, content in baseline.synthetic_data('cpu', train=32, test=16).items():
        torch.save(content, folder / f'{split}.pt')
    return folder


def experiment(tiny_dir, runs):
    """The command of an experiment of two arms, with so many runs in all."""
    return command('airbench94_modified', '--data-dir', tiny_dir, '--seed', 5, '--runs', 5,
                   '--trials', runs // 10, *TWO_ARMS)


def read_until(process, start, rows=0):
    """The lines of a process up to one that starts so, and so many rows after it; at once, for a kill."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        rows -= bool(rows_of(line))
        start = '' if line.lstrip().startswith(start) else start
        if not start and rows <= 0:
            break
    return ''.join(lines)


def whole_lines(log):
    """(trial, run, arm, accuracy in percent) of each line in runs.jsonl but one without an end."""
    *lines, _ = (log / 'runs.jsonl').read_text().split('\n') if (log / 'runs.jsonl').exists() else ['']
    return [(r['trial'], r['run'], r['arm'], f"{r['tta_acc']:.2%}"[:-1]) for r in map(json.loads, lines)]


def runs_in_table(out):
    """How many runs the table has: of its arms, or of the one arm that a run was finished of."""
    return sum(map(int, re.findall(r'^(?:Average|\S*(?:modified|baseline)) +(\d+)  \d+m ', out, re.M)))


# ---------------------------------------- kill -9 ----------------------------------------

@times(10, 100)
def test_killed_again_and_again_it_loses_no_row_and_ends_in_the_table_of_the_unkilled(n, tiny_dir, tmp_path):
    rng, words, printed, log = random.Random(n), experiment(tiny_dir, 20 * n), set(), None
    for _ in range(n):
        with live(tmp_path, words if log is None else [*words, '--resume', log]) as process:
            out = read_until(process, rng.choice([TITLE] + 4 * [HEAD]), rng.randrange(12))
            time.sleep(rng.choice([0, rng.uniform(0, 0.06)]))  # at once after a row, or anywhere in two runs
            assert process.poll() is None, out
            process.kill()
            out += process.stdout.read()
        log = log or next(iter((tmp_path / 'logs').iterdir()), None)
        printed |= {*rows_of(out)}
        assert printed <= {*whole_lines(log)}
        runs = log / 'runs.jsonl'
        if rng.random() < 0.3 and runs.exists():  # what a power cut may leave of the last line
            printed -= {*whole_lines(log)[-1:]}
            os.truncate(runs, max(0, runs.stat().st_size - rng.randrange(1, 200)))
    result = finished(tmp_path, 'airbench94_modified', '--resume', log)
    whole = finished(tmp_path / 'logs', *[Path(words[1]).stem, *words[2:]])
    assert outcomes(log) == outcomes(whole.log)
    assert result.table == whole.table and len(printed) > n


# ---------------------------------------- SIGINT and SIGTERM ----------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def new_folders(tmp_path, n):
    for i in range(n):
        (tmp_path / str(i)).mkdir()
        yield tmp_path / str(i)


def stop_somewhere(rng, process, number):
    """Send a signal at a random moment; what was printed until the end, which comes within half a minute."""
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(number)
    return process.communicate(timeout=40)[0]


@pytest.mark.parametrize('number', SIGNALS)
@times(2, 50)
def test_signal_ends_it_with_the_table_of_the_finished_runs(n, number, tiny_dir, tmp_path):
    rng = random.Random(n)
    for folder in new_folders(tmp_path, n):
        with live(folder, experiment(tiny_dir, 10**6)) as process:
            out = read_until(process, rng.choice([TITLE] + 3 * [HEAD]), rng.randrange(6))
            out += stop_somewhere(rng, process, number)
        assert process.returncode == 128 + number, out
        last = out.splitlines()[-1]
        assert re.fullmatch(r'airbench94_modified: stopped after \d+ .*', last), out
        assert 'Traceback' not in out, out
        logs = [*folder.glob('logs/*')]
        assert logs or not rows_of(out)
        for log in logs:
            lines = whole_lines(log)
            in_table = runs_in_table(out)
            assert {*rows_of(out)} <= {*lines}
            assert len(lines) <= in_table <= len(lines) + 1  # one more: stopped before it was written
            assert f'after {in_table} finished' in last and (not lines or f'Log: logs/{log.name}' in out)


@pytest.mark.parametrize('number', SIGNALS)
@times(2, 20)
def test_signal_before_the_first_line_ends_it_without_a_table(n, number, tiny_dir, tmp_path):
    (tmp_path / 'slow.py').write_text(f'print("loading", flush=True)\nimport time; time.sleep({n} / 10)\n'
                                      + (ROOT / 'airbench94_baseline.py').read_text())
    rng = random.Random(n)
    for _ in range(n):
        with live(tmp_path, [*experiment(tiny_dir, 10**6), tmp_path / 'slow.py']) as process:
            assert process.stdout.readline() == 'loading\n'
            time.sleep(rng.uniform(0, n / 10))
            process.send_signal(number)
            out = process.communicate(timeout=40)[0]
        assert process.returncode == 128 + number and out.count('\n') == 1, out
        assert out == 'airbench94_modified: stopped after 0 finished runs\n'


def test_second_sigterm_leaves_the_table_alone(tiny_dir, tmp_path):
    with live(tmp_path, experiment(tiny_dir, 10**6)) as process:
        out = read_until(process, HEAD, 2)
        for _ in range(20):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        out += process.communicate(timeout=40)[0]
    assert process.returncode == 128 + signal.SIGTERM and runs_in_table(out) >= 2, out


def children(pid):
    return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()


def alive(pid):
    file = Path(f'/proc/{pid}/stat')
    return file.exists() and file.read_text().rsplit(')')[-1].split()[0] != 'Z'


@pytest.mark.parametrize('number', SIGNALS)
@times(1, 10)
def test_signal_ends_torchrun_and_its_workers(n, number, tiny_dir, tmp_path):
    rng = random.Random(n)
    for folder in new_folders(tmp_path, n):
        words = [*TORCHRUN, '--nproc_per_node=2', *experiment(tiny_dir, 10**6)[1:]]
        with live(folder, words) as process:
            out = read_until(process, HEAD, rng.randrange(1, 6))
            workers = children(process.pid)
            out += stop_somewhere(rng, process, number)
        assert len(workers) >= 2 and process.returncode != 0
        wait_for(lambda: not any(map(alive, workers)), seconds=5)
        log, = folder.glob('logs/*')
        assert {*rows_of(out)} <= {*whole_lines(log)} and f'Log: logs/{log.name}' in out
        assert len(rows_of(out)) <= runs_in_table(out) <= len(records(log)) + 2, out  # the other may go on


# ---------------------------------------- A full disk ----------------------------------------

def with_file_limit(folder, words, size):
    """A command where no file may grow over a size in bytes, as on a disk that gets full."""
    return subprocess.run(words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, timeout=200,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_run_that_cannot_be_logged_is_in_the_table_and_the_log_stays_whole(tiny_dir, tmp_path):
    words = [*experiment(tiny_dir, 20), '--hyp', 'opt.train_epochs=40']  # long lines
    code = (ROOT / 'airbench94_modified.py').stat().st_size
    process = with_file_limit(tmp_path, words, code + 2000)
    log, = (tmp_path / 'logs').iterdir()
    lines = whole_lines(log)
    assert process.returncode == 1 and process.stderr.count('\n') == 1 and 2 <= len(lines) < 19
    assert f'{log.relative_to(tmp_path)}/runs.jsonl' in process.stderr and 'too large' in process.stderr
    assert runs_in_table(process.stdout) == len(lines) + 1
    assert rows_of(process.stdout) == lines
    result = finished(tmp_path, 'airbench94_modified', '--resume', log)
    assert rows_of(result.out)[0][:3] not in {line[:3] for line in lines}
    assert whole_lines(log)[:len(lines)] == lines and len(whole_lines(log)) == 20


@pytest.mark.parametrize('size', [0, 1000])
def test_disk_too_full_for_the_code_is_one_line_before_any_run(size, tiny_dir, tmp_path):
    process = with_file_limit(tmp_path, experiment(tiny_dir, 10), size)
    assert process.returncode == 2 and process.stderr.count('\n') == 1 and not process.stdout
    assert 'code.py' in process.stderr and 'too large' in process.stderr


# ---------------------------------------- Divergence ----------------------------------------

@times(5, 20)
@pytest.mark.parametrize('name', ['airbench94_baseline', 'airbench94_modified'])
def test_diverging_runs_end_in_their_usual_time_and_are_marked(n, name, tiny_dir, tmp_path):
    result = finished(tmp_path, name, '--data-dir', tiny_dir, '--seed', 5, '--trials', 1, '--runs', n,
                      '--quiet', *TINY, 'opt.train_epochs=10', 'opt.lr=1e6',
                      '--versus', f'{ROOT / name}.py:opt.lr=1')
    own, other = name.removeprefix('airbench94_'), f'{ROOT / name} opt.lr=1'
    assert [(cells[0], cells[1]) for cells in result.table[1:3]] == [(own, str(n)), (other, str(n))]
    assert result.table[1][-1] == f'{n}/{n}' != result.table[2][-1]
    warnings = [line.rsplit(',')[0] for line in result.table if str(line).startswith(f'Warning: {own} ')]
    assert warnings == [f'Warning: {own} trial 1 run {i} diverged' for i in range(1, n + 1)]
    clock = {arm: np.median([r['clock_seconds'] for r in records(result.log) if r['arm'] == arm])
             for arm in (own, other)}
    assert clock[own] < 2 * clock[other]


# ---------------------------------------- Long work ----------------------------------------

@pytest.fixture(scope='module', params=[200, pytest.param(2000, marks=pytest.mark.campaign)])
def long(request, tiny_dir, tmp_path_factory):
    """Many runs in one process: its resident MiB, and the seconds between rows that were not a run's own."""
    folder, resident, seen = tmp_path_factory.mktemp('long'), [], []
    with live(folder, experiment(tiny_dir, request.param)) as process:
        for line in process.stdout:
            if rows_of(line):
                seen.append(time.perf_counter())
                pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
                resident.append(pages * resource.getpagesize() / 2 ** 20)
            if line.startswith('Arm '):
                break
    log, = (folder / 'logs').iterdir()
    overhead = np.diff(seen) - [record['wall_seconds'] for record in records(log)[1:]]
    assert len(seen) == request.param
    return SimpleNamespace(resident=np.array(resident), overhead=overhead)


def test_memory_stays_flat_over_many_runs(long):
    quarter = len(long.resident) // 4
    first, last = (np.median(part) for part in (long.resident[quarter:2 * quarter], long.resident[-quarter:]))
    print(f'{first:.1f} MiB in the second quarter, {last:.1f} MiB in the last')  # pytest's -rP shows it
    assert last - first < 3 + 0.002 * len(long.resident)  # of a run, its record stays


def test_overhead_of_a_run_stays_constant(long):
    quarter = len(long.overhead) // 4
    first, last = (np.quantile(x, 0.2) for x in (long.overhead[:quarter], long.overhead[-quarter:]))
    print(f'{1000 * first:.2f} ms in the first quarter, {1000 * last:.2f} ms in the last')
    assert last < 1.3 * first + 0.0003
