"""The command line: options, rows, table, log, errors, and how a command ends."""

import copy
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    NARROW,
    NARROW_ARGS,
    ROOT,
    assert_refused,
    command,
    environment,
    live,
    times,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROW = re.compile(
    r' +(?P<trial>\d+) +(?P<run>\d+) +(?P<epoch>\d+) +(?P<loss>\d+\.\d{4}|diverged)'
    r' +(?P<train>\d+\.\d\d%) +(?P<test>\d+\.\d\d%|-)(?: +(?P<tta>\d+\.\d\d%))?'
    r' +\d+\.\d{3}s +(?P<left>\d+m \d\ds)'
)
CELLS = re.compile(
    r'(?P<name>\d+|Average) +(?P<runtime>\d+m \d\d\.\d{3}s) +(?P<clock>\d+\.\d{3})s'
    r' +(?P<mean>\d+\.\d\d)%(?: \+- (?P<error>\d+\.\d\d))?(?: +(?P<std>\d+\.\d\d))?'
    r' +(?P<above>\d+/\d+) +(?P<diverged>\d+/\d+)'
)
RUN_KEYS = {'script', 'sha256', 'hyp', 'trial', 'run', 'seed', 'device', 'torch', 'dtype', 'data'}
RUN_KEYS |= {'epochs', 'tta_acc', 'clock_seconds', 'eval_seconds', 'wall_seconds', 'compile'}
RUN_KEYS |= {'warmup_seconds', 'train_images', 'test_images', 'classes'}
FINISHED = re.compile(r'^ +1 +1 +1 .*%.*%.*%', re.M)  # the row of a whole run of one epoch


@pytest.fixture
def short(data_dir):
    """Arguments of one narrow run of one epoch."""
    return ['--data-dir', data_dir, '--trials', 1, *NARROW_ARGS, 'opt.train_epochs=1']


def log_of(folder):
    """The one log folder in folder/logs: its path, code and runs."""
    (path,) = (Path(folder) / 'logs').iterdir()
    lines = (path / 'runs.jsonl').read_text().splitlines()
    runs = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return SimpleNamespace(path=path, code=(path / 'code.py').read_text(), runs=runs)


def rows_of(out):
    lines = re.split('[\r\n]+', out)
    return [match.groupdict() for match in map(ROW.fullmatch, lines) if match]


def table_of(out):
    """The rows of the table, each a dict."""
    matches = map(CELLS.fullmatch, out[out.index('\nTrial') :].splitlines())
    return [match.groupdict() for match in matches if match]


def fail_on_call(function, number, error):
    """function, except that its call of a number raises error."""
    calls = iter(range(1, 10**6))

    def failing(*args, **kwargs):
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return failing


# ---------------------------------------- A whole command ----------------------------------------
@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """Two trials of two runs by an edited copy of a script: what they printed and logged."""
    folder = tmp_path_factory.mktemp('whole')
    copied = shutil.copy(ROOT / 'airbench94_modified.py', folder / 'mine.py')
    args = ['--data-dir', data_dir, '--trials', 2, '--runs', 2, '--seed', 5, *NARROW_ARGS]
    words = [sys.executable, 'mine.py', *map(str, args)]
    process = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert process.returncode == 0 and not process.stderr, process.stderr
    source = Path(copied).read_text()
    return SimpleNamespace(source=source, out=process.stdout, log=log_of(folder), folder=folder)


def test_one_row_per_epoch_in_80_columns_with_the_logged_numbers(whole):
    lines = whole.out[whole.out.index('trial  run') : whole.out.index('Log: ')].splitlines()
    assert max(map(len, lines)) <= 80
    numbered = [(trial, run, epoch) for trial in (1, 2) for run in (1, 2) for epoch in (1, 2)]
    rows = rows_of(whole.out)
    assert [tuple(int(row[k]) for k in ('trial', 'run', 'epoch')) for row in rows] == numbered
    for row, (trial, run, epoch) in zip(rows, numbered, strict=True):
        record = whole.log.runs[2 * trial + run - 3]
        logged = record['epochs'][epoch - 1]
        assert row['loss'] == f'{logged["train_loss"]:.4f}'
        assert row['train'] == f'{logged["train_acc"]:.2%}'
        assert row['test'] == f'{logged["test_acc"]:.2%}'
        assert row['tta'] == (f'{record["tta_acc"]:.2%}' if epoch == 2 else None)


