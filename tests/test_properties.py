"""What holds whatever is asked for: a command ends in its table or in one line, and hyp is as before."""
import contextlib
import copy
import io
import itertools
import json
import math
import re
import shutil
import signal
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, configuration, example, given, settings, strategies as st

from conftest import ROOT, times

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), 'hypothesis'))  # not .hypothesis here

FRACTION, FACTOR, COUNT, WIDTHS = (0.0, 1.0), (1e-9, 1e9), (1, 10**9), 'net.widths.block'
LIMITS = {
    'opt.train_epochs': FACTOR, 'opt.batch_size': COUNT, 'opt.lr': FACTOR, 'opt.momentum': (1e-6, 0.9999),
    'opt.weight_decay': (0.0, 1e9), 'opt.bias_scaler': FACTOR, 'opt.label_smoothing': FRACTION,
    'opt.whiten_bias_epochs': (0, 10**9), 'aug.flip': (False, True), 'aug.translate': (0, 31),
    f'{WIDTHS}1': COUNT, f'{WIDTHS}2': COUNT, f'{WIDTHS}3': COUNT, 'net.batchnorm_momentum': FRACTION,
    'net.scaling_factor': FACTOR, 'net.tta_level': (0, 2), 'net.tta_share': (1e-9, 1.0),
    'opt.small_epochs': (0, 10**9), 'opt.small_size': (17, 1000), 'net.compile': (False, True)}
SHORT = {'opt.train_epochs': 2.0, 'opt.batch_size': 24, f'{WIDTHS}1': 9, f'{WIDTHS}2': 9, f'{WIDTHS}3': 9,
         'opt.small_size': 40, 'net.compile': False}
BASE = ['--device', 'cpu', '--data-dir', '../data', '--seed', '0', '--trials', '1', '--hyp',
        *(f'{WIDTHS}{i}=3' for i in (1, 2, 3)), 'opt.batch_size=12', 'opt.train_epochs=1']
ROW = re.compile(r' +(\d+) +(\d+) +(\d+) +(\d+\.\d{4}|diverged) +\d+\.\d\d% +(?:\d+\.\d\d%|-)'
                 r'(?: +(\d+\.\d\d)%)? +\d+\.\d{3}s +\d+m \d\ds  (\S.*)')
CELLS = [r'\S.*', r'\d+', r'\d+m \d\d\.\d{3}s', r'\d+\.\d{3}s \+- (\d+\.\d{3}|-)',
         r'\d+\.\d\d% \+- (\d+\.\d\d|-)', r'\d+\.\d\d|-', r'\d+/\d+', r'\d+/\d+']
NUMBER = r'[-+]?\d+\.\d{2,3}'
DIFFERENCE = [
    r'.*(: no difference in accuracy from .* shown at n = \d+|'
    r' is \d+\.\d\d points (more|less) accurate than .*)'
    r' \(p [=<] [01]\.\d{3}\)(, and it takes \d+\.\d{3} of the time)?',
    rf'    {NUMBER} points \({NUMBER} to {NUMBER}\), clock x {NUMBER} \({NUMBER} to {NUMBER}\)']


@pytest.fixture
def every(request, n):
    """@every(strategy, ...) calls a function with n examples, in the campaign random, and those of always."""
    chosen = settings(max_examples=n, derandomize=not request.node.get_closest_marker('campaign'),
                      deadline=None, database=None, print_blob=True, suppress_health_check=[*HealthCheck])

    def every(*strategies, always=()):
        def call(holds):
            for value in always:
                holds = example(value)(holds)
            chosen(given(*strategies)(holds))()
        return call
    return every


# ---------------------------------------- What is asked for ----------------------------------------

