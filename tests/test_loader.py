"""CifarLoader: what its batches hold, when it computes what, and that both scripts' batches are the same."""
import itertools

import pytest
import torch
import torch.nn.functional as F

FULL = {'flip': True, 'translate': 2}
AUGS = [FULL, {'flip': True}, {'translate': 2}, None]
each_aug = pytest.mark.parametrize('aug', AUGS, ids=str)


@pytest.fixture(scope='module')
def noise():
    """300 images of noise, no two alike. The label of image i is i."""
    rng = torch.Generator().manual_seed(5)
    images = torch.randint(256, (300, 32, 32, 3), generator=rng, dtype=torch.uint8)
    return first({'train': {'images': images, 'labels': torch.arange(300), 'classes': []}}, 300)


def first(data, n):
    """Both splits of a loader's dict: the first n training images."""
    split = {key: value[:n] for key, value in data['train'].items()}
    return {'train': split, 'test': split}


def make_loader(script, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return script.CifarLoader(*args, **kwargs)


def batches(loader, epochs=3):
    return [batch for _ in range(epochs) for batch in loader]


def select(loader, mask):
    loader.images = loader.images[mask]
    loader.labels = loader.labels[mask]


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for our_batch, their_batch in zip(ours, theirs):
        assert all(map(torch.equal, our_batch, their_batch))


def placement(image, original):
    """(row, column, mirrored) of the crop of the reflect-padded original that image is, else None."""
    padded = F.pad(original, (2,) * 4, 'reflect')
    for row, column, mirrored in itertools.product(range(5), range(5), (False, True)):
        crop = padded[:, row:row + 32, column:column + 32]
        if torch.equal(image, crop.flip(-1) if mirrored else crop):
            return row, column, mirrored


def placements(loader, epochs=1):
    """A list per epoch: the placement of each image of a loader over `noise`, in the order of the images."""
    normalized, result = loader.normalize(loader.images), []
    for _ in range(epochs):
        found = {int(i): placement(image, normalized[i]) for batch in loader for image, i in zip(*batch)}
        result.append([found[i] for i in sorted(found)])
    return result


# Both loaders

@each_aug
def test_both_loaders_yield_bit_identical_batches(aug, baseline, modified, data):
    assert_same_batches(*(batches(make_loader(script, data, batch_size=100, aug=aug))
                          for script in (baseline, modified)))


@each_aug
def test_both_loaders_yield_bit_identical_batches_after_a_selection(aug, baseline, modified, data):
    streams = []
    for script in (baseline, modified):
        loader = make_loader(script, data, batch_size=50, aug=aug, drop_last=False)
        batches(loader, epochs=1)
        select(loader, loader.labels < 5)
        streams.append(batches(loader))
    assert_same_batches(*streams)


def test_the_same_seed_repeats_the_batches(script, data):
    assert_same_batches(*(batches(make_loader(script, data, batch_size=100, aug=FULL)) for _ in range(2)))


def test_random_numbers_are_drawn_as_flips_then_per_epoch_offsets_then_permutation(script, noise):
    loader = make_loader(script, noise, batch_size=300, aug=FULL)
    batches(loader, epochs=1)
    (_, order), = loader
    torch.manual_seed(1)
    torch.rand(300)
    for _ in range(2):
        torch.randint(5, (300, 2))
        expected = torch.randperm(300)
    assert torch.equal(order, expected)


# Augmentation

@each_aug
def test_every_image_is_a_crop_perhaps_mirrored_of_the_original_that_its_label_names(aug, script, noise):
    loader = make_loader(script, first(noise, 50), batch_size=20, aug=aug, drop_last=False)
    assert None not in sum(placements(loader, epochs=2), [])


def test_every_one_of_the_25_offsets_occurs(script, noise):
    epoch, = placements(make_loader(script, noise, batch_size=100, aug={'translate': 2}))
    assert {(row, column) for row, column, _ in epoch} == set(itertools.product(range(5), range(5)))


def test_every_epoch_draws_new_offsets(script, noise):
    one, two = placements(make_loader(script, noise, batch_size=100, aug={'translate': 2}), epochs=2)
    assert sum(a == b for a, b in zip(one, two)) < 30  # 12 of 300 by chance


@pytest.mark.parametrize('aug', [{}, {'flip': True}], ids=str)
def test_without_translate_no_image_is_shifted(aug, script, noise):
    epoch, = placements(make_loader(script, first(noise, 50), batch_size=50, aug=aug))
    assert {(row, column) for row, column, _ in epoch} == {(2, 2)}


@pytest.mark.parametrize('aug', [{'flip': True}, FULL], ids=str)
def test_every_image_alternates_between_mirrored_and_not(aug, script, noise):
    epochs = placements(make_loader(script, first(noise, 50), batch_size=50, aug=aug), epochs=4)
    mirrored = torch.tensor([[image[2] for image in epoch] for epoch in epochs])
    assert torch.equal(mirrored[1:], ~mirrored[:-1])


def test_about_half_of_the_images_are_mirrored_in_the_first_epoch(script, noise):
    epoch, = placements(make_loader(script, noise, batch_size=100, aug={'flip': True}))
    assert 120 < sum(mirrored for *_, mirrored in epoch) < 180


def test_without_flip_no_image_is_mirrored(script, noise):
    epochs = placements(make_loader(script, first(noise, 50), batch_size=50, aug={'translate': 2}), epochs=2)
    assert not any(mirrored for epoch in epochs for *_, mirrored in epoch)


def test_the_callers_images_stay_as_they_were(script, noise):
    before = noise['train']['images'].clone()
    batches(make_loader(script, noise, batch_size=100, aug=FULL), epochs=2)
    assert torch.equal(noise['train']['images'], before)


# Precomputation

@pytest.mark.parametrize('aug, sizes', [
    (FULL, {'norm': 32, 'flip': 32, 'pad': 36}), ({'flip': True}, {'norm': 32, 'flip': 32}),
    ({'translate': 3}, {'norm': 32, 'pad': 38}), ({}, {'norm': 32})], ids=str)
def test_modified_precomputes_in_init_what_the_augmentation_needs(aug, sizes, modified, data):
    shapes = {k: tuple(v.shape) for k, v in make_loader(modified, data, aug=aug).proc_images.items()}
    assert shapes == {key: (256, 3, size, size) for key, size in sizes.items()}


def test_pad_is_the_reflect_padded_flip_of_norm(modified, noise):
    norm, flip, pad = make_loader(modified, noise, aug=FULL).proc_images.values()
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(flip, norm))
    assert torch.equal(pad, F.pad(flip, (2,) * 4, 'reflect'))


