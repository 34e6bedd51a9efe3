"""One training from scratch: what it depends on, what it times and records, and that it learns."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, environment, narrow_hyp

TIMES = ('clock_seconds', 'eval_seconds', 'wall_seconds')
ROW = {'epoch', 'train_loss', 'train_acc', 'test_acc', 'clock_seconds', 'eval_seconds'}
RECORD = {'seed', 'hyp', 'epochs', 'tta_acc', *TIMES, 'train_images', 'test_images', 'classes'}
RECORD |= {'torch', 'device', 'dtype'}

pytestmark = pytest.mark.filterwarnings('ignore:Detected call of')  # of a scheduler, by idle steps


def results(record):
    """A record without its times."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in record['epochs']]
    return {**{k: v for k, v in record.items() if k not in TIMES}, 'epochs': rows}


def assert_same_state(net, state):
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def run(script, data, seed=1, quiet=True, **changes):
    return script.train(data, seed, narrow_hyp(script, **changes), 'cpu', quiet=quiet)


def with_classes(data, n):
    """The same images in so many classes."""
    changed = {}
    for name, split in data.items():
        labels = torch.arange(len(split['labels'])) % n
        changed[name] = {**split, 'labels': labels, 'classes': [f'class {i}' for i in range(n)]}
    return changed


@pytest.fixture
def idle(script, monkeypatch):
    """Each script with steps that do not train: losses 64, 128, ..., 16 of 64 predictions wrong."""
    losses = iter(range(64, 10**6, 64))

    def train_step(net, optimizer, images, targets, whiten_bias_grad):
        wrong = torch.arange(64) >= 48
        answers = (targets.argmax(1) + wrong) % 10
        return torch.tensor(float(next(losses))), torch.eye(10)[answers]

    monkeypatch.setattr(script, 'train_step', train_step)
    return script


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


def test_another_seed_is_another_run(script, data):
    assert results(run(script, data, 1)[0]) != results(run(script, data, 2)[0])


def test_evaluating_every_epoch_does_not_change_a_run(script, data):
    (_, quiet), (_, evaluated) = (run(script, data, quiet=quiet) for quiet in (True, False))
    assert_same_state(quiet, evaluated.state_dict())


def test_a_run_leaves_hyp_and_data_as_they_were(script, data):
    own, hyp = json.dumps(script.hyp), narrow_hyp(script, small_sizes=[24])
    before, images = json.dumps(hyp), data['train']['images'].clone()
    record, _ = script.train(data, 1, hyp, 'cpu', quiet=True)
    assert (json.dumps(script.hyp), json.dumps(hyp)) == (own, before)
    assert torch.equal(data['train']['images'], images)
    assert record['hyp'] == script.flatten(hyp) and record['hyp']['opt.small_sizes'] == [24]


def test_a_network_that_is_given_is_drawn_anew(script, data):
    """As with --compile: neither old weights nor statistics nor momentum stay."""
    expected, fresh = run(script, data, 2)
    _, net = run(script, data, 1)
    hyp = narrow_hyp(script)
    record, again = script.train(data, 2, hyp, 'cpu', net=net, quiet=True)
    assert again is net and results(record) == results(expected)
    assert_same_state(net, fresh.state_dict())


def test_both_scripts_train_on_the_same_batches(baseline, modified, data, monkeypatch):
    streams = {}
    for script in (baseline, modified):
        stream = streams[script] = []

        def train_step(net, optimizer, images, targets, whiten_bias_grad, stream=stream):
            stream.append((images, targets))
            return torch.zeros(()), targets

        monkeypatch.setattr(script, 'train_step', train_step)
        run(script, data, train_epochs=1.5)
    assert [len(stream) for stream in streams.values()] == [6, 6]
    for pair in zip(*streams.values(), strict=True):
        assert all(map(torch.equal, *pair))


def test_whitening_takes_the_first_5000_normalized_unaugmented_images(idle, monkeypatch):
    given = []

    def init_whitening(net, images):
        given.append(images)

    monkeypatch.setattr(idle.CifarNet, 'init_whitening', init_whitening)
    data = idle.synthetic_data('cpu', train=5003, test=10)
    run(idle, data, train_epochs=0.001)
    raw = data['train']['images'][:5000].permute(0, 3, 1, 2) / 255
    assert torch.equal(given[0], idle.CifarLoader.normalize(raw))


# ---------------------------------------- Epochs and sizes ----------------------------------------
EPOCHS = [(2.0, 8, 2), (2.25, 9, 3), (2.26, 10, 3), (1.01, 5, 2), (0.1, 1, 1)]