ODD = ['', ' ', '\n', '\n\n', 'x\n\ny', 'a\0b', '\x1b[2J', '\r', '\x85', 'é', '\udcff', '--', '-', '%s', '0',
       '{arm}', '-1', '1.5', 'nan', '-nan', 'inf', '-inf', '1e400', '0x10', '0_2', '2 ', '2\n', '\u0662',
       '1e-320', '9' * 5000, str(10**9 + 1), '=3', '==', ',', ',,', ':', 'a' * 300]
TEXT = st.sampled_from(ODD) | st.text(  # with digits it could ask for many runs, with -h for the help
    st.characters(exclude_categories=['Cs', 'Nd'], exclude_characters='/h'), max_size=5)
ODD_KEYS = ['', 'opt', 'lr', 'opt.', 'opt.lr.x', 'OPT.LR', ' opt.lr', 'net.widths', 'opt.own', 'none.lr', '.']
KEYS = st.sampled_from([*LIMITS, *LIMITS, *ODD_KEYS])


def valid(key):
    """Values of a hyperparameter from its whole range, as far as its runs are short."""
    low, high = LIMITS[key][0], SHORT.get(key, LIMITS[key][1])
    if isinstance(low, int):
        return st.sampled_from([low, high]) | st.integers(low, high).map(type(low))
    exponents = st.floats(math.log10(low or 1e-9), math.log10(high))
    return st.sampled_from([low, high]) | exponents.map(lambda x: min(max(low, 10 ** x), high))


def mostly(strategy):
    return st.one_of(strategy, strategy, TEXT)


def option(name, values, most=1):
    return st.lists(values, min_size=1, max_size=most).map(lambda words: [name, *words])


def pairs(values, keys=KEYS):
    """KEY=VALUE, mostly with a valid value, and then as many of them as `values` says."""
    return keys.flatmap(lambda key: values(mostly(valid(key).map(str) if key in LIMITS else TEXT)).map(
        lambda words: f"{key}={','.join(words)}"))


PAIR = pairs(lambda value: st.lists(value, min_size=1, max_size=1))
SWEEP = pairs(lambda value: st.lists(value, max_size=2) | value.map(lambda word: [word] * 2))
VERSUS = st.builds(
    '{}{}{}'.format, st.sampled_from(['missing', *(f'../{name}' for name in (
        'edited', 'odd\nname', 'infinite', 'empty', 'exits', 'broken', 'folder'))]),
    st.sampled_from(['.py', '.py', '']),
    st.just('') | st.lists(PAIR, max_size=2).map(','.join).map(':'.__add__))
PLACES = mostly(st.sampled_from(['new', 'a/b', '.', '..', '../folder', '../damaged', '../number', '../deep',
                                 '../empty.py', '/dev/null/x', 'x/\0', '\udcff', '../data', '../data']))
COUNTS = mostly(st.sampled_from('12'))
OPTIONS = st.lists(max_size=3, elements=st.one_of(
    option('--trials', COUNTS), option('--runs', COUNTS), option('--hyp', mostly(PAIR), 3),
    option('--sweep', mostly(SWEEP), 2), option('--versus', mostly(VERSUS), 2),
    option('--seed', mostly(st.sampled_from(['0', str(2**64), str(2**64 + 1)]))),
    option('--target', mostly(st.floats(0, 100).map(str))), option('--recipe', mostly(st.just('report'))),
    option('--device', mostly(st.sampled_from(['cpu', 'cpu', 'CPU', 'cpu:0', 'cuda:99', 'meta']))),
    option('--log-dir', PLACES), option('--data-dir', PLACES), option('--resume', PLACES),
    st.sampled_from([['--quiet'], ['--quiet'], ['--synthetic'], ['--hyp', 'opt.batch_size=25']]),
    st.sampled_from([['--trials'], ['--trials='], ['--hyp'], ['extra'], ['-q'], ['--tri', '2'], ['--', 'x'],
                     ['--nonsense'], ['--versus', '--quiet'], ['--resume=']])))
