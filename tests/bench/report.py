"""What a person reads: the table of the arms, and a sentence about each comparison."""

import math
import sys
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import stats
from bench.errors import UserError, one_line
from bench.records import data_key

WIDTH = 100  # of what is piped


@dataclass
class Results:
    """The runs of an experiment or of logs, and how they are to be judged."""

    arms: dict[str, list[dict]]  # the first is the reference
    target: float = 94.0
    margin: float | None = None
    until_sure: float | None = None  # points; the looks are those of `planned` runs
    planned: int = 0
    searched: bool = False  # arms of a sweep
    with_clocks: bool = True  # those of a busy machine say nothing
    common: list[str] = field(default_factory=list)  # what --hyp gave all arms
    notes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @property
    def comparisons(self) -> int:
        return len(self.arms) - 1


class QuietConsole(Console):
    """rich's Console without markup in names, which leaves a closed pipe to its caller."""

    def __init__(self, file=None):
        file = file or sys.stdout
        width = None if file.isatty() else WIDTH
        super().__init__(file=file, width=width, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self):
        raise BrokenPipeError


# ---------------------------------------- An arm ----------------------------------------


def percent(runs: list[dict]) -> np.ndarray:
    """TTA accuracies in percent."""
    return 100 * np.array([run['tta_acc'] for run in runs])


def clocks(runs: list[dict]) -> np.ndarray:
    """Clocks in seconds."""
    return np.array([run['clock_seconds'] for run in runs])


def flop(runs: list[dict]) -> int | None:
    """FLOP of a run of the arm, where they were counted."""
    return runs[0].get('flop')


def classes(run: dict) -> int:
    """The number of classes of a run's data."""
    data = run.get('data')
    found = run.get('classes') or (data.get('classes') if isinstance(data, dict) else None) or 10
    return len(found) if isinstance(found, list) else found


def diverged(runs: list[dict]) -> list[dict]:
    """The runs of an arm that diverged."""
    losses = [[row['train_loss'] for row in run.get('epochs', [])] for run in runs]
    flags = stats.diverged(percent(runs), losses, [classes(run) for run in runs])
    return [run for run, bad in zip(runs, flags, strict=True) if bad]


