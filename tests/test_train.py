"""One training from scratch: what it depends on, what it times and records, and edits of it."""

import functools
import importlib
import inspect
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import REPORT_SCRIPTS, ROOT, SCRIPTS, environment, narrow_hyp, with_sgd
from torch import nn

TIMES = ('clock_seconds', 'eval_seconds', 'wall_seconds')
ROW = {'epoch', 'train_loss', 'train_acc', 'test_acc', 'clock_seconds', 'eval_seconds'}
RECORD = {'seed', 'hyp', 'epochs', 'tta_acc', *TIMES, 'train_images', 'test_images', 'classes'}
RECORD |= {'torch', 'device', 'dtype'}

pytestmark = pytest.mark.filterwarnings('ignore:Detected call of')  # of a scheduler, by idle steps


def results(record):
    """Return a record without its times."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in record['epochs']]
    return {**{k: v for k, v in record.items() if k not in TIMES}, 'epochs': rows}


def assert_same_state(net, state):
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def run(script, data, seed=1, quiet=True, **changes):
    return script.train(data, seed, narrow_hyp(script, **changes), 'cpu', quiet=quiet)


@pytest.fixture
def steps(monkeypatch):
    """Make the steps of all scripts idle. Returns a list of the images and targets of each.

    Losses are 64, 128, ...; 16 of 64 predictions are wrong.
    """
    steps = []

    def train_step(net, optimizer, images, targets, whiten_bias_grad):
        steps.append((images, targets))
        answers = (targets.argmax(1) + (torch.arange(64) >= 48)) % 10
        return torch.tensor(64.0 * len(steps)), torch.eye(10)[answers]

    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), 'train_step', train_step)
    return steps


# ---------------------------------------- What a run depends on -----------------------------------
def test_a_run_after_another_is_that_run_alone_bit_for_bit(modified, data, tmp_path):
    """In another process, on as many threads; the bias freezes after the first epoch."""
    hyp = narrow_hyp(modified, whiten_bias_epochs=1)
    modified.train(data, 1, narrow_hyp(modified, momentum=0.5), 'cpu')
    record, net = modified.train(data, 2, hyp, 'cpu')
    code = f"""import torch, airbench94_modified as script