ALWAYS = [[words.split(' ')] for words in (
    '--hyp opt.lr=1e9 opt.train_epochs=2', '--hyp opt.batch_size=25', '--versus ../exits.py', '--trials 0',
    f'--seed {2**64}', f'--seed {2**64 + 1}',  # what follows was an error once
    '--sweep opt.lr=2\n,3', '--versus ../odd\nname.py', '--versus ../infinite.py', '--log-dir x/\0',
    '--log-dir \udcff', '--data-dir \udcff', '--resume ../number', '--resume ../deep', '--hyp x\n\ny=3')]


# ---------------------------------------- What comes of it ----------------------------------------

@pytest.fixture
def call(script, tmp_path, monkeypatch):
    """call(words): main in an empty folder beside tiny data, odd scripts and odd folders; how it ended."""
    data, text = script.synthetic_data('cpu', train=24, test=10), (ROOT / f'{script.NAME}.py').read_text()
    monkeypatch.setattr(script, 'synthetic_data', lambda device: data)
    monkeypatch.setitem(sys.modules, 'torchvision.datasets', None)  # no download
    for name, content in {
            'edited.py': text, 'odd\nname.py': text, 'exits.py': 'raise SystemExit(0)', 'broken.py': 'x = (',
            'infinite.py': text.replace("'flip': True", "'flip': True, 'own': float('inf')"), 'empty.py': '',
            'folder.py/x': '', 'folder/x': '', 'data/x': '', 'damaged/train.pt': '', 'damaged/test.pt': '',
            'damaged/experiment.json': '{', 'number/experiment.json': '{"command": 3}',
            'deep/experiment.json': '[' * 10**5}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for split, content in data.items():
        torch.save(content, tmp_path / 'data' / f'{split}.pt')
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('no end within a minute'))

    def call(words):
        shutil.rmtree(tmp_path / 'here', ignore_errors=True)
        (tmp_path / 'here').mkdir()
        monkeypatch.chdir(tmp_path / 'here')
        logs, modules = {*tmp_path.rglob('*Z-*-*')}, {*sys.modules}
        out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors, newline='')
                    for errors in ('strict', 'backslashreplace'))  # as a process has them
        signal.alarm(60)
        try:
            with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
                  warnings.catch_warnings(record=True) as said):
                status, runs = 0, script.main([*BASE, *words])
        except SystemExit as end:
            status, runs = end.code, None
        finally:
            signal.alarm(0)
            for name in {*sys.modules} - modules:
                name.startswith('versus_') and sys.modules.pop(name)
        out.seek(0), err.seek(0)
        return SimpleNamespace(status=status, runs=runs, logs={*tmp_path.rglob('*Z-*-*')} - logs,
                               out=out.read(), err=err.read() + ''.join(map(str, said)))
    yield call
    signal.signal(signal.SIGALRM, handler)


def strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def lost(runs):
    """Those that diverged, of one arm."""
    floor = statistics.median(run['tta_acc'] for run in runs) - 0.1 if len(runs) > 2 else 0
    return [run for run in runs if run['tta_acc'] < floor or None in (
        losses := [row['train_loss'] for row in run['epochs']]) or abs(losses[-1] - math.log(10)) < 1e-5]


