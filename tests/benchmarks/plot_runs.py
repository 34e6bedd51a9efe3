"""Figures of finished experiments, from their log folders: training loss and accuracies by epoch.

    python tests/benchmarks/plot_runs.py logs/A --out f.pdf           one arm: its runs
    python tests/benchmarks/plot_runs.py logs/A logs/B --out f.pdf    all arms; f-<arm>.pdf: their runs

Training loss and accuracy are of an epoch's last batch, test accuracy is without test-time augmentation. In a
notebook, after `%run -n tests/benchmarks/plot_runs.py`, the runs that a script's main() returned (or those of
read_runs(['logs/A'])) show inline by

    %matplotlib inline
    display(*figures(runs).values())
"""
import argparse
import collections
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_baseline as baseline

SHOWN = 5  # individual runs in an arm's figure, as in the report
# Okabe and Ito's colours, in an order in which neighbours differ in lightness too
COLOURS = ('#0072B2', '#E69F00', '#000000', '#CC79A7', '#009E73', '#56B4E9', '#D55E00')
LINES, MARKERS = ('-', '--', '-.', ':'), 'os^DvPX*'  # 7 colours, 4 and 8 of these: no style twice in 56 arms
QUANTITIES = {'train_loss': ('training loss (left)', ('#000000', '-', 'o')),
              'train_acc': ('training accuracy (right)', ('#E69F00', '--', 's')),
              'test_acc': ('test accuracy (right)', ('#0072B2', '-.', '^'))}
UNMEASURED = 'test accuracy (not measured: --quiet)'


def curves(runs: list, key: str) -> np.ma.MaskedArray:
    """[run, epoch], accuracies in percent. Masked where the log has null: a loss not finite, --quiet."""
    values = np.array([[row[key] for row in run['epochs']] for run in runs], float)
    return np.ma.masked_invalid(values) * (1 if key == 'train_loss' else 100)


def draw(axes, values: np.ma.MaskedArray, style: tuple, width: float):
    y, (colour, line, marker) = values.filled(np.nan), style
    return axes.plot(np.arange(1, len(y) + 1), y, line, color=colour, marker=marker, ms=4, lw=width)[0]


