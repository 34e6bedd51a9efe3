"""The experiment bench: statistics, table, --versus, --sweep, the log, --resume, torchrun."""
import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import NARROW, NARROW_ARGS, ROOT, command, environment, live

MODIFIED, BASELINE = (ROOT / f'airbench94_{name}.py' for name in ('modified', 'baseline'))
ROW = re.compile(r' +(\d+) +(\d+) +\d+ +(?:\d+\.\d{4}|diverged) .*?(\d+\.\d\d)% +[\d.]+s +\d+m \d\ds  (\S.*)')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']


def flat(hyp):
    """{'opt': {'lr': 10}} -> {'opt.lr': 10}."""
    return {f'{key}{rest}': leaf for key, value in hyp.items() for rest, leaf in (
        [(f'.{k}', v) for k, v in flat(value).items()] if isinstance(value, dict) else [('', value)])}


def edit(path, *changes):
    """The text of a script with (old, new) put in."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# ---------------------------------------- Processes and logs ----------------------------------------

def bench(folder, script, *args, processes=None):
    """The command line of a script in a folder, under torchrun with so many processes; what it printed."""
    words = command(script, *args)
    if processes:
        words = [*TORCHRUN, f'--nproc_per_node={processes}', *words[1:]]
    return subprocess.run(words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=200)


def finished(folder, script, *args, processes=None):
    """`bench` of a command that succeeds, and its log folder."""
    process = bench(folder, script, *args, processes=processes)
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(out=process.stdout, rows=rows_of(process.stdout), table=table_of(process.stdout),
                           log=Path(folder, re.search('^Log: (.*)', process.stdout, re.M)[1]))


def rows_of(out):
    """(trial, run, arm, accuracy in percent) of each finished run's row, as printed."""
    return [(int(trial), int(run), arm, accuracy) for trial, run, accuracy, arm in (
        match.groups() for match in map(ROW.fullmatch, out.splitlines()) if match)]


def table_of(out):
    """Cells of the table's rows and the lines under it, without anything that depends on the clock."""
    lines = re.search(r'^Arm .*?(?=^device )', out, re.M | re.S)[0].splitlines()
    cells = [re.split(' {2,}', line) for line in lines]
    return [[cell for i, cell in enumerate(row) if i not in (2, 3)] if len(row) == 8 else
            re.sub(', and it takes .*|, clock x .*', '', row[-1]) for row in cells]


def sentences_of(table):
    """The sentence about each arm, of a `table_of`."""
    return [line for line in table if isinstance(line, str) and ' accura' in line]


def records(log):
    """The records in a log folder, of all processes."""
    return [json.loads(line) for file in sorted(log.glob('runs*.jsonl')) for line in open(file)]


def outcomes(log):
    """Everything about the logged runs that must not depend on how they were made."""
    found = [(r['arm'], r['trial'], r['run'], r['seed'], r['tta_acc'],
              *((row['train_loss'], row['train_acc'], row['test_acc']) for row in r['epochs']))
             for r in records(log)]
    assert len({key[:3] for key in found}) == len(found)  # none is made twice
    return sorted(found)


def experiment_of(log):
    return json.loads((log / 'experiment.json').read_text())


@pytest.fixture
def refused(baseline, tmp_path, monkeypatch, capsys):
    """refused(*args, by=script): the line with which main, in an empty folder, ends before any work."""
    monkeypatch.chdir(tmp_path)

    def refused(*args, by=baseline):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            by.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count('\n')) == (2, '', 1) and 'Traceback' not in err, out + err
        assert not (tmp_path / 'logs').exists()
        return err
    return refused


# ---------------------------------------- Statistics ----------------------------------------

DF = (1, 1.05, 1.3, 2.5, 7.7, 24, 124, 999)


@pytest.mark.parametrize('df', DF)
def test_student_gives_scipys_probabilities(baseline, df):
    t, cdf = baseline.student(df)
    x = np.linspace(0, 12, 500)
    assert np.abs(np.interp(x, t, cdf) - stats.t.cdf(x, df)).max() < 1e-6


