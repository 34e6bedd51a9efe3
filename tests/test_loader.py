"""CifarLoader: what its batches hold, what it computes when; both scripts' are the same."""

import itertools

import pytest
import torch
import torch.nn.functional as F

FULL = {'flip': True, 'translate': 2}
each_aug = pytest.mark.parametrize('aug', [FULL, {'flip': True}, {'translate': 2}, None], ids=str)


@pytest.fixture(scope='module')
def noise():
    """300 images of noise, no two alike. The label of image i is i."""
    rng = torch.Generator().manual_seed(5)
    images = torch.randint(256, (300, 32, 32, 3), generator=rng, dtype=torch.uint8)
    split = {'images': images, 'labels': torch.arange(300), 'classes': [*map(str, range(300))]}
    return {'train': split, 'test': split}


def first(data, n):
    """Both splits: the first n training images."""
    split = {key: value[:n] for key, value in data['train'].items()}
    return {'train': split, 'test': split}


def make_loader(script, *args, **kwargs):
    torch.manual_seed(1)
    return script.CifarLoader(*args, **kwargs)


def batches(loader, epochs=3):
    return [batch for _ in range(epochs) for batch in loader]


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for our_batch, their_batch in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, our_batch, their_batch))


def placement(image, original):
    """(row, column, mirrored) of the crop of the reflect-padded original that an image is."""
    padded = F.pad(original, (2,) * 4, 'reflect')
    for row, column, mirrored in itertools.product(range(5), range(5), (False, True)):
        crop = padded[:, row : row + 32, column : column + 32]
        if torch.equal(image, crop.flip(-1) if mirrored else crop):
            return row, column, mirrored
    raise AssertionError('no window of its original')


def placements(loader, epochs=1):
    """For each epoch the placement of each image of a loader over `noise`, in the images' order."""
    originals, result = loader.normalize(loader.images), []
    for _ in range(epochs):
        found = {}
        for images, labels in loader:
            for image, i in zip(images, labels.tolist(), strict=True):
                found[i] = placement(image, originals[i])
        result.append([found[i] for i in sorted(found)])
    return result


# ---------------------------------------- Both loaders ----------------------------------------
@each_aug
@pytest.mark.parametrize('drop_last', [True, False])
def test_both_loaders_yield_bit_identical_batches(aug, drop_last, baseline, modified, data):
    streams = []
    for script in (baseline, modified):
        loader = make_loader(script, data, batch_size=100, aug=aug, drop_last=drop_last)
        streams.append(batches(loader))
    assert_same_batches(*streams)


def test_the_same_seed_repeats_the_batches(script, data):
    streams = [batches(make_loader(script, data, batch_size=100, aug=FULL)) for _ in range(2)]
    assert_same_batches(*streams)


def test_random_numbers_are_drawn_as_flips_then_per_epoch_offsets_then_order(script, noise):
    (_, one), (_, two) = batches(make_loader(script, noise, batch_size=300, aug=FULL), epochs=2)
    torch.manual_seed(1)
    torch.rand(300)
    for order in (one, two):
        torch.randint(5, (300, 2))
        assert torch.equal(order, torch.randperm(300))


# ---------------------------------------- Augmentation ----------------------------------------
@each_aug
def test_each_image_is_a_window_of_the_padded_original_that_its_label_names(aug, script, noise):
    loader = make_loader(script, first(noise, 50), batch_size=20, aug=aug, drop_last=False)
    found = {place for epoch in placements(loader, epochs=2) for place in epoch}
    aug = {'flip': False, 'translate': 0, **(aug or {})}
    assert ({(row, column) for row, column, _ in found} == {(2, 2)}) != bool(aug['translate'])
    assert {mirrored for *_, mirrored in found} == ({False, True} if aug['flip'] else {False})


def test_every_one_of_the_25_offsets_occurs_and_every_epoch_draws_new_ones(script, noise):
    loader = make_loader(script, noise, batch_size=100, aug={'translate': 2})
    one, two = placements(loader, epochs=2)
    every = set(itertools.product(range(5), range(5)))
    assert {(row, column) for row, column, _ in one} == every
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 30  # 12 of 300 by chance


@pytest.mark.parametrize('aug', [{'flip': True}, FULL], ids=str)
def test_every_image_alternates_between_mirrored_and_not(aug, script, noise):
    loader = make_loader(script, first(noise, 100), batch_size=50, aug=aug)
    epochs = placements(loader, epochs=4)
    mirrored = torch.tensor([[image[2] for image in epoch] for epoch in epochs])
    half = (loader.proc_images['flip'] != loader.proc_images['norm']).any(dim=(1, 2, 3))
    assert torch.equal(mirrored[0], half)  # all are mirrored on top of that in odd epochs
    assert torch.equal(mirrored[1:], ~mirrored[:-1])
    assert 30 < mirrored[0].sum() < 70  # a random half to begin with


