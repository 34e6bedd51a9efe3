"""tests/benchmarks/plot_runs.py: figures against the numbers of small hand-made logs, files, errors."""
import json
import re
import subprocess
import sys
import warnings
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import ROOT, environment

pytest.importorskip('matplotlib')
from matplotlib import image

sys.path.insert(0, str(ROOT / 'tests' / 'benchmarks'))
import plot_runs

QUIET, NULL = {'test_acc': None}, {'train_loss': None}


def record(arm, run, epochs=3, trial=1, **changes):
    """A line of runs.jsonl whose numbers tell arm, run and epoch. changes: epoch2={key: value}, all={...}."""
    shift = 0.01 * run + 0.1 * (len(arm) % 3)
    rows = [{'epoch': e, 'train_acc': 0.2 + 0.1 * e + shift, 'test_acc': 0.15 + 0.1 * e + shift,
             'train_loss': 2.5 - 0.2 * e - shift, 'clock_seconds': 1.0 * e, 'eval_seconds': 0.1,
             **changes.get('all', {}), **changes.get(f'epoch{e}', {})} for e in range(1, epochs + 1)]
    return {'arm': arm, 'trial': trial, 'run': run, 'data': 'synthetic images', 'seed': run, 'epochs': rows,
            'tta_acc': 0.5 + shift, 'clock_seconds': epochs + 0.1 * run, 'eval_seconds': 0.3,
            'wall_seconds': epochs + 1.0}


