"""What a cheap machine does to an experiment of the tool: kills, signals, a full disk, long work.

Each case has a short form, and a long one in the campaign (`python -m pytest tests -m campaign`).
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from bench import cli
from bench_helpers import command, lines, log_of, memory_of, outcomes, report_of, rows, write_fake
from conftest import environment, live, times

resource = pytest.importorskip('resource', reason='file-size limits and /proc: Linux')

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def experiment(runs, seconds=0.004):
    """The arguments of an experiment of two arms, with so many runs of each."""
    arms = ['fake.py', 'fake.py:fake.skill=93.9']
    return ['run', *arms, '--hyp', f'fake.seconds={seconds}', '--seed', '5', '--runs', str(runs)]


def folder_of(tmp_path, name):
    """A folder with the script."""
    write_fake(tmp_path / name)
    return tmp_path / name


def finished(folder, *args, **options):
    """What a command that ends well prints."""
    process = subprocess.run(
        command(*args, **options), cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def in_process(folder, args, monkeypatch, capsys):
    """`finished`, without a new process."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        capsys.readouterr()
        assert cli.main(args) == 0
    return capsys.readouterr().out


def read_rows(process, n):
    """What a process prints up to its n-th row."""
    out = ''
    for line in process.stdout:
        out += line
        if len(rows(out)) >= n:
            break
    return out


def shown(out):
    return [row for row in rows(out.split('\nArm ')[0])]


def on_disk(log):
    return [(run['run'], f'{100 * run["tta_acc"]:.2f}') for run in lines(log)]


# ---------------------------------------- Kills ----------------------------------------


@times(2, 100)
def test_killed_at_random_moments_it_loses_no_row_and_ends_in_the_same_table(
    n, tmp_path, monkeypatch, capsys
):
    rng, folder, args, printed = (
        random.Random(n),
        folder_of(tmp_path, 'killed'),
        experiment(12 * n),
        [],
    )
    for _ in range(n):
        with live(folder, command(*args)) as process:
            printed += shown(read_rows(process, rng.randrange(1, 12)))
            time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))
            process.kill()
            printed += shown(process.stdout.read())
        log = log_of(folder)
        args = ['run', '--resume', str(log)]
        assert set(printed) <= set(on_disk(log))
        if rng.random() < 0.5:  # what a power cut may leave of a last line
            with open(log / 'runs.jsonl', 'ab') as file:
                file.write(b'{"arm": "fake", "run": 1, "tta_')
    out = in_process(folder, args, monkeypatch, capsys)
    whole = folder_of(tmp_path, 'whole')
    expected = in_process(whole, experiment(12 * n), monkeypatch, capsys)
    assert outcomes(log) == outcomes(log_of(whole))
    assert report_of(out) == report_of(expected)


@pytest.mark.parametrize('number', SIGNALS)
@times(1, 50)
def test_signal_ends_it_with_the_table_of_the_finished_runs(n, number, tmp_path):
    rng = random.Random(n)
    for i in range(n):
        folder = folder_of(tmp_path, str(i))
        with live(folder, command(*experiment(10**5))) as process:
            out = read_rows(process, rng.randrange(1, 6))
            time.sleep(rng.uniform(0, 0.03))
            for _ in range(3):  # more than one must not end the table
                process.send_signal(number)
            out += process.communicate(timeout=60)[0]
        log = log_of(folder)
        assert process.returncode == 128 + number and 'Traceback' not in out, out
        made = len(lines(log))
        assert sum(map(int, re.findall(r'^fake(?: fake\S*)? +(\d+)  9', out, re.M))) == made
        assert (
            f'stopped after {made} finished runs; `run --resume {log.relative_to(folder)}`' in out
        )


@pytest.mark.parametrize('number', SIGNALS)
@times(1, 20)
def test_signal_before_the_first_run_leaves_nothing(n, number, tmp_path):
    for i in range(n):
        folder = folder_of(tmp_path, str(i))
        slow = ('import torch', 'print("loading", flush=True); time.sleep(20); import torch')
        write_fake(folder, 'fake.py', slow)
        with live(folder, command('run', 'fake.py')) as process:
            assert process.stdout.readline() == 'loading\n'
            process.send_signal(number)
            out = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + number
        assert out == 'bench: stopped after 0 finished runs\n' and not (folder / 'logs').exists()


# ---------------------------------------- torchrun ----------------------------------------


