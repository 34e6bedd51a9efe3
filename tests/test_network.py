"""The networks against a transcription of the specification; their initialization, whitening and TTA."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import set_autocast

SIZES = {'airbench94_baseline': 1_972_792, 'airbench94_modified': 1_972_792 + 83_456}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture
def net(script):
    return script.make_net()


@pytest.fixture
def float32(script, monkeypatch):
    """Each script without autocast."""
    set_autocast(monkeypatch, script, False)
    return script


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
    """The specification's network in functional form: images [N, 3, 32, 32] -> logits [N, 10]."""
    def norm(x, name):
        mean, var, bias = (state[f'{name}.{key}'].clone() for key in ('running_mean', 'running_var', 'bias'))
        return F.batch_norm(x, mean, var, None, bias, training=training, eps=1e-12)

    x = F.gelu(F.conv2d(images, state['0.weight'], state['0.bias']))
    for group in ('2', '3', '4'):
        shortcut = F.conv2d(F.max_pool2d(x, 2), state[f'{group}.downsample.weight']) if residual else 0
        x = F.max_pool2d(F.conv2d(x, state[f'{group}.conv1.weight'], padding=1), 2)
        x = F.conv2d(F.gelu(norm(x, f'{group}.norm1')), state[f'{group}.conv2.weight'], padding=1)
        x = F.gelu(norm(x, f'{group}.norm2') + shortcut)
    return F.linear(F.max_pool2d(x, 3).flatten(1), state['7.weight']) / 9


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def shifted(images, rows, columns):
    """The images moved by -1, 0 or 1 pixels, what comes in at the edges reflected."""
    def source(step):
        positions = torch.arange(32) - step
        return torch.where(positions < 0, -positions, torch.where(positions > 31, 62 - positions, positions))
    return images[:, :, source(rows)][..., source(columns)]


# Forward

@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@torch.no_grad()
def test_the_network_is_the_specifications(training, script, net):
    images, residual = torch.randn(6, 3, 32, 32), script.NAME == 'airbench94_modified'
    expected = reference(images, perturb(net).state_dict(), residual, training)
    logits = net.train(training)(images)
    assert logits.shape == (6, 10) and (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_modified_group_adds_the_downsampled_pooled_input_before_the_last_gelu(modified):
    group, x = perturb(modified.ConvGroup(5, 7, 0.6)).eval(), torch.randn(2, 5, 9, 9)
    path = group.conv2(F.gelu(group.norm1(group.pool(group.conv1(x)))))
    expected = F.gelu(group.norm2(path) + group.downsample(group.pool(x)))
    torch.testing.assert_close(group(x), expected)


def test_only_the_modified_groups_have_a_downsample_convolution(script):
    parts = dict(script.ConvGroup(5, 7, 0.6).named_children())
    expected = {'conv1', 'pool', 'norm1', 'conv2', 'norm2'}
    assert set(parts) == (expected | {'downsample'} if script.NAME == 'airbench94_modified' else expected)


def test_downsample_is_a_1x1_convolution_without_bias(modified):
    downsample = modified.ConvGroup(5, 7, 0.6).downsample
    assert downsample.weight.shape == (7, 5, 1, 1) and downsample.bias is None


# Parameters and their initialization

def test_number_of_parameters(script, net):
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[script.NAME]


def test_frozen_are_the_whitening_filters_and_the_batchnorm_scales(net):
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {'0.weight', *(f'{group}.norm{i}.weight' for group in (2, 3, 4) for i in (1, 2))}


@pytest.mark.parametrize('in_channels, out_channels', [(4, 6), (6, 6), (6, 4)])
def test_a_conv_starts_as_the_identity_on_its_first_channels(in_channels, out_channels, script):
    x, same = torch.randn(2, in_channels, 5, 5), min(in_channels, out_channels)
    torch.testing.assert_close(script.Conv(in_channels, out_channels)(x)[:, :same], x[:, :same])


def test_the_other_filters_of_a_conv_have_pytorchs_default_init(script):
    torch.manual_seed(1)
    expected = nn.Conv2d(4, 6, 3, bias=False).weight
    torch.manual_seed(1)
    assert torch.equal(script.Conv(4, 6).weight[4:], expected[4:])


def test_linear_and_downsample_have_pytorchs_default_init(net):
    for weight in (value for name, value in net.state_dict().items() if name == '7.weight' or 'down' in name):
        bound = weight[0].numel() ** -0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)


def test_the_whitening_bias_starts_at_zero(net):
    assert net[0].bias.shape == (24,) and not net[0].bias.any()


def test_batchnorm_eps_and_momentum(net):
    assert [(norm.eps, round(norm.momentum, 12)) for norm in norms(net)] == [(1e-12, 0.4)] * 6


def test_batchnorm_starts_with_scale_one_and_bias_zero(net):
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms(net))


def test_batchnorm_keeps_the_given_share_of_the_old_statistic(script):
    norm, x = script.BatchNorm(2, 0.6), 3 * torch.randn(5, 2, 4, 4) + 7
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.4 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.6 + 0.4 * x.var((0, 2, 3)))


