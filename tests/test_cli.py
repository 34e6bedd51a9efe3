"""The command line: options, rows, table, log, errors, and how a command ends."""

import copy
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    NARROW_ARGS,
    ROOT,
    assert_refused,
    environment,
    limited,
    live,
    narrow_hyp,
    runs_in_table,
    times,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MODIFIED = ROOT / 'airbench94_modified.py'
Row = namedtuple('Row', 'trial run epoch loss train test rest')  # rest: TTA, clock, time left
FINISHED = r' +1 +1 +1 .*%.*%.*%'  # the row of a whole run of one epoch


@pytest.fixture(scope='module')
def short(data_dir):
    """Arguments of one narrow run of one epoch; hyperparameters may follow."""
    return ['--data-dir', data_dir, '--trials', 1, *NARROW_ARGS, 'opt.train_epochs=1']


def log_of(folder):
    """The one log folder in folder/logs: its path, code and the runs of its whole lines."""
    (path,) = (Path(folder) / 'logs').iterdir()
    *lines, _ = (path / 'runs.jsonl').read_text().split('\n')
    runs = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return SimpleNamespace(path=path, code=(path / 'code.py').read_text(), runs=runs)


def rows_of(out):
    return [
        Row(*line.split(maxsplit=6))
        for line in out.splitlines()
        if re.match(r' +\d+ +\d+ +\d+ ', line)
    ]


def piped(folder, script, *args, **variables):
    """A live script with pipes as a user's: what it prints is buffered, errors come apart."""
    env = environment(PYTHONUNBUFFERED='', **variables)
    words = [sys.executable, str(script), *map(str, args)]
    return live(folder, words, env=env, stderr=subprocess.PIPE)