@pytest.mark.parametrize('epochs, total, rows', EPOCHS)
def test_epochs_may_be_fractional(epochs, total, rows, idle, data):
    steps, shown = [], []
    hyp = narrow_hyp(idle, train_epochs=epochs)
    watch = {'on_step': lambda *args: steps.append(args), 'on_epoch': shown.append}
    record, _ = idle.train(data, 1, hyp, 'cpu', **watch)
    assert steps == [(step, total) for step in range(1, total + 1)]
    assert [row['epoch'] for row in record['epochs']] == [*range(1, rows + 1)]
    assert shown == record['epochs'][:-1]  # the last one comes with the accuracy with TTA


def test_the_first_epochs_train_on_small_images(script, data, monkeypatch):
    given, train_step = [], script.train_step

    def recorder(net, optimizer, images, *args):
        given.append(images)
        return train_step(net, optimizer, images, *args)

    monkeypatch.setattr(script, 'train_step', recorder)
    run(script, data, train_epochs=3.0, small_sizes=[16, 24])
    small, given[:] = [*given], []
    run(script, data, train_epochs=3.0)
    for batch, whole, size in zip(small, given, [16] * 4 + [24] * 4 + [32] * 4, strict=True):
        expected = whole
        if size < 32:
            expected = F.interpolate(whole, size=size, mode='bilinear', antialias=True)
        assert torch.equal(batch, expected) and batch.shape[-1] == size


@pytest.mark.parametrize('changes', [{'batch_size': 257}, {'train_epochs': 0.0}])
def test_a_run_without_a_step_is_an_error(changes, script, data):
    with pytest.raises(script.UserError):
        run(script, data, **changes)


# ---------------------------------------- Clock ----------------------------------------
@pytest.fixture
def tick(idle, monkeypatch):
    """tick(owner, name): time stands still, but for one second per call of that function."""
    seconds = [0.0]
    monkeypatch.setattr(idle, 'time', SimpleNamespace(perf_counter=lambda: seconds[0]))

    def tick(owner, name):
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            seconds[0] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    return tick


ON_THE_CLOCK = [  # clock, evaluation, wall
    ('make_net', (0, 0, 1)),
    ('make_optimizer', (0, 0, 1)),
    ('CifarLoader.__init__', (2, 0, 2)),
    ('CifarNet.init_whitening', (1, 0, 1)),
    ('LookaheadState.__init__', (1, 0, 1)),
    ('LookaheadState.update', (2, 0, 2)),  # after steps 5 and 8
    ('train_step', (8, 0, 8)),
    ('evaluate', (0, 2, 2)),
    ('infer', (1, 2, 3)),
]


@pytest.mark.parametrize('name, seconds', ON_THE_CLOCK)
def test_what_is_on_the_clock_of_two_epochs_of_four_steps(name, seconds, idle, tick, data):
    owner, _, method = name.rpartition('.')
    tick(getattr(idle, owner) if owner else idle, method)
    record, _ = run(idle, data, quiet=False)
    assert tuple(record[key] for key in TIMES) == seconds
    if name == 'train_step':
        assert [row['clock_seconds'] for row in record['epochs']] == [4, 8]


def test_on_epoch_is_off_the_clock(idle, tick, data):
    callbacks = SimpleNamespace(on_epoch=lambda row: None)
    tick(callbacks, 'on_epoch')
    record, _ = idle.train(data, 1, narrow_hyp(idle), 'cpu', on_epoch=callbacks.on_epoch)
    assert tuple(record[key] for key in TIMES) == (0, 0, 1)


def test_test_images_are_normalized_once_per_run_on_the_clock(idle, data, monkeypatch):
    normalized, normalize = [], idle.CifarLoader.normalize

    def recorder(images):
        normalized.append(len(images))
        return normalize(images)

    monkeypatch.setattr(idle.CifarLoader, 'normalize', staticmethod(recorder))
    run(idle, data, quiet=False)
    assert normalized.count(100) == 1


# ---------------------------------------- Record ----------------------------------------
@pytest.mark.parametrize('quiet', [True, False])
def test_record(quiet, script, data):
    record, net = run(script, data, 7, quiet)
    assert set(record) == RECORD and isinstance(net, torch.nn.Module)
    assert (record['seed'], record['train_images'], record['test_images']) == (7, 256, 100)
    assert all(set(row) == ROW for row in record['epochs'])
    assert [row['test_acc'] is None for row in record['epochs']] == [quiet] * 2
    assert json.loads(json.dumps(record)) == record
    loader = script.CifarLoader(data, train=False)
    assert record['tta_acc'] == script.evaluate(net, loader, 2)


