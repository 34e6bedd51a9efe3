"""Schedule, Nesterov SGD, lookahead, whitening bias and loss against the specification."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import narrow_hyp

pytestmark = pytest.mark.filterwarnings('ignore:Detected call of')  # of a scheduler, by idle steps
KILOSTEP_SCALE = 1024 * (1 + 1 / (1 - 0.85))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def net(script):
    return script.make_net(narrow_hyp(script))


def schedule(step, total):
    """The specification's factor of the learning rates after `step` of `total` steps."""
    warmup = int(0.23 * total)
    if step < warmup:
        return 0.2 + 0.8 * step / warmup
    return 1 - 0.93 * (step - warmup) / (total - warmup)


def floats(net):
    state = net.state_dict().items()
    return {name: value.clone() for name, value in state if value.is_floating_point()}


def train(script, data, **changes):
    """A quiet run of 4 steps per epoch."""
    return script.train(data, 1, narrow_hyp(script, **changes), 'cpu', quiet=True)


@pytest.fixture
def steps(script, monkeypatch):
    """Makes training steps idle. A list of what each was given: lr and weight decay per group."""
    steps = []

    def train_step(net, optimizer, images, targets, whiten_bias_grad):
        steps.append([(group['lr'], group['weight_decay']) for group in optimizer.param_groups])
        return torch.zeros(()), torch.zeros(len(targets), 10)

    monkeypatch.setattr(script, 'train_step', train_step)
    return steps


# ---------------------------------------- Schedule ----------------------------------------
@pytest.mark.parametrize('momentum', [0.85, 0.5])
def test_lrs_follow_the_schedule_and_weight_decays_are_decoupled(momentum, steps, script, data):
    train(script, data, train_epochs=4.5, lr=9.0, momentum=momentum)
    scale = 1024 * (1 + 1 / (1 - momentum))
    lr, decay = 9.0 / scale, 0.0153 * 64 / scale
    expected = []
    for step in range(18):
        factor = schedule(step, 18)
        expected.append([(peak * factor, decay / peak) for peak in (64 * lr, lr)])
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-6, atol=0)


CORNERS = [(0, 476, 0.2), (109, 476, 1), (475, 476, 1 - 0.93 * 366 / 367), (476, 476, 0.07)]
CORNERS += [(0, 1, 1), (0, 4, 1), (0, 5, 0.2), (1, 5, 1)]  # the shortest runs have no warm-up


@pytest.mark.parametrize('step, total, factor', CORNERS)
def test_corners_of_the_schedule(step, total, factor, script):
    assert script.lr_factor(step, total) == pytest.approx(factor)


# ---------------------------------------- Optimizer ----------------------------------------
def names_in_groups(script, net):
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = script.make_optimizer(net, script.hyp).param_groups
    return [{names[id(parameter)] for parameter in group['params']} for group in groups]


def test_group_0_holds_the_batchnorm_biases_and_group_1_all_else_that_is_trained(script, net):
    biases = {f'groups.{group}.norm{i}.bias' for group in (0, 1, 2) for i in (1, 2)}
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert names_in_groups(script, net) == [biases, trained - biases]


def test_groups_are_chosen_by_type_whatever_a_layer_is_called(script, net):
    group = net.groups[0]
    group.bn1 = group.norm1
    del group.norm1
    biases, others = names_in_groups(script, net)
    assert 'groups.0.bn1.bias' in biases and len(biases) == 6
    assert not [name for name in others if 'bn1' in name]


NESTEROV = [('groups.0.norm1.bias', 64), ('groups.0.conv1.weight', 1), ('whiten.bias', 1)]


@pytest.mark.parametrize('name, bias_scaler', NESTEROV)
def test_steps_are_nesterovs_with_decoupled_weight_decay(name, bias_scaler, script, net):
    hyp = narrow_hyp(script)
    lr = hyp['opt']['lr'] / KILOSTEP_SCALE * bias_scaler
    decay = 0.0153 * 64 / KILOSTEP_SCALE / lr
    parameter, optimizer = net.get_parameter(name), script.make_optimizer(net, hyp)
    expected, velocity = torch.randn_like(parameter), torch.zeros_like(parameter)
    parameter.data.copy_(expected)
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        gradient = parameter.grad + decay * expected
        velocity = 0.85 * velocity + gradient
        expected = expected - lr * (gradient + 0.85 * velocity)
        optimizer.step()
        torch.testing.assert_close(parameter.data, expected)


# ---------------------------------------- Lookahead ----------------------------------------
def test_lookahead_averages_every_floating_point_entry(script, net):
    """BatchNorm statistics and frozen parameters too; two dtypes, as on a GPU."""
    net.groups[0].half()
    slow, lookahead = floats(net), script.LookaheadState(net)
    assert 'groups.0.norm1.running_var' in slow and 'whiten.weight' in slow
    for decay in (0.0, 0.3, 0.77, 1.0):
        for value in net.state_dict().values():
            value += torch.randn_like(value)
        fast = floats(net)
        slow = {name: decay * slow[name] + (1 - decay) * fast[name] for name in fast}
        lookahead.update(decay)
        torch.testing.assert_close(floats(net), slow, rtol=2e-3, atol=2e-3)


def test_lookahead_leaves_integers_alone(script, net):
    net.register_buffer('count', torch.tensor(3))
    script.LookaheadState(net).update(0.9)
    assert net.count == 3


def quintic(step, total):
    return 0.95**5 * (step / total) ** 3