def finish(figure, panels: dict, legend: dict, title: str | None = None):
    for label, axes in panels.items():
        axes.set(xlabel='Epoch', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        low, high = axes.dataLim.intervaly
        if 'loss' in label and 0 < 100 * low < high < np.inf:  # a diverging run would flatten all others
            axes.set_yscale('log')
    for columns in range(min(4, len(legend)), 0, -1):  # as many as fit
        box = figure.legend(legend.values(), legend, loc='outside lower center', ncols=columns, title=title,
                            fontsize=9, handlelength=3)
        if columns == 1 or box.get_window_extent().width < figure.bbox.width:
            break
        box.remove()
    figure.set_figheight(4.4 + 0.2 * -(-len(legend) // columns))
    return figure


def figure_of_runs(figure, arm: str, runs: list):
    left, legend = figure.subplots(), {}
    right = left.twinx()
    for key, (label, style) in QUANTITIES.items():
        values = curves(runs[:SHOWN], key)
        label = UNMEASURED if key == 'test_acc' and not values.count() else label
        for y in values:
            legend[label] = draw(left if key == 'train_loss' else right, y, style, 1)
    left.set_title(f'Training Flow - {arm[:1].upper()}{arm[1:]} (Individual Runs)')
    left.grid(alpha=0.3)
    shown = f'First {SHOWN} of {len(runs)} runs' if len(runs) > SHOWN else None
    return finish(figure, {'Training loss': left, 'Accuracy (%)': right}, legend, shown)


def figure_of_arms(figure, arms: dict):
    panels, legend = dict(zip(('Training loss', 'Test accuracy (%)'), figure.subplots(1, 2))), {}
    for i, (arm, runs) in enumerate(arms.items()):
        style = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        label, n_diverged = f'{arm}, n = {len(runs)}', len(baseline.diverged(runs))
        label += f', {n_diverged} diverged' * bool(n_diverged)
        for key, axes in zip(('train_loss', 'test_acc'), panels.values()):
            values = curves(runs, key)
            line = draw(axes, values.mean(0), style, 1.5)
            low, high = values.min(0).filled(np.nan), values.max(0).filled(np.nan)
            axes.fill_between(line.get_xdata(), low, high, color=style[0], alpha=0.2, linestyle=style[1])
            axes.grid(True, alpha=0.3)
            if key == 'train_loss' and values.mask.any():
                axes.set_title('finite losses only', fontsize=9)
        legend[label if values.count() else f'{label}, {UNMEASURED}'] = line
    figure.suptitle('Training Flow - Mean and Range of the Runs')
    figure.get_layout_engine().set(w_pad=0.1)
    return finish(figure, panels, legend)


def figures(runs: list) -> dict:
    """{arm: Figure of its runs}; where there are several arms, before these {'': Figure of all together}."""
    from matplotlib import figure, rc_context  # without pyplot nothing needs a display or has to be closed
    arms, drawn = baseline.group(runs, 'arm'), {}
    with rc_context({'text.parse_math': False}):  # names may contain $
        if len(arms) > 1:
            drawn[''] = figure_of_arms(figure.Figure((10, 4.6), layout='constrained'), arms)
        for arm, members in arms.items():
            drawn[arm] = figure_of_runs(figure.Figure((7, 4.6), layout='constrained'), arm, members)
    return drawn


def read_runs(folders: list) -> list:
    """The runs of the logs by arm, trial and run. An arm that several logs have is 'arm (log folder)'."""
    logs = {}
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        content, runs = baseline.read_log(folder)
        if not runs:
            raise baseline.UserError(f'{folder}: no run is finished')
        try:
            names = [arm['name'] for arm in content['arms']]
            logs[folder] = sorted(runs, key=lambda run: (names.index(run['arm']), run['trial'], run['run']))
            baseline.table(runs, 0)
            for members in baseline.group(runs, 'arm').values():
                [curves(members, key) for key in QUANTITIES]
        except (KeyError, TypeError, ValueError) as error:
            raise baseline.UserError(f'{folder} is no log folder of this version: {error!r}') from None
    known = collections.Counter(arm for runs in logs.values() for arm in baseline.group(runs, 'arm'))
    same = len({folder.name for folder in logs}) < len(logs)
    return [{**run, 'arm': run['arm'] + f' ({folder if same else folder.name})' * (known[run['arm']] > 1)}
            for folder, runs in logs.items() for run in runs]


def main():
    def fail(message):
        raise baseline.UserError(f'{message} (--help shows the usage)')
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument('logs', nargs='+', metavar='LOG', help='log folder of an experiment')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='.png, .svg or .pdf')
    parser.add_argument('--target', type=float, default=94, metavar='PCT', help='as in the scripts (94)')
    try:
        args, files = parser.parse_args(), []
        if args.out.suffix.lower() not in ('.png', '.svg', '.pdf'):
            fail(f'--out {args.out}: it must end in .png, .svg or .pdf')
        from matplotlib import rcParams
        rcParams['pdf.fonttype'] = 42  # TrueType: publishers refuse Type 3, the default
        runs = read_runs(args.logs)
        drawn = figures(runs)
        print(*baseline.table(runs, args.target), sep='\n')
        for name, figure in drawn.items():
            slug = '-' + re.sub(r'[^\w.=,+-]+', '_', name)[:100] if name and len(drawn) > 1 else ''
            file = args.out.with_stem(args.out.stem + slug)
            while file in files:  # arms 'a b' and 'a_b'
                file = file.with_stem(file.stem + '_')
            try:
                figure.savefig(file, dpi=200, format=file.suffix[1:].lower(), bbox_inches='tight')
            except OSError as error:
                raise baseline.UserError(f'cannot write {file}: {error.strerror}') from None
            files.append(file)
            print(f'Wrote {file}')
        return
    except ImportError:
        message = 'matplotlib is missing: pip install matplotlib'
    except baseline.UserError as error:
        message = str(error)
    print(f"plot_runs: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    main()