def assert_table(lines, runs, target):
    """The lines are the table of these runs: aligned, every figure a number or '-', diverged runs named."""
    arms, trials = ({str(name): [run for run in runs if run[key] == name]
                     for name in dict.fromkeys(run[key] for run in runs)} for key in ('arm', 'trial'))
    bad = [run for members in arms.values() for run in lost(members)]
    groups = arms if len(arms) > 1 else {**trials, 'Average': runs}
    head, rows, rest = lines[0], lines[1:len(groups) + 1], lines[len(groups) + 1:]
    starts = [0, *(match.start() for match in re.finditer(r'(?<=  )\S', head))]
    assert len(starts) == len(CELLS) and re.search(r'  >=\d\S*%  +Diverged$', head)
    for row, (name, members) in zip(rows, groups.items(), strict=True):
        assert all(row[start - 2:start] == '  ' and row[start] != ' ' for start in starts[1:]), lines
        cells = [row[start:end].rstrip() for start, end in zip(starts, [*starts[1:], None])]
        assert all(map(re.fullmatch, CELLS, cells)), cells
        above = sum(round(100 * run['tta_acc'], 6) >= target for run in members)
        assert (cells[0], cells[1]) == (name, str(len(members)))
        assert cells[6:] == [f'{above}/{len(members)}', f'{sum(r in bad for r in members)}/{len(members)}']
        assert {cell.endswith('-') for cell in cells[3:6]} == {len(members) == 1}
    assert sorted(rest[:len(bad)]) == sorted(
        f"Warning: {r['arm']} trial {r['trial']} run {r['run']} diverged, {r['tta_acc']:.2%}" for r in bad)
    compared = len(arms) - 1 if min(map(len, arms.values())) > 1 else 0
    assert len(rest) == len(bad) + 2 * compared
    assert all(map(re.fullmatch, DIFFERENCE * compared, rest[len(bad):])), rest


def assert_finished(end, words):
    """Every run that was asked for is in the log, rows and table; all figures are finite or marked."""
    asked = {name: value for name, *values in words for value in values}  # the last one counts
    log = Path(end.out.rpartition('\nLog: ')[2][:-1])
    assert end.err == '' and end.logs == {log.resolve()}
    experiment = strict((log / 'experiment.json').read_text())
    runs = [strict(line) for line in (log / 'runs.jsonl').read_text().splitlines()]
    arms = [arm['name'] for arm in experiment['arms']]
    assert 0 <= experiment['seed'] <= 2**64
    numbers = (range(1, int(asked.get(name, 1)) + 1) for name in ('--trials', '--runs'))
    assert [(r['trial'], r['run'], r['arm']) for r in runs] == [
        (trial, run, arm) for trial, run, arm in itertools.product(*numbers, arms)]
    assert sorted(map(json.dumps, end.runs)) == sorted(map(json.dumps, runs))
    rows = re.search(r'^trial +run .* arm\n((?:.+\n)+)\n', end.out, re.M)[1].split('\n')[:-1]
    assert [match and match.groups() for match in map(ROW.fullmatch, rows)] == [
        (str(r['trial']), str(r['run']), str(row['epoch']),
         'diverged' if row['train_loss'] is None else f"{row['train_loss']:.4f}",
         f"{100 * r['tta_acc']:.2f}" if row is r['epochs'][-1] else None, r['arm'])
        for r in runs for row in r['epochs'][-1 if ['--quiet'] in words else 0:]]
    table = re.search(r'^(?:Trial|Arm) .* Diverged\n(?:.*\n)*?(?=device )', end.out, re.M)[0]
    assert_table(table.split('\n')[:-1], end.runs, float(asked.get('--target', 94)))


def assert_refused(end, name):
    """One line that says something, no row, and no log folder."""
    assert (end.status, end.logs) == (2, set())
    assert end.err.startswith(f'{name}: ') and end.err.endswith('\n'), end.err
    assert len(end.err.splitlines()) == 1, end.err
    assert len(end.err.split()) > 4 and 'Traceback' not in end.err, end.err
    assert not any(map(ROW.fullmatch, end.out.split('\n')))


@contextlib.contextmanager
def left_as_it_was(hyp):
    before, groups = json.dumps(hyp), [*hyp.values(), hyp['net']['widths']]
    yield
    assert json.dumps(hyp) == before and all(map(
        lambda a, b: a is b, groups, [*hyp.values(), hyp['net']['widths']]))


# ---------------------------------------- Properties ----------------------------------------

@times(60, 1000)
def test_any_command_ends_in_its_table_or_in_one_line(script, call, every):
    @every(OPTIONS, always=ALWAYS)
    def holds(words):
        with left_as_it_was(script.hyp):
            end = call([*itertools.chain(*words)])
        assert_refused(end, script.NAME) if end.status else assert_finished(end, words)


