"""The CUDA path. `-m cuda_host`: what a stand-in that executes nothing can show, too (.ci/run).
`-m cuda`: what needs a GPU's results."""

import gc
import importlib

import pytest
import torch
from bench import speed
from conftest import SCRIPTS, narrow_hyp

NARROW_ARGS = [f'net.widths.block{i}=8' for i in (1, 2, 3)] + ['opt.batch_size=512']
LAUNCHES = {
    'airbench94_baseline': (81, 85),
    'airbench94_modified': (101, 109),
}  # bias frozen, trained
GIB = 2**30


pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU, or a stand-in for one'
)


@pytest.fixture(autouse=True)
def computes(request):
    """Skips what needs results where there are none: on a stand-in nobody writes the sum."""
    marked = request.node.get_closest_marker('cuda')
    if marked and torch.arange(1000, device='cuda').sum().item() != 499500:
        pytest.skip('needs a GPU that computes')


@pytest.fixture(scope='module')
def gpu_data(baseline):
    """32,768 images, as torch.randperm draws fewer than 30,000 numbers on the host."""
    return baseline.synthetic_data('cuda', train=32768, test=2500)


@pytest.fixture
def run_main(gpu_data, monkeypatch, tmp_path):
    """run_main(script, *options): main's runs on gpu_data."""

    def run_main(script, *options):
        monkeypatch.setattr(script, 'synthetic_data', lambda device: gpu_data)
        fixed = ['--synthetic', '--device', 'cuda', '--trials', '1', '--log-dir', str(tmp_path)]
        return script.main([*fixed, *options])

    return run_main


