"""Schedule, Nesterov SGD, lookahead, the whitening bias and the loss against the specification."""
import copy
from types import SimpleNamespace

import pytest
import torch

from conftest import set_autocast

KILOSTEP_SCALE = 1024 * (1 + 1 / (1 - 0.85))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def schedule(step, total):
    """The specification's factor of the learning rates after `step` of `total` steps."""
    warmup = int(0.23 * total)
    return 0.2 + 0.8 * step / warmup if step < warmup else 1 - 0.93 * (step - warmup) / (total - warmup)


def floats(net):
    return {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}


def nudge(net):
    """What stands in for training: noise on the whole floating-point state. Returns it."""
    for value in net.state_dict().values():
        if value.is_floating_point():
            value += torch.randn_like(value)
    return floats(net)


def train(script, data, epochs, **overrides):
    """A quiet run of 4 steps per epoch."""
    with script.overrides({'opt.train_epochs': epochs, **overrides}):
        return script.train(data, 1, 'cpu', quiet=True)


@pytest.fixture
def steps(narrow, monkeypatch):
    """Makes training steps idle. A list that gets what each was given: lr and weight decay per group."""
    steps = []

    def train_step(net, optimizer, images, labels, label_smoothing):
        steps.append([(group['lr'], group['weight_decay']) for group in optimizer.param_groups])
        return torch.zeros(()), torch.zeros(len(labels), 10)

    monkeypatch.setattr(narrow, 'train_step', train_step)
    return steps


# Schedule

def test_learning_rates_and_weight_decays_of_every_step(steps, narrow, data):
    train(narrow, data, 4.5)
    opt = narrow.hyp['opt']
    lr, wd = opt['lr'] / KILOSTEP_SCALE, opt['weight_decay'] * opt['batch_size'] / KILOSTEP_SCALE
    expected = [[(peak * schedule(step, 18), wd / peak) for peak in (64 * lr, lr)] for step in range(18)]
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize('total', [18, 260, 476])
def test_the_schedule_is_the_specifications(total, script):
    factors = [script.lr_factor(step, total) for step in range(total)]
    assert factors == pytest.approx([schedule(step, total) for step in range(total)])


@pytest.mark.parametrize('step, factor', [(0, 0.2), (109, 1), (475, 1 - 0.93 * 366 / 367), (476, 0.07)])
def test_the_schedules_corners(step, factor, script):
    assert script.lr_factor(step, 476) == pytest.approx(factor)


@pytest.mark.parametrize('total', range(1, 6))
def test_the_schedule_of_the_shortest_runs_is_finite_and_starts_high_without_warmup(total, script):
    factors = [script.lr_factor(step, total) for step in range(total)]
    assert factors[0] == (0.2 if total >= 5 else 1) and all(0.07 < factor <= 1 for factor in factors)


@pytest.mark.parametrize('epochs, total', [(2.0, 8), (2.25, 9), (2.26, 10), (1.01, 5), (0.1, 1)])
def test_total_steps_are_those_of_the_fractional_epochs_rounded_up(epochs, total, steps, narrow, data):
    train(narrow, data, epochs)
    assert len(steps) == total


# Optimizer

def test_group_0_holds_the_batchnorm_biases_and_group_1_every_other_trainable_parameter(narrow):
    net = narrow.make_net()
    name_of = {parameter: name for name, parameter in net.named_parameters()}
    groups = [{name_of[p] for p in group['params']} for group in narrow.make_optimizer(net).param_groups]
    biases = {f'{group}.norm{i}.bias' for group in (2, 3, 4) for i in (1, 2)}
    trainable = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert groups == [biases, trainable - biases]


@pytest.mark.parametrize('name, bias_scaler', [('2.norm1.bias', 64), ('2.conv1.weight', 1), ('0.bias', 1)])
def test_steps_are_nesterovs_with_decoupled_weight_decay(name, bias_scaler, narrow):
    net, opt = narrow.make_net(), narrow.hyp['opt']
    lr = opt['lr'] / KILOSTEP_SCALE * bias_scaler
    decay = opt['weight_decay'] * opt['batch_size'] / KILOSTEP_SCALE / lr
    parameter, optimizer = net.get_parameter(name), narrow.make_optimizer(net)
    expected, velocity = torch.randn_like(parameter), torch.zeros_like(parameter)
    parameter.data.copy_(expected)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        gradient = parameter.grad + decay * expected
        velocity = 0.85 * velocity + gradient
        expected = expected - lr * (gradient + 0.85 * velocity)
        optimizer.step()
        torch.testing.assert_close(parameter.data, expected)


# Lookahead

def test_lookahead_averages_every_floating_point_entry(narrow):
    net = narrow.make_net()
    slow, lookahead = floats(net), narrow.LookaheadState(net)
    for decay in (0.0, 0.3, 0.77, 1.0):
        fast = nudge(net)
        slow = {name: decay * slow[name] + (1 - decay) * fast[name] for name in fast}
        lookahead.update(decay)
        torch.testing.assert_close(floats(net), slow)


def test_lookahead_leaves_integers_alone(narrow):
    net = narrow.make_net()
    lookahead = narrow.LookaheadState(net)
    net.state_dict()['2.norm1.num_batches_tracked'].fill_(3)
    lookahead.update(0.9)
    assert net.state_dict()['2.norm1.num_batches_tracked'] == 3


def quintic(step, total):
    return 0.95 ** 5 * (step / total) ** 3


