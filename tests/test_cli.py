"""The command line of the scripts: options, rows, table, log, and how a command ends."""
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import NARROW_ARGS, ROOT, SCRIPTS, command, environment, live

ROW = re.compile(r' +(\d+) +(\d+) +(\d+) +(\d+\.\d{4}|diverged) +(\d+\.\d\d%) +(\d+\.\d\d%|-)'
                 r'( +\d+\.\d\d%)? +\d+\.\d{3}s +\d+m \d\ds  (\S.*)')
OPTIONS = ('--trials', '--runs', '--seed', '--device', '--compile', '--hyp', '--recipe', '--versus',
           '--sweep', '--data-dir', '--log-dir', '--resume', '--target', '--quiet', '--synthetic', '--help')
EXPERIMENT_KEYS = {'schema', 'script', 'command', 'seed', 'started', 'data', 'environment', 'recipe', 'hyp',
                   'crc32', 'arms'}
RUN_KEYS = {'arm', 'trial', 'run', 'data', 'seed', 'epochs', 'tta_acc', 'clock_seconds', 'wall_seconds'}
EPOCH_KEYS = {'epoch', 'train_loss', 'train_acc', 'test_acc', 'clock_seconds', 'eval_seconds'}
SLOW_ARGS = ('--device', 'cpu', '--hyp', 'opt.batch_size=256')  # full widths: a warm-up of seconds


@pytest.fixture
def call(baseline, tmp_path, monkeypatch, capsys):
    """call(*args): main in an empty folder; returns what it ended with: status, out, err."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        status = 0
        capsys.readouterr()
        try:
            baseline.main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)
    return call


@pytest.fixture
def short(data_dir):
    """Arguments of one narrow run of one epoch."""
    return ['--data-dir', data_dir, '--trials', 1, *NARROW_ARGS, 'opt.train_epochs=1']


def assert_refused(result, status=2):
    """The command ended with a status and one line."""
    assert result.status == status, result.err
    assert result.err.count('\n') == 1 and 'Traceback' not in result.err, result.err


def log_of(folder):
    """The one log folder in folder/logs: code, experiment and runs."""
    log, = (Path(folder) / 'logs').iterdir()
    runs = [json.loads(line, parse_constant=pytest.fail) for line in open(log / 'runs.jsonl')]
    return SimpleNamespace(path=log, code=(log / 'code.py').read_text(), runs=runs,
                           experiment=json.loads((log / 'experiment.json').read_text()))


def rows_of(out):
    return [match.groups() for match in map(ROW.fullmatch, out.splitlines()) if match]


def table_of(out):
    """The lines from the table's head to its average."""
    return re.search(r'^Trial .*?^Average [^\n]*', out, re.M | re.S)[0].splitlines()


def fail_on_call(function, number, error):
    """function, except that its call of a number raises error."""
    calls = iter(range(1, 10**6))

    def failing(*args, **kwargs):
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)
    return failing


# ---------------------------------------- Bad input ----------------------------------------

@pytest.mark.parametrize('args', [
    '--trails 3', 'extra', '--tri 3', '--trials', '--trials 0', '--trials 1.5', '--trials -1', '--runs 0',
    '--seed -1', '--seed x', '--target 101', '--target -1', '--target nan', '--recipe nonsense',
    '--device nonsense', '--device cuda:x', '--hyp', '--hyp opt.lr', '--hyp =3', '--hyp opt.lr=',
    '--hyp opt.lr=x', '--hyp opt.lr=nan', '--hyp opt.lr=inf', '--hyp opt.lr=-1', '--hyp opt=3',
    '--hyp opt.nonsense=3', '--hyp opt.batch_size=64.5', '--hyp opt.batch_size=0', '--hyp aug.flip=2',
    '--hyp opt.momentum=1', '--hyp opt.label_smoothing=1.1', '--hyp net.tta_level=3',
    '--hyp aug.translate=32', '--hyp opt.train_epochs=0', '--hyp opt.train_epochs=-1',
    '--hyp opt.lr=10 opt.momentum=x', '--compile --hyp opt.lr=x', '--compile --device nonsense'])
