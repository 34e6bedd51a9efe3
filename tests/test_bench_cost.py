"""FLOP of a run, against a count by hand."""

import math

import pytest
from bench.contract import load_script
from bench.cost import run_flop
from bench.errors import UserError
from bench_helpers import write_fake
from conftest import FILES, ROOT

WIDTHS = (24, 32, 40)
TRAIN = 3000
TEST = 250
BATCH = 256


def conv(channels_in, channels_out, kernel, size):
    """FLOP of a convolution of one image to size x size."""
    return 2 * channels_in * channels_out * kernel**2 * size**2


def by_hand(epochs, whiten_bias_epochs, views):
    """FLOP of the baseline of WIDTHS.

    A backward pass costs two forward passes, but none for the whitening (its weights are frozen),
    and one for what follows it once its bias is frozen too. (Pooling drops the last row of an odd
    map: 30, 14 and 6 of 31, 15 and 7.)
    """
    a, b, c = WIDTHS
    whitening = conv(3, 24, 2, 31)
    first = conv(24, a, 3, 30)
    rest = conv(a, a, 3, 15) + conv(a, b, 3, 14) + conv(b, b, 3, 7) + conv(b, c, 3, 6)
    rest += conv(c, c, 3, 3) + 2 * c * 10
    steps_per_epoch = TRAIN // BATCH
    steps = math.ceil(steps_per_epoch * epochs)
    early = min(steps, steps_per_epoch * whiten_bias_epochs)
    training = steps * (whitening + 2 * first + 3 * rest) + early * first
    return BATCH * training + TEST * views * (whitening + first + rest)


def flop_of(path, **changes):
    """FLOP of a run of a script on synthetic data."""
    script = load_script(str(path))
    hyp = {**script.facts().hyp, 'opt.batch_size': BATCH, **changes}
    for i, width in enumerate(WIDTHS, start=1):
        hyp[f'net.widths.block{i}'] = width
    return run_flop(script, hyp, script.module.synthetic_data('cpu', train=TRAIN, test=TEST))


@pytest.mark.parametrize('epochs, whiten_bias_epochs, level', [(2.5, 1, 2), (0.5, 0, 1), (1, 3, 0)])
def test_flop_of_the_baseline_are_those_counted_by_hand(epochs, whiten_bias_epochs, level):
    changes = {'opt.train_epochs': float(epochs), 'opt.whiten_bias_epochs': whiten_bias_epochs}
    changes['net.tta_level'] = level
    views = (1, 2, 6)[level]
    found = flop_of(ROOT / 'airbench94_baseline.py', **changes)
    assert found == pytest.approx(by_hand(epochs, whiten_bias_epochs, views), rel=1e-4)


def test_matrix_products_of_an_optimizer_count_once_a_step(tmp_path):
    """As Muon's do: they do not grow with the batch."""
    text = (ROOT / 'airbench94_baseline.py').read_text()
    step = '    optimizer.step()\n    return loss, logits\n'
    assert text.count(step) == 1
    path = tmp_path / 'muon.py'
    path.write_text(text.replace(step, f'    torch.ones(20, 30) @ torch.ones(30, 40)\n{step}'))
    changes = {'opt.train_epochs': 1.5, 'net.tta_level': 0}
    plain = flop_of(ROOT / 'airbench94_baseline.py', **changes)
    assert flop_of(path, **changes) - plain == 17 * 2 * 20 * 30 * 40


def test_a_share_of_the_images_with_tta_counts_as_that_share(tmp_path):
    """Whoever chooses those images does it among all of them, as fast94 does."""
    text = (ROOT / 'airbench94_baseline.py').read_text()
    call = "tta_acc = evaluate(net, test_loader, hyp['net']['tta_level'])"
    assert text.count(call) == 1
    some = 'test_loader.precompute()\n        images = test_loader.proc_images["norm"]\n'
    some += '        predict(net, images[: len(images) // 5], 2)\n        tta_acc = 0.5'
    path = tmp_path / 'share.py'
    path.write_text(text.replace(call, some))
    changes = {'opt.train_epochs': 0.1, 'opt.whiten_bias_epochs': 0}
    found = flop_of(path, **changes)
    assert found == pytest.approx(by_hand(0.1, 0, 6 / 5), rel=1e-4)


def test_whatever_cannot_be_counted_is_said(tmp_path):
    fake = load_script(str(write_fake(tmp_path)))
    data = fake.load_data(None)
    hyp = fake.facts().hyp
    with pytest.raises(UserError, match='torch counted no FLOP'):
        run_flop(fake, hyp, data)
    with pytest.raises(UserError, match='hyp has no opt.batch_size'):
        run_flop(fake, {'opt.train_epochs': 2.0}, data)
    quiet = load_script(str(write_fake(tmp_path, 'quiet.py', ('if on_epoch:', 'if epoch == 1:'))))
    with pytest.raises(UserError, match='not called after every epoch'):
        run_flop(quiet, hyp, data)


def test_a_loader_that_keeps_its_last_batch_cannot_be_counted(tmp_path):
    path = tmp_path / 'keep.py'
    call = "CifarLoader(data, True, opt['batch_size'], hyp['aug'],"
    text = FILES['airbench94_baseline'].read_text()
    assert text.count(call) == 1
    path.write_text(text.replace(call, f'{call} drop_last=False,'))
    with pytest.raises(UserError, match='keeps the last, smaller batch'):
        flop_of(path, **{'opt.train_epochs': 1.0})
