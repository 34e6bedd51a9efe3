"""The networks against a transcription of the specification; initialization, whitening, TTA."""

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, narrow_hyp
from torch import nn

SIZES = {'airbench94_baseline': 1_972_792, 'airbench94_modified': 1_972_792 + 83_456}
pytestmark = pytest.mark.usefixtures('float32')


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def net(script):
    return script.make_net(script.hyp)


@torch.no_grad()
def perturb(module):
    """Noise on all weights, BatchNorm biases and statistics; the BatchNorm scales stay 1."""
    for name, tensor in module.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 2)
        elif name.endswith(('bias', 'running_mean')):
            tensor.normal_(std=0.5)
        elif tensor.dim() > 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.5 * tensor.std())
    return module


def reference(images, state, residual, training):
    """The specification's network in functional form, with whole 'same' convolutions."""

    def norm(x, name):
        mean, var, bias = (
            state[f'{name}.{key}'].clone() for key in ('running_mean', 'running_var', 'bias')
        )
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
    return F.linear(x, state['head.weight']) / 9


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def is_residual(script):
    return script.NAME == 'airbench94_modified'


# ---------------------------------------- Forward ----------------------------------------
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('pixels', [32, 24, 20, 16])
@torch.no_grad()
def test_the_network_is_the_specifications(pixels, training, script, net):
    """Maps of 31, 23, 19 and 15 pixels are odd: what the pooling never reads is not computed."""
    images = torch.randn(6, 3, pixels, pixels)
    expected = reference(images, perturb(net).state_dict(), is_residual(script), training)
    logits = net.train(training)(images)
    assert logits.shape == (6, 10)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('pixels', [8, 9])
@torch.no_grad()
def test_conv_is_computed_only_where_the_pooling_reads(pixels, script):
    group, x = perturb(script.ConvGroup(5, 7, 0.6)).eval(), torch.randn(2, 5, pixels, pixels)
    path = F.max_pool2d(F.conv2d(x, group.conv1.weight, padding='same'), 2)
    path = group.norm2(group.conv2(F.gelu(group.norm1(path))))
    if is_residual(script):
        path = path + group.downsample(group.pool(x))
    computed = []
    group.conv1.register_forward_hook(lambda module, given, output: computed.append(output.shape))
    torch.testing.assert_close(group(x), F.gelu(path))
    assert computed == [(2, 7, 8, 8)]


@pytest.mark.parametrize('classes', [2, 5, 100])
def test_as_many_logits_as_classes(classes, script):
    net = script.make_net(narrow_hyp(script), num_classes=classes)
    assert net(torch.randn(3, 3, 32, 32)).shape == (3, classes)


# ---------------------------------------- Parameters ----------------------------------------
def test_number_of_parameters(script, net):
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[script.NAME]
    assert net.whiten.bias.shape == (24,) and not net.whiten.bias.any()


def test_only_the_modified_groups_have_a_downsample_convolution(script):
    parts = dict(script.ConvGroup(5, 7, 0.6).named_children())
    expected = {'conv1', 'pool', 'norm1', 'conv2', 'norm2'}
    if is_residual(script):
        expected.add('downsample')
        assert parts['downsample'].weight.shape == (7, 5, 1, 1)
        assert parts['downsample'].bias is None
    assert set(parts) == expected


def test_frozen_are_the_whitening_filters_and_the_batchnorm_scales(net):
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    scales = {f'groups.{group}.norm{i}.weight' for group in (0, 1, 2) for i in (1, 2)}
    assert frozen == {'whiten.weight', *scales}


@pytest.mark.parametrize('in_channels, out_channels', [(4, 6), (6, 6), (6, 4)])
def test_a_conv_starts_as_the_identity_on_its_first_channels(in_channels, out_channels, script):
    x, same = torch.randn(2, in_channels, 5, 5), min(in_channels, out_channels)
    conv = script.Conv(in_channels, out_channels)
    torch.testing.assert_close(conv(x)[:, :same], x[:, :same])


def test_all_other_weights_have_pytorchs_default_init(script, net):
    torch.manual_seed(1)
    expected = nn.Conv2d(4, 6, 3, bias=False).weight
    torch.manual_seed(1)
    assert torch.equal(script.Conv(4, 6).weight[4:], expected[4:])
    for name, weight in net.state_dict().items():
        if name == 'head.weight' or 'downsample' in name:
            bound = weight[0].numel() ** -0.5
            assert 0.98 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_batchnorm(script, net):
    for norm in norms(net):
        assert (norm.eps, round(norm.momentum, 12)) == (1e-12, 0.4)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert len(norms(net)) == 6
    norm, x = script.BatchNorm(2, 0.6), 3 * torch.randn(5, 2, 4, 4) + 7
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.4 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.6 + 0.4 * x.var((0, 2, 3)))


