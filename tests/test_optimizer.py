"""Schedule, Nesterov SGD, lookahead and whitening bias of the report's two scripts.

fast94's optimizer is in test_muon.py.
"""

import pytest
import torch
from conftest import narrow_hyp, with_sgd

pytestmark = [
    with_sgd,
    pytest.mark.filterwarnings('ignore:Detected call of'),  # of a scheduler, by idle steps
]


@pytest.fixture
def net(script):
    torch.manual_seed(1)
    return script.make_net(narrow_hyp(script))


def floats(net):
    state = net.state_dict().items()
    return {name: value.clone() for name, value in state if value.is_floating_point()}


def train(script, data, **changes):
    """Make a quiet run of 4 steps per epoch, from the weights of the fixture `net`."""
    return script.train(data, 1, narrow_hyp(script, **changes), 'cpu', quiet=True)


@pytest.fixture
def steps(script, monkeypatch):
    """Make training steps idle. Returns a list of what each got: lr and weight decay per group."""
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
    factors = [0.2, 0.4, 0.6, 0.8] + [1 - 0.93 * step / 14 for step in range(14)]
    expected = [[(peak * factor, decay / peak) for peak in (64 * lr, lr)] for factor in factors]
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-6, atol=0)


CORNERS = [(0, 476, 0.2), (109, 476, 1), (475, 476, 1 - 0.93 * 366 / 367), (476, 476, 0.07)]
CORNERS += [(0, 1, 1), (0, 4, 1), (0, 5, 0.2), (1, 5, 1)]  # the shortest runs have no warm-up


def test_corners_of_the_schedule(script):
    for step, total, factor in CORNERS:
        assert script.lr_factor(step, total) == pytest.approx(factor), (step, total)


# ---------------------------------------- Optimizer ----------------------------------------
def test_group_0_holds_the_batchnorm_biases_and_group_1_all_else_that_is_trained(script, net):
    """Chosen by type, whatever a layer is called."""
    net.groups[0].bn1 = net.groups[0].norm1
    del net.groups[0].norm1
    norms = [f'groups.{i}.norm{j}' for i in (0, 1, 2) for j in (1, 2)]
    norms[0] = 'groups.0.bn1'
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = script.make_optimizer(net, script.hyp).param_groups
    biases, others = ([names[parameter] for parameter in group['params']] for group in groups)
    fixed = ['whiten.weight', *(f'{norm}.weight' for norm in norms)]
    assert sorted(biases) == sorted(f'{norm}.bias' for norm in norms)
    assert sorted([*biases, *others, *fixed]) == sorted(names.values())


@pytest.mark.parametrize('name, bias_scaler', [('groups.0.norm1.bias', 64), ('head.weight', 1)])
def test_steps_are_nesterovs_with_decoupled_weight_decay(name, bias_scaler, script, net):
    hyp, scale = narrow_hyp(script), 1024 * (1 + 1 / (1 - 0.85))
    lr = hyp['opt']['lr'] / scale * bias_scaler
    decay = 0.0153 * 64 / scale / lr
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
    """BatchNorm statistics and frozen parameters too, no integers; two dtypes, as on a GPU."""
    net.groups[0].half()
    net.register_buffer('count', torch.tensor(3))
    slow, lookahead = floats(net), script.LookaheadState(net)
    assert {'groups.0.norm1.running_var', 'whiten.weight'} < slow.keys()
    for decay in (0.0, 0.3, 0.77, 1.0):
        for name in slow:
            net.state_dict()[name] += torch.randn_like(slow[name])
        fast = floats(net)
        slow = {name: decay * slow[name] + (1 - decay) * fast[name] for name in fast}
        lookahead.update(decay)
        torch.testing.assert_close(floats(net), slow, rtol=2e-3, atol=2e-3)
    assert net.count == 3


@pytest.mark.parametrize('epochs, total', [(2.5, 10), (3.0, 12)])
def test_lookahead_follows_every_5th_step_and_the_last(
    epochs, total, steps, script, data, monkeypatch
):
    """The 10th step of 10 is both."""
    updates = []
    monkeypatch.setattr(
        script.LookaheadState, 'update', lambda self, decay: updates.append((len(steps), decay))
    )
    train(script, data, train_epochs=epochs)
    expected = [(step, pytest.approx(0.95**5 * (step / total) ** 3)) for step in (5, 10)]
    assert updates == [*expected, (total, 1)]


def test_the_slow_average_begins_as_the_whitened_network(steps, script, data, net):
    """Idle steps change nothing, so the network ends as the slow average began."""
    _, trained = train(script, data, train_epochs=3.0)
    loader = script.CifarLoader(data)
    net.init_whitening(loader.normalize(loader.images))
    torch.testing.assert_close(floats(trained), floats(net), rtol=0, atol=0)


# ---------------------------------------- Whitening bias ----------------------------------------
def test_the_frozen_whitening_bias_is_moved_by_lookahead_alone(script, data, monkeypatch):
    """Three epochs of 4 steps, of which the first trains it. No gradient, momentum or decay."""
    steps, train_step = [], script.train_step

    def recorder(net, optimizer, *args):
        bias = net.whiten.bias
        before = bias.detach().clone()
        result = train_step(net, optimizer, *args)
        momentum = optimizer.state[bias]['momentum_buffer'].clone()
        steps.append((before, bias.detach().clone(), bias.grad, momentum))
        return result

    monkeypatch.setattr(script, 'train_step', recorder)
    train(script, data, train_epochs=3.0, whiten_bias_epochs=1)
    befores, afters, gradients, momenta = zip(*steps, strict=True)
    frozen = [False] * 4 + [True] * 8
    assert list(map(torch.equal, befores, afters)) == frozen
    assert [gradient is None for gradient in gradients] == frozen
    assert all(torch.equal(momentum, momenta[3]) for momentum in momenta[4:])
    # Between the steps lookahead moves it, after the 5th; then slow and fast are the same.
    kept = list(map(torch.equal, afters[:-1], befores[1:]))
    assert [step for step, same in enumerate(kept, 1) if not same] == [5]
