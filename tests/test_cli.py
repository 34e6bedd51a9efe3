"""The command line: options, rows, table, log, mistakes, and how a command ends."""

import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from bench.data import describe
from bench.records import decode
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

MODIFIED = ROOT / 'airbench94_modified.py'
FINISHED = r' +1 +1 +end .*%.*%.*%'  # the row of a whole run


@pytest.fixture(scope='module')
def short(data_dir):
    """Return the arguments of one narrow run of one epoch; hyperparameters may follow."""
    return ['--data-dir', data_dir, '--trials', 1, *NARROW_ARGS, 'opt.train_epochs=1']


def log_of(folder):
    """Return the one log folder in folder/logs: its path, code and the runs of its whole lines."""
    (path,) = (Path(folder) / 'logs').iterdir()
    *lines, _ = (path / 'runs.jsonl').read_text().split('\n')
    runs = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return SimpleNamespace(path=path, code=(path / 'code.py').read_text(), runs=runs)


def rows_of(out):
    """Return the words of each row of an epoch or a finished run."""
    return [line.split() for line in out.splitlines() if re.match(r' +\d+ +\d+ +(\d+|end) ', line)]


def piped(folder, script, *args, **variables):
    """Run a script with pipes as a user's: what it prints is buffered, errors come apart."""
    env = environment(PYTHONUNBUFFERED='', **variables)
    words = [sys.executable, str(script), *map(str, args)]
    return live(folder, words, env=env, stderr=subprocess.PIPE)


