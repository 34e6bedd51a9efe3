"""fast94: the accuracy of airbench94_baseline.py with less computing, mostly by Muon.

`diff airbench94_baseline.py tests/bench/examples/fast94.py` is the experiment:

1. Muon (K. Jordan, 2024) trains the 3x3 filters in place of SGD. Of the gradient with momentum, as
   a matrix [out, in * 9], it takes the singular vectors but raises the singular values, all but the
   smallest, to about 1. That is steepest descent in the spectral norm (arXiv:2409.20325): of all
   steps that change a filter bank's output by at most about lr times its input, the one that, to
   first order, lowers the loss most. SGD's step has a few large singular values, and hardly moves
   the filters in all other directions. Before each step the filters get a fixed norm. All else has
   Nesterov SGD. Unlike the baseline: no lookahead, and the lrs fall linearly to 0.
2. Small images first: six epochs on 24 x 24 pixels, then 3.4 on 32 x 32. The network ends in a
   global pooling, so it takes images of any size. A step on 24 pixels has half the FLOP.
   (Progressive resizing is a known technique: fast.ai, 2018. Together with Muon: E1, Fulcrum
   Research, 2026.)
3. Test-time augmentation (TTA, below) for a fifth of the test images, those that the network is
   least certain of.
4. With --compile a step on the GPU, optimizers and all, is one CUDA graph.

The optimizers' values are those of Hiverge's cifar10-speedrun, which goes back to airbench94_muon
(K. Jordan), but Muon's momentum is the latter's, and its lr our own, as are image sizes and epochs.
Hiverge's are also batch size, label smoothing, BatchNorm's momentum, the scale of head and logits,
and how long the whitening bias is trained. All else is airbench94 (Keller Jordan,
arXiv:2404.00498). Together:

- Network: a 2x2 convolution with fixed filters that whiten the pixels (24 channels), three groups
  of two 3x3 convolutions (64, 256 and 256 channels) with max-pooling, BatchNorm and GELU, and a
  linear layer. 1,972,792 parameters; a run takes 0.63 of the baseline's FLOP.
- Augmentation: each image is mirrored in every second epoch and shifted by up to two pixels.
- Training: 9.4 epochs in half precision, batches of 1536, label smoothing.
- Test: a weighted mean over six views (test-time augmentation, TTA) or, for most images, one view.

Result: 93.67 +- 0.07 % on CPUs (mean and 95 % interval of 25 runs), when trained on 40,000 of
CIFAR-10's training images and tested on the other 10,000; the baseline has 93.65 +- 0.05 % (25
runs). It has not run on a GPU, so how much time it saves there is not known.

    python tests/bench/examples/fast94.py --compile              five runs and their table
    python tests/bench/examples/fast94.py --trials 5 --runs 25 --quiet --compile
    python tests/bench run airbench94_baseline.py tests/bench/examples/fast94.py --holdout

The sections on hyperparameters, loader, network, optimizers, evaluation and training are the
recipe. Data files, compilation, log and command line can be read last.

In a notebook: paste this file into a cell and run it. Then runs = main(['--trials', '1']) does what
the command line does. The log keeps the text of all cells that you ran.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NAME = 'fast94'

# -------------------------------------------------------------------------------------------------
#                                         Hyperparameters
# -------------------------------------------------------------------------------------------------

# lr and weight_decay are decoupled from the other hyperparameters, so that each can be tuned alone:
# - Muon's step has about the same norm whatever the gradient is, and the filters have a fixed norm.
#   So lr says by what angle a step turns the filters; the batch size does not come in.
# - The others have SGD. The loss is summed over the batch, so a step grows with batch_size by
#   itself: leave bias_lr and head_lr as they are when you change batch_size.
# - PyTorch multiplies SGD's weight decay by the lr. MuonAndSGD divides it by the peak lr, so that
#   another peak does not change how fast the weights shrink. It is per example. Muon has none.

hyp = {
    'opt': {
        'train_epochs': 9.4,  # may be fractional
        'low_res_epochs': [24, 24, 24, 24, 24, 24],  # image size of the first epochs; then 32
        'batch_size': 1536,
        'lr': 0.2,  # of Muon, for the 3x3 filters
        'momentum': 0.6,  # of Muon
        'bias_lr': 0.0573,  # of SGD, for BatchNorm biases and the whitening bias
        'head_lr': 0.5415,  # of SGD, for the linear layer
        'sgd_momentum': 0.825,
        'weight_decay': 1.04e-06,  # of SGD, per example
        'label_smoothing': 0.09,
        'whiten_bias_epochs': 0.2,  # then the bias of the whitening layer is frozen
    },
    'aug': {
        'flip': True,
        'translate': 2,  # pixels
    },
    'net': {
        'widths': {'block1': 64, 'block2': 256, 'block3': 256},
        'batchnorm_momentum': 0.557,  # share of the old running statistic that is kept
        'scaling_factor': 1 / 256,  # of the logits
        'tta_level': 2,  # 0: the test image; 1: its mirror image, too; 2: six views (see infer)
        'tta_share': 0.2,  # share of the test images that get these views
    },
}

# The lowest and the highest value that is accepted. A hyperparameter that you add needs no entry.
hyp_limits = {
    'opt.train_epochs': (1e-6, 1e6),
    'opt.low_res_epochs': (9, 32),
    'opt.batch_size': (1, 10**6),
    'opt.lr': (1e-6, 1e6),
    'opt.momentum': (0, 0.9999),
    'opt.bias_lr': (1e-6, 1e6),
    'opt.head_lr': (1e-6, 1e6),
    'opt.sgd_momentum': (1e-6, 0.9999),
    'opt.weight_decay': (0, 1e3),
    'opt.label_smoothing': (0, 1),
    'opt.whiten_bias_epochs': (0, 10**6),
    'aug.flip': (False, True),
    'aug.translate': (0, 31),
    'net.widths.block1': (1, 10**5),
    'net.widths.block2': (1, 10**5),
    'net.widths.block3': (1, 10**5),
    'net.batchnorm_momentum': (0, 1),
    'net.scaling_factor': (1e-6, 1e6),
    'net.tta_level': (0, 2),
    'net.tta_share': (0, 1),
}


class UserError(ValueError):
    """An error that the user can fix; the command line prints it without a traceback."""


def default_hyp() -> dict:
    """Return a copy of hyp, to be changed and given to `train`."""
    return copy.deepcopy(hyp)


def flat_hyp(hyp: dict, prefix: str = '') -> dict:
    """Return nested hyperparameters flat: {'opt': {'lr': 9.0}} becomes {'opt.lr': 9.0}."""
    flat = {}
    for key, value in hyp.items():
        if isinstance(value, dict):
            flat.update(flat_hyp(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat


def check_hyp(hyp: dict):
    """Raise UserError where a value (or each item of a list) is not a number within hyp_limits."""
    for key, value in flat_hyp(hyp).items():
        if key not in hyp_limits:
            continue
        lowest, highest = hyp_limits[key]
        items = value if isinstance(value, list) else [value]
        for item in items:
            is_number = isinstance(item, (bool, int, float))
            if not is_number or not lowest <= item <= highest:
                raise UserError(f'{key}={value}: it must be from {lowest} to {highest}')


# -------------------------------------------------------------------------------------------------
#                                               Data
# -------------------------------------------------------------------------------------------------

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def find_problem(content) -> str | None:
    """Return what is wrong with the content of a train.pt or test.pt, if anything is."""
    if not isinstance(content, dict):
        return f'it holds no dict, but a {type(content).__name__}'
    for key in ('images', 'labels', 'classes'):
        if key not in content:
            return f'it lacks the key {key!r}'
    images = content['images']
    labels = content['labels']
    classes = content['classes']
    for tensor in (images, labels):
        if type(tensor) is not torch.Tensor or tensor.device.type != 'cpu' or tensor.is_sparse:
            return 'images and labels must be plain tensors'
    if images.dtype != torch.uint8 or images.shape[1:] != (32, 32, 3):
        found = f'{images.dtype} {list(images.shape)}'
        return f'images must be uint8 [N, 32, 32, 3], but are {found}'
    if len(images) == 0:
        return 'it has no images'
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.is_complex():
        found = f'{labels.dtype} {list(labels.shape)}'
        return f'labels must be integers [{len(images)}], but are {found}'
    if not isinstance(classes, (list, tuple)):
        return 'classes must be a list of names'
    if labels.long().min() < 0 or labels.long().max() >= len(classes):
        return f'labels must be from 0 to {len(classes) - 1}, as for its classes'
    return None


def read_split(path: pathlib.Path) -> dict:
    """Load and check train.pt or test.pt, which may be anybody's.

    Returns {'images': uint8 [N, 32, 32, 3], 'labels': int64 [N], 'classes': list of names}, on the
    CPU. Raises UserError with the file's name for whatever is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums; torch.load does not
        content = torch.load(path, map_location='cpu', weights_only=True)  # runs no code in it
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except Exception as error:  # a damaged file fails anywhere, with any exception
        reason = str(error).split('\n')[0]
        raise UserError(f'{path} is not a file of torch.save: {reason}') from None
    if damaged:
        raise UserError(f'{path} is damaged: the checksum of {damaged} is wrong')
    problem = find_problem(content)
    if problem:
        raise UserError(f'{path}: {problem}')
    classes = [str(name) for name in content['classes']]
    return {'images': content['images'], 'labels': content['labels'].long(), 'classes': classes}


