"""What a cheap machine does to an experiment of the tool: kills, signals, a full disk, long work.

Each case has a short form, and a long one in the campaign (`python -m pytest tests -m campaign`).
"""

import errno
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from bench.runner import run_seed
from bench.worker import Worker
from bench_helpers import command, lines, log_of, logged, result_of, rows, tool, write_fake
from conftest import environment, limited, live, times

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def experiment(folder, runs, seconds=0.004, *changes):
    """The arguments of an experiment of two arms, with so many runs of each, in a folder."""
    script = write_fake(folder, 'fake.py', *changes)
    common = ['--hyp', f'fake.seconds={seconds}', '--seed', '5', '--log-dir', folder / 'logs']
    return ['run', script, f'{script}:fake.skill=93.9', *common, '--runs', runs]


def finished(*args):
    """`result_of` a command that ends well."""
    status, out, err = tool(*args)
    assert status == 0, err
    return result_of(out)


def ended(words, **options):
    """A process that has ended; options of subprocess.run."""
    return subprocess.run(words, env=environment(), capture_output=True, text=True, **options)


def read_rows(process, n):
    """What a process prints up to its n-th row."""
    out = ''
    for line in process.stdout:
        out += line
        if len(rows(out)) >= n:
            break
    return out


def runs_in_table(out):
    """How many runs the table of a report has."""
    return sum(map(int, re.findall(r'^fake(?: fake\S*)? +(\d+)  9', out, re.M)))


def children(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def assert_ended(pids):
    """The processes end within seconds, if they have not yet."""
    deadline = time.monotonic() + 60
    left = set(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = {pid for pid in left if Path(f'/proc/{pid}').exists()}
    assert not left


# ---------------------------------------- Arms' processes ----------------------------------------
ENDS = [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize('number, status', ENDS)
def test_no_process_is_left_however_the_tool_ends(number, status, tmp_path):
    """Nor one that a script has started; also where a script is busy for hours."""
    code = "import subprocess; print('pid', subprocess.Popen(['sleep', '3600']).pid)"
    busy = ('    rows = []', f'    if seed: {code}; time.sleep(3600)\n    rows = []')
    with live(tmp_path, command(*experiment(tmp_path, 9, 0, busy))) as process:
        for line in process.stdout:
            if line.startswith('pid'):
                break
        arms = children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=300)
    assert len(arms) == 2 and process.returncode == status
    assert_ended([*arms, int(line.split()[1])])


def test_killed_arm_ends_the_experiment_and_resume_completes_it(tmp_path):
    args = experiment(tmp_path / 'killed', 10**5)
    with live(tmp_path, command(*args)) as process:
        out = read_rows(process, 5)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        out += process.communicate(timeout=300)[0]
    log = log_of(tmp_path / 'killed' / 'logs')
    assert process.returncode == 1
    last = out.splitlines()[-1]
    assert last.endswith('its process was killed (SIGKILL, as when memory runs out)'), last
    assert runs_in_table(out) == len(lines(log))
    runs = 1 + max(run['run'] for run in lines(log))
    whole = finished(*experiment(tmp_path / 'whole', runs))
    assert finished('run', '--resume', log, '--runs', runs) == whole


# ---------------------------------------- Kills ----------------------------------------
@times(2, 100)
def test_killed_at_random_moments_it_loses_no_row_and_ends_in_the_same_table(n, tmp_path):
    rng, printed, folder = random.Random(n), [], tmp_path / 'killed'
    args = experiment(folder, 12 * n)
    for _ in range(n):
        with live(tmp_path, command(*args)) as process:
            printed += rows(read_rows(process, rng.randrange(1, 12)))
            time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))
            process.kill()
            printed += rows(process.stdout.read())
        log = log_of(folder / 'logs')
        args = ['run', '--resume', log]
        assert set(printed) <= set(logged(log))
        if rng.random() < 0.5:  # what a power cut may leave of a last line
            with open(log / 'runs.jsonl', 'ab') as file:
                file.write(b'{"arm": "fake", "run": 1, "tta_')
    assert finished(*args) == finished(*experiment(tmp_path / 'whole', 12 * n))


@pytest.mark.parametrize('number', SIGNALS)
@times(1, 50)
def test_signal_ends_it_with_the_table_of_the_finished_runs(n, number, tmp_path):
    rng = random.Random(n)
    for i in range(n):
        with live(tmp_path, command(*experiment(tmp_path / str(i), 10**5))) as process:
            out = read_rows(process, rng.randrange(1, 6))
            time.sleep(rng.uniform(0, 0.03))
            for _ in range(3):  # more than one must not end the table
                process.send_signal(number)
            out += process.communicate(timeout=300)[0]
        log = log_of(tmp_path / str(i) / 'logs')
        assert process.returncode == 128 + number and 'Traceback' not in out, out
        made = len(lines(log))
        assert runs_in_table(out) == made
        assert f'stopped after {made} finished runs; `python tests/bench run --resume {log}`' in out