def end(process):
    """Return what `call` returns, of a live script when it has ended."""
    out, err = process.communicate()
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def read_until(process, pattern):
    """Return what a process prints up to a line that a pattern matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return ''.join(lines)
    return pytest.fail(process.stderr.read())


# ---------------------------------------- A whole command ----------------------------------------
@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """Return what two trials of two runs printed and logged.

    The script is an edited copy with the line ends of Windows, and with names in its folder and in
    the data that its stdout, of ASCII alone, cannot show.
    """
    folder = tmp_path_factory.mktemp('whole')
    source = MODIFIED.read_text() + '# edited: schnell genug\n'
    (folder / 'mine.py').write_bytes(source.replace('\n', '\r\n').encode())
    (folder / 'größer').symlink_to(data_dir)
    args = ['--data-dir', 'größer', '--trials', 2, '--runs', 2, '--seed', 5, *NARROW_ARGS]
    with piped(folder, 'mine.py', *args, PYTHONIOENCODING='ascii') as process:
        result = end(process)
    assert result.status == 0 and not result.err, result.err
    return SimpleNamespace(source=source, out=result.out, log=log_of(folder), folder=folder)


def test_every_epoch_and_every_run_has_a_row_of_80_columns_with_the_logged_numbers(whole):
    shown = whole.out[whole.out.index('trial  run') :].split('\n\n')[0]
    assert '\r' not in shown and max(map(len, shown.splitlines())) <= 80
    expected = []
    for run in whole.log.runs:
        last = {**run['epochs'][-1], 'epoch': 'end', 'clock_seconds': run['clock_seconds']}
        for row in [*run['epochs'], last]:
            words = [run['trial'], run['run'], row['epoch'], f'{row["train_loss"]:.4f}']
            words += [f'{row["train_acc"]:.2%}', f'{row["test_acc"]:.2%}']
            if row is last:
                words.append(f'{run["tta_acc"]:.2%}')
            expected.append([*map(str, words), f'{row["clock_seconds"]:.3f}s'])
    rows = rows_of(shown)
    assert [row[:-2] for row in rows] == expected
    assert all(re.fullmatch(r'\d+m \d\ds', ' '.join(row[-2:])) for row in rows)
    assert rows[-1][-2:] == ['0m', '00s']  # the time that is left


def test_the_table_is_of_the_logged_runs(whole, modified):
    with redirect_stdout(io.StringIO()) as table:
        modified.print_table(whole.log.runs)
    assert table.getvalue() in whole.out and runs_in_table(whole.out) == 4


def test_the_log_has_the_source_and_a_line_of_each_run_that_stands_alone(whole):
    log = whole.log
    assert log.code == whole.source
    assert re.fullmatch(r'\d{8}T\d{6}Z-airbench94_modified-\w+', log.path.name)
    assert sorted(os.listdir(log.path)) == ['code.py', 'runs.jsonl']
    assert [(run['trial'], run['run']) for run in log.runs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({run['seed'] for run in log.runs}) == 4
    for run in log.runs:
        assert run['script'] == 'airbench94_modified' and run['compile'] is False
        assert run['hyp']['net.widths.block1'] == 8 and run['train_images'] == 256
        first, second = (row['clock_seconds'] for row in run['epochs'])
        assert 0 < first < second < run['clock_seconds'] < run['wall_seconds']
        assert run['warmup_seconds'] > 0


def test_the_source_is_hashed_with_plain_line_ends_as_the_tool_does(whole):
    """Whatever line ends the file has: else --resume would refuse it with an empty diff."""
    digest = hashlib.sha256(whole.source.encode()).hexdigest()
    assert {run['sha256'] for run in whole.log.runs} == {digest}
    assert decode((whole.folder / 'mine.py').read_bytes()) == whole.source == whole.log.code


def test_the_log_tells_data_sets_apart_as_the_tool_does(whole, data):
    logged = whole.log.runs[0]['data']
    assert logged == describe(data, 'größer')
    expected = {'name': 'größer', 'train': 256, 'test': 100, 'classes': 10}
    for split in ('train', 'test'):
        for key in ('images', 'labels'):
            content = data[split][key].numpy().tobytes()
            expected[f'{split}_{key}_crc32'] = zlib.crc32(content)
    assert logged == expected


def test_the_screen_says_what_runs_and_in_the_end_on_what(whole):
    run = whole.log.runs[0]
    first, second, third = whole.out.splitlines()[:3]
    assert first == 'airbench94_modified on cpu, seed 5, data: gr??er'
    assert 'Without a GPU an epoch takes minutes' in second and 'Warming up' in third
    *_, where, log = whole.out.splitlines()
    assert all(run[key] in where for key in ('device', 'dtype', 'torch'))
    assert 'warm-up' in where and whole.log.path.name in log


# ---------------------------------------- Options ----------------------------------------
def test_quiet_prints_one_row_per_run_without_test_accuracy(call, short, tmp_path):
    result = call(*short, 'opt.train_epochs=2', '--quiet', '--runs', 2)
    rows = rows_of(result.out)
    assert [row[:3] for row in rows] == [['1', '1', 'end'], ['1', '2', 'end']]
    assert [sum('%' in word for word in row) for row in rows] == [2, 2]  # of training, with TTA
    assert {row['test_acc'] for run in log_of(tmp_path).runs for row in run['epochs']} == {None}


def test_a_drawn_seed_is_printed_and_repeats_the_run(call, short):
    first = call(*short)
    seed = re.search(r'seed (\d+)', first.out)[1]
    again, other = call(*short, '--seed', seed), call(*short, '--seed', int(seed) + 1)
    losses = [rows_of(result.out)[0][3] for result in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_runs_are_seeded_from_seed_trial_and_run_alone(call, short):
    results = [call(*short, '--trials', 2, '--runs', n, '--seed', 3).runs for n in (1, 2)]
    (one, two), more = [[(run['seed'], run['tta_acc']) for run in runs] for runs in results]
    assert [one, two] == [more[0], more[2]]


def test_the_last_of_two_values_for_a_hyperparameter_holds(call, short):
    (run,) = call(*short, 'opt.lr=6', '--hyp', 'opt.lr=7', 'aug.flip=False').runs
    assert (run['hyp']['opt.lr'], run['hyp']['aug.flip']) == (7.0, False)


def test_a_string_in_hyp_of_an_edited_copy_can_be_set(baseline, monkeypatch):
    monkeypatch.setitem(baseline.hyp['net'], 'activation', 'gelu')
    assert baseline.changed_hyp(['net.activation=ReLU'])['net']['activation'] == 'ReLU'


def test_a_string_is_a_command_line(call, data_dir, baseline):
    words = f'--data-dir {data_dir} --trials 1 --quiet {" ".join(NARROW_ARGS)}'
    (run,) = baseline.main(words)
    assert run['hyp'] == baseline.flat_hyp(narrow_hyp(baseline))


def test_synthetic_is_said_on_the_screen_and_in_the_log(call, baseline, data, short, monkeypatch):
    monkeypatch.setattr(baseline, 'synthetic_data', lambda device: data)
    result = call(*short, '--synthetic')
    assert 'data: synthetic' in result.out and result.runs[0]['data']['name'] == 'synthetic'


def test_help_has_every_option_and_the_commands_of_the_header(call, script):
    result = call('--help', script=script)
    assert result.status == 0 and not result.err
    options = 'trials runs seed device compile hyp data-dir log-dir quiet save synthetic'
    assert all(f' --{option} ' in result.out for option in options.split())
    assert f'{script.NAME}.py --trials 5 --runs 25' in result.out


# ---------------------------------------- Mistakes ----------------------------------------
MISTAKES = """
--trails=3 --run=3 --tri=3 --trials --trials=0 --trials=1.5 --runs=0 --seed=-1 --seed=x extra
--recipe=x --target=94 --device=mps --device=cuda:99 --save=none/net.pt --save=. --lr=3
--log-dir=/dev/null/logs --data-dir=/dev/null/data
"""
BAD_VALUES = """
=3 opt.lr opt.lr=x opt.lr=-9 opt.lr=0 opt=3 opt.nonsense=3 opt.lr.x=3 opt.batch_size=64.5
opt.batch_size=257 opt.train_epochs=0 opt.train_epochs=nan opt.train_epochs=Infinity aug.flip=1
aug.flip=no net.widths=3 net.tta_level=7 lr=3
"""


@pytest.mark.parametrize('word', MISTAKES.split())
def test_a_mistaken_option_is_one_line_before_any_work(word, call, data_dir, tmp_path):
    result = call('--data-dir', data_dir, *NARROW_ARGS, word)
    assert_refused(result)
    assert word.partition('=')[0] in result.err or '/dev/null/data' in result.err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('word', BAD_VALUES.split())
def test_a_bad_value_is_one_line_before_any_work(word, call, short, tmp_path):
    result = call(*short, word)
    assert_refused(result)
    assert word.partition('=')[0] in result.err and not os.listdir(tmp_path)


@pytest.mark.parametrize('words', [['--run', '3'], ['--trails'], ['--compil']])
def test_an_option_that_is_not_there_is_answered_as_argparse_does(words, call):
    error = call(*words).err
    assert f'unrecognized arguments: {" ".join(words)}' in error and 'opt.lr' not in error


@pytest.mark.parametrize('key', ['opt.learning_rate', 'opt.lrr'])
def test_a_key_that_is_not_there_is_answered_with_its_group(key, call, short):
    error = call(*short, f'{key}=9').err
    assert f'no {key}' in error and all(name in error for name in ('lr', 'momentum', 'batch_size'))
    assert 'tta_level' not in error


def test_a_string_with_a_mistake_is_answered_by_its_words(call, baseline, capsys):
    with pytest.raises(SystemExit):
        baseline.main('--trails 1')
    assert 'unrecognized arguments: --trails 1' in capsys.readouterr().err


def test_640_images_are_answered_with_a_batch_size_that_fits(call, baseline, tmp_path):
    for split, content in baseline.synthetic_data('cpu', train=640, test=10).items():
        torch.save(content, tmp_path / f'{split}.pt')
    result = call('--data-dir', '.', '--device', 'cpu')
    assert_refused(result)
    assert '640 images, but opt.batch_size is 1024: try --hyp opt.batch_size=128' in result.err


# ---------------------------------------- Signals and disks --------------------------------------
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
def test_ctrl_c_in_the_warm_up_ends_with_130_one_line_and_no_log(n, data_dir, tmp_path):
    args = ['--data-dir', data_dir, '--device', 'cpu', '--hyp', 'opt.batch_size=256']
    for _ in range(n):
        with piped(tmp_path, MODIFIED, *args) as process:
            read_until(process, 'Warming up')
            process.send_signal(signal.SIGINT)
            assert_refused(end(process), 130)
        assert not os.listdir(tmp_path / 'logs')


def test_the_row_of_a_run_comes_after_its_line_is_in_the_log(call, short, baseline, monkeypatch):
    shown = []

    def end_run(self, record):
        (log,) = Path('logs').glob('*/runs.jsonl')
        shown.append(log.read_text().count('\n'))

    monkeypatch.setattr(baseline.Progress, 'end_run', end_run)
    call(*short, '--runs', 2)
    assert shown == [1, 2]


def test_a_disk_that_fills_keeps_the_earlier_lines_and_the_table(
    call, short, tmp_path, baseline, monkeypatch, capsys
):
    monkeypatch.setattr(baseline, 'source_code', lambda: 'short')
    with limited(resource.RLIMIT_FSIZE, 5000), pytest.raises(OSError, match='too large'):
        call(*short, '--trials', 100)
    runs = log_of(tmp_path).runs
    assert [run['trial'] for run in runs] == [*range(1, len(runs) + 1)] and len(runs) > 1
    assert runs_in_table(capsys.readouterr().out) == len(runs)


# ---------------------------------------- Failures ----------------------------------------
def fail_in_third_run(script, error, data, monkeypatch):
    done = script.train(data, 1, narrow_hyp(script), 'cpu', quiet=True)
    trainings = [done, done, done, error]  # the first is the warm-up
    monkeypatch.setattr(script, 'train', Mock(side_effect=trainings))


def test_a_bug_keeps_its_traceback_after_the_table(
    call, short, baseline, data, monkeypatch, capsys
):
    fail_in_third_run(baseline, RuntimeError('CUDA out of memory'), data, monkeypatch)
    with pytest.raises(RuntimeError, match='out of memory'):
        call(*short, '--runs', 5)
    out, err = capsys.readouterr()
    assert runs_in_table(out) == 2 and not err


@pytest.mark.parametrize('fails', [True, False])
def test_a_compilation_that_fails_says_so_above_pytorchs_error(
    fails, call, short, baseline, monkeypatch, capsys
):
    """The same failure without --compile is a bug like any other."""

    def compile_step(net):
        raise RuntimeError('Dynamo is not supported on Python 3.99+')

    def train(*args, **kwargs):
        raise RuntimeError('Dynamo is not supported on Python 3.99+')

    monkeypatch.setattr(baseline, 'compile_step', compile_step)
    monkeypatch.setattr(baseline, 'train', train)
    with pytest.raises(RuntimeError, match='^Dynamo is not supported'):
        call(*short, *(['--compile'] if fails else []))
    err = capsys.readouterr().err
    assert err == 'airbench94_baseline: --compile failed; it works without. PyTorch says:\n' * fails


@pytest.mark.campaign
def test_compile_without_a_compiler_keeps_pytorchs_traceback(short, tmp_path):
    variables = {'PATH': '', 'CXX': '/none/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    with piped(tmp_path, MODIFIED, '--compile', *short, **variables) as process:
        result = end(process)
    assert result.status == 1 and 'it works without' in result.err.splitlines()[0]
    assert 'Traceback' in result.err


# ---------------------------------------- Table ----------------------------------------
@pytest.mark.parametrize('compiled, more', [(False, ''), (True, ' without the CUDA graphs')])
def test_a_gpus_versions_and_memory_stand_below_the_table(compiled, more, baseline, capsys):
    run = {'device': 'NVIDIA H200', 'dtype': 'float16', 'torch': '2.11.0', 'cuda': '13.0'}
    run.update(driver='580.1', peak_bytes=2**30, warmup_seconds=14, compile=compiled)
    baseline.print_machine(run)
    line = 'NVIDIA H200, float16, torch 2.11.0, CUDA 13.0, driver 580.1, peak memory 1024 MiB'
    assert capsys.readouterr().out == f'{line}{more}, warm-up 0m 14s\n'


def made_up(trial, run, tta_acc):
    seconds = {'clock_seconds': 3.357, 'wall_seconds': 29.9999}  # of two: a minute, when rounded
    return dict(trial=trial, run=run, tta_acc=tta_acc, classes=10, **seconds)


def table(script, runs, capsys):
    """Return the lines of the table, with single spaces."""
    script.print_table(runs)
    lines = capsys.readouterr().out.strip().splitlines()
    assert max(map(len, lines)) <= 80
    return [' '.join(line.split()) for line in lines]


def test_the_table_has_the_reports_layout_with_the_worst_run(baseline, capsys):
    runs = [made_up(1, 1, 0.94), made_up(1, 2, 0.93), made_up(2, 1, 0.95), made_up(2, 2, 0.51)]
    assert table(baseline, runs, capsys) == [
        'Trial Runtime Time/run Accuracy +- s.e. Std Worst >=94%',
        '1 1m 00.000s 3.357s 93.50% +- 0.50 0.71 93.00% 1/2',
        '2 1m 00.000s 3.357s 73.00% +- 22.00 31.11 51.00% 1/2',
        'Average 1m 00.000s 3.357s 83.25% +- 10.76 21.52 51.00% 2/4',
    ]


def test_one_run_has_no_average_and_no_spread(baseline, capsys):
    lines = table(baseline, [made_up(1, 1, 0.94)], capsys)
    assert lines[1:] == ['1 0m 30.000s 3.357s 94.00% 94.00% 1/1']


CHANCE = [(0.1, 10, True), (0.1099, 10, True), (0.1101, 10, False), (0.195, 5, True), (0.2, 4, 0)]


@pytest.mark.parametrize('accuracy, classes, named', CHANCE)
def test_a_run_within_a_point_of_chance_is_named_with_advice(
    accuracy, classes, named, baseline, capsys
):
    bad = {**made_up(3, 2, accuracy), 'classes': classes}
    *_, last = table(baseline, [made_up(3, 1, 0.94), bad], capsys)
    assert last.startswith('Trial 3, run 2 is at chance') == named
    assert ('a lower opt.lr' in last) == named


def test_a_run_that_diverged_is_finished_counted_and_logged_without_nan(
    call, short, tmp_path, script
):
    result = call(*short, 'opt.train_epochs=2', 'opt.lr=1e6', script=script)
    assert result.status == 0, result.err
    assert runs_in_table(result.out) == 1 == len(log_of(tmp_path).runs)


def test_the_log_has_null_where_a_number_is_not_finite(baseline, tmp_path):
    run = {'epochs': [{'train_loss': float('nan')}, {'train_loss': float('inf')}], 'lr': 1.0}
    baseline.append_to_log(tmp_path / 'log', 'the code', run)
    line = (tmp_path / 'log' / 'runs.jsonl').read_text()
    assert line == '{"epochs": [{"train_loss": null}, {"train_loss": null}], "lr": 1.0}\n'
    assert (tmp_path / 'log' / 'code.py').read_text() == 'the code'
