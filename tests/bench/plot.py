"""Figures of logs: training curves, accuracies, differences, and accuracy against cost.

Arms of a family share a hue and a marker. A family is what stands before a colon in an arm's name
('24 pixels: 4 epochs'), or else the name of its script.
"""

import io
import os
import textwrap

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from bench import records, stats
from bench.compare import accuracies, compare, flop
from bench.errors import UserError, one_line
from bench.records import Run
from bench.report import describe_data

PANELS = ('curves', 'accuracy', 'difference', 'cost')
WIDTH = 6.8  # inches, for the text width of a page
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'legend.fontsize': 8, 'lines.linewidth': 1.2}
HUES = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')  # Okabe and Ito
MARKERS = ('o', 's', '^', 'D', 'v', 'P')
LINES = ('-', '--', '-.', ':')
PALEST = 0.5  # share of white in the last arm of a family
NAME_WIDTH = 40  # characters of a line of an arm's name
PLACES = [  # of a name beside its point: the nearest first
    (6, 0, 'left'),
    (-6, 0, 'right'),
    (5, 9, 'left'),
    (-5, 9, 'right'),
    (5, -9, 'left'),
    (-5, -9, 'right'),
    (6, 18, 'left'),
    (-6, 18, 'right'),
    (6, -18, 'left'),
    (-6, -18, 'right'),
]
CURVES = [
    ('train_loss', 1.0, 'loss of the last batch'),
    ('test_acc', 100.0, 'test accuracy (%)'),
]


class Drawing(Figure):
    """A Figure that a notebook shows, whatever its backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format='png', dpi=100)
        return buffer.getvalue()


# ---------------------------------------- Options ----------------------------------------


def check_suffix(path: str):
    """Raise UserError where matplotlib cannot write such a file."""
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if os.path.splitext(path)[1].lower().lstrip('.') not in kinds:
        raise UserError(f'--plot {one_line(path)}: its suffix must be one of {", ".join(kinds)}')


def panel_names(text: str) -> list[str]:
    """Return the panels of 'accuracy,cost'. Raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in PANELS:
            raise UserError(f'--panels {one_line(name)}: there are {", ".join(PANELS)}')
    return names


def differences_of(arms: dict) -> dict[str, stats.Difference]:
    """Return the difference of each arm with two runs or more from the first."""
    (_, base), *others = arms.items()
    found = {}
    for name, runs in others:
        if min(len(runs), len(base)) >= 2:
            found[name] = compare(runs, base).difference()
    return found


def missing(panel: str, arms: dict[str, list[Run]]) -> str:
    """Return why a panel cannot be drawn; '' where it can."""
    every = [run for runs in arms.values() for run in runs]
    if panel == 'curves' and max(len(run.epochs) for run in every) < 2:
        return 'the logs have no epochs but the last'
    if panel == 'curves' and not curve_kinds(arms):
        return 'no loss is finite'
    if panel == 'difference' and not differences_of(arms):
        return 'there are no two arms with two runs each'
    if panel == 'cost' and not all(map(flop, arms.values())):
        return 'the cost of an arm is not known'
    return ''


def panels_of(arms: dict[str, list[Run]], wanted: list[str] | None) -> list[str]:
    """Return the panels to draw: those wanted, or all that show something."""
    if wanted is not None:
        for panel in wanted:
            reason = missing(panel, arms)
            if reason:
                raise UserError(f'--panels {panel}: {reason}')
        return wanted
    panels = [panel for panel in PANELS if not missing(panel, arms)]
    if 'cost' in panels:
        costs = [flop(runs) for runs in arms.values()]
        if max(costs) < 1.01 * min(costs):
            panels.remove('cost')
    return panels


# ---------------------------------------- Looks of an arm ----------------------------------------


def family(name: str, runs: list[Run]) -> str:
    """Return which arms an arm belongs with."""
    before, colon, _ = name.partition(':')
    if colon:
        return before
    if runs[0].script:
        return records.script_name({'script': runs[0].script})
    return name


def short(name: str) -> str:
    """Return an arm's name without its family, which the legend tells."""
    return name.partition(': ')[2] or name


def looks_of(arms: dict[str, list[Run]]) -> dict[str, dict]:
    """Return colour, marker and line style of each arm."""
    families: dict[str, list] = {}
    for name, runs in arms.items():
        families.setdefault(family(name, runs), []).append(name)
    looks = {}
    for i, members in enumerate(families.values()):
        hue = np.array(to_rgb(HUES[i % len(HUES)]))
        for j, name in enumerate(members):
            white = PALEST * j / max(1, len(members) - 1)
            looks[name] = {
                'color': tuple(hue + (1 - hue) * white),
                'marker': MARKERS[i % len(MARKERS)],
                'linestyle': LINES[j % len(LINES)],
            }
    return {name: looks[name] for name in arms}