def make_files(folder: pathlib.Path):
    """Write folder/train.pt and test.pt, made from torchvision's CIFAR10.

    Downloads CIFAR-10 unless its archive, or what was in it, is in the folder. Only whole and
    checked files appear under the two names. Raises UserError.
    """
    from torchvision.datasets import CIFAR10  # here, as the import takes a second
    from torchvision.datasets.utils import check_integrity

    archive = folder / CIFAR10.filename
    extracted = folder / CIFAR10.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = ('train.pt', 'test.pt', archive.name, extracted.name)
        for path in folder.iterdir():
            if path.name not in ours and not path.name.startswith('.'):
                raise UserError(
                    f'{folder} has no train.pt and test.pt, but has {path.name}: '
                    'CIFAR-10 is downloaded into an empty or new folder only'
                )
        if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
            size = archive.stat().st_size
            found = f'its MD5 differs; {size:,} bytes'
            raise UserError(f'{archive} is not CIFAR-10 ({found}): remove it')
        with tempfile.TemporaryDirectory(prefix='.download-', dir=folder) as temporary:
            if archive.exists():
                root, download = folder, True  # torchvision extracts it
            elif extracted.exists():
                root, download = folder, False
            else:
                root, download = temporary, True
                print(f'Downloading CIFAR-10 (170 MB) into {folder}', flush=True)
            for name in ('test.pt', 'train.pt'):
                split = CIFAR10(root, train=name == 'train.pt', download=download)
                content = {
                    'images': torch.from_numpy(split.data),
                    'labels': torch.tensor(split.targets),
                    'classes': split.classes,
                }
                torch.save(content, pathlib.Path(temporary, name))
                read_split(pathlib.Path(temporary, name))  # torch 2.4 does not report a full disk
            for name in ('test.pt', 'train.pt'):
                pathlib.Path(temporary, name).replace(folder / name)
    except UserError:
        raise
    except Exception as error:  # network, disk, and whatever torchvision raises
        reason = str(error).split('\n')[0]
        raise UserError(
            f'no CIFAR-10 in {folder}: {reason}. Put train.pt and test.pt there, or '
            f'{archive.name} (www.cs.toronto.edu/~kriz/cifar.html); or use --synthetic'
        ) from None