def test_baseline_precomputes_in_the_first_iteration(baseline, data):
    loader = make_loader(baseline, data, aug=FULL)
    before = list(loader.proc_images)
    batches(loader, epochs=1)
    assert (before, list(loader.proc_images)) == ([], ['norm', 'flip', 'pad'])


def test_later_epochs_compute_nothing_anew(script, data):
    loader = make_loader(script, data, aug=FULL, batch_size=100)
    batches(loader, epochs=1)
    before = {key: (value, value.clone()) for key, value in loader.proc_images.items()}
    batches(loader, epochs=2)
    for key, value in loader.proc_images.items():
        assert value is before[key][0] and torch.equal(value, before[key][1])


def test_nothing_that_init_builds_has_a_graph(script, data):
    loader = make_loader(script, data, aug=FULL)
    values = [*vars(loader).values(), *loader.proc_images.values()]
    assert not any(getattr(value, 'requires_grad', False) for value in values)


def test_precomputation_from_images_that_require_grad_has_no_graph(script, data):
    loader = make_loader(script, data, batch_size=100, aug=FULL)
    loader.images = loader.images.clone().requires_grad_()
    (images, _), = itertools.islice(loader, 1)
    assert not any(tensor.requires_grad for tensor in (images, *loader.proc_images.values()))


# Batches

@pytest.mark.parametrize('train, batch_size, drop_last, sizes', [
    (True, 3, None, [3, 3, 3]), (False, 3, None, [3, 3, 3, 1]),  # the default: drop when training
    (True, 3, False, [3, 3, 3, 1]), (False, 3, True, [3, 3, 3]),
    (True, 5, True, [5, 5]), (True, 5, False, [5, 5]), (True, 1, True, [1] * 10), (True, 11, False, [10]),
])
def test_len_and_batch_sizes(train, batch_size, drop_last, sizes, script, noise):
    loader = make_loader(script, first(noise, 10), train, batch_size, drop_last=drop_last)
    assert [len(images) for images, _ in loader] == sizes and len(loader) == len(sizes)