# ---------------------------------------- Curves ----------------------------------------


def curve(run: Run, key: str, scale: float) -> dict:
    """Return {epoch: value} of a run, without epochs that have no value."""
    return {row['epoch']: scale * row[key] for row in run.epochs if row.get(key) is not None}


def draw_curves(axes, arms: dict, looks: dict, kind: tuple):
    """Draw each run as a thin line, the mean of each arm as a thick one."""
    key, scale, label = kind
    for name, runs in arms.items():
        color = looks[name]['color']
        style = looks[name]['linestyle']
        by_epoch: dict[float, list] = {}
        for run in runs:
            points = curve(run, key, scale)
            axes.plot(list(points), list(points.values()), color=color, lw=0.4, alpha=0.25)
            for epoch, value in points.items():
                by_epoch.setdefault(epoch, []).append(value)
        epochs = sorted(by_epoch)
        means = [np.mean(by_epoch[epoch]) for epoch in epochs]
        axes.plot(epochs, means, style, color=color, lw=1.6)
        if key == 'test_acc' and epochs:
            ends = [epochs[-1], epochs[-1] + 0.5]
            tta = accuracies(runs).mean()
            axes.plot(ends, [means[-1], tta], ':', color=color)
            axes.plot(ends[1:], [tta], looks[name]['marker'], color=color, ms=4)
    axes.set_xlabel('epoch')
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def curve_kinds(arms: dict) -> list[tuple]:
    """Return the kinds of curves that some run has: no empty panels."""
    kinds = []
    for kind in CURVES:
        if any(curve(run, kind[0], 1.0) for runs in arms.values() for run in runs):
            kinds.append(kind)
    return kinds


# ---------------------------------------- Rows of arms ----------------------------------------


def draw_accuracies(axes, arms: dict, looks: dict, target: float):
    """Draw every run as a dot, and below the mean of the arm with its 95% interval."""
    for i, (name, runs) in enumerate(arms.items()):
        values = accuracies(runs)
        spread = np.random.default_rng(i).uniform(-0.15, 0.15, len(runs))  # fewer overlaps
        style = {'color': looks[name]['color'], 'ms': 3.5, 'mew': 0, 'alpha': 0.7}
        axes.plot(values, i - 0.12 + spread, looks[name]['marker'], **style)
        average = stats.mean(values)
        half = np.nan_to_num(average.half)
        axes.errorbar(average.value, i + 0.26, xerr=half, fmt='|k', capsize=2.5, ms=7)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -1), min(high, 101))  # an interval of two runs may go beyond
    if low <= target <= high + (high - low):
        axes.axvline(target, color='black', linestyle=':')
    axes.set_xlabel('TTA accuracy (%)')
    axes.set_title('Each run; mean, 95% interval')


def draw_differences(axes, arms: dict, looks: dict, differences: dict):
    """Draw the difference of each arm from the first, with its interval."""
    axes.axvline(0, color='black', lw=0.8)
    for i, name in enumerate(arms):
        if name not in differences:
            continue
        difference = differences[name]
        style = {'color': looks[name]['color'], 'marker': looks[name]['marker']}
        axes.errorbar(difference.value, i, xerr=difference.half, ms=4, capsize=2.5, **style)
        text = f'{difference.value:+.2f}'
        axes.annotate(text, (difference.value, i), (0, 4), textcoords='offset points', ha='center')
    axes.set_xlabel('points')


def finish_rows(axes, arms: dict, named: bool):
    """Give the arms their rows, the reference on top, and their names if this panel has them."""
    axes.set_ylim(len(arms) - 0.5, -0.7)
    names = []
    if named:
        for name, runs in arms.items():
            names.append(textwrap.fill(f'{name}, n\u00a0=\u00a0{len(runs)}', NAME_WIDTH))
    axes.set_yticks(range(len(arms)), names or [''] * len(arms))
    axes.grid(axis='x', alpha=0.3)


# ---------------------------------------- Cost ----------------------------------------


def draw_costs(axes, arms: dict, looks: dict):
    """Draw the mean of each arm, with its 95% interval, against its cost."""
    reference = flop(next(iter(arms.values())))
    for name, runs in arms.items():
        average = stats.mean(accuracies(runs))
        half = np.nan_to_num(average.half)
        style = {'color': looks[name]['color'], 'marker': looks[name]['marker']}
        cost = flop(runs) / reference
        axes.errorbar(cost, average.value, yerr=half, ms=4, capsize=2.5, **style)
    axes.margins(x=0.16, y=0.08)
    axes.set_xlabel(f'cost: FLOP of a run, relative to {next(iter(arms))}')
    axes.set_ylabel('TTA accuracy (%)')
    axes.grid(alpha=0.3)
    axes.set_title('Mean accuracy and 95% interval against cost')