def test_table_has_a_row_per_trial_and_their_average_with_its_standard_error(whole):
    rows, runs = table_of(whole.out), whole.log.runs
    assert [row['name'] for row in rows] == ['1', '2', 'Average']
    for row, some in zip(rows, (runs[:2], runs[2:], runs), strict=True):
        percent = np.array([100 * run['tta_acc'] for run in some])
        std = percent.std(ddof=1)
        seconds = sum(run['wall_seconds'] for run in some) / (len(some) // 2)
        expected = f'{percent.mean():.2f}', f'{std / len(some) ** 0.5:.2f}', f'{std:.2f}'
        assert (row['mean'], row['error'], row['std']) == expected
        assert row['runtime'] == f'0m {seconds:06.3f}s'  # of the Average: of a trial
        assert row['above'] == f'{sum(percent >= 94)}/{len(some)}'
        assert row['clock'] == f'{np.mean([run["clock_seconds"] for run in some]):.3f}'


def test_log_lines_are_complete_and_the_code_is_the_source(whole):
    assert whole.log.code == whole.source
    assert re.fullmatch(r'\d{8}T\d{6}Z-mine-\w+', whole.log.path.name)
    assert {path.name for path in whole.folder.iterdir()} == {'mine.py', 'logs'}
    assert {path.name for path in whole.log.path.iterdir()} == {'code.py', 'runs.jsonl'}
    assert [(run['trial'], run['run']) for run in whole.log.runs] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    assert len({run['seed'] for run in whole.log.runs}) == 4
    for run in whole.log.runs:
        assert set(run) >= RUN_KEYS and len(run['epochs']) == 2
        assert run['script'] == 'mine'  # the file's name
        assert run['sha256'] == hashlib.sha256(whole.source.encode()).hexdigest()
        assert {key: run['hyp'][key] for key in NARROW} == NARROW
        clocks = [row['clock_seconds'] for row in run['epochs']]
        assert clocks[0] < clocks[1] < run['clock_seconds'] < run['wall_seconds']


def test_screen_says_what_runs_before_the_first_row(whole):
    head = whole.out[: whole.out.index('trial  run')]
    first = head.splitlines()[0]
    assert first.startswith('mine') and 'seed 5' in first
    assert all(f'{key}={value}' in first for key, value in NARROW.items())  # not the defaults
    assert torch.__version__ in head and str(whole.log.runs[0]['data']) in head
    assert re.search(r'\d+m \d\ds a run, \d+m \d\ds in all', head)
    assert whole.log.path.name in whole.out.splitlines()[-1]


# ---------------------------------------- Options ----------------------------------------
def test_one_trial_of_one_run_has_no_average_and_no_spread(call, short):
    (row,) = table_of(call(*short).out)
    assert row['name'] == '1' and row['error'] is None and row['std'] is None


def test_quiet_prints_one_row_per_run_without_test_accuracy(call, short, tmp_path):
    result = call(*short, 'opt.train_epochs=2', '--quiet', '--runs', 2)
    found = [(row['run'], row['epoch'], row['test']) for row in rows_of(result.out)]
    assert found == [('1', '2', '-'), ('2', '2', '-')]
    assert {row['test_acc'] for run in log_of(tmp_path).runs for row in run['epochs']} == {None}


def test_drawn_seed_is_printed_and_repeats_the_run(call, short):
    first = call(*short)
    seed = re.search(r'seed (\d+)', first.out)[1]
    again, other = call(*short, '--seed', seed), call(*short, '--seed', int(seed) + 1)
    losses = [rows_of(result.out)[0]['loss'] for result in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_runs_are_seeded_from_seed_trial_and_run_alone(call, short, script):
    runs = {}
    for n in (1, 2):
        found = call(*short, '--trials', 2, '--runs', n, '--seed', 3, script=script).runs
        runs[n] = {(run['trial'], run['run']): (run['seed'], run['tta_acc']) for run in found}
    assert runs[1] == {key: runs[2][key] for key in [(1, 1), (2, 1)]}


def test_recipe_comes_before_hyp_and_both_are_shown(call, modified, short, tmp_path):
    own = copy.deepcopy(modified.hyp)
    result = call('--recipe', 'fast94', *short, 'opt.lr=6', 'opt.lr=7', script=modified)
    hyp, recipe = log_of(tmp_path).runs[0]['hyp'], modified.RECIPES['fast94']
    assert hyp['opt.small_sizes'] == recipe['opt.small_sizes'] and hyp['opt.lr'] == 7
    assert 'fast94' in result.out and 'opt.lr=7' in result.out and modified.hyp == own


def test_synthetic_is_said_on_the_screen_and_in_the_log(
    call, baseline, data, short, tmp_path, monkeypatch
):
    monkeypatch.setattr(baseline, 'synthetic_data', lambda device: data)
    assert 'synthetic' in call(*short, '--synthetic').out
    assert log_of(tmp_path).runs[0]['data'] == 'synthetic'


def test_target_is_what_runs_are_counted_from(call, short):
    result = call(*short, '--target', '1.5')
    assert '>=1.5%' in result.out and table_of(result.out)[0]['above'] == '1/1'


def test_main_returns_the_records_with_a_short_repr(call, short):
    result = call(*short, '--runs', 2)
    assert len(result.runs) == 2 and set(result.runs[0]) >= RUN_KEYS
    assert len(repr(result.runs)) < 80 and '2' in repr(result.runs)


def test_help_names_every_option_and_the_commands(call, baseline):
    result = call('--help')
    assert result.status == 0 and not result.err
    options = '--trials --runs --seed --device --compile --recipe --hyp --data-dir --log-dir'
    for option in [*options.split(), '--target', '--quiet', '--save', '--synthetic']:
        assert f' {option}' in result.out
    assert 'python airbench94_baseline.py' in result.out


# ---------------------------------------- Bad input ----------------------------------------
BAD = ['--trails 3', 'extra', 'opt.lr', '--trials', '--trials 0', '--trials 1.5', '--runs 0']
BAD += ['--seed -1', '--seed x', '--target 101', '--target 0.94', '--target nan', '--recipe x']
BAD += ['--device mps', '--device cuda:99', '--hyp', '--hyp opt.lr', '--hyp =3', '--hyp opt.lr=x']
BAD += ['--hyp opt=3', '--hyp opt.nonsense=3', '--hyp opt.batch_size=64.5', '--hyp aug.flip=1']
BAD += ['--hyp net.widths=3', '--hyp opt.small_sizes=24', '--save none/net.pt', '--tri 3']


@pytest.mark.parametrize('args', BAD)
def test_bad_option_is_one_line_before_any_work(args, call, tmp_path):
    assert_refused(call(*args.split()))
    assert not list(tmp_path.iterdir())


MEANT = {
    '--lr 3': '--hyp opt.lr=',
    '--epochs 3': '--hyp opt.train_epochs=',
    '--batch-size 3': '--hyp opt.batch_size=',
    '--hyp lr=3': '--hyp opt.lr=',
    '--hyp epochs=3': '--hyp opt.train_epochs=',
    '--hyp opt.flip=3': '--hyp aug.flip=',
}


@pytest.mark.parametrize('args', MEANT)
def test_did_you_mean(args, call):
    result = call(*args.split())
    assert_refused(result)
    assert 'did you mean' in result.err and MEANT[args] in result.err


def test_hyperparameter_without_hyp_is_not_dropped(call, short, tmp_path):
    call('opt.lr=3', *short)
    assert log_of(tmp_path).runs[0]['hyp']['opt.lr'] == 3


def test_batch_size_over_the_training_set(call, short):
    result = call(*short, 'opt.batch_size=257')
    assert_refused(result)
    assert 'opt.batch_size' in result.err and not rows_of(result.out)


@pytest.mark.parametrize('epochs', ['0', '-1', 'nan'])
def test_no_epochs_are_one_line_before_the_first_run(epochs, call, short):
    assert_refused(call(*short, f'opt.train_epochs={epochs}'))


def test_unwritable_log_folder(call, short):
    result = call(*short, '--log-dir', '/dev/null/logs')
    assert_refused(result)
    assert '/dev/null/logs' in result.err


VALID = {
    'opt.lr': [0.01, 1e9],
    'opt.train_epochs': [0.01, 1.3],
    'opt.batch_size': [1, 7, 24],
    'opt.momentum': [1e-6, 0.9999],
    'opt.weight_decay': [0.0, 1e9],
    'opt.bias_scaler': [1e-9, 1e9],
    'opt.label_smoothing': [0.0, 1.0],
    'opt.whiten_bias_epochs': [0, 1, 10**30],
    'opt.small_sizes': [[], [24], [17, 40]],
    'aug.flip': [False],
    'aug.translate': [0, 31],
    'net.widths.block1': [1, 9],
    'net.batchnorm_momentum': [0.0, 1.0],
    'net.scaling_factor': [1e-9, 1e9],
    'net.tta_level': [0, 1],
    'net.tta_share': [1e-9, 0.5],
}
INFINITE = [float('nan'), float('inf'), -1.0, 0.0]
ODD = {
    'opt.lr': INFINITE,
    'opt.train_epochs': [float('inf')],
    'opt.batch_size': [0, -5, 25, 10**30],
    'opt.momentum': [*INFINITE, 1.0],
    'opt.weight_decay': INFINITE,
    'opt.bias_scaler': INFINITE,
    'opt.small_sizes': [[7], [0], [-1], [True], ['a'], [[]], [None], [2.5]],
    'aug.translate': [32, -1, 10**30],
    'net.widths.block1': [0, -1, 10**30],
    'net.scaling_factor': INFINITE,
    'net.tta_share': INFINITE,
}
CHANGES = st.fixed_dictionaries({}, optional={k: st.sampled_from(VALID[k]) for k in VALID})
ONE_ODD = st.sampled_from([{key: value} for key, values in ODD.items() for value in values])


@pytest.fixture
def tiny(script, data_dir, monkeypatch):
    """The options of a run of 30 ms on 24 images, which are what --synthetic gives."""
    data = script.synthetic_data('cpu', train=24, test=10)
    monkeypatch.setattr(script, 'synthetic_data', lambda device: data)
    tiny = ['--synthetic', '--device', 'cpu', '--trials', 1, '--seed', 0, '--hyp']
    return [*tiny, *(f'net.widths.block{i}=3' for i in (1, 2, 3)), 'opt.batch_size=12']


@times(40, 1000)
@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_any_hyperparameters_make_a_table_or_one_line(n, call, script, tiny, request):
    own = copy.deepcopy(script.hyp)
    random = bool(request.node.get_closest_marker('campaign'))

    @settings(
        max_examples=n,
        derandomize=not random,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failure is short enough as it is
        suppress_health_check=[*HealthCheck],
    )
    @given(CHANGES, st.just({}) | ONE_ODD)
    def holds(valid, odd):
        words = [f'{key}={json.dumps(value)}' for key, value in {**valid, **odd}.items()]
        result = call(*tiny, 'opt.train_epochs=1', *words, script=script)
        assert script.hyp == own
        assert odd or not result.status, result.err
        if result.status:
            assert_refused(result)
        else:
            (row,) = table_of(result.out)
            assert row['above'].endswith('/1') and len(result.runs) == 1 and not result.err

    holds()


# ---------------------------------------- A live process ----------------------------------------
def endless(data_dir, *args):
    words = '--data-dir', data_dir, '--trials', 1000, *NARROW_ARGS, 'opt.train_epochs=1', *args
    return command('airbench94_modified', *words)


def pipes(**variables):
    """Popen's options for what a user's pipe gets: no unbuffered output, errors apart."""
    env = environment(**variables)
    del env['PYTHONUNBUFFERED']
    return {'env': env, 'stderr': subprocess.PIPE}


@pytest.fixture(scope='module')
def stopped(data_dir, tmp_path_factory):
    """A command of very many runs, stopped by Ctrl-C at its first row, and its log then."""
    folder, lines = tmp_path_factory.mktemp('stopped'), []
    with live(folder, endless(data_dir), **pipes()) as process:
        for line in process.stdout:
            lines.append(line)
            if FINISHED.match(line):
                break
        logged, running = log_of(folder).runs, process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    out, status = ''.join(lines) + rest, process.returncode
    return SimpleNamespace(
        out=out, err=err, status=status, log=log_of(folder), logged=logged, running=running
    )


def test_a_row_comes_through_a_pipe_at_once_and_is_on_the_disk_before(stopped):
    assert stopped.running
    assert (stopped.logged[0]['trial'], stopped.logged[0]['run']) == (1, 1)


def test_ctrl_c_ends_with_130_one_line_and_the_table_of_the_finished_runs(stopped):
    assert_refused(stopped, 130)
    table, n = table_of(stopped.out), len(stopped.log.runs)
    assert table[-1]['above'].endswith(f'/{n}') and f'after {n} finished' in stopped.err
    assert f'logs/{stopped.log.path.name}' in stopped.out


def test_a_pipe_gets_no_progress_line(stopped):
    assert '\r' not in stopped.out and 'step' not in stopped.out


@times(1, 20)
def test_ctrl_c_in_the_warm_up_ends_with_130_and_one_line(n, data_dir, tmp_path):
    for _ in range(n):
        words = command('airbench94_modified', '--data-dir', data_dir, '--device', 'cpu')
        with live(tmp_path, [*words, '--hyp', 'opt.batch_size=256'], **pipes()) as process:
            for line in process.stdout:
                if 'Warming up' in line:
                    break
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        assert_refused(SimpleNamespace(status=process.returncode, err=err), 130)


def test_head_of_the_rows_ends_it_without_a_traceback(data_dir, tmp_path):
    with live(tmp_path, endless(data_dir), **pipes()) as process:
        while not FINISHED.match(process.stdout.readline()):
            pass
        process.stdout.close()
        err = process.stderr.read()
        process.wait()
    assert process.returncode == 1 and err.count('\n') == 1 and 'Traceback' not in err, err


def test_a_terminal_gets_a_progress_line_that_rows_overwrite(data_dir, tmp_path):
    """The clock runs 100 times as fast, so that seconds pass between two steps."""
    pty = pytest.importorskip('pty')
    ours, theirs = pty.openpty()
    args = ['--data-dir', str(data_dir), '--trials', '1', *NARROW_ARGS]
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import airbench94_modified as script
real, script.time.perf_counter = time.perf_counter, lambda: 100 * real()
script.main({args})"""
    with live(tmp_path, [sys.executable, '-c', code], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b''
        while True:
            try:
                shown += os.read(ours, 1000)
            except OSError:  # the other side is closed
                break
        process.wait()
    os.close(ours)
    shown = shown.decode().replace('\r\n', '\n')
    assert process.returncode == 0, shown
    assert re.search(r'\r +step \d of 8, \d+m \d\ds left', shown)
    assert [row['epoch'] for row in rows_of(shown)] == ['1', '2']
    for line in shown.splitlines():
        *progress, row = line.split('\r')
        assert not progress or len(row) >= len(max(progress, key=len)), line  # nothing left over


def with_file_limit(folder, words, size):
    """A command where no file may grow over a size in bytes, as on a disk that gets full."""
    limit = size, size
    return subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )


def test_disk_that_fills_ends_with_1_and_the_table_and_the_earlier_lines_stay(baseline, tmp_path):
    for split, content in baseline.synthetic_data('cpu', train=32, test=16).items():
        torch.save(content, tmp_path / f'{split}.pt')
    code = (ROOT / 'airbench94_modified.py').stat().st_size
    long_lines = '--quiet', '--hyp', 'opt.batch_size=32', 'opt.train_epochs=40'
    process = with_file_limit(tmp_path, endless('.', *long_lines), code + 500)
    assert process.returncode == 1 and process.stderr.count('\n') == 1, process.stderr
    assert 'too large' in process.stderr
    (log,) = (tmp_path / 'logs').iterdir()
    *lines, _ = (log / 'runs.jsonl').read_text().split('\n')
    rows = rows_of(process.stdout)
    assert [int(row['trial']) for row in rows] == [json.loads(line)['trial'] for line in lines]
    average = table_of(process.stdout)[-1]  # with the run that could not be logged
    assert average['above'].endswith(f'/{len(lines) + 1}') and len(lines) > 1


def test_disk_too_full_for_the_code_ends_with_2(data_dir, tmp_path):
    process = with_file_limit(tmp_path, endless(data_dir), 1000)
    assert process.returncode == 2 and process.stderr.count('\n') == 1, process.stderr
    assert 'too large' in process.stderr and not rows_of(process.stdout)


@pytest.mark.parametrize('size', [None, 30_000])
def test_network_that_cannot_be_saved_is_one_line_after_the_table(size, data_dir, tmp_path):
    """A folder is in the way, or the disk fills with the network."""
    args = '--data-dir', data_dir, '--trials', 2, '--save', 'net.pt', *NARROW_ARGS
    words = command('airbench94_modified', *args, 'opt.train_epochs=1', 'net.widths.block3=64')
    if size is None:
        (tmp_path / 'net.pt').mkdir()
        size = 10**9
    process = with_file_limit(
        tmp_path, words, size + (ROOT / 'airbench94_modified.py').stat().st_size
    )
    assert process.returncode == 1 and process.stderr.count('\n') == 1, process.stderr
    assert table_of(process.stdout)[0]['above'].endswith('/1')


@pytest.mark.campaign
def test_compile_without_a_compiler_is_one_line(run, data_dir, tmp_path):
    args = '--compile', '--data-dir', data_dir, '--trials', 1, *NARROW_ARGS
    cache = str(tmp_path / 'inductor')
    variables = {'PATH': '', 'CXX': '/none/g++', 'TORCHINDUCTOR_CACHE_DIR': cache}
    process = run('airbench94_modified', *args, **variables)
    assert process.returncode == 2 and '--compile failed' in process.stderr.splitlines()[-1]
    assert 'Traceback' not in process.stderr


# ---------------------------------------- Failures ----------------------------------------
def test_later_failure_ends_with_1_after_the_table(call, script, short, monkeypatch):
    error = MemoryError()
    monkeypatch.setattr(script, 'train', fail_on_call(script.train, 4, error))  # 1: warm-up
    result = call(*short, '--runs', 5, script=script)
    assert_refused(result, 1)
    assert table_of(result.out)[0]['above'].endswith('/2')


def test_a_bug_keeps_its_traceback(call, baseline, short, monkeypatch):
    monkeypatch.setattr(baseline, 'train', fail_on_call(baseline.train, 3, RuntimeError('a bug')))
    with pytest.raises(RuntimeError, match='a bug'):
        call(*short, '--runs', 5)


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
    RuntimeError('GET was unable to find an engine to execute this computation'),
    MemoryError(),
]
PLACES = {  # what fails there -> what the line says
    'functional.cross_entropy': ('training step', 'opt.batch_size'),
    'CifarNet.eval': ('evaluation', 'EVAL_BATCH'),
    'CifarLoader.normalize': ('preparation of the images',),
}


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize('place', PLACES)
def test_out_of_memory_says_where(place, error, call, baseline, short, monkeypatch):
    def fail(*args, **kwargs):
        raise type(error)(*error.args)  # a new one, without the traceback of other tests

    owner, _, name = place.partition('.')
    owner = baseline.F if owner == 'functional' else getattr(baseline, owner)
    monkeypatch.setattr(owner, name, fail)
    result = call(*short)
    assert_refused(result)
    assert 'out of memory' in result.err and all(word in result.err for word in PLACES[place])


# ---------------------------------------- Table ----------------------------------------
def made_up(trial, run, tta_acc):
    epochs = [{'train_loss': 1.0}]
    seconds = {'clock_seconds': 3.357, 'wall_seconds': 30.25}
    return {
        'trial': trial,
        'run': run,
        'tta_acc': tta_acc,
        'epochs': epochs,
        'classes': 10,
        **seconds,
    }


def test_table_has_the_reports_layout_and_names_diverged_runs(script):
    runs = [made_up(1, 1, 0.94), made_up(1, 2, 0.93), made_up(2, 1, 0.95), made_up(2, 2, 0.51)]
    lines = [' '.join(line.split()) for line in script.table(runs, 94.0).splitlines()]
    assert lines == [
        'Trial Runtime Clock/run Accuracy +- s.e. Std >=94% Diverged',
        '1 1m 00.500s 3.357s 93.50% +- 0.50 0.71 1/2 0/2',
        '2 1m 00.500s 3.357s 73.00% +- 22.00 31.11 1/2 1/2',
        'Average 1m 00.500s 3.357s 83.25% +- 10.76 21.52 2/4 1/4',
        'Diverged: trial 2 run 2, 51.00%',
    ]
    assert max(map(len, script.table(runs, 94.0).splitlines())) <= 80


def test_diverged_run_is_finished_counted_and_logged_without_nan(call, short, tmp_path, script):
    result = call(*short, 'opt.train_epochs=2', 'opt.lr=1e37', script=script)  # overflows float32
    assert result.status == 0, result.err
    assert {row['loss'] for row in rows_of(result.out)} == {'diverged'}
    losses = [row['train_loss'] for row in log_of(tmp_path).runs[0]['epochs']]
    assert losses == [None, None] and table_of(result.out)[0]['diverged'] == '1/1'
    assert re.search('^Diverged: trial 1 run 1', result.out, re.M)


DURATIONS = [
    ((108.288, 3), '1m 48.288s'),
    ((59.9996, 3), '1m 00.000s'),
    ((3600.5, 3), '60m 00.500s'),
]
DURATIONS += [((59.6,), '1m 00s'), ((4.2,), '0m 04s')]


@pytest.mark.parametrize('args, text', DURATIONS)
def test_duration_is_written_as_in_the_report(args, text, baseline):
    assert baseline.duration(*args) == text