@pytest.fixture
def log(tmp_path):
    """log(name, runs, ...): a log folder with these runs, one runs file for each list. Returns its path."""
    def log(name, *files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        arms = dict.fromkeys(run['arm'] for runs in files for run in runs)
        (folder / 'experiment.json').write_text(json.dumps(
            {'schema': 2, 'command': ['it.py'], 'arms': [{'name': arm, 'hyp': {'opt.lr': 9.0}} for arm in arms]}))
        for i, runs in enumerate(files):
            (folder / f"runs{i or ''}.jsonl").write_text(''.join(json.dumps(run) + '\n' for run in runs))
        return folder
    return log


@pytest.fixture
def plot(tmp_path):
    """plot(*args): the command line in an empty folder, every warning an error in matplotlib and here."""
    def plot(*args, **variables):
        return subprocess.run(
            [sys.executable, '-W', 'error::UserWarning', '-W', 'error::RuntimeWarning',
             str(ROOT / 'tests/benchmarks/plot_runs.py'), *map(str, args)], cwd=tmp_path,
            env=environment(**variables), capture_output=True, text=True, timeout=120)
    return plot


def figures(runs):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        drawn = plot_runs.figures(runs)
        for figure in drawn.values():
            figure.draw_without_rendering()
    return drawn


def by_colour(axes, label):
    """The lines that look like the legend's entry of that label."""
    legend, = axes.figure.legends
    at = [text.get_text() for text in legend.get_texts()].index(label)
    handle = legend.get_lines()[at]
    return [line for line in axes.lines if line.get_color() == handle.get_color()]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def failure(done):
    """The one line of an error, after checking that it is one."""
    assert done.returncode == 2 and done.stdout == '', done
    line, = done.stderr.splitlines()
    assert line.startswith('plot_runs: ')
    return line


BOTH = [record(arm, run, epochs) for run in (1, 2, 3) for arm, epochs in (('modified', 3), ('baseline', 4))]


# ---------------------------------------- An arm's figure ----------------------------------------
def test_a_figure_of_runs_has_the_numbers_of_the_log():
    runs = [record('baseline', run) for run in (1, 2, 3)]
    (name, figure), = figures(runs).items()
    left, right = figure.axes
    assert name == 'baseline'
    assert left.get_title() == 'Training Flow - Baseline (Individual Runs)'
    assert left.get_xlabel() == 'Epoch'
    assert (left.get_ylabel(), right.get_ylabel()) == ('Training loss', 'Accuracy (%)')
    assert (left.yaxis.get_label_position(), right.yaxis.get_label_position()) == ('left', 'right')
    assert legend_of(figure) == ['training loss (left)', 'training accuracy (right)', 'test accuracy (right)']
    assert (len(left.lines), len(right.lines)) == (3, 6)
    for axes, label, key, factor in ((left, 'training loss (left)', 'train_loss', 1),
                                     (right, 'training accuracy (right)', 'train_acc', 100),
                                     (right, 'test accuracy (right)', 'test_acc', 100)):
        for line, run in zip(by_colour(axes, label), runs, strict=True):
            assert line.get_xdata().tolist() == [1, 2, 3]
            np.testing.assert_allclose(line.get_ydata(), [factor * row[key] for row in run['epochs']])


def test_quantities_differ_in_colour_line_and_marker():
    figure = figures([record('baseline', 1)])['baseline']
    lines = [line for axes in figure.axes for line in axes.lines]
    for look in ('get_color', 'get_linestyle', 'get_marker'):
        assert len({getattr(line, look)() for line in lines}) == 3


def test_the_first_five_runs_are_drawn_and_the_legend_says_of_how_many():
    runs = [record('baseline', run) for run in range(1, 8)]
    figure = figures(runs)['baseline']
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == pytest.approx(
        [run['epochs'][0]['train_loss'] for run in runs[:5]])
    assert figure.legends[0].get_title().get_text() == 'First 5 of 7 runs'
    assert figures(runs[:5])['baseline'].legends[0].get_title().get_text() == ''


def test_epochs_have_whole_numbers_even_if_there_is_one():
    for epochs in (1, 2, 10):
        axes = figures([record('baseline', 1, epochs)])['baseline'].axes[0]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_names_are_text_not_formulas():
    for name in ('a$b$', r'$\nothing$ 100%', '_hidden'):
        drawn = figures([record(name, 1), record('baseline', 1)])
        assert drawn[name].axes[0].get_title() == (
            f'Training Flow - {name[0].upper()}{name[1:]} (Individual Runs)')
        assert legend_of(drawn['']) == [f'{name}, n = 1', 'baseline, n = 1']


# ---------------------------------------- The arms together ----------------------------------------
def test_arms_have_mean_and_range_of_their_runs():
    drawn = figures(BOTH)
    assert list(drawn) == ['', 'modified', 'baseline']
    figure = drawn['']
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ('Training loss', 'Test accuracy (%)')
    assert loss.get_xlabel() == accuracy.get_xlabel() == 'Epoch'
    assert legend_of(figure) == ['modified, n = 3', 'baseline, n = 3']
    for axes, key, factor in ((loss, 'train_loss', 1), (accuracy, 'test_acc', 100)):
        for arm, line, band in zip(('modified', 'baseline'), axes.lines, axes.collections, strict=True):
            values = factor * np.array(
                [[row[key] for row in run['epochs']] for run in BOTH if run['arm'] == arm])
            epochs = np.arange(1, values.shape[1] + 1)
            np.testing.assert_array_equal(line.get_xdata(), epochs)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            path, = band.get_paths()
            for x, low, high in zip(epochs, values.min(0), values.max(0)):
                at = path.vertices[path.vertices[:, 0] == x, 1]
                assert (at.min(), at.max()) == pytest.approx((low, high))
            assert line in by_colour(axes, f'{arm}, n = 3')


def test_arms_differ_in_more_than_colour():
    runs = [record(f'arm {i}', 1) for i in range(20)]
    lines = figures(runs)[''].axes[0].lines
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert len(set(looks)) == 20
    for one, other in zip(looks, looks[1:]):
        assert all(a != b for a, b in zip(one, other))
    # what is left of a colour in grey: neighbours within the first arms are apart
    grey = [np.dot([int(colour[i:i + 2], 16) for i in (1, 3, 5)], (0.299, 0.587, 0.114))
            for colour, _, _ in looks[:2]]
    assert abs(grey[0] - grey[1]) > 50


@pytest.mark.parametrize('n, arm', [(2, 'baseline'), (20, 'baseline opt.lr=11.5'), (3, 'a name ' * 12)])
def test_the_legend_fits_into_the_figure(n, arm):
    figure = figures([record(f'{arm}{i}', 1) for i in range(n)])['']
    box, (width, height) = figure.legends[0].get_window_extent(), figure.get_size_inches() * figure.dpi
    assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0
    assert all(axes.get_window_extent().y0 > box.y1 for axes in figure.axes)
    assert figure.axes[0].get_window_extent().height > 2.5 * figure.dpi


# ---------------------------------------- Null: --quiet, diverged ----------------------------------------
def test_quiet_runs_say_that_test_accuracy_was_not_measured():
    runs = [record('quiet', run, all=QUIET) for run in (1, 2)] + [record('baseline', run) for run in (1, 2)]
    drawn = figures(runs)
    unmeasured = 'test accuracy (not measured: --quiet)'
    assert legend_of(drawn['quiet'])[2] == unmeasured
    assert legend_of(drawn['baseline'])[2] == 'test accuracy (right)'
    assert legend_of(drawn['']) == [f'quiet, n = 2, {unmeasured}', 'baseline, n = 2']
    assert np.isnan(drawn[''].axes[1].lines[0].get_ydata()).all()
    assert not np.isnan(drawn[''].axes[0].lines[0].get_ydata()).any()
    assert all(unmeasured in label for label in legend_of(figures(
        [{**run, 'arm': arm} for arm in 'ab' for run in runs[:2]])['']))


def test_a_diverged_run_leaves_gaps_and_the_mean_is_of_the_others():
    runs = [record('baseline', 1), record('baseline', 2, epoch2=NULL, epoch3=NULL),
            record('baseline', 3, epoch3=NULL), record('modified', 1)]
    drawn = figures(runs)
    lines = drawn['baseline'].axes[0].lines
    assert [np.isnan(line.get_ydata()).tolist() for line in lines] == [
        [False, False, False], [False, True, True], [False, False, True]]
    loss = drawn[''].axes[0]
    values = [[row['train_loss'] for row in run['epochs']] for run in runs[:3]]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [
        np.mean([row[0] for row in values]), np.mean([values[0][1], values[2][1]]), values[0][2]])
    assert loss.get_title() == 'finite losses only'
    assert legend_of(drawn['']) == ['baseline, n = 3, 2 diverged', 'modified, n = 1']


