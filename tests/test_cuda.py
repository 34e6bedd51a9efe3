"""The CUDA path. `-m cuda_host`: what a stand-in that executes nothing can show, too (.ci/run).
`-m cuda`: what needs a GPU's results."""

import copy
import gc

import numpy as np
import pytest
import torch
from bench.worker import pick_device
from conftest import narrow_hyp
from cuda_host_helpers import (
    Kernels,
    blank_batch,
    count_triton_bytes,
    random_data,
    stand_in,
    triton_bytes,
)

NARROW_ARGS = [f'net.widths.block{i}=8' for i in (1, 2, 3)] + ['opt.batch_size=512']
# At most, of an eager step with a frozen and with a trained whitening bias.
LAUNCHES = {
    'airbench94_baseline': (81, 85),
    'airbench94_modified': (101, 109),
    'fast94': (160, 165),
}
# At most, of a compiled step with its share of the epoch, of the first kind (fast94: 24 pixels,
# the bias is trained) and the second (32 pixels, frozen): launches, GB moved by generated kernels.
COMPILED = {
    'airbench94_baseline': [(6, 1.94), (6, 1.75)],
    'airbench94_modified': [(9, 4.00), (8, 3.60)],
    'fast94': [(5, 1.54), (4, 2.62)],
}
GIB = 2**30

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU, or a stand-in for one'
)


@pytest.fixture(autouse=True)
def computes(request):
    """Skip what needs results where there are none: on a stand-in nobody writes the sum."""
    marked = request.node.get_closest_marker('cuda')
    if marked and torch.arange(1000, device='cuda').sum().item() != 499500:
        pytest.skip('needs a GPU that computes')


@pytest.fixture(scope='module')
def gpu_data(baseline):
    """Return 32,768 images, as torch.randperm draws fewer than 30,000 numbers on the host."""
    return baseline.synthetic_data('cuda', train=32768, test=2500)


def two_kinds(script) -> dict:
    """Return changes to hyp for two kinds of steps: in the first epoch, and after it."""
    changes = {'opt.whiten_bias_epochs': 1}
    if script.NAME == 'fast94':
        changes['opt.low_res_epochs'] = [24]
    return changes


@pytest.fixture
def run_main(gpu_data, monkeypatch, tmp_path):
    """Return run_main(script, *options): main's runs on gpu_data."""

    def run_main(script, *options):
        monkeypatch.setattr(script, 'synthetic_data', lambda device: gpu_data)
        fixed = ['--synthetic', '--device', 'cuda', '--trials', '1', '--log-dir', str(tmp_path)]
        return script.main([*fixed, *options])

    return run_main


# ---------------------------------------- On a stand-in ----------------------------------------
@pytest.mark.cuda_host
def test_a_run_from_the_command_line(script, run_main):
    (run,) = run_main(script, '--hyp', 'opt.train_epochs=2', *NARROW_ARGS)
    assert run['dtype'] == 'float16' and run['peak_bytes'] > 0 and len(run['epochs']) == 2
    assert run['cuda'] == torch.version.cuda and 'driver' in run


@pytest.mark.cuda_host
def test_compiled_runs_in_one_process_leave_nothing_behind(script, run_main, monkeypatch):
    """Three calls of main. Nothing is compiled or captured after a warm-up, and no memory of a call
    stays, of its network or of its CUDA graphs."""
    stats, warm_up = torch._dynamo.utils.counters['stats'], script.warm_up
    counted, memory, reserved, captures = [], [], [], []

    class CountedGraph(torch.cuda.graph):
        def __enter__(self):
            captures.append(1)
            return super().__enter__()

    def count():
        return np.array((stats['unique_graphs'], len(captures)))

    def warm_up_and_count(*args, **kwargs):
        result = warm_up(*args, **kwargs)
        counted.append(count())
        return result

    monkeypatch.setattr(torch.cuda, 'graph', CountedGraph)
    monkeypatch.setattr(script, 'warm_up', warm_up_and_count)
    for _ in range(3):
        kinds = [f'{key}={value}' for key, value in two_kinds(script).items()]
        before = count()
        run_main(script, '--compile', '--hyp', 'opt.train_epochs=2', *kinds, *NARROW_ARGS)
        assert np.array_equal(count(), counted[-1])  # after the run as after its warm-up
        # Two kinds of steps, which are CUDA graphs; evaluation of 2,000 and of 500 images.
        assert (counted[-1] - before).tolist() == [4, 2]
        gc.collect()
        memory.append(torch.cuda.memory_allocated())
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert memory[2] <= memory[1]
    assert reserved[2] <= reserved[1]


