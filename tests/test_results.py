"""No figure without its log: what the READMEs say is computed anew from tests/bench/results."""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bench import cli, records, report
from bench.compare import accuracies, compare, times
from bench.stats import mean
from conftest import ROOT
from scipy import stats as scipy_stats

RESULTS = ROOT / 'tests' / 'bench' / 'results'
INDEX = RESULTS / 'README.md'
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())
READMES = [ROOT / 'README.md', ROOT / 'tests' / 'bench' / 'README.md', INDEX]
READMES += [folder / 'README.md' for folder in FOLDERS]

# An indented block that starts with the command, and then has lines that it prints, or none.
SHOW = re.compile(
    r' {4}\$ python (tests/bench show tests/bench/results/.*)\n((?:(?! {4}\$ )(?: {4}.*)?\n)+)'
)
COMMAND = re.compile(r'tests/bench show ((?:[^`\n\\]|\\\n)*)')
NUMBER = r'[+-]?\d+\.\d{2,3}'
FIGURES = [
    re.compile(rf'{NUMBER} \({NUMBER} to {NUMBER}\)'),  # a difference or a ratio
    re.compile(r'\d\d\.\d\d \+- \d\.\d\d %'),  # an accuracy
    re.compile(r'\d+\.\d+ \+- \d+\.\d+ s\b'),  # a time
]
LOST = '@2db97c8'  # the logs that this commit still has


def figures_in(text: str) -> list[str]:
    """All figures with an interval in a text."""
    plain = ' '.join(text.replace(' points', '').replace('*', '').split())
    plain = re.sub(rf'( to {NUMBER});[^)]*\)', r'\1)', plain)  # '(-0.06 to +0.11; n = 25)'
    return [found for pattern in FIGURES for found in pattern.findall(plain)]


def difference_texts(found) -> list[str]:
    """'-0.52 (-0.73 to -0.32)', and as a loss: '0.52 (0.32 to 0.73)', in both orders."""
    texts = [f'{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})']
    size, low, high = -found.value, -found.high, -found.low
    for ends in ((low, high), (high, low)):
        texts.append(f'{size:.2f} ({ends[0]:.2f} to {ends[1]:.2f})')
    texts.append(f'{size:.2f} ({found.low:+.2f} to {found.high:+.2f})')
    return texts


@functools.cache
def figures_of(*logs: Path) -> set[str]:
    """All figures that some logs have, whatever the reference."""
    arms = records.by_arm(records.read([str(log) for log in logs]).runs)
    found = set()
    for runs in arms.values():
        found.add(report.with_interval(mean(accuracies(runs)), 2, '%'))
        average = mean(times(runs))
        found.add(report.with_interval(average, report.digits_of(average.value), 's'))
    for sample, reference in itertools.permutations(arms.values(), 2):
        if min(len(sample), len(reference)) < 2:
            continue
        comparison = compare(sample, reference)
        found.update(difference_texts(comparison.difference()))
        ratio = comparison.time_ratio()
        for digits in (2, 3):
            ends = f'({ratio.low:.{digits}f} to {ratio.high:.{digits}f})'
            found.add(f'{ratio.value:.{digits}f} {ends}')
    results = report.results_of([str(log) for log in logs], {})
    found.update(figures_in('\n'.join(report.report_lines(results, 1000))))  # as --until-sure
    return found


# ---------------------------------------- Lost logs ----------------------------------------
@pytest.fixture(scope='session')
def lost_results(tmp_path_factory) -> Path:
    """The results of an earlier commit, where the clone has its history."""
    folder = tmp_path_factory.mktemp('lost')
    command = ['git', 'archive', LOST[1:], 'tests/bench/results']
    archive = subprocess.run(command, cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f'commit {LOST[1:]} is not in this clone')
    subprocess.run(['tar', '-x', '-C', folder], input=archive.stdout, check=True)
    return folder / 'tests' / 'bench' / 'results'


DESIGNS = {
    'h200-factors': [
        lambda hyp, arm: hyp['opt.batch_size'] == 768,
        lambda hyp, arm: hyp['opt.momentum'] == 0.9,
        lambda hyp, arm: hyp['opt.lr'] == 9,
        lambda hyp, arm: hyp['net.batchnorm_momentum'] == 0.75,
        lambda hyp, arm: arm.startswith('modified'),
        lambda hyp, arm: len(hyp['opt.small_sizes']) == 7,
        lambda hyp, arm: hyp['opt.weight_decay'] == 0.0115,
    ],
    'h200-factors-2': [
        lambda hyp, arm: hyp['opt.weight_decay'] == 0.02,
        lambda hyp, arm: hyp['opt.momentum'] == 0.8,
        lambda hyp, arm: hyp['opt.lr'] == 14,
        lambda hyp, arm: hyp['net.batchnorm_momentum'] == 0.5,
        lambda hyp, arm: hyp['opt.lr_end'] == 0,
        lambda hyp, arm: hyp['opt.label_smoothing'] == 0.15,
        lambda hyp, arm: hyp['opt.bias_scaler'] == 32,
        lambda hyp, arm: hyp['opt.whiten_bias_epochs'] == 1,
        lambda hyp, arm: hyp['opt.drop_noise'] == 0.5,
        lambda hyp, arm: hyp['opt.lr_peak'] == 0.15,
        lambda hyp, arm: len(hyp['opt.keep_shares']) == 10,
    ],
}