def test_an_epoch_without_any_loss_is_a_gap_in_the_mean():
    runs = [record('baseline', 1, epoch2=NULL), record('baseline', 2, epoch2=NULL), record('modified', 1)]
    y = figures(runs)[''].axes[0].lines[0].get_ydata()
    assert np.isnan(y).tolist() == [False, True, False]
    every = figures([record('baseline', 1, all={**NULL, **QUIET}), record('modified', 1, all=NULL)])
    assert np.isnan(every[''].axes[0].lines[0].get_ydata()).all()


def test_a_huge_loss_does_not_flatten_the_others():
    runs = [record('baseline', 1), record('baseline', 2, epoch2={'train_loss': 6e4}), record('modified', 1)]
    drawn = figures(runs)
    assert [axes.get_yscale() for axes in drawn['baseline'].axes] == ['log', 'linear']
    assert [axes.get_yscale() for axes in drawn[''].axes] == ['log', 'linear']
    assert drawn['modified'].axes[0].get_yscale() == 'linear'


# ---------------------------------------- Log folders ----------------------------------------
def test_runs_of_several_processes_are_in_the_order_of_the_experiment(log):
    runs = [record('baseline', run, trial=trial) for trial in (1, 2) for run in (1, 2, 3)]
    read = plot_runs.read_runs([log('a', runs[1::2], runs[::2])])
    assert read == runs