record, net = script.train(script.synthetic_data('cpu', 256, 100), 2, {hyp}, 'cpu')
torch.save((script.json.dumps(record), net.state_dict()), 'alone.pt')"""
    alone = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=alone, check=True)
    other, state = torch.load(tmp_path / 'alone.pt', weights_only=True)
    assert results(record) == results(json.loads(other))
    assert_same_state(net, state)


def test_a_network_that_is_given_is_drawn_anew(script, data):
    """As with --compile: neither old weights nor statistics nor momentum stay."""
    expected, fresh = run(script, data, 2)
    other, net = run(script, data, 1)
    record, again = script.train(data, 2, narrow_hyp(script), 'cpu', net=net, quiet=True)
    assert again is net and results(record) == results(expected) != results(other)
    assert_same_state(net, fresh.state_dict())


def test_evaluating_every_epoch_does_not_change_a_run(script, data):
    (_, quiet), (_, evaluated) = (run(script, data, quiet=quiet) for quiet in (True, False))
    assert_same_state(quiet, evaluated.state_dict())


def test_a_run_leaves_hyp_and_data_as_they_were(script, data):
    hyp = narrow_hyp(script)
    before, images = json.dumps([script.hyp, hyp]), data['train']['images'].clone()
    record, _ = script.train(data, 1, hyp, 'cpu', quiet=True)
    assert json.dumps([script.hyp, hyp]) == before and record['hyp'] == script.flat_hyp(hyp)
    assert torch.equal(data['train']['images'], images)


def test_baseline_and_modified_train_on_the_same_batches(baseline, modified, steps, data):
    for script in (baseline, modified):
        run(script, data, train_epochs=1.5)
    for pair in zip(steps[:6], steps[6:], strict=True):
        assert all(map(torch.equal, *pair))


def test_the_first_epochs_of_fast94_train_on_small_images(fast94, steps, data):
    for low_res_epochs in ([16, 24], []):
        run(fast94, data, train_epochs=3.0, low_res_epochs=low_res_epochs)
    sizes = [16] * 4 + [24] * 4 + [32] * 4
    for (batch, _), (expected, _), size in zip(steps[:12], steps[12:], sizes, strict=True):
        if size < 32:
            expected = F.interpolate(expected, size=size, mode='bilinear')
        assert torch.equal(batch, expected) and batch.shape[-1] == size


def test_whitening_takes_the_first_5000_normalized_unaugmented_images(script, steps, monkeypatch):
    given, data = [], script.synthetic_data('cpu', train=5003, test=10)
    monkeypatch.setattr(script.CifarNet, 'init_whitening', lambda net, x: given.append(x))
    run(script, data, train_epochs=0.001)
    raw = data['train']['images'][:5000].permute(0, 3, 1, 2) / 255
    assert torch.equal(given[0], script.CifarLoader.normalize(raw))


@pytest.mark.parametrize('epochs, total, rows', [(2.0, 8, 2), (2.26, 10, 3), (0.1, 1, 1)])
def test_epochs_may_be_fractional(epochs, total, rows, script, steps, data):
    shown, hyp = [], narrow_hyp(script, train_epochs=epochs)
    record, _ = script.train(data, 1, hyp, 'cpu', on_epoch=shown.append)
    assert len(steps) == total
    assert [row['epoch'] for row in record['epochs']] == [*range(1, rows + 1)]
    assert shown == record['epochs']  # the last one, too


# ---------------------------------------- Values that make no sense ------------------------------
MEANINGLESS = {
    'opt.train_epochs': [0, -1.0, math.nan, math.inf],
    'opt.batch_size': [0, -64],
    'opt.lr': [-9.0, 0.0, math.nan, 'x', None],
    'opt.momentum': [1.5, 1.0, -0.1],
    'opt.weight_decay': [-1.0],
    'opt.bias_scaler': [0.0],
    'opt.bias_lr': [0.0],
    'opt.head_lr': [-1.0],
    'opt.sgd_momentum': [1.0],
    'opt.label_smoothing': [3.0, -0.1],
    'opt.whiten_bias_epochs': [-5],
    'opt.low_res_epochs': [[40], [24, 0]],
    'aug.flip': ['no', 2],
    'aug.translate': [32, -1],
    'net.widths.block1': [0],
    'net.batchnorm_momentum': [7.0, -0.1],
    'net.scaling_factor': [0.0],
    'net.tta_level': [7, -3],
    'net.tta_share': [1.5, -0.2],
}
MEANINGLESS = [(key, value) for key, values in MEANINGLESS.items() for value in values]


@pytest.mark.parametrize('key, value', MEANINGLESS)
def test_a_meaningless_value_is_refused_by_its_key_before_any_work(
    key, value, baseline, fast94, data, monkeypatch
):
    script = baseline
    if key not in baseline.flat_hyp(baseline.hyp):
        script = fast94
    monkeypatch.setattr(script, 'make_net', pytest.fail)
    with pytest.raises(script.UserError, match=f'^{key}='):
        run(script, data, **{key: value})


def test_an_edited_copy_may_add_hyperparameters(script, data, steps):
    hyp = narrow_hyp(script)
    hyp['opt']['mine'] = 'word'
    record, _ = script.train(data, 1, hyp, 'cpu', quiet=True)
    assert record['hyp']['opt.mine'] == 'word'


def test_an_unknown_augmentation_is_refused(script, data):
    hyp = narrow_hyp(script)
    hyp['aug'] = {'translat': 2}
    with pytest.raises(script.UserError, match='no aug.translat; aug has flip, translate'):
        script.train(data, 1, hyp, 'cpu')


@pytest.mark.parametrize('n, smaller', [(640, 128), (100, 20), (3, 1)])
def test_too_few_images_are_refused_with_a_batch_size_that_fits(n, smaller, baseline):
    data = baseline.synthetic_data('cpu', train=n, test=10)
    with pytest.raises(baseline.UserError) as error:
        baseline.train(data, 1)
    advice = f'{n} images, but opt.batch_size is 1024: try --hyp opt.batch_size={smaller}'
    assert str(error.value) == advice


# ---------------------------------------- Clock ----------------------------------------
ALL, SGD, MUON = SCRIPTS, REPORT_SCRIPTS, ('fast94',)
ON_THE_CLOCK = [  # the scripts; on the clock, in the evaluation, on the wall
    (ALL, 'make_net', (0, 0, 1)),
    (ALL, 'make_optimizer', (0, 0, 1)),
    (ALL, 'CifarLoader.__init__', (2, 0, 2)),
    (ALL, 'CifarLoader.normalize', (3, 0, 3)),  # training and test images, those for the whitening
    (ALL, 'CifarNet.init_whitening', (1, 0, 1)),
    (SGD, 'LookaheadState.__init__', (1, 0, 1)),
    (SGD, 'LookaheadState.update', (2, 0, 2)),  # after steps 5 and 8
    (MUON, 'make_schedule', (1, 0, 1)),
    (ALL, 'train_step', (8, 0, 8)),
    (ALL, 'infer', (1, 2, 3)),
    (ALL, 'on_epoch', (0, 0, 2)),
]
ON_THE_CLOCK = [(script, *rest) for scripts, *rest in ON_THE_CLOCK for script in scripts]


@pytest.mark.parametrize('script, name, expected', ON_THE_CLOCK, indirect=['script'])
def test_what_is_on_the_clock_of_8_steps(name, expected, script, steps, data, monkeypatch):
    """Let time stand still, but for one second per call of the function of that name."""
    monkeypatch.setattr(script, 'on_epoch', lambda row: None, raising=False)
    *owners, method = name.split('.')
    owner = functools.reduce(getattr, owners, script)
    function, seconds = getattr(owner, method), [0]

    def slow(*args, **kwargs):
        seconds[0] += 1
        return function(*args, **kwargs)

    static = isinstance(inspect.getattr_static(owner, method), staticmethod)
    monkeypatch.setattr(owner, method, staticmethod(slow) if static else slow)
    monkeypatch.setattr(script, 'time', SimpleNamespace(perf_counter=lambda: seconds[0]))
    record, _ = script.train(data, 1, narrow_hyp(script), 'cpu', on_epoch=script.on_epoch)
    assert tuple(record[key] for key in TIMES) == expected
    if name == 'train_step':
        assert [row['clock_seconds'] for row in record['epochs']] == [4, 8]


# ---------------------------------------- Record ----------------------------------------
@pytest.mark.parametrize('quiet', [True, False])
def test_record(quiet, script, data):
    record, net = run(script, data, 7, quiet)
    assert set(record) == RECORD and isinstance(net, nn.Module)
    assert (record['seed'], record['train_images'], record['test_images']) == (7, 256, 100)
    assert all(set(row) == ROW for row in record['epochs'])
    assert [row['test_acc'] is None for row in record['epochs']] == [quiet] * 2
    assert json.loads(json.dumps(record)) == record
    assert record['device'].endswith(', threads: 1')
    share = [0.2] if script.NAME == 'fast94' else []
    loader = script.CifarLoader(data, train=False)
    assert record['tta_acc'] == script.evaluate(net, loader, 2, *share)


def test_loss_and_training_accuracy_are_those_of_the_epochs_last_batch(script, steps, data):
    rows = run(script, data)[0]['epochs']
    assert [(row['train_loss'], row['train_acc']) for row in rows] == [(4, 0.75), (8, 0.75)]


def test_tta_is_for_the_end_with_the_level_and_the_share_of_hyp(script, steps, data, monkeypatch):
    """infer answers right with TTA alone."""
    given = []

    def infer(net, loader, tta_level=0, tta_share=1.0):
        given.append((tta_level, tta_share))
        return F.one_hot((loader.labels + (tta_level == 0)) % 10)

    monkeypatch.setattr(script, 'infer', infer)
    changes = {'tta_share': 0.25} if script.NAME == 'fast94' else {}
    record, _ = run(script, data, quiet=False, tta_level=1, **changes)
    assert given == [(0, 1.0), (0, 1.0), (1, changes.get('tta_share', 1.0))]
    assert [row['test_acc'] for row in record['epochs']] == [0, 0] and record['tta_acc'] == 1


def test_a_huge_lr_takes_its_usual_steps_and_ends_at_chance(script, data):
    record, _ = run(script, data, lr=1e6)
    assert len(record['epochs']) == 2 and record['tta_acc'] < 0.2


# ---------------------------------------- Loss ----------------------------------------
@pytest.mark.parametrize('classes, smoothing', [(10, 0.2), (5, 0.125)])
def test_loss_is_cross_entropy_with_label_smoothing_summed_in_float32(
    classes, smoothing, script, data, monkeypatch
):
    """Of half-precision logits and a run's targets, against torch's own smoothing."""
    seen, train_step = [], script.train_step

    def recorder(net, optimizer, images, targets, whiten_bias_grad):
        loss, logits = train_step(net, optimizer, images, targets, whiten_bias_grad)
        seen.append((loss, logits, targets.argmax(1)))
        return loss, logits

    monkeypatch.setattr(script, 'train_step', recorder)
    monkeypatch.setattr(script, 'cpu_has_bfloat16', lambda: True)
    split = data['train']
    split = {**split, 'labels': split['labels'] % classes, 'classes': split['classes'][:classes]}
    hyp = narrow_hyp(script, label_smoothing=smoothing, train_epochs=0.25)
    script.train({'train': split, 'test': split}, 1, hyp, 'cpu', quiet=True)
    ((loss, logits, labels),) = seen
    assert (logits.dtype, logits.shape) == (torch.bfloat16, (64, classes))
    logits = logits.float()
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction='sum')
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # float32, no gradient


# ---------------------------------------- Edits ----------------------------------------
@pytest.mark.parametrize('classes', [5, 100])
def test_as_many_classes_as_the_data_has(classes, script, data):
    changed = {}
    for name, split in data.items():
        labels = torch.arange(len(split['labels'])) % classes
        changed[name] = {**split, 'labels': labels, 'classes': ['a class'] * classes}
    record, net = run(script, changed, quiet=False)
    assert net.head.out_features == record['classes'] == classes
    assert math.isfinite(record['epochs'][-1]['train_loss'])


def test_a_third_convolution_in_each_group(script, data, monkeypatch):
    group = script.ConvGroup

    def deeper(a, b, momentum):
        third = script.Conv(b, b), script.BatchNorm(b, momentum), nn.GELU()
        return nn.Sequential(group(a, b, momentum), *third)

    monkeypatch.setattr(script, 'ConvGroup', deeper)
    record, net = run(script, data)
    assert math.isfinite(record['epochs'][-1]['train_loss'])
    assert all(norm.bias.any() for _, _, norm, _ in net.groups)  # trained


@with_sgd
def test_another_optimizer_is_a_change_of_make_optimizer_alone(script, data, monkeypatch):
    def make_optimizer(net, hyp):
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.003)

    monkeypatch.setattr(script, 'make_optimizer', make_optimizer)
    record, net = run(script, data)
    torch.manual_seed(1)
    assert not torch.equal(net.head.weight, script.make_net(narrow_hyp(script)).head.weight)
    assert math.isfinite(record['epochs'][-1]['train_loss'])