@times(25, 400)
def test_any_hyperparameters_within_their_limits_make_a_whole_run(script, call, every):
    @every(st.fixed_dictionaries({}, optional={key: valid(key) for key in LIMITS}), st.booleans())
    def holds(values, quiet):
        words = [['--hyp', *(f'{key}={value}' for key, value in values.items())]] * bool(values)
        words += [['--quiet']] * quiet
        end = call([*itertools.chain(*words)])
        assert end.status == 0, end.err
        assert_finished(end, words)


def beside(key):
    """Text at and just over the limits of a hyperparameter."""
    return st.sampled_from([str(near) for limit in LIMITS.get(key, FRACTION) for near in (
        limit, limit - 1, limit + 1, -limit, *(math.nextafter(limit, to) for to in (-math.inf, math.inf)))])


@times(300, 5000)
def test_parse_hyp_takes_what_is_of_the_type_and_within_the_limits_and_nothing_else(script, every):
    known = script.flat(script.hyp)
    numbers = (st.integers() | st.floats()).map(str) | st.sampled_from(['true', 'FALSE', 'yes'])

    def value(key, text):
        """The value that key=text gives, or None."""
        with contextlib.suppress(KeyError, ValueError):
            kind, (low, high) = type(known[key]), LIMITS[key]
            number = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
            return number if low <= number <= high else None

    texts = KEYS.flatmap(lambda key: st.tuples(st.just(key), beside(key) | numbers | TEXT))

    @every(st.lists(texts, max_size=2).map(dict))
    def holds(texts):
        expected = {key: value(key, text) for key, text in texts.items()}
        if None in expected.values():
            with pytest.raises(script.UserError):
                script.parse_hyp(texts, known)
        else:
            values = script.parse_hyp(texts, known)
            assert values == expected and all(type(values[key]) is type(known[key]) for key in values)


@times(100, 2000)
def test_hyp_is_as_before_after_any_overrides(script, every):
    @every(st.dictionaries(KEYS, st.integers() | st.none()), st.booleans())
    def holds(values, fails):
        before = script.flat(copy.deepcopy(script.hyp))
        with left_as_it_was(script.hyp), contextlib.suppress(AttributeError, TypeError, ZeroDivisionError):
            with script.overrides(values):
                assert values.keys() - LIMITS or script.flat(script.hyp) == {**before, **values}
                fails and 1 / 0


LOSSES = st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e30, math.log(10), None]).map(lambda x: {'train_loss': x})
RUN = st.fixed_dictionaries({
    'tta_acc': st.integers(0, 16).map(lambda i: i / 16), 'epochs': st.lists(LOSSES, min_size=1, max_size=2),
    'clock_seconds': st.sampled_from([1e-9, 1e-6, 3.25, 3.25, 3.26, 1e4]),
    'wall_seconds': st.sampled_from([1e-9, 3.5, 59.9996, 1e6])})
NAMES = st.sampled_from(['a', 'modified', 'nan', 'inf opt.lr=9', 'Average', 'x #2'])


@times(100, 2000)
def test_table_of_any_runs_is_aligned_and_has_no_unmarked_figure(script, every):
    equal = st.builds(lambda run, n: [run] * n, RUN, st.integers(1, 7))

    @every(st.dictionaries(NAMES, equal | st.lists(RUN, min_size=1, max_size=7), min_size=1, max_size=3),
           st.integers(1, 4), st.integers(0, 16).map(lambda i: 6.25 * i) | st.floats(0, 100))
    def holds(arms, per_trial, target):
        runs = [{'arm': name, 'trial': 1 + i // per_trial, 'run': 1 + i % per_trial, **run}
                for name, members in arms.items() for i, run in enumerate(members)]
        assert_table(script.table(runs, target), runs, target)
