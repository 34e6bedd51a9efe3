"""The networks against a transcription of the specification; initialization, whitening, TTA."""

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW_ARGS, narrow_hyp
from torch import nn

PARAMETERS = {'airbench94_modified': 1_972_792 + 83_456}  # of the others 1,972,792
SCALES = {'fast94': 1 / 256}  # of the logits; of the others 1/9
FORGET = {'fast94': 0.443}  # the share of a batch in BatchNorm's statistics; of the others 0.4
pytestmark = pytest.mark.usefixtures('float32')


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def net(script):
    return script.make_net(script.hyp)


@torch.no_grad()
def perturb(module):
    """Add noise to all weights, BatchNorm biases and statistics; the BatchNorm scales stay 1."""
    for name, tensor in module.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 2)
        elif name.endswith(('bias', 'running_mean')):
            tensor.normal_(std=0.5)
        elif tensor.dim() > 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.5 * tensor.std())
    return module


def reference(images, state, residual, scale, training):
    """Return the logits of the specification's network, with whole 'same' convolutions."""

    def norm(x, name):
        keys = 'running_mean', 'running_var', 'bias'
        mean, var, bias = (state[f'{name}.{key}'].clone() for key in keys)
        return F.batch_norm(x, mean, var, None, bias, training=training, eps=1e-12)

    x = F.gelu(F.conv2d(images, state['whiten.weight'], state['whiten.bias']))
    for name in ('groups.0', 'groups.1', 'groups.2'):
        shortcut = 0
        if residual:
            shortcut = F.conv2d(F.max_pool2d(x, 2), state[f'{name}.downsample.weight'])
        x = F.max_pool2d(F.conv2d(x, state[f'{name}.conv1.weight'], padding=1), 2)
        x = F.gelu(norm(x, f'{name}.norm1'))
        x = F.conv2d(x, state[f'{name}.conv2.weight'], padding=1)
        x = F.gelu(norm(x, f'{name}.norm2') + shortcut)
    x = F.max_pool2d(x, x.shape[-1]).flatten(1)
    return F.linear(x, state['head.weight']) * scale


# ---------------------------------------- The network ----------------------------------------
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('pixels', [32, 20])
@torch.no_grad()
def test_the_network_is_the_specifications(pixels, training, script, net):
    """Maps of 31, 15 and 7 pixels; of 19, 9 and 4."""
    images, residual = torch.randn(6, 3, pixels, pixels), script.NAME == 'airbench94_modified'
    scale = SCALES.get(script.NAME, 1 / 9)
    expected = reference(images, perturb(net).state_dict(), residual, scale, training)
    logits = net.train(training)(images)
    assert logits.shape == (6, 10)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_the_pooling_never_reads_is_not_computed(net):
    computed = []
    for group in net.groups:
        group.conv1.register_forward_hook(lambda *args: computed.append(args[-1].shape[-1]))
    net(torch.randn(6, 3, 20, 20))
    assert computed == [18, 8, 4]  # of 19, 9 and 4


def test_number_of_parameters(script, net):
    expected = PARAMETERS.get(script.NAME, 1_972_792)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def test_batchnorms_start_neutral_and_forget_quickly(script, net):
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    forget = FORGET.get(script.NAME, 0.4)
    assert [(norm.eps, round(norm.momentum, 12)) for norm in norms] == [(1e-12, forget)] * 6
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize('in_channels, out_channels', [(4, 6), (6, 4)])
def test_a_conv_starts_as_the_identity_and_else_by_default(in_channels, out_channels, script):
    conv = script.Conv(in_channels, out_channels)
    torch.manual_seed(1)  # again
    expected = nn.Conv2d(in_channels, out_channels, 3, bias=False).weight.detach()
    same = range(min(in_channels, out_channels))
    expected[same] = 0
    expected[same, same, 1, 1] = 1
    assert torch.equal(conv.weight, expected)