def load_data(data_dir: str = 'cifar10', device: torch.device | str | None = None) -> dict:
    """Return the data in data_dir/train.pt and test.pt, made of CIFAR-10 where both are missing.

    Returns {'train': split, 'test': split}; a split has images (uint8 [N, 32, 32, 3]), labels
    (int64 [N]) and classes (names). device: a GPU if there is one. Raises UserError.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    folder = pathlib.Path(data_dir).absolute()
    train_file = folder / 'train.pt'
    test_file = folder / 'test.pt'
    if not os.path.exists(train_file) and not os.path.exists(test_file):
        make_files(folder)
    for file in (train_file, test_file):
        if not os.path.exists(file):
            raise UserError(f'{file} is missing; the other half of the data is there')
    data = {'train': read_split(train_file), 'test': read_split(test_file)}
    if data['train']['classes'] != data['test']['classes']:
        raise UserError(f'{folder}: train.pt and test.pt have different classes')
    for split in data.values():
        split['images'] = split['images'].to(device)
        split['labels'] = split['labels'].to(device)
    return data


def synthetic_data(device: torch.device | str, train: int = 50000, test: int = 10000) -> dict:
    """Return a random stand-in for what `load_data` returns, always the same.

    Each of the ten classes has 20 patterns. An image is one of them on a random colour, under
    clutter and noise. With one pattern for a class the images of a class would be so alike that
    their gradients add up, and training diverges at the learning rates that CIFAR-10 needs.
    """
    rng = torch.Generator().manual_seed(94)

    def smooth(n, size):  # [n, 3, 32, 32]
        points = torch.randn(n, 3, size, size, generator=rng)
        return F.interpolate(points, 32, mode='bicubic')

    def strength(n, lowest, highest):  # [n, 1, 1, 1], of each image its own
        return lowest + (highest - lowest) * torch.rand(n, 1, 1, 1, generator=rng)

    patterns = smooth(200, 4)
    data = {}
    for split, n in (('train', train), ('test', test)):
        which = torch.randint(200, (n,), generator=rng)
        images = 128 + 30 * torch.randn(n, 3, 1, 1, generator=rng)
        images = images + strength(n, 40, 80) * patterns[which]
        images += strength(n, 0, 40) * smooth(n, 8)
        images += strength(n, 0, 20) * torch.randn(n, 3, 32, 32, generator=rng)
        images = images.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
        data[split] = {
            'images': images.to(device),
            'labels': (which % 10).to(device),
            'classes': list('abcdefghij'),
        }
    return data


# -------------------------------------------------------------------------------------------------
#                                              Loader
# -------------------------------------------------------------------------------------------------

DTYPE = {'cuda': torch.float16, 'cpu': torch.float32}  # of images and weights except BatchNorm's


def batch_flip_lr(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image of [N, C, H, W] left to right, independently with probability 0.5."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def batch_crop(images: torch.Tensor, offsets: torch.Tensor, size: int) -> torch.Tensor:
    """Crop each image of [N, C, H, W] to size x size pixels, each at its own offset.

    offsets: int64 [N, 2], row and column of the crop's first pixel. Returns [N, C, size, size],
    channels_last. One gather, so neither a loop over offsets nor a synchronization.
    """
    n, channels = images.shape[:2]
    rows = images.permute(0, 2, 3, 1).flatten(2)  # [N, H, W * C], a view if channels_last
    # x.unfold(axis, size, step) replaces an axis by the number of the window, and appends an axis
    # of length size. So windows[n, y, x] is the crop of image n at row y and column x.
    windows = rows.unfold(1, size, 1)  # [N, H - size + 1, W * C, size], a view
    windows = windows.unfold(2, size * channels, channels)  # [N, y, x, size, size * C], a view
    every = torch.arange(n, device=images.device)
    crops = windows[every, offsets[:, 0], offsets[:, 1]]  # [N, size, size * C], the only copy
    crops = crops.unflatten(2, (size, channels))  # [N, size, size, C]
    return crops.permute(0, 3, 1, 2)  # [N, C, size, size]


class CifarLoader:
    """Make batches of normalized, augmented images and their labels on the device.

    Args:
        path: a directory for `load_data`, or the dict that it returns.
        train: the split; also the default of drop_last and shuffle.
        batch_size: images in a batch.
        aug: {'flip': bool, 'translate': pixels}; what is left out is off.
        drop_last: leave out the last batch where it is not full.
        shuffle: a new random order in each epoch.
        device: where batches are made (default: where the data are).

    Yields, for an epoch:
        images [B, 3, 32, 32], channels_last, float16 on CUDA, else float32; labels int64 [B].

    Attributes:
        images: [N, 3, 32, 32] in [0, 1], not normalized. To train on a subset, assign
            loader.images = loader.images[keep], and the same for labels, between epochs. A change
            in place is not noticed, nor is another aug.
        labels: int64 [N]. classes: their names.
        epoch: how many epochs have begun.
        proc_images: computed once, when the first epoch begins. 'norm': normalized images.
            'flip' (only with aug flip): norm with a random half mirrored. 'pad' (only with aug
            translate): 'flip', or 'norm' if there is no 'flip', with a reflected border.
    """

    def __init__(
        self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None, device=None
    ):
        data = path
        if not isinstance(path, dict):
            data = load_data(path, device)
        split = data['train'] if train else data['test']
        if device is None:
            device = split['images'].device
        device = torch.device(device)
        images = split['images'].to(device).permute(0, 3, 1, 2)  # a view, channels_last
        self.images = images.to(DTYPE[device.type]).div_(255)
        self.labels = split['labels'].to(device)
        self.classes = split['classes']
        self.batch_size = batch_size
        self.aug = {'flip': False, 'translate': 0}  # a new augmentation needs a value here
        known = set(self.aug)
        self.aug.update(aug or {})
        unknown = set(self.aug) - known
        if unknown:
            raise UserError(f'no aug.{unknown.pop()}; aug has {", ".join(sorted(known))}')
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.epoch = 0
        self.proc_images = {}
        self.precomputed_from = None  # the images that proc_images were made of

    @staticmethod
    def normalize(images: torch.Tensor) -> torch.Tensor:
        """Return (images - mean) / std of each channel, for images [N, 3, H, W] in [0, 1]."""
        mean = torch.tensor(CIFAR_MEAN, dtype=images.dtype).view(3, 1, 1)
        std = torch.tensor(CIFAR_STD, dtype=images.dtype).view(3, 1, 1)
        mean = mean.to(images.device, non_blocking=True)
        std = std.to(images.device, non_blocking=True)
        return (images - mean).div_(std)

    @torch.no_grad()
    def precompute(self):
        """Fill proc_images, unless they are of the present images already."""
        if self.precomputed_from is self.images:
            return
        self.precomputed_from = self.images
        images = self.normalize(self.images)
        self.proc_images['norm'] = images
        if self.aug['flip']:
            images = batch_flip_lr(images)
            self.proc_images['flip'] = images
        pad = self.aug['translate']
        if pad:
            padded = F.pad(images, (pad, pad, pad, pad), 'reflect')
            self.proc_images['pad'] = padded.contiguous(memory_format=torch.channels_last)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        n = len(self.images)
        if self.drop_last:
            return n // self.batch_size
        return math.ceil(n / self.batch_size)

    def __iter__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f'{len(self.images)} images, but {len(self.labels)} labels')
        self.precompute()
        n = len(self.images)
        device = self.images.device
        images = self.proc_images['norm']
        if self.aug['flip']:
            images = self.proc_images['flip']
        if self.aug['translate']:
            positions = 2 * self.aug['translate'] + 1
            offsets = torch.randint(positions, (n, 2), device=device)
            images = batch_crop(self.proc_images['pad'], offsets, size=images.shape[-1])
        # Alternating flip: a random half was mirrored once, by precompute, and odd epochs mirror
        # all, so every two epochs show each image both ways.
        if self.aug['flip'] and self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        if self.shuffle:
            order = torch.randperm(n, device=device)
        else:
            order = torch.arange(n, device=device)
        for index in order.split(self.batch_size)[: len(self)]:  # may drop the last batch
            yield images[index], self.labels[index]


# -------------------------------------------------------------------------------------------------
#                                              Network
# -------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """A 3x3 convolution without bias. Its first in_channels outputs start as copies of the inputs.

    The other outputs start at random. Source: DiracNets, arXiv:1706.00388.
    """

    def __init__(self, in_channels: int, out_channels: int, padding='same'):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=padding, bias=False)
        nn.init.dirac_(self.weight.data[:in_channels])


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without a learned scale. momentum: the share of the OLD statistic that is kept."""

    def __init__(self, num_features: int, momentum: float):
        super().__init__(num_features, eps=1e-12, momentum=1 - momentum)
        self.weight.requires_grad = False
        self.num_batches_tracked = None  # unused; saves a kernel per layer and step


