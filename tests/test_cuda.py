"""What only a GPU shows: half precision, memory format, no synchronization in a span, --compile, memory."""

import contextlib

import pytest
import torch

from conftest import NARROW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


@pytest.fixture(scope='module')
def gpu_data(baseline):
    """32,768 images, as torch.randperm draws fewer than 30,000 numbers on the host."""
    return baseline.synthetic_data('cuda', train=32768, test=2500)


@pytest.fixture(autouse=True)
def default_stream():
    """An engine leaves a stream of its own current."""
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())


@contextlib.contextmanager
def synchronization_is_an_error():
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_weights_and_images_are_half_precision_channels_last(script, gpu_data):
    net = script.make_net('cuda')
    for name, parameter in net.named_parameters():
        assert parameter.dtype == (torch.float32 if 'norm' in name else torch.float16), name
    assert net[2].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images, labels = next(iter(script.CifarLoader(gpu_data, batch_size=64, aug=script.hyp['aug'])))
    assert images.dtype == torch.float16 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and labels.is_cuda


def test_a_seed_gives_the_same_weights_and_batches(script, gpu_data):
    def first_batch():
        torch.manual_seed(3)
        net = script.make_net('cuda')
        return net[2].conv1.weight, next(iter(script.CifarLoader(gpu_data, aug=script.hyp['aug'])))[
            0
        ]

    (weight, batch), (same_weight, same_batch) = first_batch(), first_batch()
    assert torch.equal(weight, same_weight) and torch.equal(batch, same_batch)
    torch.manual_seed(3)
    assert torch.equal(weight.cpu(), script.make_net('cpu')[2].conv1.weight.half())


def test_both_loaders_yield_bit_identical_batches(baseline, modified, gpu_data):
    batches = []
    for script in (baseline, modified):
        torch.manual_seed(5)
        loader = script.CifarLoader(gpu_data, batch_size=500, aug=baseline.hyp['aug'])
        batches.append([images for _ in range(2) for images, _ in loader])
    assert all(torch.equal(one, other) for one, other in zip(*batches))


def set_rates(optimizer, rate):
    for group in optimizer.param_groups:
        group['lr'] = rate


@pytest.mark.parametrize('trained', [True, False])
@pytest.mark.parametrize('engine', [False, True])
def test_steps_of_an_epoch_do_not_synchronize(script, gpu_data, engine, trained):
    torch.compiler.reset()
    net = script.make_net('cuda')
    optimizer, step = script.make_optimizer(net), script.train_step
    if engine:
        net, optimizer, step = script.Engine(torch.device('cuda', 0)).reset(net)
    net[0].bias.requires_grad = trained
    lookahead = script.LookaheadState(net)
    loader = script.CifarLoader(gpu_data, batch_size=1024, aug=script.hyp['aug'])
    for images, labels in list(loader)[:3]:  # compiles and captures
        set_rates(optimizer, 1e-3)
        step(net, optimizer, images, labels, 0.2)
    with synchronization_is_an_error():
        for images, labels in loader:
            set_rates(optimizer, 1e-3)
            step(net, optimizer, images, labels, 0.2)
            lookahead.update(0.5)


@pytest.mark.parametrize('share', [0.25, 1.0])
@pytest.mark.parametrize('engine', [False, True])
def test_evaluation_does_not_synchronize(script, gpu_data, engine, share):
    torch.compiler.reset()
    net = script.Engine(torch.device('cuda', 0)).net if engine else script.make_net('cuda')
    net[0].bias.requires_grad = False
    loader = script.CifarLoader(gpu_data, train=False, batch_size=1000)
    script.infer(net, loader, 2, share)  # compiles
    with synchronization_is_an_error():
        logits = script.infer(net, loader, 2, share)
    assert logits.shape == (2500, 10) and logits.isfinite().all()


def test_replayed_steps_are_the_eager_ones(script, gpu_data):
    """In half precision, step by step from the same weights and momentum, a capture and three replays."""
    torch.compiler.reset()
    eager = script.make_net('cuda')
    eager_optimizer = script.make_optimizer(eager)
    engine = script.Engine(torch.device('cuda', 0))
    net, optimizer, step = engine.reset(eager)
    batches = list(script.CifarLoader(gpu_data, batch_size=512, aug=script.hyp['aug']))[:5]
    for number, (images, labels) in enumerate(batches, start=1):
        losses = []
        for one, other, make_step in (
            (net, optimizer, step),
            (eager, eager_optimizer, script.train_step),
        ):
            one.train()
            set_rates(other, 1e-3 / number)
            losses.append(make_step(one, other, images, labels, 0.2)[0].clone())
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(
                net.state_dict()[name], value, rtol=2e-2, atol=2e-3, msg=name
            )
        eager.load_state_dict(net.state_dict())
        for one, other in zip(net.parameters(), eager.parameters()):
            if one in optimizer.state:
                eager_optimizer.state[other]['momentum_buffer'].copy_(
                    optimizer.state[one]['momentum_buffer']
                )
    assert len(engine.graphs) == 1


def test_an_engine_captures_once_for_all_runs(script, gpu_data):
    torch.compiler.reset()
    values = {**NARROW, 'opt.batch_size': 512, 'opt.whiten_bias_epochs': 1, 'opt.small_epochs': 1}
    with script.overrides(values):
        engine = script.Engine(torch.device('cuda', 0))
        first, _ = script.train(gpu_data, 1, engine=engine, quiet=True)
        graphs = dict(engine.graphs)
        again, _ = script.train(gpu_data, 1, engine=engine, quiet=True)
        eager, _ = script.train(gpu_data, 1, quiet=True)
    assert engine.graphs == graphs and len(graphs) == 2
    assert again['epochs'][-1]['train_loss'] == pytest.approx(
        first['epochs'][-1]['train_loss'], rel=0.2
    )
    assert again['epochs'][-1]['train_loss'] == pytest.approx(
        eager['epochs'][-1]['train_loss'], rel=0.2
    )


@pytest.mark.parametrize(
    'options', [[], ['--compile'], ['--compile', '--hyp', 'opt.small_epochs=1']]
)
def test_training_learns_and_counts_its_memory(
    script, gpu_data, options, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(script, 'synthetic_data', lambda device: gpu_data)
    narrow = [f'{key}={value}' for key, value in {**NARROW, 'opt.batch_size': 512}.items()]
    runs = script.main(
        [
            '--synthetic',
            '--device',
            'cuda',
            '--trials',
            '2',
            '--log-dir',
            str(tmp_path),
            *options,
            '--hyp',
            *narrow,
        ]
    )
    assert min(run['tta_acc'] for run in runs) > 0.3
    assert 'peak memory' in capsys.readouterr().out


def test_full_size_run_stays_under_4_gib(script):
    data = script.synthetic_data('cuda')
    torch.cuda.reset_peak_memory_stats()
    with script.overrides({'opt.train_epochs': 1.0}):
        script.train(data, seed=0)
    assert torch.cuda.max_memory_allocated() < 4 * 2**30


def test_peak_memory_of_run_50_is_that_of_run_2(script, gpu_data):
    peaks = []
    with script.overrides({**NARROW, 'opt.batch_size': 512, 'opt.train_epochs': 1.0}):
        for seed in range(50):
            torch.cuda.reset_peak_memory_stats()
            script.train(gpu_data, seed, quiet=True)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[49] == peaks[1]