def test_head_and_downsample_have_pytorchs_default_init_and_the_whitening_bias_is_0(script, net):
    """fast94's head is divided by its standard deviation."""
    assert net.whiten.bias.shape == (24,) and not net.whiten.bias.any()
    for name, weight in net.state_dict().items():
        if name == 'head.weight' or 'downsample' in name:
            bound = weight[0].numel() ** -0.5
            if script.NAME == 'fast94':
                assert weight.std().item() == pytest.approx(1)
                assert 0.97 * 3**0.5 < weight.abs().max() <= 1.03 * 3**0.5
                continue
            assert 0.98 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_saved_network_gives_the_same_logits(script, data, data_dir, tmp_path, call):
    """The file has the script, hyp, classes and weights; no code is run to read it."""
    options = '--data-dir', data_dir, '--trials', 1, '--seed', 3, '--save', 'net.pt', *NARROW_ARGS
    (run,) = call(*options, script=script).runs
    saved = torch.load(tmp_path / 'net.pt', weights_only=True)
    assert saved['script'] == script.NAME and saved['classes'] == [*'abcdefghij']
    net = script.make_net(saved['hyp'], 'cpu', len(saved['classes']))
    net.load_state_dict(saved['state_dict'])
    loader = script.CifarLoader(str(data_dir), train=False, device='cpu')
    share = [saved['hyp']['net']['tta_share']] if script.NAME == 'fast94' else []
    assert script.evaluate(net, loader, 2, *share) == run['tta_acc']
    _, trained = script.train(data, run['seed'], saved['hyp'])
    assert torch.equal(script.infer(net, loader), script.infer(trained, loader))


# ---------------------------------------- Whitening ----------------------------------------
def test_whitening_decorrelates_patches_with_filters_that_fall_and_their_negatives(net):
    images = F.interpolate(torch.randn(200, 3, 8, 8), 32, mode='bilinear')  # correlated
    net.init_whitening(images, eps=1e-2)
    patches = F.unfold(images.double(), 2).permute(1, 0, 2).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    weight = net.whiten.weight.detach()
    outputs = weight[:12].double().flatten(1) @ patches
    moment, expected = outputs @ outputs.T / patches.shape[1], eigenvalues / (eigenvalues + 1e-2)
    torch.testing.assert_close(moment, expected.diag(), rtol=0, atol=2e-3)
    lengths = weight[:12].double().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, (eigenvalues + 1e-2) ** -0.5, rtol=1e-2, atol=0)
    assert torch.equal(weight[12:], -weight[:12])


def test_whitening_computes_in_float32_for_half_precision_images(net):
    images = torch.randn(20, 3, 32, 32).half()
    net.init_whitening(images.float())
    expected = net.whiten.weight.clone()
    net.init_whitening(images)
    assert torch.equal(net.whiten.weight, expected)


# ---------------------------------------- Test-time augmentation ---------------------------------
@pytest.fixture
def trained(script):
    """Return a perturbed narrow network."""
    return perturb(script.make_net(narrow_hyp(script)))


@pytest.fixture
def loader(script, data):
    """Return 100 test images in batches of 30, the last one short."""
    return script.CifarLoader(data, train=False, batch_size=30)


@torch.no_grad()
def explicit_tta(net, images, level):
    """Return the logits of the specification's formula, pass by pass."""
    net.eval()

    def mirrored_mean(x):
        return 0.5 * net(x) + 0.5 * net(x.flip(-1))

    if level == 0:
        return net(images)
    if level == 1:
        return mirrored_mean(images)
    padded = F.pad(images, (1,) * 4, 'reflect')
    moved = [mirrored_mean(padded[:, :, i : i + 32, i : i + 32]) for i in (0, 2)]
    return 0.5 * mirrored_mean(images) + 0.5 * (moved[0] + moved[1]) / 2


@pytest.mark.parametrize('level', [0, 1, 2])
def test_infer_is_the_formula_and_leaves_the_network_as_it_was(level, script, trained, loader):
    expected = explicit_tta(trained, loader.normalize(loader.images), level)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    logits = script.infer(trained.train(), loader, level)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not logits.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize('level', [-1, 3, 7])
def test_a_tta_level_that_is_not_there_is_an_error(level, script, trained, loader):
    with pytest.raises(ValueError, match=f'tta_level {level}'):
        script.infer(trained, loader, level)


@pytest.mark.parametrize('share, count', [(0, 0), (0.2, 204)])
def test_fast94_gives_tta_to_exactly_the_share_of_least_certain_images(share, count, fast94):
    """Of 1,017 images in one batch of 2,000, 204 get it, and no more."""
    net = perturb(fast94.make_net(narrow_hyp(fast94)))
    data = fast94.synthetic_data('cpu', train=8, test=1017)
    loader = fast94.CifarLoader(data, train=False, batch_size=2000)
    images = loader.normalize(loader.images)
    expected = explicit_tta(net, images, 0)
    best = expected.sort(descending=True).values
    unsure = (best[:, 0] - best[:, 1]).argsort()[:count]
    expected[unsure] = explicit_tta(net, images[unsure], 2)
    logits = fast94.infer(net, loader, 2, share)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_logits_under_bfloat16_are_float32_and_close(script, trained, loader, monkeypatch):
    expected = script.infer(trained, loader, 2)
    monkeypatch.setattr(script, 'cpu_has_bfloat16', lambda: True)
    logits = script.infer(trained, loader, 2)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * expected.abs().max().item())