def test_bad_option_is_refused_in_one_line_before_any_work(call, tmp_path, args):
    assert_refused(call(*args.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason='CUDA is here')
@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_cuda_without_cuda_is_refused(call, device):
    result = call('--device', device)
    assert_refused(result)
    assert f'--device {device}' in result.err


def test_unknown_hyperparameter_lists_the_valid_ones(call, baseline):
    message = call('--hyp', 'opt.learning_rate=3').err
    keys = [f'{group}.{key}' for group, values in baseline.hyp.items() for key in values if key != 'widths']
    assert not [key for key in [*keys, 'net.widths.block1'] if key not in message]


def test_batch_size_over_the_training_set_is_refused(call, data_dir, tmp_path):
    result = call('--data-dir', data_dir, *NARROW_ARGS, 'opt.batch_size=257')
    assert_refused(result)
    assert '257' in result.err and '256' in result.err
    assert not list(tmp_path.glob('logs/*')) and not rows_of(result.out)


def test_unwritable_log_directory_is_refused(call, short):
    result = call(*short, '--log-dir', '/dev/null/logs')
    assert_refused(result)
    assert '/dev/null/logs' in result.err


def test_compile_does_not_take_the_blame_for_other_errors(call, short):
    assert '--compile' not in call(*short, '--compile', '--log-dir', '/dev/null/logs').err


# ---------------------------------------- Help and hyp ----------------------------------------

def test_help_names_every_option_and_ends_with_examples(call, baseline):
    result = call('--help')
    assert result.status == 0
    options, examples = result.out.split(baseline.__doc__.strip().partition('\n')[0])
    assert not [option for option in OPTIONS if f'\n  {option}' not in options.replace('-h, ', '')]
    commands = re.findall(rf'^    ((?:python|torchrun) .*{baseline.NAME}\.py\b.*)', examples, re.M)
    assert len(commands) >= 2 and baseline.__doc__.strip().endswith(examples.strip())


def test_hyp_takes_several_values_and_may_be_repeated(call, short, tmp_path):
    call(*short, 'opt.lr=9', 'opt.lr=8', '--hyp', 'aug.flip=false', '--hyp', 'aug.translate=0')
    arm, = log_of(tmp_path).experiment['arms']
    assert (arm['hyp']['opt.lr'], arm['hyp']['aug.flip'], arm['hyp']['aug.translate']) == (8, False, 0)


@pytest.mark.parametrize('failing', [False, True])
def test_overrides_are_undone_when_main_ends(call, baseline, short, monkeypatch, failing):
    before = json.dumps(baseline.hyp)
    if failing:
        monkeypatch.setattr(baseline, 'train', fail_on_call(None, 1, MemoryError()))
    assert call(*short).status == (2 if failing else 0)
    assert json.dumps(baseline.hyp) == before


def test_recipe_is_put_in_before_hyp(call, baseline, short, tmp_path, monkeypatch):
    monkeypatch.setitem(baseline.RECIPES, 'other', {'opt.lr': 7.0, 'opt.momentum': 0.8})
    call(*short, 'opt.lr=6', '--recipe', 'other')
    experiment = log_of(tmp_path).experiment
    assert experiment['recipe'] == 'other'
    arm, = experiment['arms']
    assert (arm['hyp']['opt.lr'], arm['hyp']['opt.momentum']) == (6, 0.8)


# ---------------------------------------- A whole command ----------------------------------------

@pytest.fixture(scope='module', params=SCRIPTS)
def whole(request, data_dir, tmp_path_factory):
    """Two trials of two runs by each script: what they printed and logged."""
    name, folder = request.param, tmp_path_factory.mktemp('whole')
    args = ['--data-dir', data_dir, '--trials', 2, '--runs', 2, '--seed', 5, *NARROW_ARGS]
    process = subprocess.run(command(name, *args), cwd=folder, env=environment(), capture_output=True,
                             stdin=subprocess.DEVNULL, text=True, timeout=200)
    assert process.returncode == 0 and not process.stderr, process.stderr
    return SimpleNamespace(name=name, args=[*map(str, args)], out=process.stdout, log=log_of(folder),
                           folder=folder)


def test_one_row_per_epoch(whole):
    head = next(line for line in whole.out.splitlines() if line.split()[:3] == ['trial', 'run', 'epoch'])
    assert ' '.join(head.split()) == 'trial run epoch train loss train acc test acc tta acc clock left arm'
    assert [tuple(map(int, row[:3])) for row in rows_of(whole.out)] == [
        (trial, run, epoch) for trial in (1, 2) for run in (1, 2) for epoch in (1, 2)]


def test_rows_show_the_logged_numbers(whole):
    for trial, run, epoch, loss, train_acc, test_acc, tta_acc, arm in rows_of(whole.out):
        record = next(r for r in whole.log.runs if (r['trial'], r['run']) == (int(trial), int(run)))
        assert arm == record['arm'] == whole.name.removeprefix('airbench94_')
        row = record['epochs'][int(epoch) - 1]
        assert loss == f"{row['train_loss']:.4f}"
        assert [train_acc, test_acc] == [f"{100 * row[f'{kind}_acc']:.2f}%" for kind in ('train', 'test')]
        assert (tta_acc or '').strip() == (f"{100 * record['tta_acc']:.2f}%" if epoch == '2' else '')


def test_table_shows_the_logged_numbers(whole):
    head, *lines = table_of(whole.out)
    assert re.split(' {2,}', head) == [
        'Trial', 'n', 'Runtime', 'Clock/run (95% CI)', 'Accuracy (95% CI)', 'Std', '>=94%', 'Diverged']

    def expected(name, runs):
        accuracies, clocks = ([factor * run[key] for run in runs]
                              for factor, key in ((100, 'tta_acc'), (1, 'clock_seconds')))
        factor = stats.t.ppf(0.975, len(runs) - 1) / math.sqrt(len(runs))
        runtime = sum(run['wall_seconds'] for run in runs) / len({run['trial'] for run in runs})
        return [name, f'{len(runs)}', f'0m {runtime:06.3f}s',
                f'{np.mean(clocks):.3f}s +- {factor * np.std(clocks, ddof=1):.3f}',
                f'{np.mean(accuracies):.2f}% +- {factor * np.std(accuracies, ddof=1):.2f}',
                f'{np.std(accuracies, ddof=1):.2f}', f'{sum(a >= 94 for a in accuracies)}/{len(runs)}']

    trials = [(str(trial), [run for run in whole.log.runs if run['trial'] == trial]) for trial in (1, 2)]
    assert [re.split(' {2,}', line)[:-1] for line in lines] == [
        expected(name, runs) for name, runs in [*trials, ('Average', whole.log.runs)]]


def test_log_folder_is_named_by_time_and_script(whole):
    assert re.fullmatch(rf'\d{{8}}T\d{{6}}Z-{whole.name}-\w+', whole.log.path.name)
    assert {path.name for path in whole.log.path.iterdir()} == {'code.py', 'experiment.json', 'runs.jsonl'}
    assert [path.name for path in whole.folder.iterdir()] == ['logs']


def test_experiment_is_described_whole(whole):
    experiment = whole.log.experiment
    assert EXPERIMENT_KEYS <= set(experiment)
    assert experiment['script'] == whole.name and experiment['seed'] == 5
    assert experiment['recipe'] == 'report'
    assert experiment['command'][1:] == [*whole.args, '--seed', '5']
    arm, = experiment['arms']
    assert arm['name'] == whole.name.removeprefix('airbench94_')
    assert (arm['hyp']['opt.batch_size'], arm['hyp']['net.widths.block3']) == (64, 8)
    assert experiment['hyp']['opt']['batch_size'] in (1024, 1536)  # the script's own
    assert experiment['environment']['torch'] == torch.__version__


def test_logged_code_is_the_source_that_ran(whole):
    assert whole.log.code == (ROOT / f'{whole.name}.py').read_text()


def test_logged_runs_have_every_field(whole):
    assert [(run['trial'], run['run']) for run in whole.log.runs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({run['seed'] for run in whole.log.runs}) == 4
    for run in whole.log.runs:
        assert RUN_KEYS <= set(run) and len(run['epochs']) == 2
        assert all(EPOCH_KEYS <= set(row) for row in run['epochs'])
        assert run['epochs'][0]['clock_seconds'] < run['epochs'][1]['clock_seconds'] < run['clock_seconds']
        assert run['clock_seconds'] < run['wall_seconds']


def test_cpu_notice_estimates_the_time_and_names_a_shorter_command(whole):
    notice = next(line for line in whole.out.splitlines() if line.startswith('No GPU:'))
    assert len(re.findall(r'\d+m \d\ds', notice)) == 2  # a run, the command
    assert notice.endswith('Shorter: --trials 1 --runs 1 --hyp opt.train_epochs=1')


# ---------------------------------------- Options ----------------------------------------

def test_quiet_prints_one_row_per_run_without_test_accuracy(call, short, tmp_path):
    result = call(*short, 'opt.train_epochs=2', '--quiet', '--runs', 2)
    assert [(run, epoch, test_acc) for _, run, epoch, _, _, test_acc, _, _ in rows_of(result.out)] == [
        ('1', '2', '-'), ('2', '2', '-')]
    assert {row['test_acc'] for run in log_of(tmp_path).runs for row in run['epochs']} == {None}


def test_synthetic_is_said_everywhere(call, baseline, data, short, tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, 'synthetic_data', lambda device: data)
    result, log = call(*short, '--synthetic'), log_of(tmp_path)
    lines = result.out.splitlines()
    table = lines.index(table_of(result.out)[0])
    assert 'synthetic' in ' '.join(lines[table - 2:])  # beside the table
    assert all('synthetic' in json.dumps(record) for record in [log.experiment, *log.runs])


def test_target_is_what_runs_are_counted_from(call, short):
    head, _, average = table_of(call(*short, '--target', 0).out)
    assert '>=0%' in head and average.split()[-2] == '1/1'


def test_drawn_seed_is_printed_and_repeats_the_run(call, short, baseline):
    first = call(*short)
    seed = re.search(r'seed (\d+)', first.out)[1]
    again, other = call(*short, '--seed', seed), call(*short)
    assert rows_of(again.out) == rows_of(first.out) != rows_of(other.out)


def test_one_run_has_no_spread(call, short):
    for line in table_of(call(*short).out)[1:]:
        _, n, _, clock, accuracy, std, *_ = re.split(' {2,}', line)
        assert (n, std) == ('1', '-') and clock.endswith('s +- -') and accuracy.endswith('% +- -')


def test_runs_are_seeded_from_seed_trial_and_run_alone(call, short, tmp_path):
    call(*short, '--trials', 2, '--runs', 2, '--seed', 3, '--log-dir', 'a/logs')
    call(*short, '--trials', 2, '--runs', 1, '--seed', 3, '--log-dir', 'b/logs')
    seeds, fewer = ({(run['trial'], run['run']): run['seed'] for run in log_of(tmp_path / name).runs}
                    for name in 'ab')
    assert fewer == {key: seeds[key] for key in [(1, 1), (2, 1)]}


# ---------------------------------------- A live process ----------------------------------------

def live_command(folder, *args):
    """A running command, whose lines come as they do through a user's pipe."""
    env = {key: value for key, value in environment().items() if key != 'PYTHONUNBUFFERED'}
    return live(folder, command('airbench94_modified', *args), env=env, stderr=subprocess.PIPE)


@pytest.fixture(scope='module')
def stopped(data_dir, tmp_path_factory):
    """A command of very many runs, stopped by Ctrl-C when the row that ends its first run has come."""
    folder = tmp_path_factory.mktemp('stopped')
    with live_command(folder, '--data-dir', data_dir, '--trials', 1000, '--runs', 2, *NARROW_ARGS) as process:
        out, first_row = '', None
        for text in process.stdout:
            out, match = out + text, ROW.fullmatch(text.rstrip('\n'))
            if match and not first_row:
                first_row = SimpleNamespace(running=process.poll() is None, text=text)
            if match and match[7]:
                break
        logged = log_of(folder).runs
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    return SimpleNamespace(out=out + rest, err=err, status=process.returncode, log=log_of(folder),
                           first_row=first_row, logged_at_row=logged)


def test_rows_come_through_a_pipe_while_the_process_runs(stopped):
    assert stopped.first_row.running


def test_run_is_on_the_disk_before_its_row_is_printed(stopped):
    assert (stopped.logged_at_row[0]['trial'], stopped.logged_at_row[0]['run']) == (1, 1)


def test_ctrl_c_ends_with_130_and_one_line(stopped):
    assert_refused(stopped, 130)
    assert 'stopped' in stopped.err


def test_ctrl_c_prints_the_table_of_the_finished_runs_and_the_log(stopped):
    n = len(stopped.log.runs)
    assert table_of(stopped.out)[-1].split()[:2] == ['Average', str(n)]
    assert f'logs/{stopped.log.path.name}' in stopped.out


def test_ctrl_c_in_the_warm_up_ends_with_130_and_one_line(data_dir, tmp_path):
    with live_command(tmp_path, '--data-dir', data_dir, *SLOW_ARGS) as process:
        for text in process.stdout:
            if 'arming up' in text:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert_refused(SimpleNamespace(status=process.returncode, err=err), 130)
    assert not list(tmp_path.glob('logs/*'))


# ---------------------------------------- Diverged runs ----------------------------------------

def record(trial, run, tta_acc, loss=1.0):
    return {'arm': 'it', 'trial': trial, 'run': run, 'tta_acc': tta_acc, 'clock_seconds': 3.357,
            'wall_seconds': 30.25, 'epochs': [{'train_loss': loss}]}


@pytest.mark.parametrize('accuracies, expected', [
    ([0.94, 0.51, 0.94], [1]), ([0.94, 0.51], []), ([0.94, 0.8401, 0.94], []), ([0.94, 0.8399, 0.94], [1])])
def test_run_far_under_the_median_of_three_or_more_diverged(baseline, accuracies, expected):
    runs = [record(1, i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert baseline.diverged(runs) == [runs[i] for i in expected]


def test_run_with_an_undefined_loss_in_any_epoch_diverged(baseline):
    runs = [record(1, 1, 0.94), record(1, 2, 0.94, None), record(1, 3, 0.94)]
    runs[2]['epochs'].append({'train_loss': None})
    assert baseline.diverged(runs) == runs[1:]


@pytest.mark.parametrize('last, expected', [(math.log(10), 1), (2.303, 0)])
def test_run_that_ends_with_equal_logits_diverged(baseline, last, expected):
    run = record(1, 1, 0.1)
    run['epochs'] = [{'train_loss': loss} for loss in (math.log(10), 1.0, last)]
    assert len(baseline.diverged([run])) == expected


@pytest.mark.parametrize('loss', [math.nan, math.inf])
def test_infinite_or_undefined_loss_is_logged_as_none(call, baseline, short, tmp_path, monkeypatch, loss):
    train = baseline.train

    def diverging(*args, **kwargs):
        record, net = train(*args, **kwargs)
        record['epochs'][-1]['train_loss'] = loss
        return record, net

    monkeypatch.setattr(baseline, 'train', diverging)
    result = call(*short, 'opt.train_epochs=2')
    assert [row[3] == 'diverged' for row in rows_of(result.out)] == [False, True]
    assert log_of(tmp_path).runs[0]['epochs'][-1]['train_loss'] is None


def test_diverged_run_is_finished_counted_and_named(call, short, tmp_path):
    result = call(*short, 'opt.train_epochs=2', 'opt.lr=1e9')
    assert result.status == 0, result.err
    log, table = log_of(tmp_path), table_of(result.out)
    assert {row['train_loss'] for row in log.runs[0]['epochs']} == {None}
    assert [line.split()[-1] for line in table[1:]] == ['1/1', '1/1']
    assert re.search(r'^Warning: .*trial 1 run 1 diverged\b', result.out[result.out.index(table[-1]):], re.M)


# ---------------------------------------- Table ----------------------------------------

def test_table_has_the_reports_layout(baseline):
    runs = [record(1, 1, 0.94), record(1, 2, 0.93), record(2, 1, 0.95), record(2, 2, 0.51)]
    assert '\n'.join(baseline.table(runs, 94.0)) == """\
Trial    n  Runtime     Clock/run (95% CI)  Accuracy (95% CI)  Std    >=94%  Diverged
1        2  1m 00.500s  3.357s +- 0.000     93.50% +- 6.35     0.71   1/2    0/2
2        2  1m 00.500s  3.357s +- 0.000     73.00% +- 279.54   31.11  1/2    1/2
Average  4  1m 00.500s  3.357s +- 0.000     83.25% +- 34.24    21.52  2/4    1/4
Warning: it trial 2 run 2 diverged, 51.00%"""


def test_stopped_trial_stays_out_of_the_average_runtime(baseline):
    runs = [record(1, 1, 0.94), record(1, 2, 0.93), record(2, 1, 0.95)]
    assert '\n'.join(baseline.table(runs, 93.5)) == """\
Trial    n  Runtime     Clock/run (95% CI)  Accuracy (95% CI)  Std   >=93.5%  Diverged
1        2  1m 00.500s  3.357s +- 0.000     93.50% +- 6.35     0.71  1/2      0/2
2        1  0m 30.250s  3.357s +- -         95.00% +- -        -     1/1      0/1
Average  3  1m 00.500s  3.357s +- 0.000     94.00% +- 2.48     1.00  2/3      0/3"""


@pytest.mark.parametrize('args, text', [
    ((108.288,), '1m 48.288s'), ((0,), '0m 00.000s'), ((59.9994,), '0m 59.999s'),
    ((59.9996,), '1m 00.000s'), ((3600.5,), '60m 00.500s'), ((59.6, 0), '1m 00s'), ((4.2, 0), '0m 04s')])
def test_duration_is_written_as_in_the_report(baseline, args, text):
    assert baseline.duration(*args) == text


# ---------------------------------------- Failures ----------------------------------------

@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError('CUDA out of memory.'), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
@pytest.mark.parametrize('number, status', [(1, 2), (3, 1)])  # the warm-up trains twice
def test_out_of_memory_names_batch_size_and_free_memory(call, baseline, short, monkeypatch,
                                                        error, number, status):
    monkeypatch.setattr(baseline, 'train', fail_on_call(baseline.train, number, error))
    result = call(*short, '--runs', 3)
    assert_refused(result, status)
    assert 'memory' in result.err and '64' in result.err and re.search(r'\d+ MiB free', result.err)


def test_out_of_memory_is_one_line_where_free_memory_is_unknown(call, baseline, short, monkeypatch):
    monkeypatch.setattr(baseline, 'train', fail_on_call(None, 1, MemoryError()))
    baseline.environment(torch.device('cpu'))  # cached, so that it stays this machine's
    monkeypatch.setattr(baseline.sys, 'platform', 'darwin')
    monkeypatch.setattr(baseline.os, 'sysconf', fail_on_call(None, 1, ValueError()))
    result = call(*short)
    assert_refused(result)
    assert 'out of memory' in result.err


def test_failure_in_a_later_run_prints_the_table_of_the_finished_ones(call, baseline, short, monkeypatch):
    monkeypatch.setattr(baseline, 'train', fail_on_call(baseline.train, 4, MemoryError()))
    assert table_of(call(*short, '--runs', 3).out)[-1].split()[:2] == ['Average', '1']


def test_failure_in_the_warm_up_leaves_no_log(call, baseline, short, tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, 'train', fail_on_call(None, 1, MemoryError()))
    call(*short)
    assert not list(tmp_path.glob('logs/*'))


def test_log_that_becomes_unwritable_ends_with_1_after_the_table(call, baseline, short, monkeypatch):
    error = baseline.UserError('cannot write runs.jsonl: No space left on device')
    monkeypatch.setattr(baseline, 'write_log', fail_on_call(baseline.write_log, 4, error))  # the second run's
    result = call(*short, '--runs', 3)
    assert_refused(result, 1)
    assert 'No space left' in result.err and table_of(result.out)


def test_compile_without_a_compiler_is_refused(run, data_dir, tmp_path):
    process = run('airbench94_modified', '--compile', '--data-dir', data_dir, *NARROW_ARGS, PATH='',
                  CXX='/nonexistent/g++', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'inductor'))
    assert_refused(SimpleNamespace(status=process.returncode, err=process.stderr))
    assert '--compile' in process.stderr
    assert not list(tmp_path.glob('logs/*'))


# ---------------------------------------- Import ----------------------------------------

def test_import_has_no_side_effect(tmp_path):
    code = f"""
import os, sys, torch
def state():
    return (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
            torch.initial_seed(), torch.get_rng_state().tolist(), sys.argv)
before, loaded = state(), 'torchvision' in sys.modules
sys.path.insert(0, {str(ROOT)!r})
import {', '.join(SCRIPTS)}
assert state() == before
assert not torch.cuda.is_initialized()
assert not loaded and 'torchvision' not in sys.modules
assert not os.listdir()
"""
    process = subprocess.run([sys.executable, '-c', code, '--nonsense', '--trials', 'x'], cwd=tmp_path,
                             env=environment(), capture_output=True, text=True, timeout=100)
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')