def end(process):
    """What `call` returns, of a live script when it has ended."""
    out, err = process.communicate()
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def read_until(process, pattern):
    """What a process prints up to a line that a pattern matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return ''.join(lines)
    return pytest.fail(process.stderr.read())


# ---------------------------------------- A whole command ----------------------------------------
@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """Two trials of two runs by an edited copy of a script: what they printed and logged."""
    folder, source = tmp_path_factory.mktemp('whole'), MODIFIED.read_text() + '# edited\n'
    (folder / 'mine.py').write_text(source)
    args = ['--data-dir', data_dir, '--trials', 2, '--runs', 2, '--seed', 5, *NARROW_ARGS]
    with piped(folder, 'mine.py', *args) as process:
        result = end(process)
    assert result.status == 0 and not result.err, result.err
    return SimpleNamespace(source=source, out=result.out, log=log_of(folder), folder=folder)


def test_a_pipe_gets_a_row_of_80_columns_per_epoch_with_the_logged_numbers(whole):
    shown = whole.out[whole.out.index('trial  run') : whole.out.index('Log: ')]
    assert '\r' not in shown and max(map(len, shown.splitlines())) <= 80
    records = [(run, row) for run in whole.log.runs for row in run['epochs']]
    for row, (run, logged) in zip(rows_of(shown), records, strict=True):
        numbers = run['trial'], run['run'], logged['epoch'], f'{logged["train_loss"]:.4f}'
        shares = f'{logged["train_acc"]:.2%}', f'{logged["test_acc"]:.2%}'
        assert row[:6] == (*map(str, numbers), *shares)
        tta = f'{run["tta_acc"]:.2%} +' if logged['epoch'] == 2 else ''
        assert re.fullmatch(rf'{tta}\d+\.\d\d\ds +\d+m \d\ds', row.rest)


def test_the_table_is_of_the_logged_runs(whole, modified):
    assert f'\n{modified.table(whole.log.runs, 94)}\n' in whole.out


def test_the_log_has_the_source_and_a_line_of_each_run_that_stands_alone(whole):
    log, digest = whole.log, hashlib.sha256(whole.source.encode()).hexdigest()
    assert log.code == whole.source and re.fullmatch(r'\d{8}T\d{6}Z-mine-\w+', log.path.name)
    assert sorted(os.listdir(whole.folder)) == ['logs', 'mine.py']
    assert sorted(os.listdir(log.path)) == ['code.py', 'runs.jsonl']
    assert [(run['trial'], run['run']) for run in log.runs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({run['seed'] for run in log.runs}) == 4
    for run in log.runs:
        assert (run['script'], run['sha256'], run['compile']) == ('mine', digest, False)
        assert run['hyp']['net.widths.block1'] == 8 and run['train_images'] == 256
        first, second = (row['clock_seconds'] for row in run['epochs'])
        assert 0 < first < second < run['clock_seconds'] < run['wall_seconds']
        assert run['warmup_seconds'] > 0


def test_the_screen_says_what_runs_and_in_the_end_on_what(whole):
    head, run = whole.out[: whole.out.index('trial  run')], whole.log.runs[0]
    first, changes = head.splitlines()[0], NARROW_ARGS[NARROW_ARGS.index('--hyp') + 1 :]
    assert first.startswith('mine') and 'seed 5' in first and ' '.join(changes) in first
    assert run['data'] in head and re.search(r'\d+m \d\ds a run, \d+m \d\ds in all', head)
    *_, where, log = whole.out.splitlines()
    assert all(run[key] in where for key in ('device', 'dtype', 'torch'))
    assert 'warm-up' in where and whole.log.path.name in log


# ---------------------------------------- Options ----------------------------------------
def test_quiet_prints_one_row_per_run_without_test_accuracy(call, short, tmp_path):
    result = call(*short, 'opt.train_epochs=2', '--quiet', '--runs', 2)
    found = [(row.run, row.epoch, row.test) for row in rows_of(result.out)]
    assert found == [('1', '2', '-'), ('2', '2', '-')]
    assert {row['test_acc'] for run in log_of(tmp_path).runs for row in run['epochs']} == {None}


def test_a_drawn_seed_is_printed_and_repeats_the_run(call, short):
    first = call(*short)
    seed = re.search(r'seed (\d+)', first.out)[1]
    again, other = call(*short, '--seed', seed), call(*short, '--seed', int(seed) + 1)
    losses = [rows_of(result.out)[0].loss for result in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_runs_are_seeded_from_seed_trial_and_run_alone(call, short):
    results = [call(*short, '--trials', 2, '--runs', n, '--seed', 3).runs for n in (1, 2)]
    (one, two), more = [[(run['seed'], run['tta_acc']) for run in runs] for runs in results]
    assert [one, two] == [more[0], more[2]]


def test_hyp_goes_before_the_recipe_and_needs_no_option(call, baseline, short, tmp_path):
    args = ['opt.momentum=0.5', '--recipe', 'fast94', *short, 'opt.lr=6', 'opt.lr=7']
    result = call(*args)
    hyp, recipe = log_of(tmp_path).runs[0]['hyp'], baseline.RECIPES['fast94']
    assert hyp['opt.small_sizes'] == recipe['opt.small_sizes']
    assert (hyp['opt.lr'], hyp['opt.momentum']) == (7, 0.5)
    assert all(word in result.out for word in ('fast94', 'opt.lr=7', 'opt.momentum=0.5'))


def test_synthetic_is_said_on_the_screen_and_in_the_log(call, baseline, data, short, monkeypatch):
    monkeypatch.setattr(baseline, 'synthetic_data', lambda device: data)
    result = call(*short, '--synthetic')
    assert 'data: synthetic' in result.out and result.runs[0]['data'] == 'synthetic'


def test_target_is_what_runs_are_counted_from(call, short):
    out = call(*short, '--target', '1.5').out
    assert '>=1.5%' in out and re.search(r' 1/1 +\d/1$', out, re.M)


def test_help_has_every_option_and_the_commands_of_the_header(call):
    result = call('--help')
    assert result.status == 0 and not result.err
    options = 'trials runs seed device compile recipe hyp data-dir log-dir target quiet save'
    assert all(f' --{option} ' in result.out for option in options.split())
    assert ' --synthetic' in result.out and 'python airbench94_baseline.py' in result.out


# ---------------------------------------- Bad input ----------------------------------------
BAD = """
--trails=3 --tri=3 --trials --trials=0 --trials=1.5 --runs=0 --seed=-1 --seed=x --target=101
--target=0.94 --target=nan --recipe=x --device=mps --device=cuda:99 --save=none/net.pt --hyp extra
=3 opt.lr opt.lr=x opt=3 opt.nonsense=3 opt.batch_size=64.5 opt.batch_size=257 opt.train_epochs=0
opt.train_epochs=-1 opt.train_epochs=nan opt.train_epochs=inf opt.small_sizes=24 aug.flip=1
net.widths=3 --lr=3 --epochs=3 --batch-size=3 lr=3 epochs=3 opt.flip=3
"""


@pytest.mark.parametrize('word', BAD.split())
def test_a_bad_word_is_one_line_before_any_work(word, call, short, tmp_path):
    result, name = call(*short, word), word.partition('=')[0]
    assert_refused(result)
    assert name in result.err and not os.listdir(tmp_path)


def test_a_key_that_is_not_there_is_answered_with_all(call, short):
    assert 'hyp has opt.train_epochs, opt.batch_size' in call(*short, 'opt.lrr=3').err


def test_hyperparameters_that_fail_say_why(call, short):
    result = call(*short, 'opt.small_sizes=[2.5]')
    assert_refused(result)
    assert 'these hyperparameters fail: TypeError' in result.err


INFINITE = [float('nan'), float('inf'), -1.0, 0.0]
HYPERPARAMETERS = {  # values that make a run, values that may end in one line
    'opt.lr': ([0.01, 1e9], INFINITE),
    'opt.train_epochs': ([0.01, 1.3], [float('inf')]),
    'opt.batch_size': ([1, 7, 24], [0, -5, 25, 10**30]),
    'opt.momentum': ([1e-6, 0.9999], [*INFINITE, 1.0]),
    'opt.weight_decay': ([0.0, 1e9], INFINITE),
    'opt.bias_scaler': ([1e-9, 1e9], INFINITE),
    'opt.label_smoothing': ([0.0, 1.0], []),
    'opt.whiten_bias_epochs': ([0, 1, 10**30], []),
    'opt.small_sizes': ([[], [24], [17, 40]], [[7], [0], [-1], [True], ['a'], [[]], [None], [2.5]]),
    'aug.flip': ([False], []),
    'aug.translate': ([0, 31], [32, -1, 10**30]),
    'net.widths.block1': ([1, 9], [0, -1, 10**30]),
    'net.batchnorm_momentum': ([0.0, 1.0], []),
    'net.scaling_factor': ([1e-9, 1e9], INFINITE),
    'net.tta_level': ([0, 1], []),
    'net.tta_share': ([1e-9, 0.5], INFINITE),
}
VALID = {key: st.sampled_from(valid) for key, (valid, _) in HYPERPARAMETERS.items()}
ODD = [{key: value} for key, (_, odd) in HYPERPARAMETERS.items() for value in odd]
ANY = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])


@times(40, 1000)
@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_any_hyperparameters_make_a_table_or_one_line(n, call, script, monkeypatch, request):
    """In runs of 30 ms on 24 images, which are what --synthetic gives."""
    data, own = script.synthetic_data('cpu', train=24, test=10), copy.deepcopy(script.hyp)
    monkeypatch.setattr(script, 'synthetic_data', lambda device: data)
    tiny = ['--synthetic', '--device', 'cpu', '--trials', 1, '--seed', 0, '--hyp']
    tiny += [*(f'net.widths.block{i}=3' for i in (1, 2, 3)), 'opt.batch_size=12']
    random = bool(request.node.get_closest_marker('campaign'))

    # Without shrinking: a failure is short enough as it is.
    @settings(ANY, max_examples=n, derandomize=not random, phases=[Phase.generate])
    @given(st.fixed_dictionaries({}, optional=VALID), st.just({}) | st.sampled_from(ODD))
    def holds(valid, odd):
        words = [f'{key}={json.dumps(value)}' for key, value in {**valid, **odd}.items()]
        result = call(*tiny, 'opt.train_epochs=1', *words, script=script)
        assert script.hyp == own
        assert odd or not result.status, result.err
        if result.status:
            assert_refused(result)
        else:
            assert runs_in_table(result.out) == len(result.runs) == 1 and not result.err

    holds()


# ---------------------------------------- Signals, pipes, disks ----------------------------------
def test_ctrl_c_ends_with_130_one_line_and_the_table_of_the_finished_runs(short, tmp_path):
    with piped(tmp_path, MODIFIED, *short, '--trials', 1000) as process:
        read_until(process, FINISHED)
        process.send_signal(signal.SIGINT)
        result = end(process)
    assert_refused(result, 130)
    log = log_of(tmp_path)
    n = len(log.runs)
    assert runs_in_table(result.out) == n and f'after {n} finished' in result.err
    assert f'logs/{log.path.name}' in result.out


@times(1, 20)
def test_ctrl_c_in_the_warm_up_ends_with_130_and_one_line(n, data_dir, tmp_path):
    args = ['--data-dir', data_dir, '--device', 'cpu', '--hyp', 'opt.batch_size=256']
    for _ in range(n):
        with piped(tmp_path, MODIFIED, *args) as process:
            read_until(process, 'Warming up')
            process.send_signal(signal.SIGINT)
            assert_refused(end(process), 130)


def test_head_gets_its_row_at_once_and_ends_the_command_without_a_traceback(short, tmp_path):
    with piped(tmp_path, MODIFIED, *short, '--trials', 1000) as process:
        read_until(process, FINISHED)
        (log,) = tmp_path.glob('logs/*/runs.jsonl')
        logged = log.read_text().count('\n')
        process.stdout.close()
        assert_refused(end(process), 1)
    assert 0 < logged < 90  # a buffer holds 100 rows


def test_disk_that_fills_ends_with_1_and_the_table_and_the_earlier_lines_stay(
    call, baseline, short, tmp_path, monkeypatch
):
    data = baseline.synthetic_data('cpu', train=32, test=16)
    monkeypatch.setattr(baseline, 'load_data', lambda *args: data)
    args = 'opt.batch_size=32', 'opt.train_epochs=40', '--trials', 1000, '--quiet'
    with limited(resource.RLIMIT_FSIZE, 500 + (ROOT / 'airbench94_baseline.py').stat().st_size):
        result = call(*short, *args)
    assert_refused(result, 1)
    runs, rows = log_of(tmp_path).runs, rows_of(result.out)
    assert 'too large' in result.err and len(runs) > 1
    assert [int(row.trial) for row in rows] == [run['trial'] for run in runs]
    assert runs_in_table(result.out) == len(runs) + 1  # with the run that could not be logged


def test_a_log_that_cannot_begin_ends_with_2(call, short):
    unwritable = call(*short, '--log-dir', '/dev/null/logs')
    with limited(resource.RLIMIT_FSIZE, 1000):
        full = call(*short)
    for result, word in ((unwritable, '/dev/null/logs'), (full, 'too large')):
        assert_refused(result)
        assert word in result.err and not rows_of(result.out)


@pytest.mark.parametrize('folder_in_the_way', [True, False])
def test_a_network_that_cannot_be_saved_is_one_line_after_the_table(
    folder_in_the_way, call, short, tmp_path
):
    """Else the disk fills with the network."""
    if folder_in_the_way:
        (tmp_path / 'net.pt').mkdir()
    with limited(resource.RLIMIT_FSIZE, 100_000):
        result = call(*short, 'net.widths.block3=64', '--save', 'net.pt', '--runs', 2)
    assert_refused(result, 1)
    assert '--save' in result.err and runs_in_table(result.out) == 1


# ---------------------------------------- Failures ----------------------------------------
@pytest.mark.campaign
def test_compile_without_a_compiler_is_one_line(short, tmp_path):
    variables = {'PATH': '', 'CXX': '/none/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    with piped(tmp_path, MODIFIED, '--compile', *short, **variables) as process:
        result = end(process)
    assert result.status == 2 and '--compile failed' in result.err.splitlines()[-1]
    assert 'Traceback' not in result.err


def fail_in_third_run(script, error, data, monkeypatch):
    done = script.train(data, 1, narrow_hyp(script), 'cpu', quiet=True)
    trainings = [done, done, done, error]  # the first is the warm-up
    monkeypatch.setattr(script, 'train', Mock(side_effect=trainings))


def test_a_later_failure_ends_with_1_after_the_table(call, short, baseline, data, monkeypatch):
    fail_in_third_run(baseline, MemoryError(), data, monkeypatch)
    result = call(*short, '--runs', 5)
    assert_refused(result, 1)
    assert runs_in_table(result.out) == 2


def test_a_bug_keeps_its_traceback(call, short, baseline, data, monkeypatch):
    fail_in_third_run(baseline, RuntimeError('a bug'), data, monkeypatch)
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
PLACES = 'F.cross_entropy', 'CifarNet.eval', 'CifarLoader.normalize'


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize('place', PLACES)
def test_out_of_memory_is_one_line_with_pytorchs_figures(
    place, error, call, baseline, short, monkeypatch
):
    def fail(*args, **kwargs):
        raise type(error)(*error.args)  # a new one, without the traceback of other tests

    owner, name = place.split('.')
    monkeypatch.setattr(getattr(baseline, owner), name, fail)
    result = call(*short)
    assert_refused(result)
    assert 'out of memory' in result.err and 'opt.batch_size' in result.err
    assert str(error) in result.err


# ---------------------------------------- Table ----------------------------------------
def made_up(trial, run, tta_acc):
    seconds = {'clock_seconds': 3.357, 'wall_seconds': 29.9999}  # of two: a minute, when rounded
    epochs = [{'train_loss': 1.0}]
    return dict(trial=trial, run=run, tta_acc=tta_acc, epochs=epochs, classes=10, **seconds)


def test_the_table_has_the_reports_layout_and_names_diverged_runs(baseline):
    runs = [made_up(1, 1, 0.94), made_up(1, 2, 0.93), made_up(2, 1, 0.95), made_up(2, 2, 0.51)]
    lines = baseline.table(runs, 94.0).splitlines()
    assert [' '.join(line.split()) for line in lines] == [
        'Trial Runtime Clock/run Accuracy +- s.e. Std >=94% Diverged',
        '1 1m 00.000s 3.357s 93.50% +- 0.50 0.71 1/2 0/2',
        '2 1m 00.000s 3.357s 73.00% +- 22.00 31.11 1/2 1/2',
        'Average 1m 00.000s 3.357s 83.25% +- 10.76 21.52 2/4 1/4',
        'Diverged: trial 2 run 2, 51.00%',
    ]
    assert max(map(len, lines)) <= 80


def test_one_run_has_no_average_and_no_spread(baseline):
    _, row = baseline.table([made_up(1, 1, 0.94)], 94.0).splitlines()
    assert ' '.join(row.split()) == '1 0m 30.000s 3.357s 94.00% 1/1 0/1'


def test_diverged_run_is_finished_counted_and_logged_without_nan(call, short, tmp_path, script):
    result = call(*short, 'opt.train_epochs=2', 'opt.lr=1e37', script=script)  # overflows float32
    assert result.status == 0, result.err
    assert [row.loss for row in rows_of(result.out)] == ['diverged'] * 2
    losses = [row['train_loss'] for row in log_of(tmp_path).runs[0]['epochs']]
    assert losses == [None, None] and re.search(r' 0/1 +1/1$', result.out, re.M)
    assert re.search('^Diverged: trial 1 run 1', result.out, re.M)