UPDATES = [
    (1.0, [(4, 1)]),
    (2.0, [(5, quintic(5, 8)), (8, 1)]),
    (2.5, [(5, quintic(5, 10)), (10, quintic(10, 10)), (10, 1)]),  # the last is a 5th one too
    (3.0, [(5, quintic(5, 12)), (10, quintic(10, 12)), (12, 1)]),
]


@pytest.mark.parametrize('epochs, expected', UPDATES)
def test_lookahead_follows_every_5th_step_and_the_last(
    epochs, expected, steps, script, data, monkeypatch
):
    updates = []

    class Recorder(script.LookaheadState):
        def update(self, decay):
            updates.append((len(steps), decay))

    monkeypatch.setattr(script, 'LookaheadState', Recorder)
    train(script, data, train_epochs=epochs)
    assert updates == [(step, pytest.approx(decay)) for step, decay in expected]


def test_the_network_ends_as_the_slow_average_that_began_whitened(script, data, monkeypatch):
    seen, updates = {}, []

    class Recorder(script.LookaheadState):
        def __init__(self, net):
            super().__init__(net)
            seen['start'], seen['net'] = floats(net), net

        def update(self, decay):
            updates.append((decay, floats(seen['net'])))
            super().update(decay)

    monkeypatch.setattr(script, 'LookaheadState', Recorder)
    _, net = train(script, data, train_epochs=3.0)
    slow = seen['start']
    assert torch.equal(slow['whiten.weight'], net.whiten.weight)
    for decay, fast in updates:
        slow = {name: decay * slow[name] + (1 - decay) * fast[name] for name in slow}
    torch.testing.assert_close(floats(net), slow)


# ---------------------------------------- Whitening bias ----------------------------------------
@pytest.fixture
def bias_steps(script, data, monkeypatch):
    """Of each step of 3 epochs of 4 steps, of which the first trains the whitening bias: it before
    and after, its gradient, the optimizer's momentum for it."""
    steps, train_step = [], script.train_step

    def recorder(net, optimizer, *args):
        before, bias = net.whiten.bias.detach().clone(), net.whiten.bias
        result = train_step(net, optimizer, *args)
        momentum = optimizer.state[bias]['momentum_buffer'].clone()
        steps.append((before, bias.detach().clone(), bias.grad, momentum))
        return result

    monkeypatch.setattr(script, 'train_step', recorder)
    train(script, data, train_epochs=3.0, whiten_bias_epochs=1)
    return steps


def test_the_frozen_whitening_bias_gets_no_gradient_momentum_or_decay(bias_steps):
    assert [torch.equal(before, after) for before, after, *_ in bias_steps] == [False] * 4 + [
        True
    ] * 8
    assert [gradient is None for *_, gradient, _ in bias_steps] == [False] * 4 + [True] * 8
    assert all(torch.equal(momentum, bias_steps[3][3]) for *_, momentum in bias_steps[4:])


def test_lookahead_still_averages_the_frozen_whitening_bias(bias_steps):
    changed = []
    for step in range(1, len(bias_steps)):
        if not torch.equal(bias_steps[step - 1][1], bias_steps[step][0]):
            changed.append(step)
    assert changed == [5]  # from then on slow and fast are the same


# ---------------------------------------- Loss ----------------------------------------
@pytest.fixture
def batch(script, data):
    """64 normalized images and their labels."""
    return next(iter(script.CifarLoader(data, batch_size=64)))


@pytest.mark.parametrize('classes, smoothing', [(10, 0.2), (10, 0.0), (5, 0.125)])
def test_loss_is_cross_entropy_with_label_smoothing_summed(
    classes, smoothing, script, data, float32, monkeypatch
):
    """That of the first batch, from the targets that a run makes, against torch's own smoothing."""
    seen, train_step = [], script.train_step

    def recorder(net, optimizer, images, targets, whiten_bias_grad):
        loss, logits = train_step(net, optimizer, images, targets, whiten_bias_grad)
        seen.append((loss, logits, targets))
        return loss, logits

    monkeypatch.setattr(script, 'train_step', recorder)
    split = data['train']
    split = {**split, 'labels': split['labels'] % classes, 'classes': split['classes'][:classes]}
    hyp = narrow_hyp(script, label_smoothing=smoothing, train_epochs=0.25)
    script.train({'train': split, 'test': split}, 1, hyp, 'cpu', quiet=True)
    ((loss, logits, targets),) = seen
    labels = targets.argmax(1)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction='sum')
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert logits.shape == (64, classes) and targets.dtype == torch.float32


def test_sum_is_float32_whatever_the_logits_are(script, net, batch, monkeypatch):
    monkeypatch.setattr(script, 'CPU_HAS_BFLOAT16', True)
    targets = torch.eye(10)[batch[1]]
    optimizer = script.make_optimizer(net, script.hyp)
    loss, logits = script.train_step(net, optimizer, batch[0], targets)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    expected = F.cross_entropy(logits.float(), batch[1], reduction='sum')
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert not loss.requires_grad and not logits.requires_grad


def test_a_step_descends_the_loss_whatever_gradients_were_left(script, net, batch, float32):
    images, labels = batch
    other = copy.deepcopy(net)
    F.cross_entropy(other(images), labels, reduction='sum').backward()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 9.0)
    optimizer = script.make_optimizer(net, script.hyp)
    script.train_step(net, optimizer, images, torch.eye(10)[labels])
    for parameter, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4)