@pytest.mark.cuda_host
def test_a_span_has_no_synchronization_but_that_of_eigh(script, gpu_data, monkeypatch):
    """And none but the accuracy's at the end of an evaluation, where its span ends."""
    spans, set_mode = [], torch.cuda.set_sync_debug_mode

    def with_mode(owner, name, inside, after):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            set_mode(inside)
            try:
                return function(*args, **kwargs)
            finally:
                set_mode(after)

        monkeypatch.setattr(owner, name, wrapped)

    class CheckedTimer(script.Timer):
        def __enter__(self):
            super().__enter__()
            spans.append(self)
            set_mode('error')

        def __exit__(self, *exception):
            set_mode('default')
            super().__exit__(*exception)

    monkeypatch.setattr(script, 'Timer', CheckedTimer)
    with_mode(torch.linalg, 'eigh', 'default', 'error')
    with_mode(script, 'infer', 'error', 'default')
    with_mode(script, 'evaluate', 'error', 'default')
    hyp = narrow_hyp(script, batch_size=512, train_epochs=2.5, **two_kinds(script))
    script.train(gpu_data, 0, hyp)
    assert len(spans) == 1 + 3 * 2 + 1  # preparation, epochs and their evaluations, the end


@pytest.mark.cuda_host
def test_a_process_of_torchrun_trains_on_its_own_gpu(script, monkeypatch):
    """Also what `--device cuda:1` does: nothing is put on the first GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs, or a stand-in with FAKEGPU_DEVICES=2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    torch.zeros(1, device='cuda:0')  # that GPU has statistics only after its first tensor
    device, before = pick_device('auto', 1), torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    data = script.synthetic_data(device, train=32768, test=2500)
    hyp = narrow_hyp(script, batch_size=512)
    net = script.make_net(hyp, device)
    script.train(data, 0, hyp, net=net, step=script.compile_step(net))
    record, _ = script.train(data, 0, hyp)
    assert record['peak_bytes'] == torch.cuda.max_memory_allocated(1) > 0
    assert torch.cuda.max_memory_allocated(0) == before


@pytest.mark.cuda_host
def test_a_run_of_full_size_needs_less_than_3_3_gib(modified):
    before = torch.cuda.memory_allocated()
    data = random_data('cuda')
    torch.cuda.reset_peak_memory_stats()
    record, _ = modified.train(data, 0, quiet=True)
    assert record['peak_bytes'] - before < 3.3 * GIB


@pytest.mark.cuda_host
def test_peak_memory_does_not_grow_from_run_to_run(script, gpu_data):
    hyp, peaks = narrow_hyp(script, batch_size=512, train_epochs=0.1), []
    for seed in range(50):
        torch.cuda.reset_peak_memory_stats()
        record, _ = script.train(gpu_data, seed, hyp=hyp, quiet=True)
        peaks.append(record['peak_bytes'])
    assert peaks[49] <= 1.01 * peaks[1]


@pytest.mark.cuda_host
@pytest.mark.parametrize('trained', [False, True])
def test_launches_of_an_eager_step(script, trained):
    if not stand_in():
        pytest.skip('on a GPU cuDNN decides how many kernels a convolution takes')
    net = script.make_net(script.hyp, 'cuda').train()
    optimizer, kernels = script.make_optimizer(net, script.hyp), Kernels()
    images = torch.zeros(64, 3, 32, 32, device='cuda', dtype=torch.half)
    batch = images.to(memory_format=torch.channels_last), torch.zeros(64, 10, device='cuda')
    script.train_step(net, optimizer, *batch, trained)  # makes the momentum
    kernels.start()
    script.train_step(net, optimizer, *batch, trained)
    assert 40 < kernels.stop() <= LAUNCHES[script.NAME][trained]


@pytest.mark.cuda_host
def test_a_kind_of_step_that_was_stopped_is_made_again_before_it_is_recorded(script, monkeypatch):
    """As by Ctrl-C while it compiles; then another run begins."""
    hyp = narrow_hyp(script)
    net = script.make_net(hyp, 'cuda').train()
    step = script.CompiledStep(net)
    images, targets = blank_batch(32)
    train_step = script.train_step
    answers = [KeyboardInterrupt, train_step, train_step]

    def sometimes_stopped(*args):
        answer = answers.pop(0)
        if answer is KeyboardInterrupt:
            raise answer
        return answer(*args)

    monkeypatch.setattr(script, 'train_step', sometimes_stopped)
    with pytest.raises(KeyboardInterrupt):
        step(net, script.make_optimizer(net, hyp), images, targets)
    optimizer = script.make_optimizer(net, hyp)
    step(net, optimizer, images, targets)
    assert not step.recorded
    step(net, optimizer, images, targets)
    assert len(step.recorded) == 1


@pytest.mark.cuda_host
def test_launches_and_bytes_of_a_compiled_step(script):
    """At full size, on one architecture. Two epochs of the first kind, whose first has the
    preparation in it, and one of the second."""
    if not stand_in() or torch.cuda.get_device_capability() != (8, 0):
        pytest.skip('on a GPU cuDNN decides how many kernels a convolution takes')
    count_triton_bytes()
    data = random_data('cuda')
    hyp = script.default_hyp()
    hyp['opt'].update(train_epochs=3.0, whiten_bias_epochs=2)
    if script.NAME == 'fast94':
        hyp['opt']['low_res_epochs'] = [24, 24]
    net = script.make_net(hyp, 'cuda')
    step = script.compile_step(net)
    moved, launches, kernels = [triton_bytes()], [], Kernels()

    def count_bytes(row):
        moved.append(triton_bytes())

    def count_epoch(row):
        launches.append(kernels.stop())
        kernels.start()

    for on_epoch in (count_bytes, count_epoch):
        kernels.start()
        script.train(data, 0, hyp, net=net, quiet=True, step=step, on_epoch=on_epoch)
    kernels.stop()
    steps = len(data['train']['labels']) // hyp['opt']['batch_size']
    found = np.round((launches[1] / steps, launches[2] / steps))
    first, again, second = np.diff(moved)
    assert again == 0
    limits = COMPILED[script.NAME]
    for (most, most_gb), count, size in zip(limits, found, (first, second), strict=True):
        assert 0 < count <= most and 0 < round(size / 1e9, 2) <= most_gb


# ---------------------------------------- On a GPU ----------------------------------------
@pytest.mark.cuda
def test_a_seed_gives_the_weights_that_it_gives_on_the_cpu(script):
    weights = []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(3)
        weights.append(script.make_net(script.hyp, device).head.weight.cpu().half())
    assert torch.equal(*weights)


@pytest.mark.cuda
def test_a_seed_gives_the_same_batches_in_both_scripts(baseline, modified, gpu_data):
    batches = []
    for script in (baseline, modified):
        torch.manual_seed(5)
        loader = script.CifarLoader(gpu_data, batch_size=500, aug=script.hyp['aug'])
        batches.append([images for _ in range(2) for images, _ in loader])
    assert all(map(torch.equal, *batches)) and len(batches[0]) == len(batches[1]) == 130


@pytest.mark.cuda
def test_compiled_steps_are_the_eager_ones(script, gpu_data):
    """In half precision, from the same weights, at a real batch size.

    The first two steps of a kind run and record its CUDA graph, later ones replay it on new images:
    in turns with the other's, with which it shares memory.
    """
    kinds = 3 * [(24, True)] + 3 * [(32, False)] + [(24, True), (32, False)]
    hyp = script.default_hyp()
    hyp['opt']['lr'] = 0.02 if script.NAME == 'fast94' else 4.0
    nets = [script.make_net(hyp, 'cuda').train() for _ in range(2)]
    loader = script.CifarLoader(gpu_data, batch_size=512, aug=hyp['aug'])
    nets[0].init_whitening(loader.normalize(loader.images[:5000]))
    nets[1].load_state_dict(nets[0].state_dict())
    start = copy.deepcopy(nets[0].state_dict())
    steps = [script.train_step, script.compile_step(nets[1])]
    optimizers = [script.make_optimizer(net, hyp) for net in nets]
    for (size, trained), (images, labels) in zip(kinds, loader, strict=False):
        images = images[:, :, :size, :size].contiguous(memory_format=torch.channels_last)
        targets = torch.nn.functional.one_hot(labels, 10).float()
        losses = [
            step(net, optimizer, images, targets, trained)[0]
            for step, net, optimizer in zip(steps, nets, optimizers, strict=True)
        ]
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    eager, compiled = (net.state_dict() for net in nets)
    for name, before in start.items():
        moved = (eager[name] - before).float().norm()
        # Of one CPU's bfloat16 and float32, with an eighth of the precision, they were 0.14 apart.
        assert (compiled[name] - eager[name]).float().norm() <= 0.1 * moved, name


@pytest.mark.cuda
@pytest.mark.parametrize('options', [[], ['--compile']], ids=['eager', 'compiled'])
def test_training_learns(script, run_main, options):
    # With a lower lr: at its own, the narrow network of the modified script may diverge.
    lr = 0.14 if script.NAME == 'fast94' else 8
    changes = ['opt.train_epochs=2', f'opt.lr={lr}', 'opt.whiten_bias_epochs=1', *NARROW_ARGS]
    (run,) = run_main(script, *options, '--seed', '1', '--hyp', *changes)
    assert run['tta_acc'] > 0.3