def test_a_batch_size_over_the_number_of_images_leaves_no_batch_if_drop_last(script, noise):
    loader = make_loader(script, first(noise, 10), batch_size=11, drop_last=True)
    assert (len(loader), list(loader)) == (0, [])


@pytest.mark.parametrize('batch_size', [1, 7, 10, 64])
def test_an_epoch_holds_each_image_once(batch_size, script, noise):
    loader = make_loader(script, first(noise, 10), batch_size=batch_size, aug=FULL, drop_last=False)
    for _ in range(2):
        assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == list(range(10))


@pytest.mark.parametrize('train, shuffle, in_order', [
    (True, None, False), (False, None, True), (True, False, True), (False, True, False)])
def test_the_order_is_shuffled_by_default_only_in_training(train, shuffle, in_order, script, noise):
    loader = make_loader(script, noise, train, batch_size=300, shuffle=shuffle)
    assert (torch.equal(next(iter(loader))[1], torch.arange(300))) == in_order


def test_every_epoch_has_its_own_permutation(script, noise):
    (_, one), (_, two) = batches(make_loader(script, noise, batch_size=300), epochs=2)
    assert not torch.equal(one, two)


@each_aug
def test_batches_are_float32_channels_last_with_int64_labels_on_the_cpu(aug, script, data):
    for images, labels in batches(make_loader(script, data, batch_size=100, aug=aug), epochs=2):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.dtype, labels.dtype, images.device.type) == (torch.float32, torch.int64, 'cpu')


@pytest.mark.parametrize('train', [True, False])
def test_a_directory_serves_as_well_as_a_dict(train, script, data, data_dir):
    streams = [batches(make_loader(script, path, train, batch_size=100, aug=FULL, device='cpu'))
               for path in (data, str(data_dir))]
    assert_same_batches(*streams)


def test_images_are_the_raw_ones_over_255(script, data):
    loader = make_loader(script, data)
    assert torch.equal(loader.images, data['train']['images'].permute(0, 3, 1, 2) / 255)


def test_normalize_is_torchvisions(script, data):
    from torchvision.transforms import Normalize
    loader = make_loader(script, data, train=False)
    expected = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))(loader.images)
    torch.testing.assert_close(loader.normalize(loader.images), expected, rtol=0, atol=1e-6)


def test_an_unknown_aug_key_is_an_error(script, data):
    with pytest.raises(ValueError, match='cutout'):
        script.CifarLoader(data, aug={'flip': True, 'cutout': 8})


# Selection

def test_a_selection_takes_effect_at_the_next_iteration(script, noise):
    loader = make_loader(script, noise, batch_size=40, aug=FULL, drop_last=False)
    batches(loader, epochs=1)
    select(loader, loader.labels % 3 == 0)
    assert len(loader) == 3
    assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == list(range(0, 300, 3))


def test_selected_images_keep_their_labels(script, noise):
    loader = make_loader(script, noise, batch_size=25, aug=FULL)
    originals = loader.normalize(loader.images)
    select(loader, loader.labels >= 250)
    for images, labels in batches(loader, epochs=2):
        assert None not in map(placement, images, originals[labels])


@pytest.mark.parametrize('name', ['images', 'labels'])
def test_a_selection_of_images_or_labels_alone_is_an_error(name, script, noise):
    loader = make_loader(script, noise)
    setattr(loader, name, getattr(loader, name)[:100])
    with pytest.raises(ValueError, match='labels'):
        next(iter(loader))


# Functions

def test_batch_crop_is_slicing(script):
    torch.manual_seed(1)
    images, offsets, index = torch.randn(9, 3, 14, 12), torch.randint(5, (9, 2)), torch.tensor([8, 0, 3, 3])
    expected = torch.stack([images[i, :, row:row + 8, column:column + 8]
                            for i, (row, column) in zip(index, offsets[index])])
    assert torch.equal(script.batch_crop(images, 8, offsets, index), expected)


def test_batch_flip_lr_mirrors_an_image_or_leaves_it(script):
    torch.manual_seed(1)
    images = torch.randn(200, 3, 4, 4)
    flipped = script.batch_flip_lr(images)
    same, mirrored = (list(map(torch.equal, flipped, other)) for other in (images, images.flip(-1)))
    assert same == [not was_mirrored for was_mirrored in mirrored] and 70 < sum(mirrored) < 130
