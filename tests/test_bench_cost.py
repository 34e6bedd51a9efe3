"""FLOP of a run, against a count by hand."""

import math

import pytest
from bench.arms import make_arms
from bench.cost import run_flop
from bench_helpers import write_fake
from conftest import ROOT

WIDTHS = (24, 32, 40)


def conv(channels_in, channels_out, kernel, size):
    """FLOP of a convolution of one image to size x size."""
    return 2 * channels_in * channels_out * kernel**2 * size**2


def by_hand(epochs, whiten_bias_epochs, views):
    """FLOP of the baseline of WIDTHS: a backward pass costs two forward passes, but none for the
    whitening (its weights are frozen), and one for what follows it once its bias is frozen too.
    (Pooling drops the last row of an odd map: 30, 14 and 6 of 31, 15 and 7.)"""
    a, b, c = WIDTHS
    whitening, first = conv(3, 24, 2, 31), conv(24, a, 3, 30)
    rest = conv(a, a, 3, 15) + conv(a, b, 3, 14) + conv(b, b, 3, 7) + conv(b, c, 3, 6)
    rest += conv(c, c, 3, 3) + 2 * c * 10
    steps = math.ceil(48 * epochs)
    early = min(steps, 48 * whiten_bias_epochs)
    training = steps * (whitening + 2 * first + 3 * rest) + early * first
    return 1024 * training + 10000 * views * (whitening + first + rest)


@pytest.mark.parametrize('epochs, whiten_bias_epochs, tta_share', [(2.5, 1, 1.0), (0.5, 0, 0.25)])
def test_flop_of_the_baseline_are_those_counted_by_hand(epochs, whiten_bias_epochs, tta_share):
    changes = [f'net.widths.block{i}={width}' for i, width in enumerate(WIDTHS, start=1)]
    changes += [f'opt.train_epochs={epochs}', f'opt.whiten_bias_epochs={whiten_bias_epochs}']
    changes += [f'net.tta_share={tta_share}']
    (arm,) = make_arms([str(ROOT / 'airbench94_baseline.py')], changes, [])
    data = arm.script.module.synthetic_data('cpu', train=8, test=4)
    views = 6 if tta_share == 1 else 1 + 6 * tta_share
    expected = by_hand(epochs, whiten_bias_epochs, views)
    assert run_flop(arm, 50000, 10000, data) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('changes', [(), [('rows = []', '1 / 0')]], ids=['no FLOP', 'an error'])
def test_script_that_does_not_compute_has_no_cost(changes, tmp_path):
    (arm,) = make_arms([str(write_fake(tmp_path, 'fake.py', *changes))], [], [])
    assert run_flop(arm, 100, 10, arm.script.module.synthetic_data('cpu')) is None
