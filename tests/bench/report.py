"""Report: the table of the arms, and a sentence about each comparison."""

import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench import records, stats
from bench.compare import (
    Comparison,
    accuracies,
    compare,
    counted,
    diverged,
    flop,
    times,
    without_diverged,
    without_gap,
)
from bench.errors import UserError, one_line
from bench.records import Run

WIDTH = 100  # of what is piped
TARGET = 94.0
MOST_DIVERGED = 10  # so many are named
GAP = '  '  # between columns


@dataclass
class Results:
    """The runs of an experiment or of logs, and how they are to be judged."""

    arms: dict[str, list[Run]]  # the first is the reference
    target: float = TARGET
    margin: float | None = None
    until_sure: float | None = None  # points; the looks are those of `planned` runs
    planned: int = 0
    searched: bool = False  # arms of a sweep
    with_times: bool = True  # those of a busy machine say nothing
    common: list[str] = field(default_factory=list)  # lines on what --hyp gave all arms
    notes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        return next(iter(self.arms))


class QuietConsole(Console):
    """rich's Console without markup in names; a notebook and a pipe get plain text."""

    def __init__(self, file=None):
        file = file or sys.stdout
        terminal = file.isatty()
        super().__init__(
            file=file,
            width=None if terminal else WIDTH,
            force_terminal=terminal and not in_notebook(),
            markup=False,
            highlight=False,
            emoji=False,
        )

    def on_broken_pipe(self):
        raise BrokenPipeError


def in_notebook() -> bool:
    """Return whether a cell's `!` started this: a terminal that shows no escape codes."""
    backend = os.environ.get('MPLBACKEND', '')
    return 'JPY_PARENT_PID' in os.environ or 'inline' in backend


# ---------------------------------------- Logs to judge ----------------------------------------


def results_of(logs: list[str], given: dict) -> Results:
    """Return the runs of logs, judged as their experiment was unless `given` says otherwise.

    given: what `show` got of target, margin, reference, label, no_time.
    """
    log = records.read(logs)
    logged = log.experiment['options'] if log.experiment else {}
    arms = records.by_arm(log.runs)
    if not arms:
        names = ', '.join(map(one_line, logs))
        raise UserError(f'{names}: no finished run yet')
    reference = given.get('reference')
    another_reference = reference is not None and reference != next(iter(arms))
    arms = put_reference_first(arms, reference)
    common = common_lines(log.common, arms)
    until_sure = logged.get('until_sure')
    planned = logged.get('runs', 0)
    if another_reference and until_sure:
        until_sure = None
        planned = 0
        log.notes.append(
            'These arms were stopped by --until-sure with another reference: '
            'p and intervals do not allow for its looks'
        )
    return Results(
        label_arms(arms, given.get('label', [])),
        target=given.get('target', logged.get('target', TARGET)),
        margin=given.get('margin', logged.get('margin')),
        until_sure=until_sure,
        planned=planned,
        searched=bool(logged.get('sweep')),
        with_times=not given.get('no_time'),
        common=common,
        notes=log.notes,
        folders=logs,
    )


def put_reference_first(arms: dict, reference: str | None) -> dict:
    """Return the arms in an order where `reference` is the first."""
    if reference is None:
        return arms
    if reference not in arms:
        raise UserError(f'--reference {one_line(reference)}: there are {", ".join(arms)}')
    return {reference: arms[reference], **arms}


def label_arms(arms: dict, labels: list[str]) -> dict:
    """Return the arms with other names: 'ARM=TEXT', in which ARM may have = itself."""
    texts = {}
    for label in labels:
        names = [name for name in arms if label.startswith(f'{name}=')]
        if not names:
            raise UserError(f'--label {one_line(label)}: there are {", ".join(arms)}')
        name = max(names, key=len)
        texts[name] = one_line(label[len(name) + 1 :])
    labelled = {}
    for name, runs in arms.items():
        text = texts.get(name, name)
        if text in labelled:
            raise UserError(f'--label: two arms would be called {text}')
        labelled[text] = runs
    return labelled