@pytest.mark.parametrize('epochs, expected', [
    (1.0, [(4, 1)]),
    (2.0, [(5, quintic(5, 8)), (8, 1)]),
    (2.5, [(5, quintic(5, 10)), (10, quintic(10, 10)), (10, 1)]),  # the last step is a 5th one too
    (3.0, [(5, quintic(5, 12)), (10, quintic(10, 12)), (12, 1)]),
])
def test_lookahead_follows_every_5th_step_and_the_last(epochs, expected, steps, narrow, data, monkeypatch):
    updates = []

    class Recorder(narrow.LookaheadState):
        def update(self, decay):
            updates.append((len(steps), decay))

    monkeypatch.setattr(narrow, 'LookaheadState', Recorder)
    train(narrow, data, epochs)
    assert updates == [(step, pytest.approx(decay)) for step, decay in expected]


@pytest.fixture
def looked(narrow, data, monkeypatch):
    """A short training: its network, whose floating-point state at the lookahead's start, and decay and state
    at each of its updates."""
    seen = SimpleNamespace(updates=[])

    class Recorder(narrow.LookaheadState):
        def __init__(self, net):
            super().__init__(net)
            seen.start, seen.net = floats(net), net

        def update(self, decay):
            seen.updates.append((decay, floats(seen.net)))
            super().update(decay)

    monkeypatch.setattr(narrow, 'LookaheadState', Recorder)
    train(narrow, data, 3.0)
    return seen


def test_the_network_ends_as_the_slow_average(looked):
    slow = looked.start
    for decay, fast in looked.updates:
        slow = {name: decay * slow[name] + (1 - decay) * fast[name] for name in slow}
    torch.testing.assert_close(floats(looked.net), slow)


def test_the_slow_average_starts_as_the_whitened_network(looked):
    assert torch.equal(looked.start['0.weight'], looked.net[0].weight)


# Whitening bias

@pytest.fixture
def bias_steps(narrow, data, monkeypatch):
    """Per step of 3 epochs of 4 steps, of which the first trains the whitening bias: it before and after, its
    gradient after."""
    steps, train_step = [], narrow.train_step

    def recorder(net, *args):
        before = net[0].bias.detach().clone()
        result = train_step(net, *args)
        steps.append((before, net[0].bias.detach().clone(), net[0].bias.grad))
        return result

    monkeypatch.setattr(narrow, 'train_step', recorder)
    train(narrow, data, 3.0, **{'opt.whiten_bias_epochs': 1})
    return steps


def test_the_whitening_bias_trains_in_its_epochs_and_then_gets_no_update(bias_steps):
    assert [torch.equal(before, after) for before, after, _ in bias_steps] == [False] * 4 + [True] * 8


def test_the_frozen_whitening_bias_gets_no_gradient(bias_steps):
    assert [gradient is None for *_, gradient in bias_steps] == [False] * 4 + [True] * 8


def test_lookahead_still_averages_the_frozen_whitening_bias(bias_steps):
    pairs = enumerate(zip(bias_steps, bias_steps[1:]), 1)
    changed = [step for step, ((_, after, _), (before, *_)) in pairs if not torch.equal(after, before)]
    assert changed == [5]  # from then on slow and fast are the same


def test_zero_whiten_bias_epochs_freeze_the_whitening_bias_at_zero(narrow, data):
    _, net = train(narrow, data, 2.0, **{'opt.whiten_bias_epochs': 0})
    assert not net[0].bias.any()


# Loss

def smoothed_cross_entropy(logits, labels, smoothing):
    """Summed over the batch, in float32."""
    targets = smoothing / 10 + (1 - smoothing) * torch.eye(10)[labels]
    return -(targets * logits.float().log_softmax(1)).sum()


@pytest.fixture
def batch(narrow, data):
    """64 normalized images and their labels."""
    return next(iter(narrow.CifarLoader(data, batch_size=64)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_label_smoothed_cross_entropy_summed_in_float32(dtype, narrow, batch, monkeypatch):
    set_autocast(monkeypatch, narrow, dtype == torch.bfloat16)
    net = narrow.make_net()
    loss, logits = narrow.train_step(net, narrow.make_optimizer(net), *batch, 0.2)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits, batch[1], 0.2), rtol=1e-6, atol=0)


def test_a_step_descends_the_summed_loss_whatever_gradients_were_left(narrow, batch, monkeypatch):
    set_autocast(monkeypatch, narrow, False)
    net = narrow.make_net()
    reference = copy.deepcopy(net)
    smoothed_cross_entropy(reference(batch[0]), batch[1], 0.2).backward()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 9.0) if parameter.requires_grad else None
    narrow.train_step(net, narrow.make_optimizer(net), *batch, 0.2)
    for (name, parameter), other in zip(net.named_parameters(), reference.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_steps_results_hold_no_graph(narrow, batch):
    net = narrow.make_net()
    results = narrow.train_step(net, narrow.make_optimizer(net), *batch, 0.2)
    assert not any(result.requires_grad for result in results)


def test_train_passes_the_label_smoothing_of_hyp(narrow, data, monkeypatch):
    given, train_step = [], narrow.train_step
    monkeypatch.setattr(narrow, 'train_step', lambda *args: given.append(args[-1]) or train_step(*args))
    train(narrow, data, 0.5, **{'opt.label_smoothing': 0.125})
    assert given == [0.125, 0.125]
