"""fast94: the optimizer Muon, its schedule, and the step in one CUDA graph."""

import copy
import math
import tempfile

import pytest
import torch
from conftest import narrow_hyp
from cuda_host_helpers import blank_batch, stand_in
from torch.utils.flop_counter import FlopCounterMode

SHAPES = [(64, 24), (64, 64), (256, 64), (256, 256)]  # of the filters: out, in
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU or a stand-in')


@pytest.fixture
def exact_products(fast94, monkeypatch):
    monkeypatch.setitem(fast94.PRODUCT_DTYPE, 'cpu', torch.float32)


def give_grads(net, size=1.0, seed=0):
    """Give each trained parameter a random gradient."""
    rng = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        if weight.requires_grad:
            grad = size * torch.randn(weight.shape, generator=rng)
            weight.grad = torch.empty_like(weight).copy_(grad)


@torch.no_grad()
def copy_weights(net, other):
    for weight, its_weight in zip(net.parameters(), other.parameters(), strict=True):
        its_weight.copy_(weight)


def assert_equal(net, other):
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def three_steps(s):
    """Return what the iteration makes of a singular value."""
    for _ in range(3):
        s = 3.4576 * s - 4.7391 * s**3 + 2.0843 * s**5
    return s


# ---------------------------------------- Muon ----------------------------------------
@pytest.mark.parametrize('rows, channels', SHAPES)
def test_three_steps_come_near_the_polar_factor(rows, channels, fast94):
    """The singular vectors stay, all values of a gradient come near 1; in half precision."""
    torch.manual_seed(rows + channels)
    matrix = torch.randn(rows, 9 * channels)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = fast94.orthogonalize(matrix[None])
    inner = u.T @ result @ vt.T
    expected = three_steps(s / matrix.norm())
    assert expected.min() > 0.7 and expected.max() < 1.4
    assert (inner.diag() - expected).abs().max() < 0.06
    assert (inner - inner.diag().diag()).abs().max() < 0.03
    polar_factor = u @ vt
    assert (result * polar_factor).sum() / result.norm() / polar_factor.norm() > 0.95


def test_the_docstrings_promise_holds(fast94):
    """Singular values from 0.02 to 1 are between 0.75 and 1.37 after three steps."""
    values = three_steps(torch.logspace(math.log10(0.02), 0, 10**4, dtype=torch.float64))
    assert values.min() > 0.75 and values.max() < 1.37


@pytest.mark.parametrize('size', [1e-6, 1e6])
def test_the_size_of_a_gradient_does_not_matter(size, fast94, exact_products):
    matrices = torch.randn(2, 8, 72, generator=torch.Generator().manual_seed(0))
    expected = fast94.orthogonalize(matrices)
    found = fast94.orthogonalize(size * matrices)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_0_stays_0(fast94):
    matrices = torch.zeros(2, 8, 72)
    assert torch.equal(fast94.orthogonalize(matrices), matrices)