def duration(seconds: float) -> str:
    """'42s', '3m 07s', '2h 05m'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m {seconds % 60:02d}s'
    return f'{seconds // 3600}h {seconds % 3600 // 60:02d}m'


def interval(estimate: stats.Estimate, digits: int, unit: str) -> str:
    """'94.01% +- 0.03'."""
    text = f'{estimate.value:.{digits}f}{unit}'
    return text if math.isnan(estimate.low) else f'{text} +- {estimate.half:.{digits}f}'


def p_text(p: float) -> str:
    return 'p < 0.001' if p < 0.001 else f'p = {p:.3f}'


# ---------------------------------------- The table ----------------------------------------


def arms_table(results: Results) -> Table:
    """A row for each arm."""
    reference = next(iter(results.arms.values()))
    with_cost = results.comparisons > 0 and all(flop(runs) for runs in results.arms.values())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column('Arm', overflow='fold')
    heads = ['n', 'Accuracy (95% CI)', 'Std', f'>={results.target:g}%', 'Diverged']
    heads += ['Clock/run (95% CI)'] if results.with_clocks else []
    heads += ['Cost'] if with_cost else []
    for head in heads:
        table.add_column(head, no_wrap=True)
    for name, runs in results.arms.items():
        accuracies, n = percent(runs), len(runs)
        spread = stats.std(accuracies)
        cells = [
            name,
            str(n),
            interval(stats.mean(accuracies), 2, '%'),
            '' if math.isnan(spread) else f'{spread:.2f}',
            f'{int(sum(accuracies.round(6) >= results.target))}/{n}',
            f'{len(diverged(runs))}/{n}',
        ]
        if results.with_clocks:
            cells.append(interval(stats.mean(clocks(runs)), 3, 's'))
        if with_cost:
            cells.append(f'x {flop(runs) / flop(reference):.3f}')
        table.add_row(*cells)
    return table


def diverged_lines(results: Results, most: int = 10) -> list[str]:
    """Which runs diverged: named, but not dropped."""
    lines = []
    for name, runs in results.arms.items():
        for run in diverged(runs):
            lines.append(f'Diverged: {name}, run {run.get("run", "?")}, {run["tta_acc"]:.2%}')
    if len(lines) > most:
        return [*lines[:most], f'Diverged: and {len(lines) - most} more']
    return lines


# ---------------------------------------- The comparisons ----------------------------------------


def verdict(name: str, reference: str, difference: stats.Difference, p: float, sizes: tuple) -> str:
    """A sentence: better, worse, or no difference shown."""
    if p < stats.ALPHA:
        word = 'better' if difference.value > 0 else 'worse'
        return (
            f'{name} is {word} than {reference} by {abs(difference.value):.2f} points ({p_text(p)})'
        )
    n = ' and '.join(str(size) for size in dict.fromkeys(sizes))
    return f'{name}: no difference from {reference} shown at n = {n} ({p_text(p)})'


def margin_clause(sample, reference, margin: float) -> str:
    """Non-inferiority: the one-sided 95% bound is that of the two-sided 90% interval."""
    bound = stats.welch(sample, reference, 1 - 2 * stats.ALPHA).low
    shown = f'(one-sided 95% bound {bound:+.2f})'
    if bound > -margin:
        return f'not inferior by more than {margin:g} points {shown}'
    return f'non-inferiority by {margin:g} points not shown {shown}'


def sequential_sentence(
    name: str, reference: str, decision: stats.Decision, results: Results
) -> str:
    """The verdict of --until-sure."""
    change = decision.difference
    if decision.verdict in ('better', 'worse'):
        text = f'{name} is {decision.verdict} than {reference} by {abs(change.value):.2f} points'
    elif decision.verdict == 'equal':
        text = f'{name}: a difference from {reference} of {results.until_sure:g} points is excluded'
    else:
        text = f'{name}: undecided, neither a difference from {reference} nor its absence is shown'
    return f'{text}, n = {decision.n} (look {decision.look})'


def numbers_line(
    sample: list[dict], reference: list[dict], difference: stats.Estimate, with_clocks: bool
) -> str:
    """The difference, the ratio of clocks and that of costs."""
    text = f'{difference.value:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f})'
    if with_clocks:
        clock = stats.ratio(clocks(sample), clocks(reference))
        text += f', clock x {clock.value:.3f} ({clock.low:.3f} to {clock.high:.3f})'
    if flop(sample) and flop(reference):
        text += f', cost x {flop(sample) / flop(reference):.3f}'
    return text


def sequential_plan(runs: int, comparisons: int) -> tuple[list[int], float]:
    """The looks, and the p below which one decides: 5% over all looks and arms (Bonferroni)."""
    looks = stats.planned_looks(runs)
    return looks, stats.nominal_p(looks, stats.ALPHA / max(1, comparisons))


def without_gap(runs: list[dict]) -> list[dict]:
    """The runs of an arm up to the first turn that its log lacks: what a look may have seen."""
    return [run for turn, run in enumerate(runs, start=1) if run.get('run', turn) == turn]


def comparison_lines(results: Results) -> list[str]:
    """A sentence and the numbers for each arm."""
    (reference, base), *others = results.arms.items()
    pairs = [(name, runs) for name, runs in others if min(len(runs), len(base)) > 1]
    lines = [
        f'{name}: one run or none, no comparison'
        for name, runs in others
        if (name, runs) not in pairs
    ]
    if not pairs:
        return lines
    differences = [stats.welch(percent(runs), percent(base)) for _, runs in pairs]
    adjusted = stats.holm([difference.p for difference in differences])
    looks, p_look = [], 0.0
    if results.until_sure:
        looks, p_look = sequential_plan(results.planned, results.comparisons)
    for (name, runs), difference, p in zip(pairs, differences, adjusted, strict=True):
        if results.until_sure:
            points = results.until_sure
            samples, seen = [without_gap(runs), without_gap(base)], looks
            if min(map(len, samples)) < 2:  # no look could be made: what there is
                samples, seen = [runs, base], []
            decision = stats.sequential(*map(percent, samples), seen, p_look, points)
            difference = decision.difference
            sentence = sequential_sentence(name, reference, decision, results)
        else:
            sentence = verdict(name, reference, difference, p, (len(runs), len(base)))
        if results.margin is not None:
            sentence += '; ' + margin_clause(percent(runs), percent(base), results.margin)
        numbers = numbers_line(runs, base, difference, results.with_clocks)
        lines += [sentence, f'    {numbers}']
    return lines + method_lines(results, len(pairs), looks, p_look)


def method_lines(results: Results, pairs: int, looks: list[int], p_look: float) -> list[str]:
    """How the sentences came about."""
    if results.until_sure:
        sentence = (
            f'Looks at {", ".join(map(str, looks))} runs per arm; one decides at p < {p_look:.4f}, '
            f'so that 5% holds over all looks and {results.comparisons} comparison(s) (Pocock, '
            'Bonferroni); intervals of that level.'
        )
    else:
        sentence = "Difference of means with Welch's 95% interval"
        sentence += f'; p adjusted for {pairs} comparisons (Holm).' if pairs > 1 else ' and p.'
    lines = [sentence]
    if results.searched:
        lines.append('Found by search: confirm the winner with `run` on new seeds.')
    return lines


# ---------------------------------------- All of it ----------------------------------------


def machine_lines(results: Results) -> list[str]:
    """The devices and versions that the runs were made with."""
    every = [run for runs in results.arms.values() for run in runs]
    kinds = {tuple(run.get(key) for key in ('device', 'torch', 'dtype')): None for run in every}
    heads = ('', 'torch ', '')
    lines = [
        ', '.join(head + one_line(fact) for head, fact in zip(heads, kind, strict=True) if fact)
        for kind in kinds
    ]
    if results.with_clocks and len({kind[0] for kind in kinds}) > 1:
        lines.append('The runs come from several devices: their clocks cannot be compared.')
    if len({data_key(run) for run in every}) > 1:
        lines.append('The data differ, or the logs do not show that they are the same.')
    sets = {one_line(describe_data(run)): None for run in every}
    warmups = sum(runs[0].get('warmup_seconds') or 0 for runs in results.arms.values())
    lines += [f'Data: {text}' for text in sets]
    return [*lines, f'Warm-up: {duration(warmups)}'] if results.with_clocks else lines


def describe_data(run: dict) -> str:
    """'cifar10 (50000 to train on, 10000 to test)'."""
    data = run.get('data')
    if isinstance(data, dict) and {'name', 'train', 'test'} <= data.keys():
        return f'{data["name"]} ({data["train"]} to train on, {data["test"]} to test)'
    return str(data)


def common_lines(changes: list[str], names) -> list[str]:
    """What --hyp gave the arms (by name), which an arm's own changes go before."""
    if not changes:
        return []
    keys = [change.partition('=')[0] for change in changes]
    overridden = any(f' {key}=' in name for key in keys for name in names)
    who = 'All arms, unless named otherwise' if overridden else 'All arms'
    return [f'{who}: {one_line(" ".join(changes))}']


def put_reference_first(arms: dict, reference: str | None) -> dict:
    """The arms in an order where `reference` is the first."""
    if reference is None:
        return arms
    if reference not in arms:
        raise UserError(f'--reference {one_line(reference)}: there are {", ".join(arms)}')
    return {reference: arms[reference], **arms}


def print_report(console: Console, results: Results):
    """The table, the comparisons, and where it all comes from."""
    for line in common_lines(results.common, results.arms):
        console.print(line)
    if results.arms:
        console.print(arms_table(results))
        lines = ['+-: 95% confidence interval of the mean. Std: of a run, in points.']
        lines += [*diverged_lines(results), '']
        if results.comparisons:
            lines += [*comparison_lines(results), '']
        for line in [*lines, *machine_lines(results)]:
            console.print(line)
    for note in results.notes:
        console.print(f'Note: {note}')
    for folder in results.folders:
        console.print(f'Log: {one_line(folder)}', soft_wrap=True)
