"""The CUDA path without a GPU: a whole training on tensors that have a device, a type and a layout,
but no values (FakeTensorMode), and the graphs that --compile hands to the compiler."""

import copy
import itertools

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from conftest import narrow_hyp
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Whose result the host needs: bool(), .item(), .tolist() (once a number), a mask as an index.
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
SGD = (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr)


class Watch(TorchDispatchMode):
    """Note the convolutions, the optimizer's updates, and what waits for the device."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.updates, self.waits = [], 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in WAITS:
            self.waits += 1
            return 0.5
        if operator in SGD:  # is not defined for fake tensors
            self.updates += 1
            return None
        if operator is aten.convolution.default:
            self.convolutions.append(args[:2])
        return operator(*args, **(kwargs or {}))


def convert(module, function, recurse=True):
    """Do what nn.Module._apply does, for fake tensors, which cannot be swapped in place."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(function(weight.detach()), weight.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = function(buffer)
    return module


def backward(loss):
    """Do what torch.Tensor.backward does without a device: gradients like their parameters."""
    todo, seen = [loss.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            if hasattr(node, 'variable'):
                node.variable.grad = torch.empty_like(node.variable)


def interpolate(images, size, mode, resize=F.interpolate):
    """Keep the layout, as on a GPU (test_muon.py): that of a fake tensor is another."""
    return resize(images, size, mode=mode).to(memory_format=torch.channels_last)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let torch take tensors on a GPU that is not there."""
    monkeypatch.setattr(nn.Module, '_apply', convert)
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(F, 'interpolate', interpolate)
    asked = 'synchronize', 'reset_peak_memory_stats', 'max_memory_allocated', 'get_device_name'
    for name in asked:
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    with FakeTensorMode():
        try:
            torch.zeros(2, device='cuda:0').copy_(torch.ones(2, device='cuda:0'))
        except (RuntimeError, AssertionError) as error:  # torch 2.4, or one that was built for CPUs
            pytest.skip(f'fake CUDA tensors need a driver in this torch: {str(error)[:60]}')
        yield


def fake_data(train=2048, test=1000):
    """Return the dict of `load_data`, on a GPU."""
    data = {}
    for split, n in (('train', train), ('test', test)):
        images = torch.zeros(n, 32, 32, 3, dtype=torch.uint8, device='cuda:0')
        labels = torch.zeros(n, dtype=torch.int64, device='cuda:0')
        data[split] = {'images': images, 'labels': labels, 'classes': [*'abcdefghij']}
    return data


def test_a_run_on_cuda_is_half_precision_channels_last_and_waits_once_an_epoch(fake_cuda, script):
    """Operators refuse mixed devices and types. Three epochs of two steps."""
    waits = []
    hyp = narrow_hyp(script, batch_size=1024, train_epochs=3.0, whiten_bias_epochs=1)
    with Watch() as watch:
        on_epoch = {'on_epoch': lambda row: waits.append(watch.waits)}
        _, net = script.train(fake_data(), 0, hyp=hyp, quiet=True, **on_epoch)
    for weight_name, weight in net.named_parameters():
        kind = torch.float32 if 'norm' in weight_name else torch.float16
        assert weight.dtype == kind and weight.device == torch.device('cuda:0')
    assert waits == [2, 4, 6]  # loss and accuracy of each epoch, nothing in a step
    assert watch.waits == 7  # and the accuracy in the end
    updates = 3 * 2 * 2  # steps, groups of parameters
    if script.NAME == 'fast94':
        updates += 2  # of the whitening bias, in the first epoch
    assert watch.updates == updates
    # At least the 7 convolutions of 6 steps and of one batch of images.
    assert len(watch.convolutions) >= 7 * 7
    for tensor in itertools.chain(*watch.convolutions):
        assert tensor.dtype == torch.float16 and tensor.device == torch.device('cuda:0')
        assert tensor.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------- --compile ----------------------------------------
@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_graphs_are_whole_half_precision_and_without_atomics(
    script, nothing_compiled, monkeypatch
):
    """Forward and backward of a step in half precision, as compile_step hands them to the compiler
    on CUDA: the rules by which they are made do not depend on the device."""
    graphs = []

    def keep(graph, inputs):
        """Give results of the right form, without values: not every operator is there in half."""
        graphs.append(graph)
        (results,) = [node.args[0] for node in graph.graph.nodes if node.op == 'output']

        def empty(result):
            if result is None:  # a gradient that nobody needs
                return None
            value = result.meta['val']
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

        return make_boxed_func(lambda *inputs: [empty(result) for result in results])

    def compile_fx(graph, inputs, config_patches=None, decompositions=None):
        compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=decompositions)
        return compiler(graph, inputs)

    monkeypatch.setattr(torch._inductor.compile_fx, 'compile_fx', compile_fx)
    monkeypatch.setitem(script.DTYPE, 'cpu', torch.float16)
    net = script.make_net(narrow_hyp(script), 'cpu').train()
    images = torch.randn(4, 3, 32, 32).to(torch.float16, memory_format=torch.channels_last)
    script.compile_step(net)
    net(images).float().sum().backward()
    assert len(graphs) == 2  # forward and backward: nothing breaks them
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == 'call_function']
    names = [str(node.target) for node in nodes]
    assert names.count('aten.as_strided.default') >= 4  # of pool_backward, once for each pool
    left = names.count('aten.max_pool2d_with_indices_backward.default')
    assert left == 3 * ('modified' in script.__name__)  # of the odd-sized inputs of its groups
    assert not [name for name in names if 'scatter' in name or 'index_put' in name]
    convolutions = [node for node in nodes if 'convolution' in str(node.target)]
    assert len(convolutions) == 14 + 6 * ('modified' in script.__name__)  # each way
    for node in convolutions:
        assert all(argument.meta['val'].dtype == torch.float16 for argument in node.args[:2])


def test_a_compiled_step_refuses_another_network(baseline, nothing_compiled):
    nets = [baseline.make_net(narrow_hyp(baseline)) for _ in range(2)]
    step = baseline.compile_step(nets[0])
    with pytest.raises(ValueError, match='another network'):
        step(nets[1], None, torch.zeros(1), torch.zeros(1))


POOLS = [  # size, stride, padding, height, and whether it is left to Inductor
    (2, 2, 0, 22, False),
    (3, 3, 0, 3, False),
    (2, 2, 0, 7, True),  # a border
    (3, 3, 1, 6, True),
    (3, 2, 0, 6, True),
]


@pytest.mark.parametrize('size, stride, padding, height, left', POOLS)
def test_the_gradient_of_pooling_is_pytorchs(size, stride, padding, height, left, baseline):
    """Also where values tie."""
    x = torch.randn(3, 4, height, height).round(decimals=1).to(memory_format=torch.channels_last)
    pooled, indices = F.max_pool2d(x.requires_grad_(), size, stride, padding, return_indices=True)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    numbers = [size] * 2, [stride] * 2, [padding] * 2, [1, 1]
    found = baseline.pool_backward(grad, x, *numbers, False, indices)
    if left:
        assert found is NotImplemented
    else:
        assert torch.equal(found, x.grad) and found.is_contiguous(memory_format=torch.channels_last)


KINDS = [(size, trained) for size in (32, 24, 20, 16) for trained in (True, False)]


def assert_compiled_is_eager(script, size, trained):
    """Check a compiled step against an eager one: loss, logits and all weights after it."""
    torch.manual_seed(1)
    hyp = narrow_hyp(script)
    eager = script.make_net(hyp, 'cpu').train()
    compiled = script.make_net(hyp, 'cpu').train()
    compiled.load_state_dict(eager.state_dict())
    steps = {eager: script.train_step, compiled: script.compile_step(compiled)}
    images = torch.randn(16, 3, size, size).to(memory_format=torch.channels_last)
    targets = torch.eye(10)[torch.arange(16) % 10]
    results = []
    for net, step in steps.items():
        optimizer = script.make_optimizer(net, hyp)
        loss, logits = step(net, optimizer, images, targets, trained)
        results.append({'loss': loss, 'logits': logits, **net.state_dict()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize('size, trained', [(32, True), (32, False), (24, False)])
def test_the_graphs_of_a_compiled_step_compute_what_an_eager_one_does(
    size, trained, script, float32, nothing_compiled, monkeypatch
):
    """The graphs, with pool_backward in them, run as they are: Inductor takes 40 s for them."""

    def compile_fx(graph, inputs, config_patches=None, decompositions=None):
        def run_it(graph, inputs):
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=run_it, decompositions=decompositions)(graph, inputs)

    monkeypatch.setattr(torch._inductor.compile_fx, 'compile_fx', compile_fx)
    assert_compiled_is_eager(script, size, trained)


@pytest.mark.campaign
@pytest.mark.parametrize('size, trained', KINDS)
def test_a_compiled_step_is_the_eager_one(size, trained, modified, float32, nothing_compiled):
    """In float32, on a CPU, by Inductor, with the whitening bias trained or frozen."""
    assert_compiled_is_eager(modified, size, trained)


def test_a_compiled_group_is_the_eager_one(baseline, float32, nothing_compiled):
    """In float32, on a CPU, by Inductor: the smallest that has a convolution and a pooling."""
    torch.manual_seed(1)
    eager = baseline.ConvGroup(3, 8, 0.6)
    compiled = copy.deepcopy(eager)
    baseline.compile_step(compiled)
    images = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    outputs = [group(images) for group in (eager, compiled)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4)