def test_filters_step_as_in_a_plain_loop(fast94, exact_products):
    """Filters of one shape in one product, and all in one foreach kernel, against one by one."""
    hyp = narrow_hyp(fast94, block1=16, block2=24, block3=24)
    net = fast94.make_net(hyp)
    optimizer = fast94.make_optimizer(net, hyp)
    filters = {name: w for name, w in net.named_parameters() if 'conv' in name}
    plain = {name: w.detach().clone() for name, w in filters.items()}
    momenta = {name: torch.zeros_like(w) for name, w in plain.items()}
    lr, m = 0.1, hyp['opt']['momentum']
    optimizer.lrs.fill_(lr)
    assert len({w.shape for w in plain.values()}) < len(plain)
    for step in range(3):
        give_grads(net, 10.0, step)
        optimizer.step()
        for name, weight in plain.items():
            grad = filters[name].grad
            momenta[name] = m * momenta[name] + grad
            x = (grad + m * momenta[name]).flatten(1)
            x = x / x.norm()
            for _ in range(3):
                a = x @ x.T
                x = 3.4576 * x + (-4.7391 * a + 2.0843 * a @ a) @ x
            weight *= math.sqrt(len(weight)) / weight.norm()
            weight -= lr * x.view(weight.shape)
        for name, weight in plain.items():
            torch.testing.assert_close(filters[name].detach(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('size', [1e-3, 1e3])
def test_every_trained_parameter_moves_in_one_step(dtype, size, fast94, monkeypatch):
    """The norm of the largest gradient here, 190,000, is beyond half precision."""
    monkeypatch.setitem(fast94.DTYPE, 'cpu', dtype)
    monkeypatch.setitem(fast94.PRODUCT_DTYPE, 'cpu', torch.float16)
    hyp = narrow_hyp(fast94, block1=16, block2=64, block3=64)
    net = fast94.make_net(hyp)
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    give_grads(net, size)
    optimizer = fast94.make_optimizer(net, hyp)
    optimizer.step()
    for name, weight in net.named_parameters():
        moved = not torch.equal(weight, before[name])
        assert weight.isfinite().all() and moved == weight.requires_grad, name
        if 'conv' in name:
            turn = (weight - before[name] * math.sqrt(len(weight)) / before[name].norm()).norm()
            assert 0.8 < turn / math.sqrt(len(weight)) / hyp['opt']['lr'] < 1.2


def test_the_groups_are_biases_head_whitening_bias_and_filters(fast94):
    net = fast94.make_net(fast94.hyp)
    names = {weight: name for name, weight in net.named_parameters()}
    groups = fast94.make_optimizer(net, fast94.hyp).param_groups
    biases, head, whiten, filters = ([names[w] for w in group['params']] for group in groups)
    blocks = [(i, j) for i in range(3) for j in (1, 2)]
    assert biases == [f'groups.{i}.norm{j}.bias' for i, j in blocks]
    assert filters == [f'groups.{i}.conv{j}.weight' for i, j in blocks]
    assert (head, whiten) == (['head.weight'], ['whiten.bias'])


def test_a_trained_parameter_without_an_optimizer_is_an_error(fast94):
    net = fast94.make_net(narrow_hyp(fast94))
    net.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='extra.weight, extra.bias'):
        fast94.make_optimizer(net, fast94.hyp)


SGD = [('groups.0.norm1.bias', 0.0573), ('head.weight', 0.5415), ('whiten.bias', 0.0573)]


@pytest.mark.parametrize('name, lr', SGD)
def test_all_but_the_filters_step_as_nesterovs_with_decoupled_weight_decay(name, lr, fast94):
    hyp = narrow_hyp(fast94)
    net = fast94.make_net(hyp)
    optimizer = fast94.make_optimizer(net, hyp)
    weight = net.get_parameter(name)
    expected = torch.randn_like(weight)
    velocity = torch.zeros_like(weight)
    weight.data.copy_(expected)
    decay = 1.04e-6 * 64 / lr
    for seed in range(4):
        give_grads(net, seed=seed)
        grad = weight.grad + decay * expected
        velocity = 0.825 * velocity + grad
        expected = expected - lr * (grad + 0.825 * velocity)
        optimizer.step()
        torch.testing.assert_close(weight.data, expected)


def test_a_frozen_whitening_bias_stays(fast94, data, monkeypatch):
    """Two epochs of 4 steps, of which 3 train it. No gradient, momentum or decay after them."""
    train_step = fast94.train_step
    seen = []

    def recorder(net, optimizer, *args):
        result = train_step(net, optimizer, *args)
        bias = net.whiten.bias
        momentum = optimizer.optimizers[0].state[bias]['momentum_buffer']
        seen.append((bias.detach().clone(), momentum.clone(), bias.grad is None))
        return result

    monkeypatch.setattr(fast94, 'train_step', recorder)
    fast94.train(data, 0, narrow_hyp(fast94, whiten_bias_epochs=0.7), quiet=True)
    biases, momenta, frozen = zip(*seen, strict=True)
    assert frozen == (False,) * 3 + (True,) * 5
    assert not torch.equal(biases[1], biases[2])
    for bias, momentum in zip(biases[3:], momenta[3:], strict=True):
        assert torch.equal(bias, biases[2]) and torch.equal(momentum, momenta[2])


def test_the_products_are_less_than_2_percent_of_training(fast94, monkeypatch):
    """Of all steps. Of a step on 24 pixels, at a batch of 1024, they are 2.05 %."""
    monkeypatch.setitem(fast94.PRODUCT_DTYPE, 'meta', torch.float32)
    net = fast94.make_net(fast94.hyp).to('meta')
    _, filters_optimizer = fast94.make_optimizer(net, fast94.hyp).optimizers
    opt = fast94.hyp['opt']
    sizes = opt['low_res_epochs']
    large_epochs = opt['train_epochs'] - len(sizes)
    training = 0
    for epochs, size in [*((1, size) for size in sizes), (large_epochs, 32)]:
        images = torch.empty(2, 3, size, size, device='meta')
        with FlopCounterMode(display=False) as counter:
            net(images, whiten_bias_grad=False).sum().backward()
        training += epochs * counter.get_total_flops() / 2 * opt['batch_size']
    with FlopCounterMode(display=False) as counter:
        filters_optimizer.step()
    products = opt['train_epochs'] * counter.get_total_flops()
    assert 0 < products / (products + training) < 0.02


# ---------------------------------------- Schedule ----------------------------------------
def test_lrs_fall_linearly_and_the_whitening_bias_has_its_own_end(fast94, data, monkeypatch):
    """As the steps see them, with the bias frozen from the step on in which its lr would be 0."""
    seen = []

    def train_step(net, optimizer, images, targets, whiten_bias_grad):
        seen.append((whiten_bias_grad, optimizer.lrs.tolist()))
        return torch.zeros(()), torch.zeros(len(images), 10)

    monkeypatch.setattr(fast94, 'train_step', train_step)
    hyp = narrow_hyp(fast94, train_epochs=2.4, whiten_bias_epochs=1.25)  # 4 steps an epoch
    fast94.train(data, 0, hyp, quiet=True)
    peaks = [hyp['opt'][key] for key in ('bias_lr', 'head_lr', 'bias_lr', 'lr')]
    assert len(seen) == 10
    for step, (trained, lrs) in enumerate(seen):
        factor = 1 - step / 10
        whiten_factor = max(0, 1 - step / 5)
        factors = [factor, factor, whiten_factor, factor]
        expected = [peak * f for peak, f in zip(peaks, factors, strict=True)]
        assert lrs == pytest.approx(expected, rel=1e-6) and trained == (step < 5)


@pytest.mark.parametrize('sizes', [[24], [16, 20, 24]])
@pytest.mark.parametrize('epochs, whitening', [(4.0, 0.2), (4.0, 1.0), (4.0, 1.9), (0.5, 0.2)])
def test_the_warm_up_has_every_kind_of_step(sizes, epochs, whitening, fast94, data, monkeypatch):
    """A kind is an image size, with or without the whitening bias."""
    kinds = set()

    def train_step(net, optimizer, images, targets, whiten_bias_grad):
        kinds.add((images.shape[-1], whiten_bias_grad))
        return torch.zeros(()), torch.zeros(len(images), 10)

    monkeypatch.setattr(fast94, 'train_step', train_step)
    changes = {'train_epochs': epochs, 'batch_size': 16}  # 16 steps an epoch
    hyp = narrow_hyp(fast94, low_res_epochs=sizes, whiten_bias_epochs=whitening, **changes)
    fast94.warm_up(data, hyp, torch.device('cpu'))
    in_warm_up = set(kinds)
    kinds.clear()
    fast94.train(data, 0, hyp, quiet=True)
    assert in_warm_up == kinds


@pytest.mark.parametrize('size', [24.0, 24.5, True])
def test_a_size_is_a_whole_number_of_pixels(size, fast94, data):
    with pytest.raises(fast94.UserError, match='low_res_epochs'):
        fast94.train(data, 0, narrow_hyp(fast94, low_res_epochs=[20, size]))


# ---------------------------------------- One network ----------------------------------------
def test_an_optimizer_in_old_memory_steps_as_a_new_one(fast94):
    """It has the old one's memory for momentum and lrs, but nothing of the values in it."""
    hyp = narrow_hyp(fast94)
    net = fast94.make_net(hyp)
    start = copy.deepcopy(net)
    old = fast94.make_optimizer(net, hyp)
    for seed in range(3):
        give_grads(net, seed=seed)
        old.step()
    old.lrs.zero_()
    momenta = [state['momentum_buffer'] for part in old.optimizers for state in part.state.values()]
    results = []
    for takes_memory in (True, False):
        copy_weights(start, net)
        new = fast94.make_optimizer(net, hyp)
        if takes_memory:
            new.take_memory_of(old)
        for seed in (5, 6):
            give_grads(net, seed=seed)
            new.step()
        results.append(copy.deepcopy(net))
        states = [state for part in new.optimizers for state in part.state.values()]
        same = [a['momentum_buffer'] is b for a, b in zip(states, momenta, strict=True)]
        assert set(same) == {takes_memory}
        assert (new.lrs is old.lrs) == takes_memory
        for lr, group in zip(new.lrs, new.param_groups, strict=True):
            assert group['lr'].data_ptr() == lr.data_ptr()
    assert_equal(*results)


def test_a_second_run_on_a_network_is_the_first(fast94, data):
    hyp = narrow_hyp(fast94)
    _, net = fast94.train(data, 0, hyp, quiet=True)
    first = copy.deepcopy(net)
    fast94.train(data, 0, hyp, net=net, quiet=True)
    assert_equal(net, first)


# ---------------------------------------- CUDA graphs ----------------------------------------
def fake_events():
    """Return and forget what the host asked of the stand-in: 'kernel', 'memcpy', ... ."""
    library = stand_in()
    with tempfile.NamedTemporaryFile('r') as file:
        library.fakegpu_dump(file.name.encode())
        lines = file.read().splitlines()
    library.fakegpu_reset()
    return [line.split('\t')[0] for line in lines]


@needs_cuda
@pytest.mark.cuda_host
def test_a_compiled_step_is_one_graph_and_at_most_8_launches(fast94, monkeypatch):
    """Of every image size, in the second run on a network, with nothing captured after the warm-up,
    and with the momentum of the first run's optimizer."""
    if not stand_in():
        pytest.skip('counts on the stand-in')
    changes = {'train_epochs': 6.0, 'low_res_epochs': [24, 24, 28], 'batch_size': 512}
    hyp = narrow_hyp(fast94, **changes)
    data = fast94.synthetic_data('cuda', train=32768, test=2500)
    device = torch.device('cuda')
    net = fast94.make_net(hyp, device)
    net.compile(backend='eager', dynamic=False)  # traces as compile_step does, but takes no minutes
    step = fast94.CompiledStep(net)
    fast94.warm_up(data, hyp, device, net, step)
    stats = torch._dynamo.utils.counters['stats']
    before = dict(step.recorded), stats['unique_graphs']
    assert len(before[0]) == 4  # 24 pixels with and without the bias, 28, 32

    class CheckedTimer(fast94.Timer):
        def __enter__(self):
            super().__enter__()
            torch.cuda.set_sync_debug_mode('error')

        def __exit__(self, *exception):
            torch.cuda.set_sync_debug_mode('default')
            super().__exit__(*exception)

    eigh = torch.linalg.eigh

    def unchecked_eigh(matrix):
        torch.cuda.set_sync_debug_mode('default')
        result = eigh(matrix)
        torch.cuda.set_sync_debug_mode('error')
        return result

    def evaluate(*args):  # its last line waits for the accuracy
        return 0.0

    monkeypatch.setattr(fast94, 'Timer', CheckedTimer)
    monkeypatch.setattr(torch.linalg, 'eigh', unchecked_eigh)
    monkeypatch.setattr(fast94, 'evaluate', evaluate)
    momenta = []
    for seed in (0, 1):
        events = []
        fake_events()
        on_epoch = {'on_epoch': lambda row, events=events: events.append(fake_events())}
        fast94.train(data, seed, hyp, net=net, quiet=True, step=step, **on_epoch)
        states = [part.state for part in step.optimizer.optimizers]
        momenta.append([s['momentum_buffer'] for state in states for s in state.values()])
    assert (dict(step.recorded), stats['unique_graphs']) == before
    for recorded in step.recorded.values():  # small images, too
        assert recorded.images.is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.Tensor.is_set_to, *momenta)) and len(momenta[0]) == 14
    steps = 32768 // 512
    for epoch, names in enumerate(events):
        launches = sum(name in ('kernel', 'memcpy', 'memset', 'graph') for name in names)
        assert names.count('graph') == steps
        if epoch > 0:  # the first has the preparation, too
            assert launches / steps < 9  # a fraction is the epoch's: its crops and its order