def test_make_net_follows_hyp(script):
    values = {'net.widths.block1': 3, 'net.widths.block2': 5, 'net.widths.block3': 7,
              'net.batchnorm_momentum': 0.9, 'net.scaling_factor': 0.0}
    with script.overrides(values):
        net = script.make_net()
    assert [norm.num_features for norm in norms(net)] == [3, 3, 5, 5, 7, 7]
    assert {round(norm.momentum, 12) for norm in norms(net)} == {0.1}
    assert not net(torch.randn(2, 3, 32, 32)).any()


def test_weights_are_float32_channels_last_on_the_cpu(net):
    weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


# Whitening

@pytest.fixture(params=[{}, {'eps': 0.1}], ids=['default eps', 'eps 0.1'])
def whitened(request, script, data):
    """layer, eps, patches [12, n] in float64 with a mean that is not 0, and their eigenvalues, falling: small
    ones, so that eps matters."""
    loader, layer = script.CifarLoader(data), nn.Conv2d(3, 24, 2)
    images = 0.05 * (loader.normalize(loader.images) + 1)
    script.init_whitening_conv(layer, images, **request.param)
    patches = F.unfold(images.double(), 2).transpose(0, 1).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    return layer, request.param.get('eps', 5e-4), patches, eigenvalues


def test_whitened_patches_have_a_diagonal_second_moment(whitened):
    layer, eps, patches, eigenvalues = whitened
    outputs = layer.weight.detach().double()[:12].flatten(1) @ patches
    expected = (eigenvalues / (eigenvalues + eps)).diag()
    torch.testing.assert_close(outputs @ outputs.T / patches.shape[1], expected, rtol=0, atol=2e-3)


def test_whitening_filters_are_in_order_of_falling_eigenvalue(whitened):
    layer, eps, _, eigenvalues = whitened
    lengths = layer.weight.detach().double()[:12].flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, (eigenvalues + eps) ** -0.5, rtol=1e-2, atol=0)


def test_the_second_half_of_the_whitening_filters_is_the_negative_of_the_first(whitened):
    weight = whitened[0].weight
    assert torch.equal(weight[12:], -weight[:12])


def test_whitening_leaves_the_bias_alone(net, script):
    script.init_whitening_conv(net[0], torch.randn(20, 3, 32, 32))
    assert not net[0].bias.any()


def test_whitening_computes_in_float32_for_half_precision_images(script):
    images, layers = torch.randn(20, 3, 32, 32).half(), [nn.Conv2d(3, 24, 2) for _ in range(2)]
    for layer, given in zip(layers, (images, images.float())):
        script.init_whitening_conv(layer, given)
    assert torch.equal(*(layer.weight for layer in layers))


# Test-time augmentation

@pytest.fixture
def trained(float32, narrow):
    """A perturbed narrow network."""
    return perturb(narrow.make_net())


@pytest.fixture
def loader(script, data):
    """100 test images in batches of 30, the last one short."""
    return script.CifarLoader(data, train=False, batch_size=30)


@torch.no_grad()
def explicit_tta(net, images, level):
    views = [(1.0, images)]
    if level == 2:
        views = [(0.5, images), (0.25, shifted(images, -1, -1)), (0.25, shifted(images, 1, 1))]
    if level:
        views = [(share / 2, x) for share, view in views for x in (view, view.flip(-1))]
    net.eval()
    return sum(share * net(view) for share, view in views)


each_level = pytest.mark.parametrize('level', [0, 1, 2])


@each_level
def test_infer_is_the_weighted_sum_of_explicit_forward_passes(level, float32, trained, loader):
    expected = explicit_tta(trained, loader.normalize(loader.images), level)
    torch.testing.assert_close(float32.infer(trained.train(), loader, level), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('share, count', [(1.0, 100), (0.95, 100), (0.301, 60), (0.3, 30), (0.001, 30)])
@each_level
def test_a_share_of_the_images_gets_tta_the_least_certain_in_whole_batches(
        level, share, count, float32, trained, loader):
    images = loader.normalize(loader.images)
    expected, augmented = (explicit_tta(trained, images, x) for x in (0, level))
    best = expected.sort(descending=True).values
    unsure = (best[:, 0] - best[:, 1]).argsort()[:count]
    expected[unsure] = augmented[unsure]
    logits = float32.infer(trained, loader, level, share)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@each_level
def test_evaluate_is_the_accuracy_of_these_logits(level, float32, trained, loader):
    loader.labels = explicit_tta(trained, loader.normalize(loader.images), level).argmax(1)
    loader.labels[:37] = (loader.labels[:37] + 1) % 10
    assert float32.evaluate(trained, loader, level) == 0.63


def test_infer_changes_nothing_in_the_network(float32, trained, loader):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    float32.infer(trained.train(), loader, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize('bfloat16', [False, True])
def test_infer_returns_float32_without_a_graph(bfloat16, script, trained, loader, monkeypatch):
    set_autocast(monkeypatch, script, bfloat16)
    logits = script.infer(trained, loader, 2)
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((100, 10), torch.float32, False)


def test_infer_takes_a_new_selection_of_images(float32, trained, loader):
    loader.images, loader.labels = loader.images[50:57], loader.labels[50:57]
    expected = explicit_tta(trained, loader.normalize(loader.images), 0)
    torch.testing.assert_close(float32.infer(trained, loader, 0), expected, rtol=1e-5, atol=1e-5)