# ---------------------------------------- On a stand-in ----------------------------------------
@pytest.mark.cuda_host
def test_weights_and_batches_are_half_precision_channels_last(script, gpu_data):
    net = script.make_net(script.hyp, 'cuda')
    for name, parameter in net.named_parameters():
        assert parameter.dtype == (torch.float32 if 'norm' in name else torch.float16), name
    assert net.groups[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    loader = script.CifarLoader(gpu_data, batch_size=64, aug=script.hyp['aug'])
    for _ in range(2):  # the second epoch is mirrored
        images, labels = next(iter(loader))
        assert images.dtype == torch.float16 and labels.dtype == torch.int64 and labels.is_cuda
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda_host
def test_a_run_from_the_command_line(script, run_main):
    (run,) = run_main(script, '--hyp', 'opt.train_epochs=2', *NARROW_ARGS)
    assert run['dtype'] == 'float16' and run['peak_bytes'] > 0 and len(run['epochs']) == 2


@pytest.mark.cuda_host
def test_compiled_runs_in_one_process_leave_nothing_behind(script, run_main, monkeypatch):
    """Three calls of main. Nothing is compiled after a warm-up, no memory stays."""
    graphs, memory, warm_up = torch._dynamo.utils.counters['stats'], [], script.warm_up

    def warm_up_and_count(*args, **kwargs):
        result = warm_up(*args, **kwargs)
        counted.append(graphs['unique_graphs'])
        return result

    monkeypatch.setattr(script, 'warm_up', warm_up_and_count)
    counted = []
    for _ in range(3):
        kinds = ['opt.train_epochs=2', 'opt.small_sizes=[24]', 'opt.whiten_bias_epochs=1']
        before = graphs['unique_graphs']
        run_main(script, '--compile', '--hyp', *kinds, *NARROW_ARGS)
        assert graphs['unique_graphs'] == counted[-1]  # after the run as after its warm-up
        # Steps of 24 pixels, and of 32 with a frozen bias; evaluation of 2,000 and of 500 images.
        assert counted[-1] - before == 4
        gc.collect()
        memory.append(torch.cuda.memory_allocated())
    assert memory[0] == memory[1] == memory[2]


@pytest.mark.cuda_host
@pytest.mark.parametrize('share', [0.25, 1.0])
def test_a_span_has_no_synchronization_but_that_of_eigh(script, gpu_data, monkeypatch, share):
    spans, eigh = [], torch.linalg.eigh

    def without_synchronization(function):
        def span(*args, **kwargs):
            spans.append(function.__name__)
            torch.cuda.set_sync_debug_mode('error')
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode('default')

        return span

    def eigh_synchronizes(matrix):
        torch.cuda.set_sync_debug_mode('default')
        result = eigh(matrix)
        torch.cuda.set_sync_debug_mode('error')
        return result

    monkeypatch.setattr(torch.linalg, 'eigh', eigh_synchronizes)
    for owner, name in (
        (script.Training, '__init__'),
        (script.Training, 'run_epoch'),
        (script, 'infer'),
    ):
        monkeypatch.setattr(owner, name, without_synchronization(getattr(owner, name)))
    changes = {'batch_size': 512, 'train_epochs': 2.5, 'whiten_bias_epochs': 1, 'tta_share': share}
    hyp = narrow_hyp(script, small_sizes=[24], **changes)
    script.train(gpu_data, 0, hyp=hyp, quiet=True)
    assert spans == ['__init__', *['run_epoch'] * 3, 'infer']


@pytest.mark.cuda_host
@pytest.mark.parametrize('recipe', ['report', 'fast94'])
def test_a_run_of_full_size_needs_less_than_3_gib(modified, recipe):
    before = torch.cuda.memory_allocated()
    data = speed.random_data(torch.device('cuda'))
    changes = {**modified.RECIPES[recipe], 'opt.train_epochs': 5.0}
    hyp = narrow_hyp(modified, **{**modified.flatten(modified.hyp), **changes})
    torch.cuda.reset_peak_memory_stats()
    record, _ = modified.train(data, 0, hyp=hyp, quiet=True)
    assert record['peak_bytes'] - before < 3 * GIB


@pytest.mark.cuda_host
def test_peak_memory_does_not_grow_from_run_to_run(script, gpu_data):
    hyp, peaks = narrow_hyp(script, batch_size=512, train_epochs=0.1), []
    for seed in range(50):
        torch.cuda.reset_peak_memory_stats()
        script.train(gpu_data, seed, hyp=hyp, quiet=True)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[49] <= 1.01 * peaks[1]


@pytest.mark.cuda_host
@pytest.mark.parametrize('trained', [False, True])
def test_launches_of_a_step(script, trained):
    if not speed.stand_in():
        pytest.skip('on a GPU cuDNN decides how many kernels a convolution takes')
    net = script.make_net(script.hyp, 'cuda').train()
    optimizer, kernels = script.make_optimizer(net, script.hyp), speed.Kernels()
    images = torch.zeros(64, 3, 32, 32, device='cuda', dtype=torch.half)
    batch = images.to(memory_format=torch.channels_last), torch.zeros(64, 10, device='cuda')
    script.train_step(net, optimizer, *batch, trained)  # makes the momentum
    kernels.start()
    script.train_step(net, optimizer, *batch, trained)
    assert 40 < kernels.stop() <= LAUNCHES[script.__name__][trained]


@pytest.mark.cuda_host
def test_out_of_memory_says_where_and_how_much(baseline, run_main, capsys):
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(4 * GIB / total)
    try:
        with pytest.raises(SystemExit) as end:
            run_main(baseline, '--hyp', 'opt.batch_size=32768')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count('\n') == 1
    assert 'out of memory in the training step' in error and 'MiB free' in error


# ---------------------------------------- On a GPU ----------------------------------------
@pytest.mark.cuda
def test_a_seed_gives_the_same_weights_and_batches(script, gpu_data):
    def first():
        torch.manual_seed(3)
        net = script.make_net(script.hyp, 'cuda')
        loader = script.CifarLoader(gpu_data, aug=script.hyp['aug'])
        return net.head.weight, next(iter(loader))[0]

    (weight, batch), (same_weight, same_batch) = first(), first()
    assert torch.equal(weight, same_weight) and torch.equal(batch, same_batch)
    torch.manual_seed(3)
    assert torch.equal(weight.cpu(), script.make_net(script.hyp, 'cpu').head.weight.half())


@pytest.mark.cuda
def test_both_loaders_yield_bit_identical_batches(gpu_data):
    batches = []
    for name in SCRIPTS:
        script = importlib.import_module(name)
        torch.manual_seed(5)
        loader = script.CifarLoader(gpu_data, batch_size=500, aug=script.hyp['aug'])
        batches.append([images for _ in range(2) for images, _ in loader])
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize('trained', [False, True])
@pytest.mark.parametrize('size', [24, 32])
def test_a_compiled_step_is_the_eager_one(script, gpu_data, size, trained):
    """In half precision, from the same weights, at a real batch size."""
    nets = [script.make_net(script.hyp, 'cuda').train() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    script.compile_net(nets[1])
    loader = script.CifarLoader(gpu_data, batch_size=512, aug=script.hyp['aug'])
    images, labels = next(iter(loader))
    targets = torch.nn.functional.one_hot(labels, 10).float()
    nets[0].init_whitening(loader.proc_images['norm'])
    nets[1].whiten.weight.data.copy_(nets[0].whiten.weight)
    images, losses = images[:, :, :size, :size], []
    images = images.contiguous(memory_format=torch.channels_last)
    for net in nets:
        optimizer = script.make_optimizer(net, script.hyp)
        losses.append(script.train_step(net, optimizer, images, targets, trained)[0])
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    for name, value in nets[0].state_dict().items():
        torch.testing.assert_close(
            nets[1].state_dict()[name], value, rtol=2e-2, atol=5e-3, msg=name
        )


@pytest.mark.cuda
@pytest.mark.parametrize('options', [[], ['--compile']], ids=['eager', 'compiled'])
def test_training_learns(script, run_main, options):
    (run,) = run_main(script, *options, '--hyp', 'opt.train_epochs=2', *NARROW_ARGS)
    assert run['tta_acc'] > 0.3
