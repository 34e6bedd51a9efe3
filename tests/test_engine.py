"""The engine of --compile: its steps are the eager ones, a run leaves nothing in it, and what it captures on
CUDA can be replayed. Here a capture is recorded and replayed on the CPU; test_cuda.py has CUDA's own."""
import contextlib
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import NARROW, set_autocast

needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
FREEZING = {**NARROW, 'opt.whiten_bias_epochs': 1}  # after the first of two epochs, which have 4 steps each
TRACED = {'backend': 'eager'}  # traced, guarded and compiled again as by inductor, but in no time


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def float32(modified, monkeypatch):
    """The modified script in float32 under FREEZING. (The engine is the same text in both scripts.)"""
    set_autocast(monkeypatch, modified, False)
    with modified.overrides(FREEZING):
        yield modified


def state(net, optimizer):
    """Every tensor that a step changes, by name."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    momenta = {f'momentum of {names[parameter]}': value['momentum_buffer']
               for parameter, value in optimizer.state.items() if value['momentum_buffer'] is not None}
    return {**net.state_dict(), **momenta}


class Twins:
    """An engine's network and an eager one, which make each step from the same state."""

    def __init__(self, script, engine, data):
        self.script, fresh = script, script.make_net()
        self.net, self.optimizer, self.step = engine.reset(fresh)
        self.eager, self.eager_optimizer = fresh, script.make_optimizer(fresh)
        self.peaks = [group['lr'] for group in self.eager_optimizer.param_groups]
        self.lookaheads = [script.LookaheadState(net) for net in (self.net, self.eager)]
        self.batches = list(script.CifarLoader(data, batch_size=64, aug=script.hyp['aug']))

    def make_step(self, number):
        """Step `number` by both; the first 4 train the whitening bias. Losses, and states after it."""
        results = []
        for net, optimizer, step in ((self.net, self.optimizer, self.step),
                                     (self.eager, self.eager_optimizer, self.script.train_step)):
            net.train()
            net[0].bias.requires_grad = number <= 4
            for group, peak in zip(optimizer.param_groups, self.peaks):
                group['lr'] = peak / number
            results.append(step(net, optimizer, *self.batches[number % 4], 0.2)[0].clone())
        if number % 5 == 0:
            for lookahead in self.lookaheads:
                lookahead.update(0.5)
        return results, [state(self.net, self.optimizer), state(self.eager, self.eager_optimizer)]

    def compare(self, steps, tolerance):
        for number in range(1, steps + 1):
            losses, (one, other) = self.make_step(number)
            torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)
                other[name].copy_(one[name])  # the next step starts from the same state


@needs_compiler
def test_compiled_steps_are_the_eager_ones_freeze_and_lookahead_included(float32, data):
    Twins(float32, float32.Engine(torch.device('cpu')), data).compare(steps=6, tolerance=1e-4)


@needs_compiler
def test_a_compiled_run_ends_as_an_eager_one(float32, data):
    with float32.overrides({'opt.small_epochs': 1}):
        engine = float32.Engine(torch.device('cpu'))
        (record, _), (eager, _) = (float32.train(data, 1, 'cpu', e, quiet=True) for e in (engine, None))
    losses, eager_losses = ([row['train_loss'] for row in run['epochs']] for run in (record, eager))
    assert losses == pytest.approx(eager_losses, rel=1e-4)
    assert record['tta_acc'] == pytest.approx(eager['tta_acc'], abs=0.02)


def test_a_second_run_of_an_engine_is_that_run_alone_bit_for_bit(float32, data):
    engine, alone = (float32.Engine(torch.device('cpu'), **TRACED) for _ in range(2))
    float32.train(data, 1, 'cpu', engine, quiet=True)
    (record, net), (expected, other) = (float32.train(data, 2, 'cpu', e, quiet=True) for e in (engine, alone))
    assert net is engine.net and record['epochs'][-1]['train_loss'] == expected['epochs'][-1]['train_loss']
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


each_course = pytest.mark.parametrize('quiet, values, test', [
    (True, {}, 100),                               # the whitening bias freezes on the way
    (True, {'opt.train_epochs': 1.0}, 100),        # it does not
    (True, {'net.tta_level': 0}, 1010),            # whole batches and a short one
    (True, {'net.tta_share': 0.3}, 1010),          # another number of batches than in the warm-up
    (False, {'opt.small_epochs': 1}, 100),         # small images, bias trained; large ones, bias frozen
    (False, {'opt.small_epochs': 2}, 100),         # small images, trained and frozen
    (False, {'opt.small_epochs': 1, 'opt.whiten_bias_epochs': 2}, 100),
])