def effects_of(log: Path) -> set[str]:
    """The main effects of a factorial design by least squares, with their intervals."""
    runs = records.read([str(log)]).runs
    rows = []
    for run in runs:
        levels = [factor(run.hyp, run.arm) for factor in DESIGNS[log.name]]
        rows.append([1.0, *(float(level) - 0.5 for level in levels)])
    design = np.array(rows)
    outcome = accuracies(runs)
    effects = np.linalg.lstsq(design, outcome, rcond=None)[0]
    freedom = len(runs) - design.shape[1]
    variance = ((outcome - design @ effects) ** 2).sum() / freedom
    errors = np.sqrt(variance * np.linalg.inv(design.T @ design).diagonal())
    half = errors * scipy_stats.t.isf(0.025, freedom)
    texts = set()
    for effect, width in zip(effects[1:], half[1:], strict=True):
        texts.add(f'{effect:+.2f} ({effect - width:+.2f} to {effect + width:+.2f})')
    return texts


# ---------------------------------------- Tables ----------------------------------------
def rows_of_tables() -> list[tuple[str, str]]:
    """The rows of the tables of failures, each with its last cell: where its log is."""
    rows = []
    for line in INDEX.read_text().partition('## What was tried')[2].splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        logs = re.fullmatch(r'`(.*)`', cells[-1])
        if logs and figures_in(line):
            rows.append((line, logs.group(1)))
    return rows


@pytest.mark.parametrize('row, logs', rows_of_tables(), ids=lambda text: text.strip('| ')[:40])
def test_a_row_of_what_failed_is_what_its_log_says(row, logs, request):
    names = logs.removesuffix(LOST).split()
    folder = RESULTS
    if logs.endswith(LOST):
        folder = request.getfixturevalue('lost_results')
    if names[0] in DESIGNS:
        known = effects_of(folder / names[0])
    else:
        known = figures_of(*(folder / name for name in names))
    assert [figure for figure in figures_in(row) if figure not in known] == []


# ---------------------------------------- READMEs ----------------------------------------
def logs_of_commands() -> list[tuple]:
    """The logs of each `show` command of the READMEs."""
    found = {(str(folder.relative_to(ROOT)),): None for folder in FOLDERS}
    for readme in READMES:
        for text in COMMAND.findall(readme.read_text()):
            words = shlex.split(text.replace('\\\n', ' '), comments=True)
            logs = []
            for word in words:
                if word.startswith('-'):
                    break
                logs.append(word)
            if logs and all(log.startswith('tests/bench/results/') for log in logs):
                found[tuple(logs)] = None
    return list(found)


@pytest.fixture(scope='session')
def known() -> set[str]:
    """The figures of all logs, and of those that a command of a README takes together."""
    found = set()
    for logs in logs_of_commands():
        if all((ROOT / log).exists() for log in logs):
            found |= figures_of(*(ROOT / log for log in logs))
    return found


@pytest.mark.parametrize('readme', READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_with_an_interval_is_in_a_log(readme, known):
    text = readme.read_text()
    if readme == INDEX:
        text = text.partition('## What was tried')[0]
    assert [figure for figure in figures_in(text) if figure not in known] == []


@pytest.mark.parametrize('logs', logs_of_commands())
def test_a_command_of_a_readme_names_logs_that_are_there(logs):
    assert [log for log in logs if not (ROOT / log).exists()] == []


BLOCKS = [block for readme in READMES for block in SHOW.findall(readme.read_text())]


@pytest.mark.parametrize('command, lines', BLOCKS, ids=[text.split('/')[-1] for text, _ in BLOCKS])
def test_a_readme_shows_what_the_log_says(command, lines, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(shlex.split(command)[1:]) == 0
    printed = [*map(str.rstrip, out.getvalue().splitlines()), '...', '']
    assert [line for line in lines.splitlines() if line[4:].rstrip() not in printed] == []


def test_the_figures_that_this_file_looks_for():
    text = 'a -0.52 points\n(-0.73 to -0.32; n = 6), x 0.650 (0.636 to 0.665), '
    text += '93.66 +- 0.06 %, 1.1 +- 0.2 s'
    assert len(figures_in(text)) == 4
    loss = difference_texts(report.stats.Difference(-1.07, -1.17, -0.96, math.nan))
    assert '1.07 (0.96 to 1.17)' in loss and '-1.07 (-1.17 to -0.96)' in loss


# ---------------------------------------- Folders ----------------------------------------
@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_every_result_says_what_was_asked_and_has_its_runs(folder):
    assert (folder / 'README.md').read_text().startswith('Asked: ')
    assert list(folder.glob('runs*.jsonl'))
    assert f'[{folder.name}]({folder.name}/README.md)' in INDEX.read_text()
    figures = sorted(folder.glob('*.png'))
    assert all(figure.stat().st_size < 150_000 for figure in figures)


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_the_code_of_every_run_is_named(folder):
    """As `COMMIT:PATH` (sha256...), or a sha256 alone; git has what is named by commit."""
    text = (folder / 'README.md').read_text()
    runs = records.read([str(path) for path in sorted(folder.glob('*.jsonl'))]).runs
    assert [run.sha256 for run in runs if run.sha256[:8] not in text] == []
    for commit, path, digits in re.findall(r'`([0-9a-f]{7}):(\S+)`\s\(([0-9a-f]{8})', text):
        shown = subprocess.run(['git', 'show', f'{commit}:{path}'], cwd=ROOT, capture_output=True)
        if shown.returncode:
            pytest.skip(f'commit {commit} is not in this clone')
        assert hashlib.sha256(shown.stdout).hexdigest().startswith(digits)