def test_loss_and_training_accuracy_are_those_of_the_epochs_last_batch(idle, data):
    rows = run(idle, data)[0]['epochs']
    assert [(row['train_loss'], row['train_acc']) for row in rows] == [(4, 0.75), (8, 0.75)]


def test_tta_is_for_the_end_and_for_the_share_of_hyp(idle, data, monkeypatch):
    """infer answers right in as many images as its tta_level says."""
    given = []

    def infer(net, loader, tta_level=0, tta_share=1.0):
        given.append((tta_level, tta_share))
        answers = (loader.labels + 1) % 10
        answers[:tta_level] = loader.labels[:tta_level]
        return torch.eye(10)[answers]

    monkeypatch.setattr(idle, 'infer', infer)
    record, _ = run(idle, data, quiet=False, tta_share=0.25)
    assert given == [(0, 1.0), (0, 1.0), (2, 0.25)]
    assert [row['test_acc'] for row in record['epochs']] == [0, 0] and record['tta_acc'] == 0.02


# ---------------------------------------- Diverged runs ----------------------------------------
def made_up(accuracy, losses=(1.0,), classes=10):
    epochs = [{'train_loss': loss} for loss in losses]
    return {'tta_acc': accuracy, 'epochs': epochs, 'classes': classes}


FAR_UNDER = [
    ([0.94, 0.51, 0.94], [1]),
    ([0.94, 0.51], []),
    ([0.94, 0.8401, 0.94], []),
    ([0.94, 0.8399, 0.94], [1]),
]


@pytest.mark.parametrize('accuracies, expected', FAR_UNDER)
def test_a_run_far_under_the_median_of_three_or_more_diverged(script, accuracies, expected):
    runs = [made_up(accuracy) for accuracy in accuracies]
    assert script.diverged(runs) == [runs[i] for i in expected]


@pytest.mark.parametrize('loss', [math.nan, math.inf])
def test_a_run_with_a_loss_that_is_not_finite_diverged(script, loss):
    runs = [made_up(0.94), made_up(0.94, [loss, 1.0]), made_up(0.94, [1.0, loss])]
    assert script.diverged(runs) == runs[1:]


@pytest.mark.parametrize('classes', [5, 10, 100])
def test_a_run_that_ends_with_equal_logits_is_dead(script, classes):
    equal = math.log(classes)
    alive = made_up(0.1, [equal, 1.0], classes), made_up(0.1, [equal - 1e-3], classes)
    dead = made_up(0.1, [1.0, equal], classes)
    assert script.diverged([*alive, dead][:2]) == [] and script.diverged([dead]) == [dead]


def test_a_huge_lr_takes_its_usual_steps_and_diverges(script, data):
    record, _ = run(script, data, lr=1e6)
    assert len(record['epochs']) == 2 and script.diverged([record]) == [record]


# ---------------------------------------- Edits ----------------------------------------
@pytest.mark.parametrize('classes', [5, 100])
def test_as_many_classes_as_the_data_has(classes, script, data):
    record, net = run(script, with_classes(data, classes), quiet=False)
    assert net.head.out_features == record['classes'] == classes
    assert math.isfinite(record['epochs'][-1]['train_loss'])


def test_a_third_convolution_in_each_group(script, data, monkeypatch):
    class Deeper(script.ConvGroup):
        def __init__(self, in_channels, out_channels, batchnorm_momentum):
            super().__init__(in_channels, out_channels, batchnorm_momentum)
            self.conv3 = script.Conv(out_channels, out_channels)
            self.norm3 = script.BatchNorm(out_channels, batchnorm_momentum)

        def forward(self, x):
            return F.gelu(self.norm3(self.conv3(super().forward(x))))

    monkeypatch.setattr(script, 'ConvGroup', Deeper)
    record, net = run(script, data)
    assert math.isfinite(record['epochs'][-1]['train_loss'])
    assert net.groups[0].norm3.bias.any()  # trained
    biases, _ = script.make_optimizer(net, script.hyp).param_groups
    assert len(biases['params']) == 9


def test_another_optimizer_is_a_change_of_make_optimizer_alone(script, data, monkeypatch):
    def make_optimizer(net, hyp):
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.003)

    monkeypatch.setattr(script, 'make_optimizer', make_optimizer)
    (one, net), (again, _) = (run(script, data) for _ in range(2))
    assert results(one) == results(again)
    assert not torch.equal(net.head.weight, script.make_net(narrow_hyp(script)).head.weight)


def test_a_narrow_network_learns(script):
    data = script.synthetic_data('cpu', train=1024, test=200)
    widths = {f'block{i}': 16 for i in (1, 2, 3)}
    record, _ = run(script, data, train_epochs=3.0, **widths)
    assert record['tta_acc'] > 0.3  # chance: 0.1