def test_an_arm_of_several_logs_is_told_apart_by_the_folder(log):
    a = log('a', [record('baseline', 1), record('modified', 1)])
    b = log('b', [record('baseline', 2)])
    arms = [(run['arm'], run['seed']) for run in plot_runs.read_runs([f'{a}/', b])]
    assert arms == [('baseline (a)', 1), ('modified', 1), ('baseline (b)', 2)]
    c = log('elsewhere/a', [record('baseline', 3)])
    assert [run['arm'] for run in plot_runs.read_runs([a, c])] == [
        f'baseline ({a})', 'modified', f'baseline ({c})']
    assert plot_runs.read_runs([a, a]) == plot_runs.read_runs([a])


# ---------------------------------------- Command line ----------------------------------------
def test_one_arm_goes_into_the_file_itself_after_its_table(log, plot, tmp_path, baseline):
    runs = [record('baseline', run) for run in (1, 2)]
    done = plot(log('a', runs), '--out', 'flow.png')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == [*baseline.table(runs, 94), 'Wrote flow.png']
    assert [path.name for path in tmp_path.glob('*.png')] == ['flow.png']


def test_several_arms_go_into_a_file_each_and_one_together(log, plot, tmp_path, baseline):
    names = ['modified', 'sub/my run.v2', 'sub/my_run.v2', 'baseline opt.lr=9']
    runs = [record(name, run) for name in names for run in (1, 2)]
    done = plot(log('a', runs[:4]), log('b', runs[4:]), '--out', 'flow.v1.png', '--target', 51)
    assert (done.returncode, done.stderr) == (0, '')
    files = ['flow.v1.png', 'flow.v1-modified.png', 'flow.v1-sub_my_run.v2.png',
             'flow.v1-sub_my_run.v2_.png', 'flow.v1-baseline_opt.lr=9.png']
    assert done.stdout.splitlines() == [*baseline.table(runs, 51), *(f'Wrote {file}' for file in files)]
    assert {path.name for path in tmp_path.glob('*.png')} == set(files)


def test_files_are_of_their_type_and_not_blank(log, plot, tmp_path):
    folder = log('a', BOTH)
    for suffix in ('png', 'SVG', 'pdf'):
        assert plot(folder, '--out', f'flow.{suffix}').returncode == 0
    pixels = image.imread(tmp_path / 'flow-baseline.png')
    assert (tmp_path / 'flow-baseline.png').read_bytes().startswith(b'\x89PNG\r\n')
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1000
    for colour in ('#000000', '#E69F00', '#0072B2'):
        rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[..., :3] - rgb).max(-1) < 0.01).sum() > 1000
    svg = ElementTree.parse(tmp_path / 'flow-baseline.SVG').getroot()
    assert svg.tag == '{http://www.w3.org/2000/svg}svg'
    text = (tmp_path / 'flow-baseline.SVG').read_text()
    assert 'Training Flow - Baseline (Individual Runs)' in text
    assert len(re.findall('<path d="[^"]*" clip-path=[^>]*stroke: #e69f00', text)) == 3  # a line a run
    pdf = (tmp_path / 'flow-baseline.pdf').read_bytes()
    assert pdf.startswith(b'%PDF-') and pdf.rstrip().endswith(b'%%EOF')
    assert b'/Type3' not in pdf
    streams = [zlib.decompressobj().decompress(part) for part in
               re.findall(rb'stream\r?\n(x.*?)endstream', pdf, re.DOTALL)]
    assert max(part.count(b'0.9019607843 0.6235294118 0 RG') for part in streams) >= 3


def test_quiet_and_diverged_logs_are_drawn_without_a_warning(log, plot):
    runs = [record('quiet', run, all=QUIET, epoch2=NULL) for run in (1, 2)]
    done = plot(log('a', [*runs, record('gone', 1, all=NULL)]), '--out', 'flow.png')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'Warning: gone trial 1 run 1 diverged' in done.stdout