# ---------------------------------------- Text ----------------------------------------


def duration(seconds: float) -> str:
    """Return '42s', '3m 07s' or '2h 05m'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m {seconds % 60:02d}s'
    return f'{seconds // 3600}h {seconds % 3600 // 60:02d}m'


def with_interval(estimate: stats.Estimate, digits: int, unit: str) -> str:
    """Return '94.01 +- 0.03 %'."""
    text = f'{estimate.value:.{digits}f}'
    if not math.isnan(estimate.low):
        text += f' +- {estimate.half:.{digits}f}'
    return f'{text} {unit}'


def digits_of(seconds: float) -> int:
    """Return how many digits a time is shown with: four in front and behind the point."""
    if seconds < 10:
        return 3
    return 2 if seconds < 100 else 1


def points_text(difference: stats.Estimate) -> str:
    """Return '-1.11 points (-1.20 to -1.02)'."""
    return f'{difference.value:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f})'


def p_text(p: float) -> str:
    """Return 'p < 0.001' or 'p = 0.031'; near 0.05 with four digits."""
    if p < 0.001:
        return 'p < 0.001'
    digits = 4 if abs(p - stats.ALPHA) < 0.0005 else 3
    return f'p = {p:.{digits}f}'


def whole(name: str) -> str:
    """Return a name that `wrapped` does not break: textwrap breaks at plain spaces only."""
    return name.replace(' ', '\u00a0')


def wrapped(text: str, width: int, indent: str = '') -> str:
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return '\n'.join(lines).replace('\u00a0', ' ')


# ---------------------------------------- The table ----------------------------------------


def table_columns(results: Results) -> dict[str, list[str]]:
    """Return the cells of each column: those that say nothing are left out."""
    arms = results.arms
    reference = arms[results.reference]
    columns: dict[str, list[str]] = {}
    target = f'>={results.target:g}%'
    for runs in arms.values():
        n = len(runs)
        spread = stats.std(accuracies(runs))
        reached = int(sum(accuracies(runs).round(6) >= results.target))
        average = stats.mean(times(runs))
        cells = {
            'n': str(n),
            'Accuracy': with_interval(stats.mean(accuracies(runs)), 2, '%'),
            'Std': '' if math.isnan(spread) else f'{spread:.2f}',
            target: f'{reached}/{n}',
            'Diverged': f'{len(diverged(runs))}/{n}',
        }
        if results.with_times:
            cells['Time/run'] = with_interval(average, digits_of(average.value), 's')
        if len(arms) > 1 and all(map(flop, arms.values())):
            cells['Cost'] = f'{flop(runs) / flop(reference):.3f}'
        for head, cell in cells.items():
            columns.setdefault(head, []).append(cell)
    for head in (target, 'Diverged'):
        if all(cell.startswith('0/') for cell in columns[head]):
            del columns[head]
    return columns


def table_lines(names: list[str], columns: dict[str, list[str]], width: int) -> list[str]:
    """Return the table's lines; a name that leaves no room for numbers gets a line of its own."""
    heads = ''
    rows = [''] * len(names)
    for head, cells in columns.items():
        cell_width = max(len(cell) for cell in [head, *cells])
        heads += GAP + head.ljust(cell_width)
        for i, cell in enumerate(cells):
            rows[i] += GAP + cell.ljust(cell_width)
    room = width - len(heads)
    fitting = [len(name) for name in names if len(name) <= room]
    name_width = max([3, *fitting])
    lines = ['Arm'.ljust(name_width) + heads]
    for name, row in zip(names, rows, strict=True):
        if len(name) > name_width:
            lines.append(name)
            name = ''
        lines.append(name.ljust(name_width) + row)
    return [line.rstrip() for line in lines]