class ConvGroup(nn.Module):
    """Two convolutions: [N, C, H, W] -> [N, out_channels, H // 2, W // 2]."""

    def __init__(self, in_channels: int, out_channels: int, batchnorm_momentum: float):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, padding=0)  # padded in forward
        self.pool = nn.MaxPool2d(2)
        self.norm1 = BatchNorm(out_channels, batchnorm_momentum)
        self.conv2 = Conv(out_channels, out_channels)
        self.norm2 = BatchNorm(out_channels, batchnorm_momentum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # At odd sizes the pooling would drop conv1's last row and column. So they are not
        # computed: no padding on the right and below.
        odd = x.shape[-1] % 2
        x = F.pad(x, (1, 1 - odd, 1, 1 - odd))
        x = self.conv1(x)
        x = self.pool(x)
        x = F.gelu(self.norm1(x))
        x = self.conv2(x)
        return F.gelu(self.norm2(x))


class CifarNet(nn.Module):
    """Images [N, 3, 32, 32] -> logits [N, num_classes]. Call `init_whitening` before training."""

    def __init__(self, hyp: dict, num_classes: int = 10):
        super().__init__()
        widths = hyp['net']['widths']
        momentum = hyp['net']['batchnorm_momentum']
        whiten_width = 2 * 3 * 2**2  # the 12 eigenvectors of 2x2 patches, and their negatives
        self.scaling_factor = hyp['net']['scaling_factor']
        self.whiten = nn.Conv2d(3, whiten_width, kernel_size=2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        self.groups = nn.Sequential(
            ConvGroup(whiten_width, widths['block1'], momentum),
            ConvGroup(widths['block1'], widths['block2'], momentum),
            ConvGroup(widths['block2'], widths['block3'], momentum),
        )
        self.head = nn.Linear(widths['block3'], num_classes, bias=False)
        self.head.weight.data.div_(self.head.weight.std())  # scaling_factor is small in return

    @torch.no_grad()
    def init_whitening(self, train_images: torch.Tensor, eps: float = 5e-4):
        """Set the first layer to PCA-whitening filters of the 2x2 patches of normalized images.

        train_images: [N, 3, H, W]. The filters are the eigenvectors of the patches' second moment,
        largest eigenvalue first, divided by sqrt(eigenvalue + eps), and their negatives. They
        decorrelate the pixels, which SGD would have to learn otherwise (arXiv:2404.00498).
        """
        patches = train_images.float().unfold(2, 2, 1).unfold(3, 2, 1)  # [N, 3, H-1, W-1, 2, 2]
        patches = patches.permute(1, 4, 5, 0, 2, 3).reshape(12, -1)  # [12, N * (H-1) * (W-1)]
        second_moment = patches @ patches.T / patches.shape[1]
        eigenvalues, eigenvectors = torch.linalg.eigh(second_moment)  # smallest first, in columns
        filters = eigenvectors / torch.sqrt(eigenvalues + eps)
        filters = filters.T.flip(0).reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, images: torch.Tensor, whiten_bias_grad: bool = True) -> torch.Tensor:
        # The bias is frozen by an argument, as toggling requires_grad would compile again.
        bias = self.whiten.bias if whiten_bias_grad else self.whiten.bias.detach()
        x = F.gelu(F.conv2d(images, self.whiten.weight, bias))  # [N, 24, 31, 31]
        x = self.groups(x)  # [N, 256, 3, 3]
        x = F.max_pool2d(x, x.shape[-1]).flatten(1)  # [N, 256]
        return self.head(x * self.scaling_factor)  # scales the logits, as the head has no bias


def make_net(hyp: dict, device: torch.device | str = 'cpu', num_classes: int = 10) -> CifarNet:
    """Return a new network on the device, in half precision on CUDA except for BatchNorm.

    The weights are drawn on the CPU, so a seed gives the same weights on every device.
    """
    device = torch.device(device)
    net = CifarNet(hyp, num_classes)
    net.to(device, DTYPE[device.type], memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # its sums over a batch need more than half precision
    return net


# -------------------------------------------------------------------------------------------------
#                                      Muon, SGD and schedule
# -------------------------------------------------------------------------------------------------


# Muon's matrix products are in half precision: a GPU is fastest in it, and it is enough for them.
PRODUCT_DTYPE = {'cuda': torch.float16, 'cpu': torch.bfloat16}


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return about U V^T for each matrix U S V^T in [n, rows, columns], without computing U or V.

    a X + b X X^T X + c (X X^T)^2 X has X's singular vectors, and of each singular value s it makes
    a s + b s^3 + c s^5. Three such steps bring all s from 0.02 to 1 to between 0.75 and 1.37, and
    raise smaller ones about 40 times. (It is a Newton-Schulz iteration; the coefficients are
    Hiverge's.)
    """
    a, b, c = 3.4576, -4.7391, 2.0843
    norms = matrices.norm(dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = matrices / norms.clamp(min=1e-12)  # then no singular value exceeds 1
    x = x.to(PRODUCT_DTYPE[x.device.type])
    for _ in range(3):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for filters [out, in, 3, 3].

    lr is a tensor on the filters' device, so that a CUDA graph does not record its value.
    """

    def __init__(self, filters: list, lr: torch.Tensor, momentum: float):
        super().__init__(filters, {'lr': lr, 'momentum': momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [weight for weight in group['params'] if weight.grad is not None]
            self.update(weights, group['lr'], group['momentum'])

    def update(self, weights: list, lr: torch.Tensor, momentum: float):
        """Update the weights. What is done to all at once takes fewer kernels."""
        for weight in weights:
            if weight not in self.state:
                self.state[weight]['momentum_buffer'] = torch.zeros_like(weight)
        grads = [weight.grad for weight in weights]
        buffers = [self.state[weight]['momentum_buffer'] for weight in weights]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        directions = torch._foreach_add(grads, buffers, alpha=momentum)  # Nesterov

        # Each weight gets the norm sqrt(out). An orthogonalized direction has it, too, where out is
        # not over in * 9. So a step turns the weight by an angle of about lr, in radians.
        scales = torch._foreach_reciprocal(torch._foreach_norm(weights))
        torch._foreach_mul_(scales, [math.sqrt(len(weight)) for weight in weights])
        torch._foreach_mul_(weights, scales)

        same_shape = {}  # one product for all of a shape
        for weight, direction in zip(weights, directions, strict=True):
            same_shape.setdefault(weight.shape, []).append((weight, direction))
        for shape, pairs in same_shape.items():
            matrices = torch.stack([direction.flatten(1) for _, direction in pairs])
            matrices = orthogonalize(matrices)
            for (weight, _), matrix in zip(pairs, matrices, strict=True):
                weight.addcmul_(matrix.view(shape), lr, value=-1)


class MuonAndSGD:
    """Muon for the 3x3 filters and Nesterov SGD for all else, used as one optimizer.

    The lrs of the four groups (BatchNorm biases, head, whitening bias, filters) are one tensor,
    which the optimizers read on the device: a copy into `lrs` changes them.
    """

    def __init__(self, net: nn.Module, hyp: dict):
        opt = hyp['opt']
        norm_biases = []
        filters = []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                norm_biases.append(module.bias)
            elif isinstance(module, Conv):
                filters.append(module.weight)
        peak_lrs = [opt['bias_lr'], opt['head_lr'], opt['bias_lr'], opt['lr']]
        self.lrs = torch.tensor(peak_lrs, device=filters[0].device)
        lrs = self.lrs
        decay = opt['weight_decay'] * opt['batch_size']
        bias_decay = decay / opt['bias_lr']
        head_decay = decay / opt['head_lr']
        groups = [
            {'params': norm_biases, 'lr': lrs[0], 'weight_decay': bias_decay},
            {'params': [net.head.weight], 'lr': lrs[1], 'weight_decay': head_decay},
            {'params': [net.whiten.bias], 'lr': lrs[2], 'weight_decay': bias_decay},
        ]
        sgd = torch.optim.SGD(groups, momentum=opt['sgd_momentum'], nesterov=True, fused=True)
        muon = Muon(filters, lrs[3], opt['momentum'])
        self.optimizers = [sgd, muon]
        self.param_groups = sgd.param_groups + muon.param_groups
        in_a_group = {id(weight) for group in self.param_groups for weight in group['params']}
        names = []
        for name, weight in net.named_parameters():
            if weight.requires_grad and id(weight) not in in_a_group:
                names.append(name)
        if names:
            raise ValueError(f'no group of MuonAndSGD has {", ".join(names)}: they would not train')

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def take_memory_of(self, other: 'MuonAndSGD'):
        """Start with the other's momentum, set to 0, in place of new memory; share its lrs.

        The CUDA graphs read and write the other's memory.
        """
        other.lrs.copy_(self.lrs)  # of the present step
        self.lrs = other.lrs
        for group, its_group in zip(self.param_groups, other.param_groups, strict=True):
            group['lr'] = its_group['lr']
        for optimizer, its_optimizer in zip(self.optimizers, other.optimizers, strict=True):
            for state in its_optimizer.state.values():
                state['momentum_buffer'].zero_()
            optimizer.state = its_optimizer.state


def make_optimizer(net: nn.Module, hyp: dict) -> MuonAndSGD:
    """Return the optimizer of all that is trained. Its lrs in each step: `make_schedule`."""
    return MuonAndSGD(net, hyp)


def lr_factor(step: int, total_steps: int) -> float:
    """Return what the lrs are multiplied by in a step, from 0 on: 1, then linearly to 0."""
    return max(0.0, 1 - step / max(1, total_steps))


def make_schedule(hyp: dict, total_steps: int, whiten_steps: int) -> torch.Tensor:
    """Return the lrs of MuonAndSGD in each step: float32 [total_steps, 4]."""
    opt = hyp['opt']
    rows = []
    for step in range(total_steps):
        factor = lr_factor(step, total_steps)
        whiten_factor = lr_factor(step, whiten_steps)
        bias_lr = opt['bias_lr'] * factor
        head_lr = opt['head_lr'] * factor
        whiten_lr = opt['bias_lr'] * whiten_factor
        rows.append([bias_lr, head_lr, whiten_lr, opt['lr'] * factor])
    return torch.tensor(rows)


# -------------------------------------------------------------------------------------------------
#                                            Evaluation
# -------------------------------------------------------------------------------------------------

EVAL_BATCH = {'cuda': 2000, 'cpu': 500}  # test images at once


@functools.cache
def cpu_info() -> str:
    """Return what Linux says of the CPU, else nothing."""
    file = pathlib.Path('/proc/cpuinfo')
    return file.read_text() if file.exists() else ''


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16; others are slower in it than in float32."""
    return 'avx512_bf16' in cpu_info() or 'amx_bf16' in cpu_info()


def cpu_autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast on a CPU that gains from it, else a context without effect."""
    enabled = device.type == 'cpu' and cpu_has_bfloat16()
    return torch.autocast('cpu', torch.bfloat16, enabled)


def predict(net: nn.Module, images: torch.Tensor, tta_level: int) -> torch.Tensor:
    """Return float32 logits of images [B, 3, 32, 32]: the weighted mean over views of each."""
    if tta_level == 0:
        views = [(1, images)]
    elif tta_level == 1:
        views = [(1 / 2, images), (1 / 2, images.flip(-1))]
    else:
        padded = F.pad(images, (1, 1, 1, 1), 'reflect')
        up_left = padded[:, :, :-2, :-2]
        down_right = padded[:, :, 2:, 2:]
        views = [
            (1 / 4, images),
            (1 / 4, images.flip(-1)),
            (1 / 8, up_left),
            (1 / 8, up_left.flip(-1)),
            (1 / 8, down_right),
            (1 / 8, down_right.flip(-1)),
        ]
    logits = 0
    for weight, view in views:
        view = view.contiguous(memory_format=torch.channels_last)
        logits = logits + weight * net(view).float()
    return logits


@torch.no_grad()
def infer(
    net: nn.Module, loader: CifarLoader, tta_level: int = 0, tta_share: float = 1.0
) -> torch.Tensor:
    """Return float32 logits [N, num_classes] of the loader's images, in order and not augmented.

    tta_level: the views that are averaged. 0: the image. 1: its mirror image, too. 2: the image
    shifted by one pixel along the diagonal, either way, and the mirror images of these, too.
    tta_share: the share of the images that get these views, those whose two largest logits are
    closest; the others get one.
    """
    if tta_level not in (0, 1, 2):
        raise ValueError(f'tta_level {tta_level}: it must be 0, 1 or 2')
    net.eval()
    loader.precompute()
    images = loader.proc_images['norm']

    def predict_all(images, tta_level):
        batches = images.split(loader.batch_size)
        return torch.cat([predict(net, batch, tta_level) for batch in batches])

    with cpu_autocast(images.device):
        if tta_share == 1:
            return predict_all(images, tta_level)
        logits = predict_all(images, tta_level=0)
        best, second = logits.topk(2).values.unbind(1)
        count = math.ceil(tta_share * len(images))
        unsure = (best - second).topk(count, largest=False).indices
        if count > 0:
            logits[unsure] = predict_all(images[unsure], tta_level)
    return logits


def evaluate(
    net: nn.Module, loader: CifarLoader, tta_level: int = 0, tta_share: float = 1.0
) -> float:
    """Return the accuracy in [0, 1] of `infer` on the loader's labels."""
    predicted = infer(net, loader, tta_level, tta_share).argmax(1)
    return (predicted == loader.labels).double().mean().item()


# -------------------------------------------------------------------------------------------------
#                                        The training step
# -------------------------------------------------------------------------------------------------


def loss_and_grads(net, images, targets, whiten_bias_grad) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the summed loss. Returns the loss and the logits."""
    with cpu_autocast(images.device):
        logits = net(images, whiten_bias_grad)
    # The sum is taken in float32: in half precision it overflows at large batches.
    loss = F.cross_entropy(logits.float(), targets, reduction='sum')
    loss.backward()
    return loss.detach(), logits.detach()


def train_step(
    net, optimizer, images, targets, whiten_bias_grad=True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the network once. Returns the summed loss [] and the logits [B, num_classes].

    images: [B, 3, 32, 32]; targets: float32 [B, num_classes], one probability for each class.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, logits = loss_and_grads(net, images, targets, whiten_bias_grad)
    optimizer.step()
    return loss, logits


# -------------------------------------------------------------------------------------------------
#                             Compilation (--compile; can be read last)
# -------------------------------------------------------------------------------------------------


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which CUDA graphs are recorded: one per device, as each takes memory."""
    return torch.cuda.Stream(device)


@dataclasses.dataclass
class RecordedStep:
    """A CUDA graph of `train_step`, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    targets: torch.Tensor
    loss: torch.Tensor
    logits: torch.Tensor


class CompiledStep:
    """`train_step` for a compiled network; on CUDA it is one launch, optimizers and all.

    A step has about 160 kernels, and a GPU finishes them faster than the host launches them. So
    they are recorded as a CUDA graph, which is one launch. There is a graph for each kind of step:
    the shape of the images, and whether the whitening bias is trained.

    A graph repeats the kernels that it recorded, so Python in the network or in an optimizer does
    not run again, and it reads and writes the same memory each time: the optimizer of a new run
    takes over that of the last run. Clone the loss and the logits that you want to keep.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.optimizer = None  # of the present run
        self.constants = []  # of its groups: the graphs have their values in them
        self.seen = set()  # kinds of steps that ran: compiled, and cuDNN has chosen its kernels
        self.recorded = {}  # kind of step -> RecordedStep
        self.pool = None  # memory that the graphs share

    def __call__(self, net, optimizer, images, targets, whiten_bias_grad=True):
        if net is not self.net:
            raise ValueError('this step was compiled for another network')
        if not images.is_cuda:
            return train_step(net, optimizer, images, targets, whiten_bias_grad)
        if optimizer is not self.optimizer:
            self.begin_run(optimizer)
        kind = (images.shape, whiten_bias_grad)
        if kind not in self.seen:
            result = train_step(net, optimizer, images, targets, whiten_bias_grad)
            self.seen.add(kind)
            return result
        if kind not in self.recorded:
            self.recorded[kind] = self.record(images, targets, whiten_bias_grad)
        step = self.recorded[kind]
        torch._foreach_copy_([step.images, step.targets], [images, targets])
        step.graph.replay()
        return step.loss, step.logits

    def begin_run(self, optimizer: MuonAndSGD):
        """Let a new optimizer use the memory that the graphs know."""
        groups = optimizer.param_groups
        constants = [(group['momentum'], group.get('weight_decay')) for group in groups]
        if self.seen:  # else the last run made no step
            optimizer.take_memory_of(self.optimizer)
        if constants != self.constants:
            self.recorded.clear()
            self.pool = None  # it ended with the last graph
        self.optimizer = optimizer
        self.constants = constants

    def record(self, images, targets, whiten_bias_grad) -> RecordedStep:
        """Record the kernels of `train_step`; none of them runs."""
        images = images.clone()
        targets = targets.clone()
        graph = torch.cuda.CUDAGraph()
        stream = capture_stream(images.device)
        with torch.cuda.device(images.device), torch.cuda.graph(graph, self.pool, stream):
            loss, logits = train_step(self.net, self.optimizer, images, targets, whiten_bias_grad)
        self.pool = graph.pool()
        return RecordedStep(graph, images, targets, loss, logits)


def pool_backward(grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):
    """Return the gradient of max-pooling for Inductor: each pixel looks whether it was the maximum.

    The arguments are those of aten.max_pool2d_with_indices_backward: grad and indices [N, C, h, w],
    where an index is y * W + x of the maximum in x [N, C, H, W]. Inductor's own rule adds with
    atomics, which it cannot fuse with what follows (PyTorch issue 195123). Without this rule and
    the two limits in `compile_step` a step moves twice the memory. Pooling with overlap, padding or
    a border is left to Inductor.
    """
    size = kernel_size[0]
    overlaps = stride not in ([], kernel_size) or any(padding)  # []: stride is kernel_size
    has_border = grad.numel() * size**2 != x.numel()
    if overlaps or has_border:
        return NotImplemented

    def repeat_for_each_pixel(pooled):  # [N, C, h, w] -> [N, C, h * size, w * size]
        repeated = pooled[:, :, :, None, :, None].expand(-1, -1, -1, size, -1, size)
        return repeated.reshape(x.shape)

    # This changes no value, but Inductor must store the input of as_strided. Else it would compute
    # grad anew for each of the pixels that read it.
    grad = grad.as_strided(grad.shape, grad.stride())
    pixels = torch.arange(x[0, 0].numel(), device=x.device).view(x.shape[2:])
    is_maximum = repeat_for_each_pixel(indices) == pixels
    grad = torch.where(is_maximum, repeat_for_each_pixel(grad), grad.new_zeros(()))
    return grad.contiguous(memory_format=torch.channels_last)


def compile_step(net: nn.Module) -> CompiledStep:
    """Compile the network in place. Returns its training step, for `train(..., net, step=step)`."""
    from torch._inductor import compile_fx, decomposition  # here, as the import takes a second

    rules = dict(decomposition.select_decomp_table())
    rules[torch.ops.aten.max_pool2d_with_indices_backward.default] = pool_backward
    # Inductor stores a value that has many readers or took many operations. With these higher
    # limits it stores less and computes more again, which takes less time than the memory traffic.
    patches = {'realize_reads_threshold': 8, 'realize_opcount_threshold': 100}
    backend = functools.partial(compile_fx.compile_fx, config_patches=patches, decompositions=rules)
    # Every network and shape counts; beyond this limit Dynamo would fall back to eager kernels.
    torch._dynamo.config.cache_size_limit = 256
    net.compile(backend=backend, dynamic=False)
    return CompiledStep(net)


# -------------------------------------------------------------------------------------------------
#                                             Training
# -------------------------------------------------------------------------------------------------


class Timer:
    """Add up the seconds of `with timer:` blocks. On CUDA both ends wait for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self):
        self.start = self.now()

    def __exit__(self, *exception):
        self.seconds += self.now() - self.start


@functools.cache
def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None where nvidia-smi does not tell it."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.split('\n')[0]


def machine_facts(device: torch.device) -> dict:
    """Return what the record of a run says of the machine."""
    facts = {'torch': str(torch.__version__)}
    if device.type == 'cuda':
        facts['device'] = torch.cuda.get_device_name(device)
        facts['dtype'] = 'float16'
        facts['cuda'] = torch.version.cuda
        facts['driver'] = driver_version()
        facts['peak_bytes'] = torch.cuda.max_memory_allocated(device)
    else:
        models = re.findall(r'model name\s*: (.*)', cpu_info())
        name = models[0] if models else platform.processor() or 'CPU'
        facts['device'] = f'{name}, threads: {torch.get_num_threads()}'
        facts['dtype'] = 'bfloat16 autocast' if cpu_has_bfloat16() else 'float32'
    return facts


def check_batch_size(data: dict, hyp: dict):
    """Raise UserError where there are fewer training images than a batch holds."""
    n = len(data['train']['labels'])
    batch_size = hyp['opt']['batch_size']
    if n < batch_size:
        smaller = max(1, n // 5)
        raise UserError(
            f'{n} images, but opt.batch_size is {batch_size}: try --hyp opt.batch_size={smaller}'
        )


def train(
    data, seed, hyp=None, device=None, net=None, quiet=False, on_epoch=None, step=None
) -> tuple[dict, nn.Module]:
    """Train from scratch.

    Args:
        data: what `load_data` returns.
        seed: of weights, batches and augmentation. Seeds torch.
        hyp: hyperparameters, nested as in hyp at the top (default: that).
        device: where to train (default: where the data are).
        net: a network to use again, perhaps compiled, that `make_net` made of the same hyp['net'].
            Its weights are drawn anew.
        quiet: evaluate in the end only.
        on_epoch: called after each epoch with its row of the record, while no time is measured.
        step: what `compile_step` returned for net (default: train_step).

    Returns (record, net). The record has tta_acc (accuracy in [0, 1] with TTA), clock_seconds
    (the training time: loaders, whitening, steps and final evaluation, but neither making the
    network nor the evaluation between epochs), epochs (a row for each), the hyperparameters and the
    machine. Raises UserError before any work.
    """
    wall_start = time.perf_counter()
    if hyp is None:
        hyp = default_hyp()
    if device is None:
        device = data['train']['images'].device
    if step is None:
        step = train_step
    check_hyp(hyp)
    check_batch_size(data, hyp)
    device = torch.device(device)
    opt = hyp['opt']
    sizes = opt['low_res_epochs']
    for size in sizes:
        if not isinstance(size, int):
            raise UserError(f'opt.low_res_epochs={sizes}: a size is a whole number of pixels')
    classes = data['train']['classes']
    timer = Timer(device)
    eval_timer = Timer(device)

    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    # The same few shapes come again and again: cuDNN tries its kernels once for each.
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)
    new_net = make_net(hyp, device, len(classes))
    if net is None:
        net = new_net
    else:
        net.load_state_dict(new_net.state_dict())
    optimizer = make_optimizer(net, hyp)
    # Seeded again, so that the batches do not depend on the number of weights.
    torch.manual_seed(seed + 2**32)

    with timer:
        test_loader = CifarLoader(data, False, EVAL_BATCH[device.type], device=device)
        test_loader.precompute()  # now, as it belongs to the training time
        train_loader = CifarLoader(data, True, opt['batch_size'], hyp['aug'], device=device)
        total_steps = math.ceil(len(train_loader) * opt['train_epochs'])
        whiten_steps = math.ceil(len(train_loader) * opt['whiten_bias_epochs'])
        net.init_whitening(train_loader.normalize(train_loader.images[:5000]))
        # On the device before the first step, so that no step waits for the host.
        schedule = make_schedule(hyp, total_steps, whiten_steps)
        schedule = schedule.to(device, non_blocking=True)
        # Row c is the smoothed label of class c. A lookup takes fewer kernels per step than the
        # smoothing in cross_entropy.
        smoothing = opt['label_smoothing']
        all_targets = torch.eye(len(classes), device=device) * (1 - smoothing)
        all_targets += smoothing / len(classes)

    rows = []
    steps_done = 0
    for epoch in range(math.ceil(total_steps / len(train_loader))):
        with timer:
            net.train()
            for images, labels in train_loader:
                if epoch < len(sizes):
                    images = F.interpolate(images, sizes[epoch], mode='bilinear')
                targets = all_targets[labels]
                optimizer.lrs.copy_(schedule[steps_done])
                whiten_bias_grad = steps_done < whiten_steps
                loss, logits = step(net, optimizer, images, targets, whiten_bias_grad)
                steps_done += 1
                if steps_done == total_steps:
                    break

        row = {
            'epoch': epoch + 1,
            'train_loss': loss.item() / len(labels),  # of the last batch
            'train_acc': (logits.argmax(1) == labels).double().mean().item(),
            'test_acc': None,
            'clock_seconds': timer.seconds,
            'eval_seconds': 0.0,
        }
        if not quiet:
            seconds_before = eval_timer.seconds
            with eval_timer:
                row['test_acc'] = evaluate(net, test_loader)
            row['eval_seconds'] = eval_timer.seconds - seconds_before
        rows.append(row)
        if on_epoch is not None:
            on_epoch(row)

    with timer:
        net_hyp = hyp['net']
        tta_acc = evaluate(net, test_loader, net_hyp['tta_level'], net_hyp['tta_share'])

    record = {
        'seed': seed,
        'hyp': flat_hyp(hyp),
        'epochs': rows,
        'tta_acc': tta_acc,
        'clock_seconds': timer.seconds,
        'eval_seconds': eval_timer.seconds,
        'wall_seconds': time.perf_counter() - wall_start,
        'train_images': len(data['train']['labels']),
        'test_images': len(data['test']['labels']),
        'classes': len(classes),
        **machine_facts(device),
    }
    return record, net


# -------------------------------------------------------------------------------------------------
#                                        Trials: table and log
# -------------------------------------------------------------------------------------------------

EPOCH_ROW = '{:>5} {:>4} {:>6} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9}'
TRIAL_ROW = '{:7} {:>12} {:>10}  {:16} {:>5} {:>7} {:>8}'


def duration(seconds: float) -> str:
    """Return seconds as in '1m 54s'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes}m {seconds:02}s'


class Progress:
    """Print a row for each epoch and each finished run, with the time that is left."""

    def __init__(self, n_runs: int, n_epochs: int):
        self.n_runs = n_runs
        self.n_epochs = n_epochs
        self.runs_done = 0
        self.start = time.perf_counter()
        heads = ('trial', 'run', 'epoch', 'loss', 'train', 'test', 'TTA', 'time', 'left')
        print(EPOCH_ROW.format(*heads), flush=True)

    def begin_run(self, trial: int, run: int):
        self.trial = trial
        self.run = run

    def end_epoch(self, row: dict):
        runs_done = self.runs_done + row['epoch'] / self.n_epochs
        self.print_row(row['epoch'], row, '', row['clock_seconds'], runs_done)

    def end_run(self, record: dict):
        self.runs_done += 1
        tta = f'{record["tta_acc"]:.2%}'
        self.print_row('end', record['epochs'][-1], tta, record['clock_seconds'], self.runs_done)

    def print_row(self, epoch, row: dict, tta: str, seconds: float, runs_done: float):
        test = '' if row['test_acc'] is None else f'{row["test_acc"]:.2%}'
        loss = f'{row["train_loss"]:.4f}'
        train = f'{row["train_acc"]:.2%}'
        left = (time.perf_counter() - self.start) * (self.n_runs / runs_done - 1)
        cells = (epoch, loss, train, test, tta, f'{seconds:.3f}s', duration(left))
        print(EPOCH_ROW.format(self.trial, self.run, *cells), flush=True)


def trial_row(name: str, runs: list[dict], n_trials: int = 1) -> str:
    """Return a row of the table: of one trial, or the average of several."""
    n = len(runs)
    percent = np.array([100 * run['tta_acc'] for run in runs])
    wall_seconds = sum(run['wall_seconds'] for run in runs) / n_trials
    minutes, seconds = divmod(round(wall_seconds, 3), 60)
    runtime = f'{minutes:.0f}m {seconds:06.3f}s'
    time_per_run = f'{np.mean([run["clock_seconds"] for run in runs]):.3f}s'
    accuracy = f'{percent.mean():.2f}%'
    std = ''
    if n > 1:
        std = f'{percent.std(ddof=1):.2f}'
        accuracy += f' +- {percent.std(ddof=1) / math.sqrt(n):.2f}'
    worst = f'{percent.min():.2f}%'
    reached = f'{sum(percent.round(6) >= 94)}/{n}'
    return TRIAL_ROW.format(name, runtime, time_per_run, accuracy, std, worst, reached)


def print_table(runs: list[dict]):
    """Print the table of all trials, and under it the runs that did not learn."""
    heads = ('Trial', 'Runtime', 'Time/run', 'Accuracy +- s.e.', 'Std', 'Worst', '>=94%')
    print(f'\n{TRIAL_ROW.format(*heads)}')
    trials = sorted({run['trial'] for run in runs})
    for trial in trials:
        members = [run for run in runs if run['trial'] == trial]
        print(trial_row(str(trial), members))
    if len(trials) > 1:
        print(trial_row('Average', runs, len(trials)))
    for run in runs:
        if abs(run['tta_acc'] - 1 / run['classes']) < 0.01:
            place = f'Trial {run["trial"]}, run {run["run"]}'
            print(f'{place} is at chance ({run["tta_acc"]:.2%}): try a lower opt.lr or more epochs')


def print_machine(run: dict):
    """Print what a run was made on."""
    words = [run['device'], run['dtype'], f'torch {run["torch"]}']
    if 'cuda' in run:
        words.append(f'CUDA {run["cuda"]}, driver {run["driver"]}')
        peak = f'peak memory {run["peak_bytes"] / 2**20:.0f} MiB'
        if run['compile']:
            peak += ' without the CUDA graphs'
        words.append(peak)
    words.append(f'warm-up {duration(run["warmup_seconds"])}')
    print(', '.join(words))


def data_facts(data: dict, name: str) -> dict:
    """Return the name, sizes and checksums of the data, which tell data sets apart in logs."""
    facts = {'name': name, 'classes': len(data['train']['classes'])}
    for split in ('train', 'test'):
        facts[split] = len(data[split]['labels'])
        for key in ('images', 'labels'):
            values = data[split][key].cpu().contiguous().numpy()
            facts[f'{split}_{key}_crc32'] = zlib.crc32(values)
    return facts


def source_code() -> str:
    """Return the code that runs: this file, or all cells that ran in the notebook."""
    if 'In' in globals():  # IPython's list of them
        return '\n\n# %%\n'.join(globals()['In'][1:])
    return pathlib.Path(__file__).read_text('utf-8')


def new_log_folder(log_dir: str) -> pathlib.Path:
    """Return log_dir/<UTC time>-<script>-<id>. Raises UserError where it cannot be made."""
    try:
        os.makedirs(log_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=log_dir).close()
    except OSError as error:
        raise UserError(f'--log-dir {log_dir} cannot be written to: {error.strerror}') from None
    stamp = time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())
    return pathlib.Path(log_dir, f'{stamp}-{NAME}-{os.urandom(3).hex()}')


def append_to_log(folder: pathlib.Path, code: str, run: dict):
    """Append a line to runs.jsonl. It is on the disk when this returns.

    The folder is made for the first run, with the code in code.py.
    """
    if not folder.exists():
        folder.mkdir()
        (folder / 'code.py').write_text(code, 'utf-8')
    # JSON has no NaN and no infinity: null stands for them.
    plain = json.loads(json.dumps(run), parse_constant=lambda name: None)
    with open(folder / 'runs.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(plain) + '\n')
        file.flush()
        os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------------
#                                       Trials: command line
# -------------------------------------------------------------------------------------------------

# In a notebook sys.argv belongs to the kernel. (__file__ is no sign: VS Code sets it in a cell.)
IN_NOTEBOOK = sys.argv[0].endswith('kernel_launcher.py')


def changed_hyp(changes: list[str]) -> dict:
    """Return a copy of hyp with changes such as 'opt.lr=9'. Raises UserError."""
    changed = default_hyp()
    known = flat_hyp(hyp)
    for change in changes:
        key, _, text = change.partition('=')
        *groups, name = key.split('.')
        if key not in known:
            prefix = f'{key.split(".")[0]}.'
            same_group = [other for other in known if other.startswith(prefix)]
            raise UserError(f'no {key}; there are {", ".join(same_group or known)}')
        try:
            value = json.loads(text.lower())  # lower case, so that True and False are read, too
        except ValueError:
            value = None
        if isinstance(known[key], str):
            value = text
        if isinstance(known[key], float) and type(value) is int:
            value = float(value)
        if type(value) is not type(known[key]):
            raise UserError(f'{change}: it must be a value like {known[key]}')
        branch = changed
        for group in groups:
            branch = branch[group]
        branch[name] = value
    check_hyp(changed)
    return changed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that a mistake is one line."""

    def error(self, message):
        raise UserError(f'{message} (--help lists the options)')


def parse_args(argv: list[str] | str | None) -> argparse.Namespace:
    """Return the options, checked. Raises UserError."""
    devices = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if devices:
        devices.insert(0, 'cuda')
    devices.append('cpu')
    parser = Parser(f'{NAME}.py', description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('--trials', metavar='N', type=int, default=5, help='rows of the table (default: 5)')
    add('--runs', metavar='N', type=int, default=1, help='trainings in a trial (default: 1)')
    add('--seed', metavar='S', type=int, help='random seed (default: drawn and printed)')
    add('--device', choices=devices, default=devices[0], help=f'default: {devices[0]}')
    add('--compile', action='store_true', help='compile the network: faster steps')
    add('--hyp', metavar='KEY=VALUE', nargs='+', action='extend', default=[], help='opt.lr=9 ...')
    add('--data-dir', metavar='DIR', default='cifar10', help='the images (default: cifar10)')
    add('--log-dir', metavar='DIR', default='logs', help='gets a folder (default: logs)')
    add('--quiet', action='store_true', help='do not evaluate between epochs')
    add('--save', metavar='FILE', help='save the network of the last run')
    add('--synthetic', action='store_true', help='random images in place of CIFAR-10')
    if IN_NOTEBOOK and argv is None:
        argv = []
    if isinstance(argv, str):
        argv = argv.split()
    args = parser.parse_args(argv)
    for name in ('trials', 'runs'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)}: it must be at least 1')
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(4), 'big')
    if args.seed < 0:
        raise UserError(f'--seed {args.seed}: it must be at least 0')
    if args.save is not None:
        folder = pathlib.Path(args.save).absolute().parent
        if not os.access(folder, os.W_OK) or os.path.isdir(args.save):
            raise UserError(f'--save {args.save}: no such file can be written')
    args.hyp = changed_hyp(args.hyp)
    return args


def warm_up(data: dict, hyp: dict, device: torch.device, net=None, step=None):
    """Make short runs, so that no kernel is chosen or compiled in a timed one.

    They train on two batches, so that an epoch is two steps: the whitening bias may be frozen
    within an epoch. They evaluate all test images, so that the smaller last batch occurs.
    On a CPU without --compile nothing depends on the shapes, and less is enough.
    """
    hyp = copy.deepcopy(hyp)
    opt = hyp['opt']
    opt['train_epochs'] = math.ceil(opt['train_epochs'])
    if opt['whiten_bias_epochs'] % 1:  # freeze it in the second of two steps, as both kinds occur
        opt['whiten_bias_epochs'] = math.floor(opt['whiten_bias_epochs']) + 0.5
    n_test = len(data['test']['labels'])
    repeats = 10  # then a GPU's times have settled
    if device.type == 'cpu':
        repeats = 1
        if step is None:
            n_test = EVAL_BATCH['cpu']
            opt['batch_size'] = min(128, opt['batch_size'])
    few = {}
    for split, n in (('train', 2 * opt['batch_size']), ('test', n_test)):
        few[split] = {
            'images': data[split]['images'][:n],
            'labels': data[split]['labels'][:n],
            'classes': data[split]['classes'],
        }
    for _ in range(repeats):
        train(few, 0, hyp, device, net, quiet=True, step=step)


def run_trials(args: argparse.Namespace, runs: list[dict]):
    """Make, print and log all runs, and append their records to runs. Raises UserError."""
    hyp = args.hyp
    if args.synthetic:
        data_name = 'synthetic'
        data = synthetic_data(args.device)
    else:
        data_name = args.data_dir
        data = load_data(args.data_dir, args.device)
    check_batch_size(data, hyp)
    device = data['train']['images'].device
    code = source_code()
    folder = new_log_folder(args.log_dir)

    print(f'{NAME} on {device}, seed {args.seed}, data: {data_name}')
    if device.type == 'cpu':
        print('Without a GPU an epoch takes minutes')
    print('Warming up', flush=True)
    start = time.perf_counter()
    net = None
    step = None
    try:
        if args.compile:
            net = make_net(hyp, device, len(data['train']['classes']))
            step = compile_step(net)
        warm_up(data, hyp, device, net, step)
    except Exception:
        if args.compile:
            print(f'{NAME}: --compile failed; it works without. PyTorch says:', file=sys.stderr)
        raise
    warmup_seconds = time.perf_counter() - start
    facts = {
        'script': NAME,
        'sha256': hashlib.sha256(code.encode()).hexdigest(),
        'data': data_facts(data, data_name),
        'compile': args.compile,
        'warmup_seconds': warmup_seconds,
        'base_seed': args.seed,
    }

    progress = Progress(args.trials * args.runs, math.ceil(hyp['opt']['train_epochs']))
    on_epoch = None if args.quiet else progress.end_epoch
    try:
        for trial, number in itertools.product(range(1, args.trials + 1), range(1, args.runs + 1)):
            progress.begin_run(trial, number)
            seeds = np.random.SeedSequence([args.seed, trial, number])
            seed = int(seeds.generate_state(1)[0])
            record, net = train(data, seed, hyp, device, net, args.quiet, on_epoch, step)
            run = {**facts, 'trial': trial, 'run': number, **record}
            append_to_log(folder, code, run)
            runs.append(run)
            progress.end_run(record)
            if args.save is not None:
                content = {'script': NAME, 'hyp': hyp, 'classes': data['train']['classes']}
                torch.save({**content, 'state_dict': net.state_dict()}, args.save)
    finally:  # also after Ctrl-C and errors
        if runs:
            print_table(runs)
            print_machine(runs[-1])
            print(f'Log: {folder}', flush=True)


def main(argv: list[str] | str | None = None) -> list[dict]:
    """Run the command line, as main('--trials 1'). Returns the records of the finished runs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # not in a notebook
            stream.reconfigure(errors='replace')  # for names that a terminal cannot show
    runs = []
    status = 0
    try:
        run_trials(parse_args(argv), runs)
    except UserError as error:
        status = 2
        print(f'{NAME}: {error}', file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        print(f'{NAME}: stopped after {len(runs)} finished runs', file=sys.stderr)
    if status and not IN_NOTEBOOK:
        sys.exit(status)
    return runs


if __name__ == '__main__':
    main()