@needs_cuda
@pytest.mark.cuda_host
def test_another_momentum_is_recorded_anew(fast94):
    """The graphs have momentum and weight decay in them, but not the lrs."""
    hyp = narrow_hyp(fast94)
    net = fast94.make_net(hyp, 'cuda').train()
    step = fast94.CompiledStep(net)
    images, targets = blank_batch(24)
    recorded, record = [], step.record
    step.record = lambda *args: recorded.append(momentum) or record(*args)
    for lr, momentum in ((0.2, 0.6), (0.1, 0.6), (0.1, 0.7), (0.1, 0.6)):
        hyp['opt'].update(lr=lr, momentum=momentum)
        optimizer = fast94.make_optimizer(net, hyp)
        for _ in range(2):
            step(net, optimizer, images, targets)
    assert recorded == [0.6, 0.7, 0.6]


@needs_cuda
@pytest.mark.cuda
def test_compiled_runs_are_the_eager_ones(fast94):
    """Two runs on one network, in half precision. The first steps, before chaos has grown."""
    if torch.arange(1000, device='cuda').sum().item() != 499500:
        pytest.skip('needs a GPU that computes')
    hyp = fast94.default_hyp()
    hyp['opt'].update(train_epochs=3.0, low_res_epochs=[24], batch_size=1024, lr=0.02)
    data = fast94.synthetic_data('cuda', train=3072, test=2000)
    net = fast94.make_net(hyp, 'cuda')
    step = fast94.compile_step(net)
    for seed in (0, 1, 2):
        compiled, _ = fast94.train(data, seed, hyp, net=net, quiet=True, step=step)
        eager, _ = fast94.train(data, seed, hyp, quiet=True)
        for ours, theirs in zip(compiled['epochs'], eager['epochs'], strict=True):
            assert ours['train_loss'] == pytest.approx(theirs['train_loss'], rel=0.02)