def test_batch_crop_is_slicing(script):
    torch.manual_seed(1)
    images, offsets = torch.randn(9, 3, 14, 12), torch.randint(5, (9, 2))
    index = torch.tensor([8, 0, 3, 3])
    crops = script.batch_crop(images, 8, offsets, index)
    for crop, i in zip(crops, index, strict=True):
        row, column = offsets[i]
        assert torch.equal(crop, images[i, :, row : row + 8, column : column + 8])


# ---------------------------------------- Precomputation ----------------------------------------
SIZES = [
    (FULL, {'norm': 32, 'flip': 32, 'pad': 36}),
    ({'flip': True}, {'norm': 32, 'flip': 32}),
    ({'translate': 3}, {'norm': 32, 'pad': 38}),
    ({}, {'norm': 32}),
]


@pytest.mark.parametrize('aug, sizes', SIZES, ids=str)
def test_modified_precomputes_in_init_and_baseline_in_the_first_epoch(
    aug, sizes, baseline, modified, data
):
    ours, theirs = (make_loader(script, data, aug=aug) for script in (modified, baseline))
    shapes = {key: tuple(value.shape) for key, value in ours.proc_images.items()}
    assert shapes == {key: (256, 3, size, size) for key, size in sizes.items()}
    assert not theirs.proc_images
    batches(theirs, epochs=1)
    assert list(theirs.proc_images) == list(sizes)


def test_pad_is_the_reflect_padded_flip_of_norm(modified, noise):
    norm, flip, pad = make_loader(modified, noise, aug=FULL).proc_images.values()
    for image, original in zip(flip, norm, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
    assert torch.equal(pad, F.pad(flip, (2,) * 4, 'reflect'))


def test_later_epochs_compute_nothing_anew(script, data):
    loader = make_loader(script, data, aug=FULL, batch_size=100)
    batches(loader, epochs=1)
    before = {key: (value, value.clone()) for key, value in loader.proc_images.items()}
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


# ---------------------------------------- Batches ----------------------------------------
BATCHES = [
    (True, 3, None, [3, 3, 3]),  # the default: drop when training
    (False, 3, None, [3, 3, 3, 1]),
    (True, 3, False, [3, 3, 3, 1]),
    (False, 3, True, [3, 3, 3]),
    (True, 5, True, [5, 5]),
    (True, 1, True, [1] * 10),
    (True, 11, False, [10]),
    (True, 11, True, []),
]


@pytest.mark.parametrize('train, batch_size, drop_last, sizes', BATCHES)
def test_len_and_batch_sizes(train, batch_size, drop_last, sizes, script, noise):
    loader = make_loader(script, first(noise, 10), train, batch_size, drop_last=drop_last)
    assert [len(images) for images, _ in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize('batch_size', [1, 7, 10, 64])
def test_an_epoch_holds_each_image_once(batch_size, script, noise):
    data = first(noise, 10)
    loader = make_loader(script, data, batch_size=batch_size, aug=FULL, drop_last=False)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in loader])
        assert sorted(labels.tolist()) == list(range(10))


@pytest.mark.parametrize(
    'train, shuffle, in_order',
    [(True, None, False), (False, None, True), (True, False, True), (False, True, False)],
)
def test_the_order_is_random_by_default_only_in_training(train, shuffle, in_order, script, noise):
    loader = make_loader(script, noise, train, batch_size=300, shuffle=shuffle)
    (_, one), (_, two) = batches(loader, epochs=2)
    assert torch.equal(one, torch.arange(300)) == in_order
    assert torch.equal(one, two) == in_order  # each epoch has its own order


@each_aug
def test_batches_are_float32_channels_last_with_int64_labels_on_the_cpu(aug, script, data):
    for images, labels in batches(make_loader(script, data, batch_size=100, aug=aug), epochs=2):
        assert images.shape == (100, 3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert not images.requires_grad and images.device.type == 'cpu'


# ---------------------------------------- What it reads ----------------------------------------
@pytest.mark.parametrize('train', [True, False])
def test_a_directory_serves_as_well_as_a_dict(train, script, data, data_dir):
    streams = []
    for path in (data, str(data_dir)):
        loader = make_loader(script, path, train, batch_size=100, aug=FULL, device='cpu')
        streams.append(batches(loader))
    assert_same_batches(*streams)


def test_own_images_of_cifars_shape_are_a_dict(script):
    images = torch.zeros(7, 32, 32, 3, dtype=torch.uint8)
    split = {'images': images, 'labels': torch.arange(7) % 2, 'classes': ['cat', 'dog']}
    loader = make_loader(script, {'train': split}, batch_size=3, aug=FULL)
    assert [labels.dtype for _, labels in loader] == [torch.int64] * 2
    assert loader.classes == ['cat', 'dog']