def legend_line(results: Results, columns: dict[str, list[str]]) -> str:
    """Return what the columns mean, and those that were left out."""
    text = 'Accuracy: with TTA. +-: 95% confidence interval of the mean. Std: of a run, in points.'
    if results.with_times:
        text += ' Time: training time.'
    if 'Cost' in columns:
        text += f' Cost: FLOP of a run, relative to {whole(results.reference)}.'
    nothing = []
    if 'Diverged' not in columns:
        nothing.append('No run diverged.')
    if f'>={results.target:g}%' not in columns:
        nothing.append(f'No run reached {results.target:g}%.')
    return ' '.join([text, *nothing])


def diverged_lines(results: Results) -> list[str]:
    """Name the runs that diverged."""
    lines = []
    for name, runs in results.arms.items():
        for run in diverged(runs):
            lines.append(f'Diverged: {whole(name)}, run {run.turn or "?"}, {run.accuracy:.2f} %')
    if len(lines) > MOST_DIVERGED:
        more = len(lines) - MOST_DIVERGED
        return [*lines[:MOST_DIVERGED], f'Diverged: and {more} more']
    return lines


def chance_lines(results: Results) -> list[str]:
    """Name the runs that did not learn: within a point of guessing."""
    lines = []
    for name, runs in results.arms.items():
        for run in runs:
            if abs(run.accuracy - 100 / run.classes) < 1:
                where = f'{whole(name)}, run {run.turn or "?"}, {run.accuracy:.2f} %'
                lines.append(f'At chance: {where}; try a lower opt.lr or more epochs')
    return lines[:MOST_DIVERGED]


# ---------------------------------------- Comparisons ----------------------------------------


@dataclass
class Judged:
    """A comparison, and the sentence about it."""

    name: str
    comparison: Comparison
    difference: stats.Difference
    sentence: str


def verdict(name: str, results: Results, comparison: Comparison, p: float) -> str:
    """Return a sentence: better, worse, no difference shown, or no verdict."""
    reference = whole(results.reference)
    value = comparison.difference().value
    if not comparison.same_data:
        return (
            f'{whole(name)}: no verdict, as its data are not shown to be those of {reference} '
            f'({whole(comparison.n_text)})'
        )
    facts = f'({whole(comparison.n_text)}, {whole(p_text(p))})'
    if p < stats.ALPHA:
        word = 'better' if value > 0 else 'worse'
        return f'{whole(name)} is {word} than {reference} by {abs(value):.2f} points {facts}'
    return f'{whole(name)}: no difference from {reference} shown {facts}'


def sequential_verdict(name: str, results: Results, decision: stats.Decision) -> str:
    """Return the sentence of --until-sure."""
    name, reference = whole(name), whole(results.reference)
    points = abs(decision.difference.value)
    if decision.look == 0:
        return f'{name}: not judged before the first look ({whole(counted(decision.n, "pair"))})'
    facts = f'({whole(counted(decision.n, "pair"))}, {whole(f"look {decision.look}")})'
    if decision.verdict in ('better', 'worse'):
        return f'{name} is {decision.verdict} than {reference} by {points:.2f} points {facts}'
    if decision.verdict == 'equal':
        limit = f'{results.until_sure:g} points'
        return f'{name}: a difference from {reference} of {limit} is ruled out {facts}'
    return (
        f'{name}: undecided; neither a difference from {reference} nor its absence is shown {facts}'
    )


def judge(results: Results, compared: dict[str, Comparison]) -> list[Judged]:
    """Return the verdicts of fixed numbers of runs."""
    names = [name for name, comparison in compared.items() if comparison.same_data]
    adjusted = stats.holm([compared[name].difference().p for name in names])
    p_values = dict(zip(names, adjusted, strict=True))
    judged = []
    for name, comparison in compared.items():
        sentence = verdict(name, results, comparison, p_values.get(name, math.nan))
        judged.append(Judged(name, comparison, comparison.difference(), sentence))
    return judged


def judge_looks(results: Results, compared: dict[str, Comparison]) -> list[Judged]:
    """Return the verdicts of --until-sure: of the turns that a look has seen."""
    looks, p = stats.sequential_plan(results.planned, len(results.arms) - 1)
    judged = []
    for name, comparison in compared.items():
        sample = without_gap(comparison.sample)
        reference = without_gap(comparison.reference)
        decision = stats.sequential(
            accuracies(sample), accuracies(reference), looks, p, results.until_sure
        )
        seen = compare(sample[: decision.n], reference[: decision.n])
        sentence = sequential_verdict(name, results, decision)
        judged.append(Judged(name, seen, decision.difference, sentence))
    return judged