def test_a_log_of_the_script_itself_can_be_drawn(run, data_dir, plot, tmp_path):
    done = run('airbench94_baseline', '--data-dir', data_dir, '--trials', 2, '--seed', 1, '--device', 'cpu',
               '--sweep', 'opt.lr=9,12', '--hyp', 'net.widths.block1=8', 'net.widths.block2=8',
               'net.widths.block3=8', 'opt.batch_size=64', 'opt.train_epochs=2')
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / 'logs').iterdir()
    done = plot(folder, '--out', 'flow.png')
    assert (done.returncode, done.stderr) == (0, '')
    assert {path.name for path in tmp_path.glob('*.png')} == {
        'flow.png', 'flow-baseline_opt.lr=9.png', 'flow-baseline_opt.lr=12.png'}


# ---------------------------------------- Errors ----------------------------------------
def test_missing_matplotlib_is_told_in_a_line(log, plot, tmp_path):
    (tmp_path / 'path').mkdir()
    (tmp_path / 'path' / 'matplotlib.py').write_text("raise ModuleNotFoundError('no matplotlib')")
    done = plot(log('a', BOTH), '--out', 'flow.png', PYTHONPATH=str(tmp_path / 'path'))
    assert failure(done) == 'plot_runs: matplotlib is missing: pip install matplotlib'


@pytest.mark.parametrize('out', ['flow.gif', 'flow', 'png'])
def test_a_file_of_another_type_is_refused(out, log, plot):
    assert f'--out {out}: it must end in .png, .svg or .pdf' in failure(plot(log('a', BOTH), '--out', out))


def test_a_missing_option_is_refused_in_a_line(log, plot):
    assert '--out' in failure(plot(log('a', BOTH)))
    assert 'LOG' in failure(plot('--out', 'flow.png'))


def test_a_folder_that_is_no_log_is_refused(log, plot, tmp_path):
    good, bad = log('good', BOTH), log('bad', BOTH)
    assert 'nowhere is no log folder' in failure(plot(good, 'nowhere', '--out', 'flow.png'))
    (bad / 'runs.jsonl').write_text('{"arm": \n')
    assert 'bad is no log folder' in failure(plot(bad, '--out', 'flow.png'))
    for text in ('{"arm": "other", "trial": 1, "run": 1}\n', '{"arm": "baseline", "run": 1}\n', '[1]\n',
                 json.dumps({**record('baseline', 1), 'epochs': [{'epoch': 1, 'loss': 2.0}]}) + '\n'):
        (bad / 'runs.jsonl').write_text(text)
        with pytest.raises(plot_runs.baseline.UserError, match='bad is no log folder'):
            plot_runs.read_runs([good, bad])
    assert not [*tmp_path.glob('*.png')]


def test_a_log_without_a_finished_run_is_refused(log, plot):
    assert failure(plot(log('a', BOTH), log('b', []), '--out', 'flow.png')).endswith('b: no run is finished')


def test_a_file_that_cannot_be_written_is_told_in_a_line(log, plot, tmp_path):
    folder = log('a', BOTH)
    (tmp_path / 'taken.png').mkdir()
    for out, reason in (('taken.png', 'Is a directory'), ('nowhere/flow.png', 'No such file or directory')):
        done = plot(folder, '--out', out)
        assert (done.returncode, done.stderr) == (2, f'plot_runs: cannot write {out}: {reason}\n')


# ---------------------------------------- Notebook ----------------------------------------
def test_the_lines_of_the_docstring_show_the_figures_in_a_notebook(log):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    shown = re.findall(r'^    (%mat.*|display.*)', plot_runs.__doc__, re.MULTILINE)
    assert len(shown) == 2
    source = [f'%run -n {ROOT}/tests/benchmarks/plot_runs.py', f"runs = read_runs([{str(log('a', BOTH))!r}])",
              '\n'.join(shown)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in source])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name='python3').execute()
    outputs = notebook.cells[-1].outputs
    assert [output.output_type for output in outputs] == ['display_data'] * 3
    assert all('image/png' in output.data for output in outputs)