def place_labels(drawing: Figure, axes, arms: dict):
    """Name the points of `draw_costs` where a name covers no other name, point or interval."""
    renderer = FigureCanvasAgg(drawing).get_renderer()
    drawing.draw_without_rendering()  # the layout is known from here on
    reference = flop(next(iter(arms.values())))
    points = []
    taken = []
    for runs in arms.values():
        average = stats.mean(accuracies(runs))
        half = np.nan_to_num(average.half)
        cost = flop(runs) / reference
        ends = [(cost, average.value - half), (cost, average.value + half)]
        taken.append(Bbox(axes.transData.transform(ends)).padded(3))
        points.append((cost, average.value))
    inside = axes.get_window_extent(renderer)
    for name, point in zip(arms, points, strict=True):
        best = None
        for place in PLACES:
            text = label(axes, short(name), point, *place)
            box = text.get_window_extent(renderer)
            text.remove()
            overlaps = sum(box.overlaps(other) for other in taken)
            if not inside.containsx(box.x1) or not inside.containsx(box.x0):
                overlaps += 10
            if best is None or overlaps < best[0]:
                best = overlaps, place, box
        label(axes, short(name), point, *best[1])
        taken.append(best[2])


def label(axes, text: str, point: tuple, dx: float, dy: float, align: str):
    """Write a text at a distance from a point, in points of type."""
    return axes.annotate(
        text,
        point,
        (dx, dy),
        textcoords='offset points',
        ha=align,
        va='center',
        fontsize=7,
    )


# ---------------------------------------- The figure ----------------------------------------


def legend_of(arms: dict, looks: dict, panels: list[str], with_tta: bool) -> tuple[list, list]:
    """Return lines and names of the one legend: arms of the curves, or else families."""
    lines = []
    names = []
    if 'curves' in panels:
        for name in arms:
            lines.append(Line2D([], [], **looks[name], ms=4))
            names.append(name)
        lines.append(Line2D([], [], color='grey', lw=0.4))
        names.append('thin: each run')
        if with_tta:
            lines.append(Line2D([], [], color='grey', linestyle=':', marker='o', ms=4))
            names.append('dotted, to the mark: with TTA after the last epoch')
        return lines, names
    for name, runs in arms.items():
        if family(name, runs) not in names:
            look = {**looks[name], 'linestyle': ''}
            lines.append(Line2D([], [], **look, ms=4))
            names.append(family(name, runs))
    if len(names) == 1:
        return [], []
    return lines, names


def figure(
    arms: dict[str, list[Run]],
    target: float = 94.0,
    panels: list[str] | None = None,
    judged: dict[str, stats.Difference] | None = None,
):
    """Return a Figure of the runs of each arm; the first arm is the reference.

    panels: some of PANELS; None: all that the logs have. judged: the differences that --until-sure
    decided on, by arm; None: those of all runs, with 95 % intervals.
    """
    arms = {name: runs for name, runs in arms.items() if runs}
    panels = panels_of(arms, panels)
    looks = looks_of(arms)
    kinds = curve_kinds(arms)
    rows = [panel for panel in ('accuracy', 'difference') if panel in panels]
    heights = []  # inches
    if 'curves' in panels:
        heights.append(2.5)
    if rows:
        heights.append(0.8 + 0.32 * len(arms))
    if 'cost' in panels:
        heights.append(3.4)
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(WIDTH, sum(heights) + 0.4), layout='constrained')
        parts = drawing.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
        parts = list(parts[:, 0])
        if 'curves' in panels:
            every = parts.pop(0).subplots(1, len(kinds), squeeze=False)[0]
            for axes, kind in zip(every, kinds, strict=True):
                draw_curves(axes, arms, looks, kind)
        if rows:
            every = parts.pop(0).subplots(1, len(rows), squeeze=False)[0]
            for axes, panel in zip(every, rows, strict=True):
                if panel == 'accuracy':
                    draw_accuracies(axes, arms, looks, target)
                else:
                    level = "--until-sure's interval"
                    if judged is None:
                        judged = differences_of(arms)
                        level = '95% interval'
                    draw_differences(axes, arms, looks, judged)
                    axes.set_title(f'Difference from {next(iter(arms))}; {level}')
                finish_rows(axes, arms, named=axes is every[0])
        if 'cost' in panels:
            cost_axes = parts.pop(0).subplots()
            draw_costs(cost_axes, arms, looks)
        lines, names = legend_of(arms, looks, panels, with_tta=len(kinds) == len(CURVES))
        if names:
            columns = min(len(names), 4) if max(map(len, names)) < 30 else 2
            drawing.legend(lines, names, loc='outside lower center', frameon=False, ncols=columns)
        sets = dict.fromkeys(describe_data(run) for runs in arms.values() for run in runs)
        drawing.suptitle('Data: ' + '; '.join(sets), fontsize=8)
        if 'cost' in panels:
            place_labels(drawing, cost_axes, arms)
    return drawing
