"""Figures of logs, for a column of a paper: panels 3.3 inches wide, readable in grey."""

import io
import os
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench import stats
from bench.errors import UserError, one_line
from bench.report import describe_data, flop, percent

PANEL = (3.3, 2.4)  # inches
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'legend.fontsize': 8, 'lines.linewidth': 1.0}
LINES = ('-', '--', '-.', ':')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
FEW_RUNS = 6  # so many can be told apart by their lines and named in a legend


class Drawing(Figure):
    """A Figure that a notebook shows, whatever its backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format='png', dpi=100)
        return buffer.getvalue()


def check_suffix(path: str):
    """Raises UserError where matplotlib cannot write such a file."""
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if os.path.splitext(path)[1].lower().lstrip('.') not in kinds:
        raise UserError(f'--plot {one_line(path)}: its suffix must be one of {", ".join(kinds)}')


def curve(run: dict, key: str, scale: float = 1.0) -> tuple[list, list]:
    """Epochs and values of a run's rows, without those that have no value."""
    rows = [row for row in run.get('epochs', []) if row.get(key) is not None]
    return [row['epoch'] for row in rows], [scale * row[key] for row in rows]


def panels_of(runs: list[dict]) -> list[tuple]:
    """(key, scale, label) of what the epochs of some runs can show: no empty panels."""
    kinds = [
        ('train_loss', 1.0, 'loss of the last batch'),
        ('test_acc', 100.0, 'test accuracy (%)'),
    ]
    return [kind for kind in kinds if any(curve(run, kind[0])[0] for run in runs)]


def has_curve(runs: list[dict]) -> bool:
    """Whether an arm's log has more of a run than its last epoch."""
    return any(len(run.get('epochs', [])) > 1 for run in runs)


def shades(n: int):
    """n colours from dark to light, which differ in grey too."""
    return matplotlib.colormaps['viridis'](np.linspace(0, 0.85, n))


def wrapped(name: str, runs: list[dict], width: int) -> str:
    """An arm's name and n in lines that fit. Uncut, as the names of a sweep differ in the end."""
    return textwrap.fill(f'{name}, n\u00a0=\u00a0{len(runs)}', width)


def draw_runs(axes, runs: list[dict], kind: tuple):
    """Each run as a line; in the panel of accuracies its TTA accuracy as the end point."""
    key, scale, label = kind
    by_accuracy = sorted(runs, key=lambda run: run['tta_acc'])
    named = by_accuracy if len(runs) <= FEW_RUNS else [by_accuracy[0], by_accuracy[-1]]
    for i, (run, shade) in enumerate(zip(by_accuracy, shades(len(runs)), strict=True)):
        epochs, values = curve(run, key, scale)
        text = f'run {run.get("run", "?")}: {run["tta_acc"]:.2%} TTA' if run in named else None
        axes.plot(epochs, values, LINES[i % 4], color=shade, label=text)
        if key == 'test_acc' and epochs:
            end, tta = epochs[-1] + 0.5, 100 * run['tta_acc']
            axes.plot(
                [epochs[-1], end], [values[-1], tta], ':', color=shade, marker=MARKERS[i % 8], ms=4
            )
    finish_panel(axes, label)


def draw_band(axes, arms: dict, kind: tuple):
    """Each arm's mean as a line, and the range of its runs as a band."""
    key, scale, label = kind
    for i, ((name, runs), shade) in enumerate(zip(arms.items(), shades(len(arms)), strict=True)):
        by_epoch = {}
        for run in runs:
            for epoch, value in zip(*curve(run, key, scale), strict=True):
                by_epoch.setdefault(epoch, []).append(value)
        epochs = sorted(by_epoch)
        values = [by_epoch[epoch] for epoch in epochs]
        style = {'color': shade, 'marker': MARKERS[i % 8], 'ms': 3}
        axes.plot(
            epochs,
            [np.mean(x) for x in values],
            LINES[i % 4],
            label=wrapped(name, runs, 90),
            **style,
        )
        axes.fill_between(
            epochs, [min(x) for x in values], [max(x) for x in values], color=shade, alpha=0.2
        )
    finish_panel(axes, label, legend=False)


def finish_panel(axes, label: str, legend=True):
    axes.set_visible(
        any(len(line.get_xdata()) for line in axes.lines)
    )  # its log may have no such values
    axes.set_xlabel('epoch')
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc='best', frameon=False)


def has_costs(arms: dict) -> bool:
    """Whether the costs of all arms are known, and differ by more than 1%."""
    costs = [flop(runs) for runs in arms.values()]
    return all(costs) and max(costs) > 1.01 * min(costs)


def tick_labels(arms: dict) -> list[str]:
    """The names of the arms, numbered where `draw_costs` refers to them."""
    numbers = [f'{i}. ' if has_costs(arms) else '' for i in range(1, len(arms) + 1)]
    return [
        wrapped(number + name, runs, 42)
        for number, (name, runs) in zip(numbers, arms.items(), strict=True)
    ]


