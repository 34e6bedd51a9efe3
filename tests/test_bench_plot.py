"""Figures of logs: their panels, names, colours and labels."""

import dataclasses
import itertools
import warnings

import matplotlib.image
import numpy as np
import pytest
from bench import plot, stats
from bench.compare import accuracies
from bench.errors import UserError
from bench.records import Run


def arm(name: str, mean: float, flop=100, n=6, curves=False, script='a.py', **fields) -> list[Run]:
    """n runs of an arm; with curves they have accuracies of three epochs."""
    rng = np.random.default_rng(0)
    runs = []
    for turn in range(1, n + 1):
        rows = []
        for epoch in range(1, 4 if curves else 2):
            row = {'epoch': epoch, 'train_loss': 2 / epoch, 'test_acc': None}
            if curves:
                row['test_acc'] = 0.8 + 0.03 * epoch
            rows.append(row)
        values = {'data': {'name': '/home/me/holdout', 'train': 40, 'test': 10}, **fields}
        accuracy = (mean + rng.normal(0, 0.1)) / 100
        run = Run(name, accuracy, 3.0, script=script, turn=turn, seed=turn, flop=flop, epochs=rows)
        runs.append(dataclasses.replace(run, **values))
    return runs


def figure(*arms: list[Run], panels=None):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return plot.figure({runs[0].arm: runs for runs in arms}, panels=panels)


def kinds(drawing) -> list[str]:
    return [axes.get_title() or axes.get_ylabel() for axes in drawing.axes]


ACCURACY = 'Each run; mean, 95% interval'
DIFFERENCE = 'Difference from a; 95% interval'
COST = 'Mean accuracy and 95% interval against cost'


# ---------------------------------------- Panels ----------------------------------------
def test_panels_are_those_that_show_something():
    assert kinds(figure(arm('a', 94))) == [ACCURACY]
    assert kinds(figure(arm('a', 94), arm('b', 93))) == [ACCURACY, DIFFERENCE]
    assert kinds(figure(arm('a', 94), arm('b', 93, 80))) == [ACCURACY, DIFFERENCE, COST]
    curves = ['loss of the last batch', 'test accuracy (%)']
    assert kinds(figure(arm('a', 94, curves=True))) == [*curves, ACCURACY]


def test_differences_of_until_sure_are_those_that_it_decided_on():
    arms = {'a': arm('a', 94), 'b': arm('b', 93)}
    judged = {'b': stats.Difference(-0.5, -0.75, -0.25, 0.001)}
    (axes,) = plot.figure(arms, panels=['difference'], judged=judged).axes
    assert axes.get_title() == "Difference from a; --until-sure's interval"
    assert axes.texts[0].get_text() == '-0.50'


def test_an_arm_of_one_run_has_no_difference():
    arms = {'a': arm('a', 94), 'b': arm('b', 93, n=1), 'c': arm('c', 93)}
    (axes,) = plot.figure(arms, panels=['difference']).axes
    assert len(axes.texts) == 1
    assert kinds(figure(arms['b'], arms['a'])) == [ACCURACY]


def test_losses_that_are_not_finite_have_no_curves():
    runs = arm('a', 10, curves=True)
    lost = [{**row, 'train_loss': None, 'test_acc': None} for row in runs[0].epochs]
    runs = [dataclasses.replace(run, epochs=lost) for run in runs]
    assert kinds(figure(runs)) == [ACCURACY]
    with pytest.raises(UserError, match='--panels curves: no loss is finite'):
        figure(runs, panels=['curves'])


def test_panels_can_be_chosen():
    arms = arm('a', 94, curves=True), arm('b', 93, 80)
    assert kinds(figure(*arms, panels=['cost'])) == [COST]
    assert kinds(figure(*arms, panels=['difference', 'accuracy'])) == [ACCURACY, DIFFERENCE]
    assert plot.panel_names('cost, accuracy') == ['cost', 'accuracy']
    with pytest.raises(UserError, match='--panels x: there are curves, accuracy'):
        plot.panel_names('cost,x')