@pytest.mark.parametrize('df', DF)
def test_student_gives_scipys_quantiles(baseline, df):
    t, cdf = baseline.student(df)
    p = np.array([0.5, 0.6, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995])
    np.testing.assert_allclose(np.interp(p, cdf, t), stats.t.ppf(p, df), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('sizes', [(2, 2), (2, 9), (5, 3), (25, 25), (40, 7), (125, 1000)])
def test_welch_gives_scipys_test(baseline, sizes):
    rng = np.random.default_rng(sizes)
    for shift, scale in ((0, 1), (0.7, 3), (2.5, 0.2)):
        a, b = rng.normal(90 + shift, scale, sizes[0]), rng.normal(90, 1, sizes[1])
        difference, half, p = baseline.welch(a, b)
        expected = stats.ttest_ind(a, b, equal_var=False)
        assert p == pytest.approx(expected.pvalue, abs=1e-6)
        low, high = expected.confidence_interval(0.95)
        assert (difference - half, difference + half) == pytest.approx((low, high), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize('level, p', [(94.0, 1), (93.5, 0)])
def test_welch_of_constant_samples_is_certain(baseline, level, p):
    assert baseline.welch(np.full(3, level), np.full(4, 94.0)) == (level - 94, 0, p)


# ---------------------------------------- Table ----------------------------------------

def made_up(arm, accuracies, clocks=(3.25,), trials=1):
    """Records of an arm's runs with these accuracies in percent, so many trials, and clocks in turn."""
    pairs = [*zip(accuracies, itertools.cycle(clocks))]
    return [{'arm': arm, 'trial': 1 + i * trials // len(pairs), 'run': 1 + i % (len(pairs) // trials),
             'tta_acc': accuracy / 100, 'clock_seconds': clock, 'wall_seconds': 30.25,
             'epochs': [{'train_loss': 1.0}]} for i, (accuracy, clock) in enumerate(pairs)]


def drawn(seed, mean, std, n=25):
    """n accuracies of just that mean and std."""
    x = np.random.default_rng(seed).normal(size=n)
    return mean + std * (x - x.mean()) / x.std(ddof=1)


def cells_of(line):
    return re.split(' {2,}', line)


def mean_and_half(x, digits):
    """A mean and half its confidence interval by scipy, in text."""
    low, high = stats.t.interval(0.95, len(x) - 1, np.mean(x), stats.sem(x))
    return f'{np.mean(x):.{digits}f}', f'{(high - low) / 2:.{digits}f}'


def test_one_arm_has_a_row_per_trial_and_an_average(baseline):
    accuracies, clocks = [94, 93, 95, 51], [3.1, 3.3, 3.2, 3.7]
    head, *rows, bad = baseline.table(made_up('modified', accuracies, clocks, trials=2), 94.0)
    assert cells_of(head) == ['Trial', 'n', 'Runtime', 'Clock/run (95% CI)', 'Accuracy (95% CI)', 'Std',
                              '>=94%', 'Diverged']
    for row, name, part, share, lost in zip(rows, ('1', '2', 'Average'), (slice(2), slice(2, 4), slice(4)),
                                            ('1/2', '1/2', '2/4'), ('0/2', '1/2', '1/4')):
        accuracy, clock = mean_and_half(accuracies[part], 2), mean_and_half(clocks[part], 3)
        n = len(accuracies[part])
        assert cells_of(row) == [name, str(n), '1m 00.500s', '{}s +- {}'.format(*clock),
                                 '{}% +- {}'.format(*accuracy), f'{np.std(accuracies[part], ddof=1):.2f}',
                                 share, lost]
    assert bad == 'Warning: modified trial 2 run 2 diverged, 51.00%'


def test_several_arms_have_a_row_each(baseline):
    samples = {name: drawn(i, 92.8 + i, 0.2) for i, name in enumerate(('modified', 'other', 'baseline'))}
    runs = [run for name, x in samples.items() for run in made_up(name, x, [3.1, 3.2, 3.4], trials=5)]
    table = baseline.table(runs, 94.0)
    assert cells_of(table[0])[:2] == ['Arm', 'n']
    for line, (name, x) in zip(table[1:4], samples.items()):
        clock = mean_and_half(([3.1, 3.2, 3.4] * 9)[:25], 3)
        accuracy, share = mean_and_half(x, 2), f'{sum(x >= 94)}/25'
        assert cells_of(line) == [name, '25', '2m 31.250s', '{}s +- {}'.format(*clock),
                                  '{}% +- {}'.format(*accuracy), '0.20', share, '0/25']


def comparison(table):
    """The sentences and the numbers under the table's rows."""
    lines = [line for line in table if len(cells_of(line)) < 8]
    numbers = [[float(x) for x in re.fullmatch(
        r'    (\S+) points \((\S+) to (\S+)\), clock x (\S+) \((\S+) to (\S+)\)', line).groups()]
        for line in lines[1::2]]
    return lines[::2], numbers


@pytest.mark.parametrize('sizes', [(25, 25), (4, 9)])
def test_each_arm_is_compared_with_the_last_as_scipy_does(baseline, sizes):
    rng = np.random.default_rng(sizes)
    clocks = [rng.normal(mean, 0.05, n) for mean, n in zip((3.0, 3.4, 3.3), (*sizes, 12))]
    samples = [drawn(i, 93 + i / 5, 0.3, n) for i, n in enumerate((*sizes, 12))]
    runs = [run for arm, x, c in zip('abc', samples, clocks) for run in made_up(arm, x, c)]
    sentences, numbers = comparison(baseline.table(runs, 94.0))
    assert [sentence[0] for sentence in sentences] == ['a', 'b'] and len(numbers) == 2
    for sentence, found, x, c in zip(sentences, numbers, samples, clocks):
        test = stats.ttest_ind(x, samples[2], equal_var=False)
        ratio = c.mean() / clocks[2].mean()
        relative = stats.ttest_ind(c / c.mean(), clocks[2] / clocks[2].mean(), equal_var=False)
        spread = relative.confidence_interval(0.95).high
        assert found[:3] == pytest.approx([x.mean() - samples[2].mean(), *test.confidence_interval(0.95)],
                                          abs=0.00501)
        assert found[3:] == pytest.approx([ratio, ratio * np.exp(-spread), ratio * np.exp(spread)],
                                          abs=0.000501)
        p = '< 0.001' if test.pvalue < 0.001 else f'= {test.pvalue:.3f}'
        assert f'(p {p})' in sentence


def test_equal_arms_are_not_told_apart(baseline):
    runs = made_up('modified', drawn(1, 94, 0.2)) + made_up('baseline', drawn(2, 94, 0.2))
    assert comparison(baseline.table(runs, 94.0)) == (
        ['modified: no difference in accuracy from baseline shown at n = 25 (p = 1.000)'],
        [[0, pytest.approx(-0.11, abs=0.005), pytest.approx(0.11, abs=0.005), 1, 1, 1]])


@pytest.mark.parametrize('mean, clock, sentence', [
    (93.15, 2.73, 'modified is 0.85 points less accurate than baseline (p < 0.001),'
                  ' and it takes 0.910 of the time'),
    (94.85, 3.0, 'modified is 0.85 points more accurate than baseline (p < 0.001)'),
    (94.0, 3.6, 'modified: no difference in accuracy from baseline shown at n = 20 (p = 1.000),'
                 ' and it takes 1.200 of the time')])
def test_sentence_says_what_was_shown_and_no_more(baseline, mean, clock, sentence):
    runs = (made_up('modified', drawn(1, mean, 0.2), [clock, clock + 0.01, clock - 0.01])
            + made_up('baseline', drawn(2, 94, 0.2, 20), [3.0, 3.01, 2.99]))
    assert comparison(baseline.table(runs, 94.0))[0] == [sentence]


def test_equal_values_of_unequal_number_do_not_differ(baseline):
    assert baseline.welch(np.full(10, 87.71), np.full(9, 87.71))[1:] == (0, 1)


def test_a_name_keeps_its_letters_where_a_figure_is_missing(baseline):
    assert baseline.table(made_up('a nan', [94]) + made_up('nano', [93]), 94.0)[1].startswith('a nan  1 ')


def test_arms_of_one_run_are_not_compared(baseline):
    table = baseline.table(made_up('a', [94]) + made_up('b', [93]), 94.0)
    assert [cells_of(line)[3:6] for line in table[1:]] == [['3.250s +- -', f'{acc}.00% +- -', '-']
                                                           for acc in (94, 93)]


def test_diverged_runs_are_named_by_arm_and_judged_by_their_own_arms_median(baseline):
    runs = made_up('a', [94, 94, 83.9, 94]) + made_up('b', [83, 83.1, 83.2, 72], trials=2)
    table = baseline.table(runs, 94.0)
    assert [cells_of(line)[-1] for line in table[1:3]] == ['1/4', '1/4']
    assert table[3:5] == [
        'Warning: a trial 1 run 3 diverged, 83.90%', 'Warning: b trial 2 run 2 diverged, 72.00%']
    assert len(comparison([*table[:3], *table[5:]])[0]) == 1


# ---------------------------------------- --versus ----------------------------------------

@pytest.fixture(scope='module')
def versus(data_dir, tmp_path_factory):
    """The baseline against an edited copy, that with an override, and the modified script with two."""
    folder = tmp_path_factory.mktemp('versus')
    (folder / 'edited.py').write_text(edit(
        BASELINE, ("'tta_level': 2,", "'tta_level': 2, 'bias_start': 0.0,"),
        ('nn.init.zeros_(net[0].bias)', "nn.init.constant_(net[0].bias, hyp['net']['bias_start'])"))
        + "\nimport atexit\natexit.register(lambda: print('\\nhyp', json.dumps(hyp)))\n")
    arms = ['edited.py', 'edited.py:net.bias_start=0.5', f'{MODIFIED}:opt.lr=9,opt.momentum=0.7']
    result = finished(folder, 'airbench94_baseline', '--data-dir', data_dir, '--trials', 2, '--seed', 5,
                      '--quiet', *NARROW_ARGS, 'opt.momentum=0.8', '--versus', *arms[:2], '--versus', arms[2])
    result.names = ['baseline', 'edited', 'edited net.bias_start=0.5',
                    f'{ROOT}/airbench94_modified opt.lr=9 opt.momentum=0.7']
    result.folder = folder
    return result


def test_arms_are_interleaved_run_by_run(versus):
    expected = [(trial, 1, arm) for trial in (1, 2) for arm in versus.names]
    assert [(r['trial'], r['run'], r['arm']) for r in records(versus.log)] == expected
    assert [row[:3] for row in versus.rows] == expected


def test_arms_share_the_seed_of_a_run(versus):
    seeds = {(r['trial'], r['seed']) for r in records(versus.log)}
    assert len(seeds) == len(dict(seeds)) == len({seed for _, seed in seeds}) == 2


def test_rows_and_table_show_the_logged_accuracies(versus):
    logged = {(r['trial'], r['run'], r['arm']): 100 * r['tta_acc'] for r in records(versus.log)}
    assert [(row[:3], row[3]) for row in versus.rows] == [(key, f'{acc:.2f}') for key, acc in logged.items()]
    for cells, name in zip(versus.table[1:5], versus.names):
        accuracies = [acc for (_, _, arm), acc in logged.items() if arm == name]
        assert cells[:3] == [name, '2', '{}% +- {}'.format(*mean_and_half(accuracies, 2))]
    assert [re.split(': | is ', line)[0] for line in sentences_of(versus.table)] == versus.names[:3]


def arm_outcomes(log, name):
    return [row[1:] for row in outcomes(log) if row[0] == name]


def test_script_with_an_equal_copy_gives_the_same_numbers(versus):
    assert arm_outcomes(versus.log, 'edited') == arm_outcomes(versus.log, 'baseline')


def test_override_holds_for_its_arm_alone(versus):
    assert arm_outcomes(versus.log, 'edited net.bias_start=0.5') != arm_outcomes(versus.log, 'edited')
    own, edited, changed, modified = (arm['hyp'] for arm in experiment_of(versus.log)['arms'])
    assert changed == {**edited, 'net.bias_start': 0.5}
    assert edited == {**own, 'net.bias_start': 0.0}
    assert (own['opt.lr'], modified['opt.lr']) == (11.5, 9)


def test_hyp_holds_for_every_arm_under_its_own_overrides(versus):
    hyps = [arm['hyp'] for arm in experiment_of(versus.log)['arms']]
    assert [hyp['opt.momentum'] for hyp in hyps] == [0.8, 0.8, 0.8, 0.7]
    assert all(hyp[key] == value for hyp in hyps for key, value in NARROW.items())


def test_arm_in_a_comparison_runs_as_it_does_alone(versus, data_dir, tmp_path):
    bench(tmp_path, 'airbench94_modified', '--data-dir', data_dir, '--trials', 2, '--seed', 5, '--quiet',
          *NARROW_ARGS, 'opt.lr=9', 'opt.momentum=0.7')
    log, = (tmp_path / 'logs').iterdir()
    assert arm_outcomes(log, 'modified') == arm_outcomes(versus.log, versus.names[3])


def test_hyp_of_another_script_is_untouched_afterwards(versus, baseline):
    left = [flat(json.loads(text)) for text in re.findall('^hyp (.*)', versus.out, re.M)]
    assert left == [{**flat(baseline.hyp), 'net.bias_start': 0.0}] * 2  # each arm imports the script anew


def test_log_has_every_arm_with_its_whole_hyp_and_code(versus, baseline, modified):
    arms = experiment_of(versus.log)['arms']
    assert [arm['name'] for arm in arms] == versus.names
    for arm, script in zip(arms, (baseline, baseline, baseline, modified)):
        assert not set(flat(script.hyp)) - set(arm['hyp'])
    for i, path in enumerate((BASELINE, versus.folder / 'edited.py', versus.folder / 'edited.py', MODIFIED)):
        assert (versus.log / f"code{i or ''}.py").read_text() == path.read_text()
    assert len([*versus.log.iterdir()]) == 6  # the four, experiment.json and runs.jsonl


@pytest.mark.parametrize('name, text, complaint', [
    ('missing', None, 'No such file'), ('typo', 'def (', 'SyntaxError'),
    ('broken', '1 / 0', 'ZeroDivisionError'), ('exits', 'import sys\nsys.exit(0)', 'SystemExit'),
    ('stops', 'raise SystemExit(3)', 'SystemExit'),
    ('no_hyp', 'def train(): pass', 'hyp'), ('no_train', 'hyp = {}', 'train'),
    ('not_a_dict', 'hyp, train = 3, print', 'int'), ('other_keys', 'hyp, train = {}, print', 'opt'),
    ('not_json', 'hyp, train = {"opt": {"batch_size": print}}, print', 'JSON')])
def test_script_that_cannot_take_part_is_refused(refused, tmp_path, name, text, complaint):
    if text:
        (tmp_path / f'{name}.py').write_text(text)
    message = refused('--versus', f'{name}.py')
    assert f'{name}.py' in message and complaint in message


@pytest.mark.parametrize('changes, complaint', [
    ('opt.nonsense=3', 'opt.nonsense'), ('opt.lr=x', 'opt.lr=x'), ('opt.lr', 'opt.lr'),
    ('opt.momentum=0.9,opt.lr=-1', 'opt.lr=-1')])
def test_bad_override_of_an_arm_is_refused(refused, changes, complaint):
    assert complaint in refused('--versus', f'{MODIFIED}:{changes}')


def test_batch_size_over_the_training_set_of_another_arm_is_one_line(
        baseline, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        baseline.main(['--data-dir', str(data_dir), *NARROW_ARGS, '--versus', f'{MODIFIED}:opt.batch_size=257'])
    err = capsys.readouterr().err
    assert end.value.code == 2 and 'opt.batch_size=257' in err and err.count('\n') == 1
    assert not [*(tmp_path / 'logs').iterdir()]


@pytest.mark.parametrize('default, text, value', [(8, '0', 0), (0.0, '-1.5', -1.5), (None, '3', 3.0),
                                                  ('cos', 'linear', 'linear')])
def test_hyperparameter_of_the_users_own_takes_any_value_of_its_type(baseline, default, text, value):
    assert baseline.parse_hyp({'aug.own': text}, {'aug.own': default}) == {'aug.own': value}


def test_overrides_keep_the_groups_that_others_may_hold(script):
    before, opt, widths = copy.deepcopy(script.hyp), script.hyp['opt'], script.hyp['net']['widths']
    with script.overrides({'opt.lr': 3.0, 'net.widths.block1': 5, 'net.tta_level': 1}):
        assert (opt['lr'], widths['block1'], script.hyp['net']['tta_level']) == (3.0, 5, 1)
    assert script.hyp == before and script.hyp['opt'] is opt and script.hyp['net']['widths'] is widths


# ---------------------------------------- --sweep ----------------------------------------

@pytest.fixture(scope='module')
def planted(data, tmp_path_factory):
    """Learning rates that teach nothing and a lot, on images that are the pattern of their class, and the
    former once more as another script's arm."""
    folder, easy = tmp_path_factory.mktemp('planted'), copy.deepcopy(data)
    patterns = 128 + 50 * torch.randn(10, 4, 4, 3, generator=torch.Generator().manual_seed(2))
    patterns = patterns.clamp(0, 255).byte().repeat_interleave(8, 1).repeat_interleave(8, 2)
    for split, content in easy.items():
        torch.save({**content, 'images': patterns[content['labels']]}, folder / f'{split}.pt')
    return finished(folder, 'airbench94_modified', '--data-dir', folder, '--trials', 3, '--seed', 1,
                    '--quiet', *NARROW_ARGS, 'opt.train_epochs=4', 'opt.bias_scaler=4',
                    'net.scaling_factor=1', 'net.tta_level=0', '--sweep', 'opt.lr=1e-6,17.25',
                    '--versus', f'{MODIFIED}:opt.lr=1e-6')


def test_sweep_makes_an_arm_of_each_value_before_those_of_versus(planted):
    assert [(arm['name'], arm['hyp']['opt.lr']) for arm in experiment_of(planted.log)['arms']] == [
        ('modified opt.lr=1e-6', 1e-6), ('modified opt.lr=17.25', 17.25),
        (f'{ROOT}/airbench94_modified opt.lr=1e-6', 1e-6)]


def test_table_of_a_sweep_has_the_best_first_and_versus_last(planted):
    assert [cells[0] for cells in planted.table[1:4]] == [
        'modified opt.lr=17.25', 'modified opt.lr=1e-6', f'{ROOT}/airbench94_modified opt.lr=1e-6']


def test_planted_advantage_is_found(planted):
    means = [float(cells[2].split('%')[0]) for cells in planted.table[1:4]]
    sentence = re.fullmatch(r'modified opt.lr=17.25 is (\S+) points more accurate than .* \(p [=<] (\S+)\)',
                            sentences_of(planted.table)[0])
    assert float(sentence[1]) == pytest.approx(means[0] - means[2], abs=0.011) and means[0] > means[2] + 30
    assert float(sentence[2]) < 0.05


def test_script_with_itself_is_not_told_apart(planted):
    name, other = 'modified opt.lr=1e-6', f'{ROOT}/airbench94_modified opt.lr=1e-6'
    assert arm_outcomes(planted.log, name) == arm_outcomes(planted.log, other)
    assert sentences_of(planted.table)[1] == (
        f'{name}: no difference in accuracy from {other} shown at n = 3 (p = 1.000)')


def test_two_sweeps_make_the_product(baseline, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = baseline.main(['--data-dir', str(data_dir), '--trials', '1', '--quiet', *NARROW_ARGS,
                          'opt.train_epochs=0.25', '--sweep', 'opt.lr=2,9', '--sweep', 'aug.translate=0,1'])
    names = {f'baseline opt.lr={lr} aug.translate={pad}': (lr, pad) for lr in (2, 9) for pad in (0, 1)}
    log, = (tmp_path / 'logs').iterdir()
    assert {run['arm'] for run in runs} == set(names) and len(runs) == 4
    assert {arm['name']: (arm['hyp']['opt.lr'], arm['hyp']['aug.translate'])
            for arm in experiment_of(log)['arms']} == names


@pytest.mark.parametrize('sweep, complaint', [
    ('opt.lr=9,x', 'opt.lr=x'), ('opt.nonsense=1,2', 'opt.nonsense'), ('opt.lr=9,,12', 'opt.lr='),
    ('opt.lr', 'opt.lr'), ('opt.batch_size=64,0', 'opt.batch_size=0')])
def test_bad_sweep_is_refused(refused, sweep, complaint):
    assert complaint in refused('--sweep', sweep)


# ---------------------------------------- --resume ----------------------------------------

@pytest.fixture(scope='module')
def args(data_dir):
    """Two arms, two trials of two runs, of any seed."""
    return ['--data-dir', data_dir, '--trials', 2, '--runs', 2, '--quiet', *NARROW_ARGS,
            'opt.train_epochs=1.25', 'net.tta_level=0', '--versus', f'{BASELINE}:opt.lr=9']


@pytest.fixture(scope='module')
def whole(args, tmp_path_factory):
    """The uninterrupted experiment."""
    return finished(tmp_path_factory.mktemp('whole'), 'airbench94_modified', *args, '--seed', 5)


@pytest.fixture
def log(whole, tmp_path):
    """A copy of its log that a test may change, outside the folder `logs`."""
    return Path(shutil.copytree(whole.log, tmp_path / 'copy'))


@pytest.fixture(scope='module')
def killed(args, tmp_path_factory):
    """The same, killed after three rows, as if while it wrote the third: its log and what is whole."""
    folder = tmp_path_factory.mktemp('killed')
    with live(folder, command('airbench94_modified', *args, '--seed', 5)) as process:
        seen = itertools.islice(filter(ROW.fullmatch, (line.rstrip('\n') for line in process.stdout)), 3)
        assert len([*seen]) == 3
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    log, = (folder / 'logs').iterdir()
    lines = (log / 'runs.jsonl').read_text().splitlines(keepends=True)
    assert 3 <= len(lines) < 8
    (log / 'runs.jsonl').write_text(''.join(lines[:2]) + lines[2][:len(lines[2]) // 2])
    return SimpleNamespace(log=log, kept=''.join(lines[:2]))


@pytest.fixture(scope='module')
def resumed(killed, args, tmp_path_factory):
    """It resumed with the whole command, in another folder."""
    return finished(tmp_path_factory.mktemp('resumed'), 'airbench94_modified', *args, '--seed', 5,
                    '--resume', killed.log)


def test_resumed_experiment_has_the_runs_of_the_uninterrupted_one(resumed, killed, whole):
    assert resumed.log == killed.log
    assert outcomes(resumed.log) == outcomes(whole.log)


def test_resumed_experiment_has_the_table_of_the_uninterrupted_one(resumed, whole):
    assert resumed.table == whole.table and [cells[1] for cells in whole.table[1:3]] == ['4', '4']


def test_resume_makes_only_what_is_missing(resumed, killed, whole):
    assert resumed.rows == whole.rows[2:]
    text = (killed.log / 'runs.jsonl').read_text()
    assert text.startswith(killed.kept) and text.count('\n') == 8


def test_resume_extends_an_experiment_by_trials(log, whole, tmp_path):
    before = (log / 'runs.jsonl').read_text()
    result = finished(tmp_path, 'airbench94_modified', '--resume', log, '--trials', 3)
    assert [row[:3] for row in result.rows] == [
        (3, run, arm) for run in (1, 2) for arm in ('modified', f'{ROOT}/airbench94_baseline opt.lr=9')]
    assert (log / 'runs.jsonl').read_text().startswith(before)
    seeds = {(r['trial'], r['run'], r['seed']) for r in records(log)}
    assert len(seeds) == len({seed for *_, seed in seeds}) == 6
    assert [cells[1] for cells in result.table[1:3]] == ['6', '6']


def test_resume_of_a_finished_experiment_prints_its_table_alone(log, whole, modified, tmp_path, capsys):
    before = (log / 'runs.jsonl').read_bytes()
    assert len(modified.main(['--resume', str(log)])) == 8
    out = capsys.readouterr().out
    assert table_of(out) == whole.table and not rows_of(out)
    assert (log / 'runs.jsonl').read_bytes() == before and [*tmp_path.iterdir()] == [log]


@pytest.fixture
def not_resumed(refused, log, modified):
    """not_resumed(*args): the line with which `--resume` of the finished log, left as it was, is refused."""
    def not_resumed(*args):
        before = {path: path.read_bytes() for path in log.iterdir()}
        message = refused('--resume', log, *args, by=modified)
        assert {path: path.read_bytes() for path in log.iterdir()} == before
        return message
    return not_resumed


@pytest.mark.parametrize('change, old, new', [
    (['--hyp', 'opt.momentum=0.7'], '"opt.momentum": 0.85', '"opt.momentum": 0.7'),
    (['--seed', 6], '"seed": 5', '"seed": 6'),
    (['--versus', MODIFIED], None, f'"name": "{ROOT}/airbench94_modified"')])
def test_resume_of_another_experiment_is_refused_with_the_difference(not_resumed, change, old, new):
    message = not_resumed(*change)
    assert 'experiment.json differs' in message and f'+   "name": {new}'.split('"name": ')[-1] in message
    assert not old or re.search(f'- *{old}', message)


def test_resume_with_other_data_is_refused(not_resumed, data, tmp_path):
    changed = copy.deepcopy(data)
    changed['test']['labels'][0] = 9 - changed['test']['labels'][0]
    for split, content in changed.items():
        torch.save(content, tmp_path / f'{split}.pt')
    message = not_resumed('--data-dir', tmp_path)
    assert 'experiment.json differs' in message
    assert len(re.findall('[-+] *"test labels": [0-9]+', message)) == 2 and '"train labels"' not in message


def test_resume_with_changed_code_is_refused_with_the_difference(log, tmp_path):
    script = tmp_path / 'airbench94_modified.py'
    script.write_text(edit(MODIFIED, ('* (step / total_steps) ** 3)', '* (step / total_steps) ** 2)')))
    process = subprocess.run([sys.executable, script, '--resume', log], cwd=tmp_path, env=environment(),
                             stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr.count('\n')) == (2, '', 1), process.stderr
    assert re.search(r'code\.py differs.*- .*\*\* 3\).*\+ .*\*\* 2\)', process.stderr)


def test_resume_with_another_engine_is_refused(not_resumed):
    assert '"net.compile": true' in not_resumed('--compile')


def test_a_run_that_is_twice_in_the_log_counts_once(log, baseline):
    runs = baseline.read_log(log)[1]
    shutil.copy(log / 'runs.jsonl', log / 'runs7.jsonl')
    assert baseline.read_log(log)[1] == runs and len(runs) == 8


def test_each_run_names_its_machine(log, baseline):
    machine = experiment_of(log)['environment']
    assert all({**run, **machine} == run for run in baseline.read_log(log)[1])


def test_resume_with_changed_code_of_another_arm_is_refused(refused, versus, tmp_path):
    source = (versus.folder / 'edited.py').read_text()
    (tmp_path / 'edited.py').write_text(source.split('import atexit')[0])
    message = refused('--resume', versus.log)
    assert 'code2.py differs' in message and '-import atexit' in message  # its second arm's, found first


@pytest.mark.parametrize('content', [None, {}, {'experiment.json': '{'}])
def test_resume_of_what_is_no_log_is_refused(refused, tmp_path, content):
    folder = tmp_path / 'folder'
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert str(folder) in refused('--resume', folder)


# ---------------------------------------- torchrun ----------------------------------------

@pytest.fixture(scope='module', params=[1, 2, 3])
def shared(request, args, tmp_path_factory):
    """The same experiment by so many processes."""
    folder = tmp_path_factory.mktemp('torchrun')
    result = finished(folder, 'airbench94_modified', *args, '--seed', 5, processes=request.param)
    result.processes = request.param
    return result


def test_processes_make_the_runs_of_one(shared, whole):
    assert outcomes(shared.log) == outcomes(whole.log)
    assert [log.name for log in shared.log.parent.iterdir()] == [shared.log.name]


def test_table_covers_the_runs_of_all_processes_and_is_printed_once(shared, whole):
    assert shared.table == whole.table
    assert [shared.out.count(text) for text in ('\nArm ', '\nLog: ', 'Warming up')] == [1, 1, 1]


def test_only_the_first_process_prints_rows(shared):
    own = [json.loads(line) for line in open(shared.log / 'runs.jsonl')]
    assert [row[:3] for row in shared.rows] == [(r['trial'], r['run'], r['arm']) for r in own]


def test_each_process_has_its_share_in_its_own_file(shared):
    names = [f"runs{rank or ''}.jsonl" for rank in range(shared.processes)]
    assert sorted(path.name for path in shared.log.glob('runs*')) == sorted(names)
    shares = [[(r['trial'], r['run']) for r in map(json.loads, open(shared.log / name))] for name in names]
    assert [len(share) for share in shares] == {1: [8], 2: [4, 4], 3: [4, 2, 2]}[shared.processes]
    assert all(share[::2] == share[1::2] for share in shares)  # both arms of a run, one after the other


def worker_of(launcher, rank):
    """The process of a rank, among torchrun's children."""
    for pid in Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split():
        if f'\0RANK={rank}\0'.encode() in Path(f'/proc/{pid}/environ').read_bytes():
            return int(pid)


def wait_for(condition, seconds=100):
    """What condition() is as soon as it is true."""
    for _ in range(50 * seconds):
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail('it never came')


@pytest.fixture(scope='module')
def broken(args, tmp_path_factory):
    """It by two processes, of a drawn seed, of which the second is killed when its first run is logged."""
    folder = tmp_path_factory.mktemp('broken')
    words = [*TORCHRUN, '--nproc_per_node=2', *command('airbench94_modified', *args)[1:]]
    with live(folder, words) as process:
        wait_for(lambda: [*folder.glob('logs/*/runs1.jsonl')] or process.poll() is not None)
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    log, = (folder / 'logs').iterdir()
    return SimpleNamespace(out=out, status=process.returncode, log=log, seed=experiment_of(log)['seed'])


@pytest.fixture(scope='module')
def unbroken(broken, args, tmp_path_factory):
    """The experiment of that seed, uninterrupted."""
    return finished(tmp_path_factory.mktemp('unbroken'), 'airbench94_modified', *args, '--seed', broken.seed)


def test_killed_process_ends_the_job(broken):
    assert broken.status not in (0, None)
    assert 1 <= len(records(broken.log)) < 8


@pytest.mark.parametrize('processes', [None, 3])
def test_broken_job_is_completed_by_any_number_of_processes(broken, unbroken, tmp_path, processes):
    log = shutil.copytree(broken.log, tmp_path / 'copy')
    before = {path.name: path.read_text() for path in log.glob('runs*')}
    result = finished(tmp_path, 'airbench94_modified', '--resume', log, processes=processes)
    assert outcomes(log) == outcomes(unbroken.log)
    assert result.table == unbroken.table
    assert all((log / name).read_text().startswith(text) for name, text in before.items())