def test_runs_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, capsys):
    one, two = folder_of(tmp_path, 'one'), folder_of(tmp_path, 'two')
    args = [*experiment(12), '--until-sure', '0.5']
    expected = in_process(one, args, monkeypatch, capsys)
    out = finished(two, *args, processes=2)
    log = log_of(two)
    assert outcomes(log) == outcomes(log_of(one)) and report_of(out) == report_of(expected)
    assert (log / 'runs-1.jsonl').exists() and sorted(shown(out)) == sorted(on_disk(log))


def workers_of(pid):
    """The processes that torchrun has started, by rank."""
    found = {}
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        variables = Path(f'/proc/{child}/environ').read_bytes().split(b'\0')
        ranks = [int(text.split(b'=')[1]) for text in variables if text.startswith(b'RANK=')]
        found.update(dict.fromkeys(ranks, int(child)))
    return found


@times(1, 10)
def test_killed_worker_ends_the_job_and_resume_completes_it(n, tmp_path, monkeypatch, capsys):
    whole = folder_of(tmp_path, 'whole')
    expected = in_process(whole, experiment(40), monkeypatch, capsys)
    for i in range(n):
        folder = folder_of(tmp_path, str(i))
        with live(folder, command(*experiment(40), processes=2)) as process:
            out = read_rows(process, random.Random(i).randrange(1, 12))
            os.kill(workers_of(process.pid)[(i + 1) % 2], signal.SIGKILL)
            out += process.communicate(timeout=120)[0]
        log = log_of(folder)
        assert process.returncode != 0 and set(shown(out)) <= set(on_disk(log))
        if i % 2 == 0:
            assert '\nArm ' in out  # rank 0 lives and shows what there is
        out = in_process(folder, ['run', '--resume', str(log)], monkeypatch, capsys)
        assert outcomes(log) == outcomes(log_of(whole)) and report_of(out) == report_of(expected)


# ---------------------------------------- The disk ----------------------------------------


def with_file_limit(folder, args, size):
    """A command where no file may grow over a size in bytes, as on a disk that gets full."""
    return subprocess.run(
        command(*args),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_full_disk_is_one_line_after_the_table_and_the_log_stays_whole(
    tmp_path, monkeypatch, capsys
):
    folder = folder_of(tmp_path, 'full')
    process = with_file_limit(folder, experiment(9, 0), 9000)
    log = log_of(folder)
    made = len(lines(log))
    assert process.returncode == 1 and process.stderr.count('\n') == 1 and 2 <= made < 18
    assert f'{log.relative_to(folder)}/runs.jsonl' in process.stderr
    assert (log / 'runs.jsonl').read_bytes().endswith(b'\n')
    counts = re.findall(r'^fake(?: fake\S*)? +(\d+)  9', process.stdout, re.M)
    assert sum(map(int, counts)) == made + 1  # the run that could not be written
    in_process(folder, ['run', '--resume', str(log)], monkeypatch, capsys)
    assert len(outcomes(log)) == 18


def test_disk_too_full_for_the_code_is_one_line_before_any_run(tmp_path):
    process = with_file_limit(folder_of(tmp_path, 'full'), experiment(9), 100)
    assert process.returncode == 2 and process.stderr.count('\n') == 1
    assert 'code-0-fake.py' in process.stderr
    assert not list((tmp_path / 'full' / 'logs').iterdir())


def test_experiments_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, 'both')
    for _ in range(2):
        in_process(folder, experiment(1, 0), monkeypatch, capsys)
    logs = sorted((folder / 'logs').iterdir())
    assert len(logs) == 2 and outcomes(logs[0]) == outcomes(logs[1])


# ---------------------------------------- Long work ----------------------------------------


def test_closed_pipe_ends_it_without_a_word(tmp_path):
    words = ' '.join(f"'{word}'" for word in command(*experiment(10**5)))
    process = subprocess.run(
        f'{words} | head -n 4', shell=True, cwd=folder_of(tmp_path, 'pipe'), env=environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.stdout.count('\n') == 4 and process.stderr == ''


@times(200, 2000)
def test_memory_and_overhead_stay_flat_over_many_runs(n, tmp_path):
    folder, memory, seen = folder_of(tmp_path, 'long'), [], []
    with live(folder, command(*experiment(n // 2, 0))) as process:
        for line in process.stdout:
            if rows(line):
                memory.append(memory_of(process.pid))
                seen.append(time.perf_counter())
            if line.startswith('Arm '):
                break
    quarter = n // 4
    first, last = (np.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    seconds = np.diff(seen)
    early, late = (np.median(part) for part in (seconds[:quarter], seconds[-quarter:]))
    print(f'{first:.1f} to {last:.1f} MiB, {1000 * early:.2f} to {1000 * late:.2f} ms a run')
    assert len(memory) == n and last - first < 3 + 0.01 * n  # its record stays
    assert late < 3 * early + 0.005