def warmed_up(script, engine, data):
    script.warm_up(script.Arm('it', script, '', script.flat(script.hyp)), data, torch.device('cpu'), engine)


@each_course
def test_after_the_warm_up_nothing_is_compiled(quiet, values, test, float32):
    data = float32.synthetic_data('cpu', 256, test)
    widths = [{'net.widths.block1': width} for width in (8, 12)]  # of two engines, both warmed up first
    with float32.overrides({'opt.train_epochs': 3.0, **values}):
        engines = []
        for arm in widths:
            with float32.overrides(arm):
                engines.append(float32.Engine(torch.device('cpu'), **TRACED))
                warmed_up(float32, engines[-1], data)
        for arm, engine in zip(widths, engines):
            with float32.overrides(arm), torch._dynamo.config.patch(error_on_recompile=True):
                float32.train(data, 1, 'cpu', engine, quiet)


def test_no_kind_of_batch_is_too_many_to_be_compiled(float32, caplog):
    """Small and large images, the bias trained and frozen, short batches, by three engines in turn."""
    device, data = torch.device('cpu'), float32.synthetic_data('cpu', 256, 130)
    with float32.overrides({'opt.small_epochs': 2, 'opt.train_epochs': 3.0, 'net.tta_share': 0.5}):
        for _ in range(3):
            float32.train(data, 1, device, float32.Engine(device, **TRACED))
    assert 'limit' not in caplog.text


# Capture

class RecordedGraph(TorchDispatchMode):
    """Stands in for a CUDA graph: the operations of a capture, which a replay runs on the very same tensors,
    inputs and results, whatever Python would decide by then."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, results in self.operations:
            again = operation(*args, **kwargs)
            olds, news = (torch.utils._pytree.tree_leaves(value) for value in (results, again))
            for old, new in zip(olds, news):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # else a view, or in place


@pytest.fixture
def capturing(float32, monkeypatch):
    """An engine on the CPU that captures as on CUDA, into RecordedGraphs."""
    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert pool == 'pool'
        before = {name: value.clone() for name, value in state(engine.net, engine.optimizer).items()}
        with graph:
            yield
        for name, value in state(engine.net, engine.optimizer).items():  # a capture on CUDA makes no step
            value.copy_(before[name])

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', RecordedGraph)
    monkeypatch.setattr(torch.cuda, 'graph', capture)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: None)
    engine = float32.Engine(torch.device('cpu'), **TRACED)
    engine.pool = 'pool'
    return engine


def test_replayed_steps_are_the_eager_ones_from_new_batches_rates_and_state(float32, data, capturing):
    Twins(float32, capturing, data).compare(steps=12, tolerance=1e-6)
    replays = {kind[1]: graph.replays for kind, (graph, *_) in capturing.graphs.items()}
    assert replays == {True: 2, False: 6}  # two steps of each kind are made before its capture


def test_replayed_runs_are_the_eager_ones(float32, data, capturing):
    with float32.overrides({'opt.small_epochs': 1, 'opt.train_epochs': 3.0}):
        for seed in (1, 2):
            (record, net), (eager, other) = (float32.train(data, seed, 'cpu', e) for e in (capturing, None))
            assert record['tta_acc'] == pytest.approx(eager['tta_acc'], abs=0.02)
            for name, value in net.state_dict().items():
                torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
    assert [graph.replays for graph, *_ in capturing.graphs.values()] == [6, 14]


@each_course
def test_after_the_warm_up_nothing_is_captured(quiet, values, test, float32, capturing):
    data = float32.synthetic_data('cpu', 256, test)
    with float32.overrides({'opt.train_epochs': 3.0, **values}):
        warmed_up(float32, capturing, data)
        graphs = dict(capturing.graphs)
        float32.train(data, 1, 'cpu', capturing, quiet)
    assert graphs and capturing.graphs == graphs


def test_each_size_and_each_state_of_the_whitening_bias_has_a_graph_of_its_own(float32, data, capturing):
    with float32.overrides({'opt.small_epochs': 2, 'opt.train_epochs': 3.0}):
        float32.train(data, 1, 'cpu', capturing, quiet=True)
    kinds = [(shape[-1], trained) for shape, trained in capturing.graphs]
    assert kinds == [(24, True), (24, False), (32, False)]


def test_the_frozen_whitening_bias_is_left_out_of_its_graph(float32, data, capturing):
    float32.train(data, 1, 'cpu', capturing, quiet=True)
    sizes = {trained: len(graph.operations) for (_, trained), (graph, *_) in capturing.graphs.items()}
    assert sizes[False] < sizes[True]