def test_a_saved_network_gives_the_same_logits(script, data_dir, tmp_path, call):
    """As README says: hyp, classes and weights are in the file, and no code is run to read it."""
    changes = [f'{key}={value}' for key, value in NARROW.items()]
    options = '--data-dir', data_dir, '--trials', 1, '--seed', 3, '--save', 'net.pt', '--hyp'
    result = call(*options, *changes, script=script)
    saved = torch.load(tmp_path / 'net.pt', weights_only=True)
    net = script.make_net(saved['hyp'], 'cpu', len(saved['classes']))
    net.load_state_dict(saved['state_dict'])
    loader = script.CifarLoader(str(data_dir), train=False, device='cpu')
    assert saved['hyp'] == narrow_hyp(script) and saved['classes'] == [*'abcdefghij']
    assert script.evaluate(net, loader, tta_level=2) == result.runs[0]['tta_acc']
    data = script.load_data(str(data_dir), 'cpu')
    _, trained = script.train(data, result.runs[0]['seed'], narrow_hyp(script))
    images = loader.normalize(loader.images)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), trained.eval()(images))


# ---------------------------------------- Whitening ----------------------------------------
@pytest.fixture
def whitened(net):
    """A whitened network, its images' patches in float64 [12, n], their eigenvalues, falling."""
    images = F.interpolate(torch.randn(200, 3, 8, 8), 32, mode='bilinear')  # correlated
    net.init_whitening(images, eps=1e-2)
    patches = F.unfold(images.double(), 2).permute(1, 0, 2).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    return net, patches, eigenvalues


def test_whitened_patches_are_decorrelated(whitened):
    net, patches, eigenvalues = whitened
    outputs = net.whiten.weight.detach().double()[:12].flatten(1) @ patches
    expected = (eigenvalues / (eigenvalues + 1e-2)).diag()
    moment = outputs @ outputs.T / patches.shape[1]
    torch.testing.assert_close(moment, expected, rtol=0, atol=2e-3)


def test_whitening_filters_fall_with_the_eigenvalue_and_come_with_their_negatives(whitened):
    net, _, eigenvalues = whitened
    weight = net.whiten.weight.detach()
    lengths = weight[:12].double().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, (eigenvalues + 1e-2) ** -0.5, rtol=1e-2, atol=0)
    assert torch.equal(weight[12:], -weight[:12])


def test_whitening_computes_in_float32_for_half_precision_images(script):
    images, nets = torch.randn(20, 3, 32, 32).half(), []
    for given in (images, images.float()):
        nets.append(script.make_net(narrow_hyp(script)))
        nets[-1].init_whitening(given)
    assert torch.equal(*(net.whiten.weight for net in nets))


# ---------------------------------------- Test-time augmentation ----------------------------------
@pytest.fixture
def trained(script):
    """A perturbed narrow network."""
    return perturb(script.make_net(narrow_hyp(script)))


@pytest.fixture
def loader(script, data):
    """100 test images in batches of 30, the last one short."""
    return script.CifarLoader(data, train=False, batch_size=30)


def shifted(images, rows, columns):
    """The images moved by -1 or 1 pixels, what comes in at the edges reflected."""

    def source(step):
        positions = torch.arange(32) - step
        positions = torch.where(positions < 0, -positions, positions)
        return torch.where(positions > 31, 62 - positions, positions)

    return images[:, :, source(rows)][..., source(columns)]


@torch.no_grad()
def explicit_tta(net, images, level):
    """The specification's formula, pass by pass."""
    net.eval()

    def mirrored_mean(x):
        return 0.5 * net(x) + 0.5 * net(x.flip(-1))

    if level == 0:
        return net(images)
    if level == 1:
        return mirrored_mean(images)
    moved = [mirrored_mean(shifted(images, step, step)) for step in (-1, 1)]
    return 0.5 * mirrored_mean(images) + 0.5 * (moved[0] + moved[1]) / 2


each_level = pytest.mark.parametrize('level', [0, 1, 2])


@each_level
def test_infer_is_the_formula_of_the_specification(level, script, trained, loader):
    expected = explicit_tta(trained, loader.normalize(loader.images), level)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    logits = script.infer(trained.train(), loader, level)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


SHARES = [(1.0, 100), (0.95, 100), (0.301, 60), (0.3, 30), (0.001, 30)]


@pytest.mark.parametrize('share, count', SHARES)
@each_level
def test_a_share_of_the_images_gets_tta_the_least_certain_in_whole_batches(
    level, share, count, script, trained, loader
):
    images = loader.normalize(loader.images)
    expected, augmented = (explicit_tta(trained, images, tta) for tta in (0, level))
    best = expected.sort(descending=True).values
    unsure = (best[:, 0] - best[:, 1]).argsort()[:count]
    expected[unsure] = augmented[unsure]
    logits = script.infer(trained, loader, level, share)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@each_level
def test_evaluate_is_the_accuracy_of_these_logits(level, script, trained, loader):
    right = explicit_tta(trained, loader.normalize(loader.images), level).argmax(1)
    loader.labels = right.clone()
    loader.labels[:37] = (right[:37] + 1) % 10
    assert script.evaluate(trained, loader, level) == 0.63


def test_without_tta_each_image_is_seen_once(script, trained, loader):
    seen = []
    trained.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    script.infer(trained, loader, 0)
    assert seen == [30, 30, 30, 10]


def test_logits_under_bfloat16_are_float32_and_close(script, trained, loader, monkeypatch):
    expected = script.infer(trained, loader, 2)
    monkeypatch.setattr(script, 'CPU_HAS_BFLOAT16', True)
    logits = script.infer(trained, loader, 2)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * expected.abs().max().item())
