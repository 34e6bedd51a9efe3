"""CifarLoader: what its batches hold, what it computes when; all scripts' are the same."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import narrow_hyp

FULL = {'flip': True, 'translate': 2}
each_aug = pytest.mark.parametrize('aug', [FULL, {'flip': True}, {'translate': 2}, {}], ids=str)


@pytest.fixture(scope='module')
def noise():
    """Return 300 images of noise, no two alike. The label of image i is i."""
    rng = torch.Generator().manual_seed(5)
    images = torch.randint(256, (300, 32, 32, 3), generator=rng, dtype=torch.uint8)
    split = {'images': images, 'labels': torch.arange(300), 'classes': [*map(str, range(300))]}
    return {'train': split, 'test': split}


def make_loader(script, *args, **kwargs):
    torch.manual_seed(1)
    return script.CifarLoader(*args, **kwargs)


def batches(loader, epochs=3):
    return [batch for _ in range(epochs) for batch in loader]


def placements(loader, epochs):
    """Return the row, column and mirroring of each image of `noise`: [epochs, 300, 3].

    Each is a crop of its reflect-padded original.
    """
    padded = F.pad(loader.normalize(loader.images), (2,) * 4, 'reflect')
    result = torch.full((epochs, 300, 3), -1)
    for epoch in range(epochs):
        for images, labels in loader:
            for row, column, mirrored in itertools.product(range(5), range(5), range(2)):
                crops = padded[labels, :, row : row + 32, column : column + 32]
                found = (images == (crops.flip(-1) if mirrored else crops)).flatten(1).all(dim=1)
                result[epoch, labels[found]] = torch.tensor([row, column, mirrored])
    assert (result >= 0).all(), 'an image is no window of its original'
    return result


# ---------------------------------------- Batches ----------------------------------------
@each_aug
@pytest.mark.parametrize('drop_last', [True, False])
def test_all_loaders_yield_bit_identical_batches(aug, drop_last, baseline, script, data):
    expected, found = (
        batches(make_loader(module, data, batch_size=100, aug=aug, drop_last=drop_last))
        for module in (baseline, script)
    )
    assert len(expected) == 3 * (2 if drop_last else 3)
    for pair in zip(expected, found, strict=True):
        assert all(map(torch.equal, *pair))


def test_random_numbers_are_drawn_as_flips_then_per_epoch_offsets_then_order(script, noise):
    (_, one), (_, two) = batches(make_loader(script, noise, batch_size=300, aug=FULL), epochs=2)
    torch.manual_seed(1)
    torch.rand(300)
    for order in (one, two):
        torch.randint(5, (300, 2))
        assert torch.equal(order, torch.randperm(300))


SIZES = [
    (True, None, [70, 70, 70, 70]),  # the default: drop the rest when training
    (False, None, [70, 70, 70, 70, 20]),
    (True, False, [70, 70, 70, 70, 20]),
    (False, True, [70, 70, 70, 70]),
]


@pytest.mark.parametrize('train, drop_last, sizes', SIZES)
def test_an_epoch_holds_every_image_once_or_drops_the_rest(train, drop_last, sizes, script, noise):
    loader = make_loader(script, noise, train, 70, aug=FULL, drop_last=drop_last)
    labels = [labels for _, labels in loader]
    assert [len(batch) for batch in labels] == sizes and len(loader) == len(sizes)
    assert loader.classes == noise['train']['classes']
    assert len(set(torch.cat(labels).tolist())) == sum(sizes)


ORDERS = [(True, None, False), (False, None, True), (True, False, True), (False, True, False)]


@pytest.mark.parametrize('train, shuffle, in_order', ORDERS)
def test_the_order_is_random_by_default_only_in_training(train, shuffle, in_order, script, noise):
    loader = make_loader(script, noise, train, batch_size=300, shuffle=shuffle)
    (_, one), (_, two) = batches(loader, epochs=2)
    assert torch.equal(one, torch.arange(300)) == in_order
    assert torch.equal(one, two) == in_order  # each epoch has its own order


@pytest.mark.parametrize('aug', [FULL, {}], ids=str)
def test_batches_are_float32_channels_last_with_int64_labels(aug, script, data):
    for images, labels in batches(make_loader(script, data, batch_size=100, aug=aug), epochs=2):
        assert images.shape == (100, 3, 32, 32) and not images.requires_grad
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


# ---------------------------------------- Selected images ----------------------------------------
@pytest.mark.parametrize('epochs', [0, 1], ids=['before', 'after the first epoch'])
@each_aug
def test_images_and_labels_that_are_set_take_effect(aug, epochs, script, noise):
    """As airbench's own README selects images: loader.images = loader.images[mask]."""
    loader = make_loader(script, noise, batch_size=100, aug=aug, drop_last=False)
    batches(loader, epochs)
    kept = torch.arange(300) % 3 == 0
    loader.images = loader.images[kept]
    loader.labels = loader.labels[kept]
    originals = make_loader(script, noise)
    padded = F.pad(originals.normalize(originals.images), (2,) * 4, 'reflect')
    seen = []
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            windows = padded[label].unfold(1, 32, 1).unfold(2, 32, 1)  # [3, 5, 5, 32, 32]
            both = torch.stack((windows, windows.flip(-1)))
            assert (both == image[:, None, None]).all(dim=(1, 4, 5)).any(), 'of another image'
            seen.append(label)
    assert len(loader) == 1 and sorted(seen) == [*range(0, 300, 3)]