def margin_clause(comparison: Comparison, margin: float) -> str:
    """Return a clause on non-inferiority, by the low end of the 90% interval."""
    bound = comparison.difference(1 - 2 * stats.ALPHA).low
    shown = f'(one-sided 95% bound {bound:+.2f})'
    if bound > -margin:
        return f'not inferior by more than {margin:g} points {shown}'
    return f'non-inferiority by {margin:g} points not shown {shown}'


def numbers_line(one: Judged, with_times: bool) -> str:
    """Return the difference, the ratio of training times and that of costs."""
    parts = [points_text(one.difference)]
    if with_times and one.comparison.same_device:
        ratio = one.comparison.time_ratio()
        parts.append(f'time x {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})')
    cost = one.comparison.cost_ratio
    if cost is not None:
        parts.append(f'cost x {cost:.3f}')
    return ', '.join(map(whole, parts))


def diverged_clause(comparison: Comparison) -> tuple[str, str]:
    """Return what a sentence says of diverged runs, and the line of numbers without them.

    The interval of that line is of 95 %.
    """
    bad = [*diverged(comparison.sample), *diverged(comparison.reference)]
    if not bad:
        return '', ''
    make = 'makes' if len(bad) == 1 else 'make'
    clause = f'; {counted(len(bad), "diverged run")} {make} this interval'
    rest = without_diverged(comparison)
    if min(len(rest.sample), len(rest.reference)) < 2:
        return clause, ''
    difference = rest.difference()
    it = 'it' if len(bad) == 1 else 'them'
    return clause, f'without {it}: {whole(points_text(difference))} (95%), {whole(rest.n_text)}'


def judged_arms(results: Results) -> list[Judged]:
    """Return the judged comparison of each arm that has two runs or more with the reference."""
    base = results.arms[results.reference]
    compared = {}
    for name, runs in results.arms.items():
        if results.until_sure:
            turns = min(len(without_gap(runs)), len(without_gap(base)))
        else:
            turns = min(len(runs), len(base))
        if name != results.reference and turns >= 2:
            compared[name] = compare(runs, base)
    if results.until_sure:
        return judge_looks(results, compared)
    return judge(results, compared)


def comparison_lines(results: Results, width: int) -> list[str]:
    """Return a sentence and the numbers for each arm, and how they came about."""
    judged = judged_arms(results)
    known = [results.reference, *(one.name for one in judged)]
    lines = []
    for name in results.arms:
        if name not in known:
            lines.append(f'{name}: fewer than two runs, no comparison')
    if not judged:
        return lines
    for one in judged:
        clause, rest = diverged_clause(one.comparison)
        sentence = one.sentence + clause
        if results.margin is not None and one.comparison.same_data:
            sentence += '; ' + margin_clause(one.comparison, results.margin)
        lines.append(wrapped(sentence, width))
        lines.append(wrapped(numbers_line(one, results.with_times), width, '    '))
        if rest:
            lines.append(wrapped(rest, width, '    '))
    return lines + [wrapped(line, width) for line in method_lines(results, judged)]


def method_lines(results: Results, judged: list[Judged]) -> list[str]:
    """Return how the sentences came about."""
    number = sum(one.comparison.same_data for one in judged)
    if results.until_sure:
        looks, p = stats.sequential_plan(results.planned, len(results.arms) - 1)
        every = ', '.join(map(str, looks))
        comparisons = counted(len(results.arms) - 1, 'comparison')
        lines = [
            f'Compared turn by turn (paired t-test). Looks after {every} turns; one decides at '
            f'{whole(f"p < {p:.4f}")}, so that all looks and {comparisons} together give 5% of '
            'false alarms (Pocock, Bonferroni). Intervals of accuracy are of that level.'
        ]
    else:
        lines = [paired_or_welch(judged)]
        if number > 1:
            lines[0] += f' p is adjusted for {number} comparisons (Holm).'
        turns = max(map(len, results.arms.values()))
        if turns < results.planned:
            lines.append(
                f'{turns} of {results.planned} planned turns: p and intervals hold only if the '
                'results had no part in stopping here.'
            )
    if results.searched:
        lines.append('Found by search: confirm the winner with `run` on new seeds.')
    return lines