def test_a_panel_that_cannot_be_drawn_is_refused_with_the_reason():
    bare = arm('a', 94, flop=None)
    for panel, reason in (
        ('curves', 'no epochs'),
        ('difference', 'no two arms'),
        ('cost', 'cost of'),
    ):
        with pytest.raises(UserError, match=f'--panels {panel}: .*{reason}'):
            figure(bare, panels=[panel])


def test_runs_without_epochs_and_an_arm_of_one_run_are_drawn():
    (lonely,) = arm('b', 93, n=1)
    assert figure(arm('a', 94), [dataclasses.replace(lonely, epochs=[])])
    assert figure([lonely])._repr_png_().startswith(b'\x89PNG')  # in a notebook


# ---------------------------------------- What is drawn ----------------------------------------
def test_every_run_is_a_dot_and_every_arm_is_named_with_its_n():
    a, b = arm('a', 94, n=6), arm('b', 93, n=4)
    axes = figure(a, b).axes[0]
    names = [label.get_text().replace('\u00a0', ' ') for label in axes.get_yticklabels()]
    assert names == ['a, n = 6', 'b, n = 4']
    dots = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) > 2]
    assert sorted(np.concatenate(dots)) == pytest.approx(sorted(accuracies(a + b)))


def test_differences_are_those_of_the_report():
    axes = figure(arm('a', 94), arm('b', 93), arm('c', 94.5)).axes[1]
    assert [text.get_text() for text in axes.texts] == ['-1.00', '+0.50']
    assert len(axes.containers) == 2  # the reference is the line at 0


def test_costs_are_relative_to_the_first_arm():
    axes = figure(arm('a', 94, 200), arm('x: b', 93, 150), panels=['cost']).axes[0]
    assert [text.get_text() for text in axes.texts] == ['a', 'b']
    assert [text.xy[0] for text in axes.texts] == [1, 0.75]


def test_the_data_are_called_by_their_name_not_their_path():
    title = figure(arm('a', 94)).get_suptitle()
    assert title == 'Data: holdout (40 to train on, 10 to test)'


def test_there_is_one_legend_and_it_explains_the_tail():
    drawing = figure(arm('a', 94, curves=True), arm('b', 93, curves=True))
    assert all(axes.get_legend() is None for axes in drawing.axes)
    (legend,) = drawing.legends
    texts = [text.get_text() for text in legend.get_texts()]
    tail = 'dotted, to the mark: with TTA after the last epoch'
    assert texts == ['a', 'b', 'thin: each run', tail]


def test_without_curves_the_legend_names_families():
    drawing = figure(arm('a', 94), arm('x: b', 93), arm('x: c', 93))
    texts = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert texts == ['a', 'x']
    assert not figure(arm('a', 94), arm('b', 93)).legends  # one script, one family


# ---------------------------------------- Looks ----------------------------------------
def test_arms_of_a_family_share_hue_and_marker_but_not_colour():
    arms = {'a': arm('a', 94), 'b': arm('b', 94), 'c: d': arm('c: d', 94)}
    arms['e'] = arm('e', 94, script='airbench94_other.py')
    looks = plot.looks_of(arms)
    assert looks['a']['marker'] == looks['b']['marker']
    assert len({look['marker'] for look in looks.values()}) == 3
    assert len({look['color'] for look in looks.values()}) == 4
    assert plot.family('e', arms['e']) == 'other'


def test_names_in_the_cost_panel_do_not_overlap():
    arms = [arm(f'24 pixels: {i} of 9.9 epochs', 94 - 0.1 * i, 100 - 4 * i) for i in range(8)]
    drawing = figure(*arms, panels=['cost'])
    renderer = drawing.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in drawing.axes[0].texts]
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    inside = drawing.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


# ---------------------------------------- Files ----------------------------------------
def test_a_figure_is_written_in_the_kind_of_its_suffix(tmp_path):
    path = tmp_path / 'a.png'
    figure(arm('a', 94), arm('b', 93)).savefig(path, dpi=150)
    assert matplotlib.image.imread(path).shape[1] >= 1000
    plot.check_suffix('a.pdf')
    with pytest.raises(UserError, match='its suffix must be one of'):
        plot.check_suffix('a.xyz')