def test_signal_while_it_ends_does_not_take_the_report(tmp_path, monkeypatch):
    """As from torchrun, which ends all processes when one has failed. Turn 2 fails."""
    bug = ('rows = []', 'assert seed in SEEDS, "my bug"; rows = []')
    seed = f'SEEDS = 0, {run_seed(5, 1)}\nimport random'
    script = write_fake(tmp_path, 'fake.py', bug, ('import random', seed))
    close = Worker.close

    def interrupted(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        close(worker)

    monkeypatch.setattr(Worker, 'close', interrupted)
    options = ('--runs', 2, '--seed', 5, '--log-dir', tmp_path / 'logs')
    status, out, err = tool('run', script, *options)
    assert status == 1 and 'my bug' in err and 'Accuracy: with TTA' in out


def test_traceback_that_cannot_be_written_does_not_take_the_report(tmp_path):
    gone = 'import shutil; shutil.rmtree(LOGS, ignore_errors=True) if seed not in SEEDS else 0; '
    bug = ('rows = []', f'{gone}assert seed in SEEDS, "my bug"; rows = []')
    seed = f'SEEDS = 0, {run_seed(5, 1)}\nLOGS = {str(tmp_path / "logs")!r}\nimport random'
    script = write_fake(tmp_path, 'fake.py', bug, ('import random', seed))
    options = ('--runs', 2, '--seed', 5, '--log-dir', tmp_path / 'logs')
    status, out, err = tool('run', script, *options)
    assert status == 1 and 'my bug' in err and 'cannot write' in err and 'Accuracy: with' in out


@pytest.mark.parametrize('other, seed', [('seed', 2), ('hyp', 1)])
def test_resume_refuses_a_log_with_runs_of_another_experiment(other, seed, tmp_path):
    script = write_fake(tmp_path)
    same = ['--seed', 1]
    others = {'1': same, 'seed': ['--seed', 2], 'hyp': [*same, '--hyp', 'opt.lr=9']}
    for name, options in others.items():
        log_dir = ['--log-dir', tmp_path / name]
        tool('run', script, '--runs', 2, *log_dir, *options)
    first, second = (log_of(tmp_path / name) for name in ('1', other))
    text = (first / 'runs.jsonl').read_text() + (second / 'runs.jsonl').read_text()
    (first / 'runs.jsonl').write_text(text)
    status, _, err = tool('run', '--resume', first, '--runs', 3)
    assert status == 2 and f'has runs of another experiment (fake, seed {seed})' in err
    assert (first / 'runs.jsonl').read_text() == text


def test_resume_takes_a_script_with_an_infinite_value(tmp_path):
    infinite = ("'word': 'x'", "'word': 'x', 'clip': float('inf')")
    script = write_fake(tmp_path, 'fake.py', infinite)
    tool('run', script, '--runs', 1, '--log-dir', tmp_path / 'logs')
    log = log_of(tmp_path / 'logs')
    status, _, err = tool('run', '--resume', log, '--runs', 2)
    assert status == 0 and len(lines(log)) == 2, err


SLOW = {
    'loading': ('import random', 'import time; print("loading"); time.sleep(60); import random'),
    'training': ('    rows = []', '    print("training"); time.sleep(60); rows = []'),
}


@pytest.mark.parametrize('when', SLOW)
@pytest.mark.parametrize('number', SIGNALS)
@times(1, 20)
def test_signal_before_the_first_run_leaves_nothing(n, number, when, tmp_path):
    script = write_fake(tmp_path, 'fake.py', SLOW[when])
    for _ in range(n):
        with live(tmp_path, command('run', script)) as process:
            for line in process.stdout:
                if line == f'{when}\n':
                    break
            process.send_signal(number)
            out = process.communicate(timeout=300)[0]
        assert process.returncode == 128 + number
        assert out == 'bench: stopped after 0 finished runs\n'
        assert not list(tmp_path.glob('logs/*'))


# ---------------------------------------- torchrun ----------------------------------------
def test_runs_do_not_depend_on_the_number_of_processes(tmp_path):
    """And only one at a time, the first, may have to download the data."""
    downloads = f"""
    if not os.path.exists('{tmp_path}/data'):
        time.sleep(1)
        open('{tmp_path}/data', 'x')
    return synthetic_data(device, test=64"""
    change = ('    return synthetic_data(device, test=64', downloads[1:])
    imports = ('import random\n', 'import os\nimport random\n')
    expected = finished(*experiment(tmp_path / 'one', 12), '--until-sure', 0.5)
    args = [*experiment(tmp_path / 'two', 12, 0.004, change, imports), '--until-sure', 0.5]
    process = ended(command(*args, processes=2))
    assert process.returncode == 0, process.stderr
    assert result_of(process.stdout) == expected
    log = log_of(tmp_path / 'two' / 'logs')
    assert (log / 'runs-1.jsonl').exists()
    assert sorted(rows(process.stdout)) == sorted(logged(log))


def process_of(pid, rank):
    """The process that torchrun has started with a rank."""
    for child in children(pid):
        if f'RANK={rank}'.encode() in Path(f'/proc/{child}/environ').read_bytes().split(b'\0'):
            return child


@times(1, 10)
def test_killed_process_ends_the_job_and_resume_completes_it(n, tmp_path):
    for i in range(n):
        args = experiment(tmp_path / str(i), 10**5)  # however late the kill comes, it goes on
        with live(tmp_path, command(*args, processes=2)) as process:
            out = read_rows(process, random.Random(i).randrange(1, 12))
            os.kill(process_of(process.pid, (i + 1) % 2), signal.SIGKILL)
            out += process.communicate(timeout=300)[0]
        log = log_of(tmp_path / str(i) / 'logs')
        assert process.returncode != 0 and set(rows(out)) <= set(logged(log))
        if i % 2 == 0:
            assert '\nArm ' in out  # rank 0 lives and shows what there is
        runs = 1 + max(run['run'] for run in lines(log))
        whole = finished(*experiment(tmp_path / f'whole {i}', runs))
        assert finished('run', '--resume', log, '--runs', runs) == whole


# ---------------------------------------- The disk ----------------------------------------
def test_full_disk_is_one_line_after_the_table_and_the_log_stays_whole(tmp_path):
    """The limit is above the size of the data, which lie in a file, too."""
    args = experiment(tmp_path, 30, 0)
    with limited(resource.RLIMIT_FSIZE, 24000):
        status, out, err = tool(*args)
    log = log_of(tmp_path / 'logs')
    made = len(lines(log))
    assert status == 1 and err.count('\n') == 1 and 2 <= made < 60
    assert str(log / 'runs.jsonl') in err and (log / 'runs.jsonl').read_bytes().endswith(b'\n')
    assert runs_in_table(out) == made + 1  # the run that could not be written
    _, runs = finished('run', '--resume', log)
    assert len(runs) == 60


def test_disk_too_full_for_the_code_is_one_line_before_any_run(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fsync)
    status, _, err = tool(*experiment(tmp_path, 9))
    assert status == 2 and err.count('\n') == 1
    assert 'code-0-fake.py: No space left on device' in err
    assert not list((tmp_path / 'logs').iterdir())


def test_experiments_of_one_second_have_folders_of_their_own(tmp_path):
    assert finished(*experiment(tmp_path, 1, 0)) == finished(*experiment(tmp_path, 1, 0))
    assert len(list((tmp_path / 'logs').iterdir())) == 2


# ---------------------------------------- Long work ----------------------------------------
def test_closed_pipe_ends_it_without_a_word(tmp_path):
    words = command(*experiment(tmp_path, 10**5))
    process = ended(f'{shlex.join(words)} | head -n 4', shell=True, timeout=300)
    assert process.stdout.count('\n') == 4 and process.stderr == ''


STATE = """statm = open('/proc/self/statm').read().split()
    state = {'pages': int(statm[1]), 'cpu_seconds': time.process_time()}
    return {**state, 'tta_acc': accuracy"""


@times(200, 2000)
def test_memory_and_overhead_stay_flat_over_many_runs(n, tmp_path):
    """Resident memory and processor time, which a busy machine leaves as they are."""
    change = "return {'tta_acc': accuracy", STATE
    args = experiment(tmp_path, n // 2, 0, change)
    assert ended(command(*args)).returncode == 0
    runs = lines(log_of(tmp_path / 'logs'))
    memory = np.array([run['pages'] for run in runs]) * resource.getpagesize() / 2**20
    seconds = np.array([run['cpu_seconds'] for run in runs])
    quarter = n // 4
    first, last = (np.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    early, late = (np.ptp(part) / quarter for part in (seconds[:quarter], seconds[-quarter:]))
    print(f'{first:.1f} to {last:.1f} MiB, {1000 * early:.2f} to {1000 * late:.2f} ms a run')
    assert len(memory) == n and last - first < 3 + 0.01 * n  # its record stays
    assert late < 2 * early + 0.001