def test_images_that_are_set_are_those_of_infer(script, noise):
    loader = make_loader(script, noise, train=False, batch_size=100)
    net = script.make_net(narrow_hyp(script))
    expected = script.infer(net, loader)
    loader.images = loader.images[50:90]
    torch.testing.assert_close(script.infer(net, loader), expected[50:90])


def test_images_without_their_labels_are_an_error(script, noise):
    loader = make_loader(script, noise, batch_size=100)
    loader.images = loader.images[:200]
    with pytest.raises(ValueError, match='200 images, but 300 labels'):
        next(iter(loader))


def test_unknown_augmentation_is_an_error(script, noise):
    with pytest.raises(script.UserError, match='no aug.translat; aug has flip'):
        script.CifarLoader(noise, aug={'translat': 2})


# ---------------------------------------- Augmentation ----------------------------------------
@each_aug
def test_every_epoch_crops_anew_at_all_of_the_25_offsets(aug, script, noise):
    loader = make_loader(script, noise, batch_size=100, aug=aug)
    one, two = placements(loader, epochs=2)[..., :2]
    offsets = itertools.product(range(5), range(5)) if 'translate' in aug else [(2, 2)]
    assert {*map(tuple, one.tolist())} == {*offsets}
    same = (one == two).all(dim=1).sum()
    assert same < 30 if 'translate' in aug else same == 300  # 12 of 300 by chance


@each_aug
def test_every_image_alternates_between_mirrored_and_not(aug, script, noise):
    loader = make_loader(script, noise, batch_size=100, aug=aug)
    mirrored = placements(loader, epochs=3)[..., 2].bool()
    if 'flip' in aug:
        half = (loader.proc_images['flip'] != loader.proc_images['norm']).any(dim=(1, 2, 3))
        assert 100 < half.sum() < 200  # random
        # All are mirrored on top of that in odd epochs.
        assert torch.equal(mirrored, torch.stack((half, ~half, half)))
    else:
        assert not mirrored.any()


# ---------------------------------------- Precomputation ----------------------------------------
PRECOMPUTED = [(FULL, dict(norm=32, flip=32, pad=36)), ({'translate': 3}, dict(norm=32, pad=38))]


@pytest.mark.parametrize('aug, sizes', PRECOMPUTED, ids=str)
def test_modified_precomputes_in_init_baseline_in_the_first_epoch_and_neither_later(
    aug, sizes, baseline, modified, data
):
    ours, theirs = (make_loader(script, data, aug=aug) for script in (modified, baseline))
    assert not theirs.proc_images
    batches(theirs, epochs=1)
    for loader in (ours, theirs):
        before = {key: (value, value.clone()) for key, value in loader.proc_images.items()}
        assert {key: value.shape[-1] for key, value in loader.proc_images.items()} == sizes
        batches(loader, epochs=2)
        for key, value in loader.proc_images.items():
            assert value is before[key][0] and torch.equal(value, before[key][1])


def test_normalize_subtracts_the_mean_and_divides_by_the_std_of_each_channel(script, data):
    loader = make_loader(script, data, train=False)
    raw = data['test']['images'].permute(0, 3, 1, 2) / 255
    assert torch.equal(loader.images, raw)
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        normalized = loader.normalize(loader.images)[:, channel]
        torch.testing.assert_close(normalized, (raw[:, channel] - mean) / std, rtol=0, atol=1e-6)