def paired_or_welch(judged: list[Judged]) -> str:
    """Return which test the comparisons used."""
    kinds = {one.comparison.pairs for one in judged}
    if kinds == {True}:
        return (
            'Compared turn by turn (paired t-test, 95% intervals): runs of a turn share their seed.'
        )
    if kinds == {False}:
        return (
            "Difference of means (Welch's t-test, 95% intervals): not every run has a partner of "
            'the same turn, seed and data.'
        )
    return (
        "Pairs: compared turn by turn (paired t-test). Others: difference of means (Welch's "
        't-test), as not every run has a partner of the same turn, seed and data. 95% intervals.'
    )


# ---------------------------------------- All of it ----------------------------------------


def machine_lines(results: Results) -> list[str]:
    """Return the devices, versions and data of the runs."""
    every = [run for runs in results.arms.values() for run in runs]
    lines = []
    for run in every:
        device = re.sub(r'\b1 threads\b', '1 thread', run.device or '')
        torch = f'torch {run.torch}' if run.torch else ''
        facts = [one_line(fact) for fact in (device, torch, run.dtype) if fact]
        line = ', '.join(facts)
        if line not in lines:
            lines.append(line)
    if results.with_times and len({run.device for run in every}) > 1:
        lines.append('The runs come from several devices: their times cannot be compared.')
    if len({records.data_key(run) for run in every}) > 1:
        lines.append('The data differ, or the logs do not show that they are the same.')
    for run in every:
        line = f'Data: {describe_data(run)}'
        if line not in lines:
            lines.append(line)
    if results.with_times:
        warmups = [runs[0].warmup_seconds or 0 for runs in results.arms.values()]
        lines.append(f'Warm-up: {duration(sum(warmups))}')
    return lines


def data_name(run: Run) -> str:
    """Return the name of a run's data: the last part of a path."""
    name = str(run.data.get('name'))
    return one_line(Path(name).name or name)


def describe_data(run: Run) -> str:
    """Return 'cifar10 (50000 to train on, 10000 to test)'."""
    facts = run.data
    return f'{data_name(run)} ({facts.get("train")} to train on, {facts.get("test")} to test)'


def common_lines(changes: list[str], names) -> list[str]:
    """Return what --hyp gave the arms (by name), which an arm's own changes go before."""
    if not changes:
        return []
    keys = [change.partition('=')[0] for change in changes]
    overridden = any(f' {key}=' in name for key in keys for name in names)
    who = 'All arms, unless named otherwise' if overridden else 'All arms'
    return [f'{who}: {one_line(" ".join(changes))}']


def report_lines(results: Results, width: int) -> list[str]:
    """Return the table, the comparisons, and where it all comes from."""
    lines = [wrapped(line, width) for line in results.common]
    if results.arms:
        columns = table_columns(results)
        lines += table_lines(list(results.arms), columns, width)
        lines.append(wrapped(legend_line(results, columns), width))
        lines += [wrapped(line, width) for line in diverged_lines(results)]
        lines += [wrapped(line, width) for line in chance_lines(results)]
        if len(results.arms) > 1:
            lines += ['', *comparison_lines(results, width)]
        lines += ['', *machine_lines(results)]
    lines += [f'Note: {note}' for note in results.notes]
    lines += [f'Log: {one_line(folder)}' for folder in results.folders]
    return lines


def print_report(console: Console, results: Results):
    """Print the report; no line is broken but where this module breaks it."""
    for line in report_lines(results, console.width):
        console.print(line, soft_wrap=True)