def draw_dots(axes, arms: dict, target: float):
    """The TTA accuracy of every run as a dot, the mean of each arm with its 95% interval below."""
    for i, ((_, runs), shade) in enumerate(zip(arms.items(), shades(len(arms)), strict=True)):
        accuracies = percent(runs)
        spread = np.random.default_rng(i).uniform(-0.12, 0.12, len(runs))  # dots that overlap less
        axes.plot(accuracies, i + spread, MARKERS[i % 8], color=shade, ms=4, alpha=0.6, mew=0)
        average = stats.mean(accuracies)
        half = 0.0 if np.isnan(average.low) else average.half
        axes.errorbar(average.value, i + 0.28, xerr=half, fmt='|k', capsize=3, ms=8)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -1), min(high, 101))  # an interval of two runs may go beyond
    if low <= target <= high + (high - low):
        axes.axvline(target, color='black', linestyle=':')
    axes.set_ylim(len(arms) - 0.5, -0.5)  # the reference is on top
    axes.set_yticks(range(len(arms)), tick_labels(arms))
    axes.set_xlabel('TTA accuracy (%)')
    axes.grid(axis='x', alpha=0.3)
    axes.set_title('Accuracy of each run; mean, 95% interval')


def draw_costs(axes, arms: dict):
    """The mean of each arm, with its 95% interval, against its cost; numbered as in the dots."""
    reference, drawn = flop(next(iter(arms.values()))), []
    for i, (runs, shade) in enumerate(zip(arms.values(), shades(len(arms)), strict=True)):
        average, cost = stats.mean(percent(runs)), flop(runs) / reference
        half = 0.0 if np.isnan(average.low) else average.half
        style = {'color': shade, 'marker': MARKERS[i % 8], 'ms': 4, 'capsize': 3}
        axes.errorbar(cost, average.value, yerr=half, **style)
        near = [
            x for x in drawn if np.allclose(x, (cost, average.value), rtol=0, atol=(0.02, 0.05))
        ]
        corner = ((4, 3), (-10, -10), (4, -10), (-10, 3))[len(near) % 4]  # labels of equal arms
        axes.annotate(f'{i + 1}', (cost, average.value), corner, textcoords='offset points')
        drawn.append((cost, average.value))
    axes.set_xlabel('cost (1: that of arm 1)')
    axes.set_ylabel('TTA accuracy (%)')
    axes.grid(alpha=0.3)
    axes.set_title('Mean accuracy and 95% interval against cost')


def figure(arms: dict[str, list[dict]], target: float = 94.0) -> Figure:
    """The runs of each arm (name -> records) as curves, the arms together, a dot for every run,
    and the accuracy against cost, where all costs are known and differ.

    A notebook shows the Figure that is returned.
    """
    arms = {name: runs for name, runs in arms.items() if runs}
    curves = {name: runs for name, runs in arms.items() if has_curve(runs)}
    panels = panels_of([run for runs in curves.values() for run in runs])
    together = len(curves) > 1 and bool(panels)
    columns = max(1, len(panels))
    costs = has_costs(arms)
    rows = (len(curves) if panels else 0) + together + 1
    most_lines = max(1 + label.count('\n') for label in tick_labels(arms))
    heights = [PANEL[1]] * (rows - 1)  # inches
    if together:
        heights[-1] += 0.17 * sum(wrapped(*arm, 90).count('\n') + 1 for arm in curves.items())
    heights.append(0.8 + max(0.4, 0.13 * most_lines) * len(arms))
    heights += [1.2 * PANEL[1]] * costs
    with matplotlib.rc_context(STYLE):
        size = PANEL[0] * max(2, columns), sum(heights)  # the names need half of the width
        drawing = Drawing(figsize=size, layout='constrained')
        parts = drawing.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if panels:
            for part, (name, runs) in zip(parts, curves.items(), strict=False):
                title = f'Training Flow - {name} (Individual Runs)'
                part.suptitle(textwrap.fill(title, 90), fontsize=8)
                for axes, kind in zip(
                    part.subplots(1, columns, squeeze=False)[0], panels, strict=True
                ):
                    draw_runs(axes, runs, kind)
        if together:
            part = parts[rows - 2]
            part.suptitle('Training Flow - mean and range', fontsize=8)
            bands = part.subplots(1, columns, squeeze=False)[0]
            for axes, kind in zip(bands, panels, strict=True):
                draw_band(axes, curves, kind)
            lines, names = bands[0].get_legend_handles_labels()
            part.legend(lines, names, loc='outside lower center', frameon=False)
        draw_dots(parts[rows - 1].subplots(), arms, target)
        if costs:
            draw_costs(parts[-1].subplots(), arms)
        sets = dict.fromkeys(one_line(describe_data(run)) for runs in arms.values() for run in runs)
        parts[-1].supxlabel('Data: ' + '; '.join(sets), fontsize=8)
    return drawing
