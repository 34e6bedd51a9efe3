"""airbench94, the baseline: CIFAR-10 in seconds on one GPU, in one file or one notebook cell.

The recipe of Keller Jordan (arXiv:2404.00498: 94.01 %, n = 1000, 3.83 s on an A100), implemented
anew. On an H200 (torch 2.11, 40,000 / 10,000 of the training images, n = 25, std 0.13 to 0.14):
93.66 % in 1.67 s; compiled 93.66 % in 1.08 s; fast94, our own, compiled 93.68 % in 0.96 s.

    python airbench94_baseline.py                                five runs and their table
    python airbench94_baseline.py --compile --recipe fast94      the fastest
    python tests/bench run airbench94_baseline.py mine.py        is an edited copy better?
"""

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IN_NOTEBOOK = '__file__' not in globals()
NAME = 'airbench94_baseline' if IN_NOTEBOOK else pathlib.Path(__file__).stem

hyp = {
    'opt': {
        'train_epochs': 9.9,  # may be fractional
        'batch_size': 1024,
        'lr': 11.5,  # of a loss that is summed: twice the batch makes steps twice as long
        'momentum': 0.85,  # Nesterov
        'weight_decay': 0.0153,  # per 1024 examples, decoupled from the lr
        'bias_scaler': 64.0,  # multiplies the lr (not the weight decay) of the BatchNorm biases
        'label_smoothing': 0.2,
        'whiten_bias_epochs': 3,  # the whitening bias trains for this many epochs, then freezes
        'small_sizes': [],  # [16, 24]: epoch 1 on 16x16 images, 2 on 24x24, then 32x32 as tests are
    },
    'aug': {'flip': True, 'translate': 2},  # alternating mirror; crops after padding by 2 pixels
    'net': {
        'widths': {'block1': 64, 'block2': 256, 'block3': 256},
        'batchnorm_momentum': 0.6,  # share of the OLD running statistic that is kept
        'scaling_factor': 1 / 9,  # multiplies the logits
        'tta_level': 2,  # test-time augmentation: 0 none, 1 mirror, 2 mirror and shift
        'tta_share': 1.0,  # share of the test images that get it, the least certain first
    },
}
RECIPES = {'report': {}}  # name -> differences from hyp; fast94: smaller images first, less TTA
RECIPES['fast94'] = {'opt.small_sizes': [24] * 5, 'opt.train_epochs': 10.9, 'net.tta_share': 0.2}

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DTYPE = {'cuda': torch.float16, 'cpu': torch.float32}  # of images and weights, but for BatchNorm
EVAL_BATCH = {'cuda': 2000, 'cpu': 500}  # what keeps a GPU busy, and what fits a CPU's cache
CAPTURE_STREAM = functools.cache(torch.cuda.Stream)  # one for each GPU: each takes memory
CPU_INFO = pathlib.Path('/proc/cpuinfo').read_text() if sys.platform == 'linux' else ''
CPU_NAME = (re.findall(r'model name\s*: (.*)', CPU_INFO) or ['CPU'])[0]
CPU_HAS_BFLOAT16 = re.search('avx512_bf16|amx_bf16', CPU_INFO) is not None


# ---------------------------------------- Data ----------------------------------------
class UserError(ValueError):
    """What the user can mend, in one line."""


def read_split(path: pathlib.Path, device: torch.device | str) -> dict:
    """A train.pt or test.pt, which may be anybody's: no code in it is run, all of it is checked."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no sums or sizes
            entries, size = archive.infolist(), path.stat().st_size
            has_folder = any(entry.external_attr & 0x10 for entry in entries)  # torch reads no byte
            if has_folder or sum(entry.file_size for entry in entries) > size or archive.testzip():
                raise ValueError('its checksums or sizes are wrong')
        content = torch.load(path, map_location='cpu', weights_only=True)
        # numpy() raises for all but plain tensors in memory.
        images, labels = (torch.from_numpy(content[key].numpy()) for key in ('images', 'labels'))
        classes = list(map(str, content['classes']))
        if images.dtype != torch.uint8 or images.shape[1:] != (32, 32, 3) or images.numel() > size:
            raise ValueError(f'not uint8 [N, 32, 32, 3]: images {images.dtype} {images.shape}')
        labels_fit = labels.shape == images.shape[:1] and not labels.is_floating_point()
        if not labels_fit or labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f'labels are not [{len(images)}] integers below {len(classes)}')
    except Exception as error:  # a damaged file fails anywhere, with any type
        reason = f'no {error}' if isinstance(error, KeyError) else str(error).split('\n')[0]
        advice = 'If it is not your own, delete it, and CIFAR-10 is downloaded again'
        raise UserError(f'{path}: {reason}. {advice}') from None
    return {'images': images.to(device), 'labels': labels.long().to(device), 'classes': classes}


def download(data_dir: pathlib.Path, missing: list[str]):
    """Write the missing splits. Only whole and checked files reach data_dir. Raises UserError."""
    print(f'No {" or ".join(missing)} in {data_dir}: getting CIFAR-10 (170 MB)', flush=True)
    try:
        from torchvision.datasets import CIFAR10  # here, as the import takes a second

        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.download-', dir=data_dir) as folder:
            root = data_dir if (data_dir / CIFAR10.filename).exists() else folder
            for name in missing:
                split = CIFAR10(root, train=name == 'train.pt', download=True)
                images, labels = torch.from_numpy(split.data), torch.tensor(split.targets)
                file = pathlib.Path(folder, name)
                torch.save({'images': images, 'labels': labels, 'classes': split.classes}, file)
                read_split(file, 'cpu')  # torch 2.4 hides a full disk
                file.replace(data_dir / name)
    except Exception as error:  # network, archive and disk fail in many ways
        reason = str(error).split('\n')[0]
        files = 'train.pt and test.pt or cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz)'
        raise UserError(f'{reason}. Put {files} into {data_dir}, or use --synthetic') from None


def load_data(data_dir: str = 'cifar10', device: torch.device | str | None = None) -> dict:
    """{'train': {'images': uint8 [N, 32, 32, 3], 'labels': int64 [N], 'classes': list}, 'test': ..}
    of data_dir/train.pt and test.pt, downloaded where missing, on a GPU if there is one."""
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    folder = pathlib.Path(data_dir).absolute()
    missing = [name for name in ('train.pt', 'test.pt') if not (folder / name).exists()]
    if missing:
        download(folder, missing)
    return {split: read_split(folder / f'{split}.pt', device) for split in ('train', 'test')}


def synthetic_data(device: torch.device | str, train: int = 50000, test: int = 10000) -> dict:
    """What `load_data` returns, made up: each class has a pattern, often faint, under noise."""
    rng = torch.Generator().manual_seed(94)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=rng), 32, mode='bicubic')
    data = {}
    for split, n in (('train', train), ('test', test)):
        labels = torch.randint(10, (n,), generator=rng)
        contrast = 40 * torch.rand(n, 1, 1, 1, generator=rng)
        x = torch.randn(n, 3, 32, 32, generator=rng).mul_(40).addcmul_(patterns[labels], contrast)
        images = x.add_(128).clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous().to(device)
        data[split] = {'images': images, 'labels': labels.to(device), 'classes': list('abcdefghij')}
    return data


# ---------------------------------------- Loader ----------------------------------------
def batch_flip_lr(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image of [N, C, H, W] left to right, independently with probability 0.5."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def batch_crop(images, size: int, offsets, index) -> torch.Tensor:
    """Crop images[index] of [N, C, H, W] to size x size pixels, each at its own offset.
    offsets: int64 [N, 2], row and column of a crop's first pixel. Returns [len(index), C, size,
    size], channels_last. One gather from a view: no loop over offsets, no synchronization."""
    channels = images.shape[1]
    rows = images.permute(0, 2, 3, 1).flatten(2)  # NHWC, where a row of a crop is contiguous
    windows = rows.unfold(1, size, 1).unfold(2, size * channels, channels)  # [n, y, x]: that crop
    crops = windows[index, offsets[index, 0], offsets[index, 1]]
    return crops.unflatten(2, (size, channels)).permute(0, 3, 1, 2)


class CifarLoader:
    """Batches of normalized, augmented images and their labels, all made on the device.
    path: a directory or the dict of `load_data`. train: which split, and the default of drop_last
    and shuffle. aug: {'flip': bool, 'translate': pixels}. Yields images [B, 3, 32, 32] (channels
    last; float16 on CUDA, else float32) and int64 labels [B]. images: [N, 3, 32, 32] in [0, 1], not
    normalized. epoch: how many have begun. proc_images: computed once, in the first `__iter__`."""

    def __init__(
        self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None, device=None
    ):
        data = path if isinstance(path, dict) else load_data(path, device)
        split = data['train' if train else 'test']
        device = split['images'].device if device is None else torch.device(device)
        images = split['images'].to(device).permute(0, 3, 1, 2)  # a view that is channels_last
        self.images = images.to(DTYPE[device.type]).div_(255)
        self.labels = split['labels'].to(device)
        self.classes, self.batch_size = split['classes'], batch_size
        self.aug = {'flip': False, 'translate': 0, **(aug or {})}
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.epoch, self.proc_images = 0, {}

    @staticmethod
    def normalize(images: torch.Tensor) -> torch.Tensor:
        """(images - mean) / std of each channel, for images [N, 3, H, W] in [0, 1]."""
        stats = torch.tensor((CIFAR_MEAN, CIFAR_STD), dtype=images.dtype)
        mean, std = stats.to(images.device, non_blocking=True).view(2, 3, 1, 1)
        return (images - mean).div_(std)

    @torch.no_grad()
    def precompute(self):
        """Fill proc_images: 'norm', and with aug 'flip' and 'pad'. A second call does nothing."""
        if self.proc_images:
            return
        images = self.proc_images['norm'] = self.normalize(self.images)
        if self.aug['flip']:
            images = self.proc_images['flip'] = batch_flip_lr(images)
        if shift := self.aug['translate']:
            pad = F.pad(images, (shift,) * 4, 'reflect').to(memory_format=torch.channels_last)
            centre = pad[:, :, shift:-shift, shift:-shift]  # a view, in place of a second copy
            self.proc_images |= {'flip' if self.aug['flip'] else 'norm': centre, 'pad': pad}

    def __len__(self) -> int:
        n = len(self.images)
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def __iter__(self):
        self.precompute()
        n, size, device = len(self.images), self.images.shape[-1], self.images.device
        images = self.proc_images.get('flip', self.proc_images['norm'])
        if self.aug['translate']:
            offsets = torch.randint(2 * self.aug['translate'] + 1, (n, 2), device=device)
            every = torch.arange(n, device=device)
            images = batch_crop(self.proc_images['pad'], size, offsets, every)
        # A random half is mirrored already, and odd epochs mirror all: two epochs show both sides.
        if self.aug['flip'] and self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        order = torch.randperm(n, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order.split(self.batch_size)[: len(self)]:
            yield images[index], self.labels[index]


# ---------------------------------------- Network ----------------------------------------
class Conv(nn.Conv2d):
    """3x3, no bias. A new one passes its input on: filters start as the identity (1706.00388)."""

    def __init__(self, in_channels: int, out_channels: int, padding='same'):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=padding, bias=False)
        nn.init.dirac_(self.weight.data[:in_channels])


class BatchNorm(nn.BatchNorm2d):
    """Its scale stays 1. momentum: the share of the OLD statistic kept (PyTorch: of the new)."""

    def __init__(self, num_features: int, momentum: float):
        super().__init__(num_features, eps=1e-12, momentum=1 - momentum)
        self.weight.requires_grad = False
        self.num_batches_tracked = None  # it would be counted up in every step, for nobody


class ConvGroup(nn.Module):
    """[N, C, H, W] -> [N, out_channels, H // 2, W // 2]."""

    def __init__(self, in_channels: int, out_channels: int, batchnorm_momentum: float):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, padding=0)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = BatchNorm(out_channels, batchnorm_momentum)
        self.conv2 = Conv(out_channels, out_channels)
        self.norm2 = BatchNorm(out_channels, batchnorm_momentum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The pool never reads the last row and column of an odd-sized map: they are not computed.
        odd = x.shape[-1] % 2
        x = self.conv1(F.pad(x, (1, 1 - odd, 1, 1 - odd)))
        x = F.gelu(self.norm1(self.pool(x)))
        return F.gelu(self.norm2(self.conv2(x)))


class CifarNet(nn.Module):
    """Images [N, 3, 32, 32] or smaller -> logits [N, num_classes]. Call `init_whitening` first."""

    def __init__(self, hyp: dict, num_classes: int = 10):
        super().__init__()
        momentum = hyp['net']['batchnorm_momentum']
        self.scaling_factor = hyp['net']['scaling_factor']
        self.whiten = nn.Conv2d(3, 24, kernel_size=2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        sizes = [24, *hyp['net']['widths'].values()]
        groups = [ConvGroup(a, b, momentum) for a, b in itertools.pairwise(sizes)]
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(sizes[-1], num_classes, bias=False)

    @torch.no_grad()
    def init_whitening(self, train_images: torch.Tensor, eps: float = 5e-4):
        """Let the first layer decorrelate the pixels of 2x2 patches, so that SGD need not.
        Filters from normalized images [N, 3, H, W]: eigenvectors of the patches' second moment by
        falling eigenvalue, over sqrt(eigenvalue + eps), and their negatives (arXiv:2404.00498)."""
        patches = train_images.float().unfold(2, 2, 1).unfold(3, 2, 1)  # [N, 3, H-1, W-1, 2, 2]
        patches = patches.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
        eigenvalues, eigenvectors = torch.linalg.eigh(patches @ patches.T / patches.shape[1])
        filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.flip(0).reshape(-1, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, images: torch.Tensor, whiten_bias_grad: bool = True) -> torch.Tensor:
        # A flag of the call: a change of requires_grad would be compiled anew in every run.
        bias = self.whiten.bias if whiten_bias_grad else self.whiten.bias.detach()
        x = F.gelu(F.conv2d(images, self.whiten.weight, bias))
        x = self.groups(x)
        x = F.max_pool2d(x, x.shape[-1]).flatten(1)
        return self.head(x * self.scaling_factor)  # scales the logits: the head has no bias


def make_net(hyp: dict, device: torch.device | str = 'cpu', num_classes: int = 10) -> CifarNet:
    """A new network, drawn on the CPU: a seed gives the same weights on every device."""
    device = torch.device(device)
    net = CifarNet(hyp, num_classes)
    net.to(device, DTYPE[device.type], memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # its sums over a batch need more than half precision
    return net


# ---------------------------------------- Optimizer ----------------------------------------
def make_optimizer(net: nn.Module, hyp: dict) -> torch.optim.Optimizer:
    """Nesterov SGD on the BatchNorm biases (group 0) and all else that is trained (group 1).
    For another optimizer change this function alone. Source: arXiv:2404.00498."""
    opt = hyp['opt']
    # One gradient moves a weight by lr / (1 - momentum) in all; airbench94 divides by about that,
    # and by 1024 examples: the summed loss grows with the batch, and the decay is made to.
    kilostep_scale = 1024 * (1 + 1 / (1 - opt['momentum']))
    lr = opt['lr'] / kilostep_scale
    decay = opt['weight_decay'] * opt['batch_size'] / kilostep_scale
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = [norm.bias for norm in norms if norm.bias.requires_grad]
    others = [p for p in net.parameters() if p.requires_grad and not any(p is b for b in biases)]
    # BatchNorm's scales are fixed, so its biases alone shape the activations: they learn faster.
    # PyTorch multiplies the weight decay by the lr; divided by it here, each is tuned on its own.
    pairs = (biases, lr * opt['bias_scaler']), (others, lr)
    groups = [{'params': p, 'lr': rate, 'weight_decay': decay / rate} for p, rate in pairs]
    return torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True, fused=True)


def lr_factor(step: int, total_steps: int) -> float:
    """What the lrs are multiplied by after `step` steps: 0.2, up to 1, then down towards 0.07."""
    warmup = int(0.23 * total_steps)
    if step < warmup:
        return 0.2 + 0.8 * step / warmup
    return 1 - 0.93 * (step - warmup) / (total_steps - warmup)


class LookaheadState:
    """Slow average of a network's floating-point state (arXiv:1907.08610): SGD at a high lr jumps
    between the sides of a valley. The decay rises, as a slow average would delay the start."""

    def __init__(self, net: nn.Module):
        tensors = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
        dtypes = {tensor.dtype for tensor in tensors}  # foreach: one kernel for one dtype
        self.fast = [[tensor for tensor in tensors if tensor.dtype is dtype] for dtype in dtypes]
        self.slow = [[tensor.clone() for tensor in tensors] for tensors in self.fast]

    @torch.no_grad()
    def update(self, decay: float):
        """slow <- decay x slow + (1 - decay) x fast, then fast (the network) <- slow."""
        for slow, fast in zip(self.slow, self.fast, strict=True):
            torch._foreach_lerp_(slow, fast, 1 - decay)
            torch._foreach_copy_(fast, slow)


# ---------------------------------------- Evaluation ----------------------------------------
def autocast(device: torch.device) -> torch.autocast:
    """On a CPU that gains from it. On a GPU the weights themselves are in half precision."""
    return torch.autocast('cpu', torch.bfloat16, device.type == 'cpu' and CPU_HAS_BFLOAT16)


@torch.no_grad()
def infer(net, loader: CifarLoader, tta_level: int = 0, tta_share: float = 1.0) -> torch.Tensor:
    """float32 logits [N, num_classes] of the loader's images, in their order, not augmented.
    tta_level: 0 the image; 1 mean of it and its mirror; 2 half of that, a quarter each of the same
    one pixel up-left and down-right. tta_share: the part of the images that gets it, those whose
    two best logits are closest, in whole batches (no new shape to compile)."""
    net.eval()
    loader.precompute()

    def predict(images, level):
        logits = []
        for batch in images.split(loader.batch_size):
            views = [(1.0, batch)]  # with their weights
            if level >= 2:
                padded = F.pad(batch, (1,) * 4, 'reflect')
                up_left, down_right = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
                views = [(0.5, batch), (0.25, up_left), (0.25, down_right)]
            if level >= 1:
                views = [(w / 2, x) for w, view in views for x in (view, view.flip(-1))]
            views = [(w, x.contiguous(memory_format=torch.channels_last)) for w, x in views]
            logits.append(sum(w * net(x).float() for w, x in views))
        return torch.cat(logits)

    images = loader.proc_images['norm']
    with autocast(images.device):
        logits = predict(images, 0 if tta_share < 1 else tta_level)
        if tta_share < 1:
            best, second = logits.topk(2).values.unbind(1)
            count = math.ceil(tta_share * len(images) / loader.batch_size) * loader.batch_size
            unsure = (second - best).topk(min(count, len(images))).indices
            logits[unsure] = predict(images[unsure], tta_level)
    return logits


def evaluate(net, loader: CifarLoader, tta_level: int = 0, tta_share: float = 1.0) -> float:
    """Accuracy in [0, 1] of `infer` on the loader's labels."""
    classes = infer(net, loader, tta_level, tta_share).argmax(1)
    return (classes == loader.labels).double().mean().item()


# ---------------------------------------- Training ----------------------------------------
def now(device: torch.device) -> float:  # seconds, when the device has done all its work
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def loss_and_grads(net, images, targets, whiten_bias_grad: bool) -> tuple:
    """Forward and backward. Returns the summed loss, and the logits."""
    with autocast(images.device):
        logits = net(images, whiten_bias_grad)
    # Summed in float32: a sum in half precision overflows at large batches.
    loss = F.cross_entropy(logits.float(), targets, reduction='sum')
    loss.backward()
    return loss.detach(), logits.detach()


class StepGraphs:
    """`loss_and_grads` of a compiled network as CUDA graphs: the host launches a step at once, and
    the GPU never waits for it. Python in the network runs in the first two steps of a kind."""

    def __init__(self):
        self.recorded, self.pool = {}, None  # kind of step -> graph, inputs, outputs, gradients

    def __call__(self, net, images, targets, whiten_bias_grad: bool) -> tuple:
        """The loss and logits. Later steps write to their memory, and to the gradients'."""
        kind = images.shape, whiten_bias_grad
        if kind not in self.recorded:  # compiles, and lets cuDNN choose its kernels
            outputs = loss_and_grads(net, images, targets, whiten_bias_grad)
            self.recorded[kind] = None
            return outputs
        if self.recorded[kind] is None:
            graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), targets.clone())
            with torch.cuda.graph(graph, self.pool, CAPTURE_STREAM(images.device)):
                outputs = loss_and_grads(net, *inputs, whiten_bias_grad)
            grads = [parameter.grad for parameter in net.parameters()]
            self.recorded[kind], self.pool = (graph, inputs, outputs, grads), graph.pool()
        graph, inputs, outputs, grads = self.recorded[kind]
        torch._foreach_copy_(inputs, (images, targets))
        graph.replay()
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter.grad = grad
        return outputs


def pool_backward(grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):
    """The gradient of max-pooling without overlap: Inductor's own kernel is slow at its indices."""
    size = kernel_size[0]
    if stride not in ([], kernel_size) or any(padding) or grad.numel() * size**2 != x.numel():
        return NotImplemented
    grad = grad.as_strided(grad.shape, grad.stride())  # so that Inductor stores it: computed once
    pooled = (t[:, :, :, None, :, None] for t in (grad, indices))
    grad, indices = (t.expand(-1, -1, -1, size, -1, size).reshape(x.shape) for t in pooled)
    place = torch.arange(x[0, 0].numel(), device=x.device).view(x.shape[2:])
    grad = torch.where(indices == place, grad, grad.new_zeros(()))
    return grad.contiguous(memory_format=torch.channels_last)


def compile_net(net: nn.Module) -> nn.Module:
    """Compile in place, for all runs. On CUDA later steps write over what a step has returned."""
    from torch._inductor import compile_fx, decomposition  # here, as it takes a second

    # Half a plain net.compile()'s memory traffic: no atomics in pooling (PyTorch issue 195123) ...
    rules = dict(decomposition.select_decomp_table())
    rules[torch.ops.aten.max_pool2d_with_indices_backward.default] = pool_backward
    patches = {'realize_reads_threshold': 8, 'realize_opcount_threshold': 100}  # ... less stored
    backend = functools.partial(compile_fx.compile_fx, config_patches=patches, decompositions=rules)
    torch._dynamo.config.cache_size_limit = 256  # kinds of batches of all networks; over it: eager
    net.compile(backend=backend, dynamic=False)
    net.step_graphs = StepGraphs() if next(net.parameters()).is_cuda else loss_and_grads
    return net


def train_step(net, optimizer, images, targets, whiten_bias_grad=True) -> tuple:
    """Forward, backward, update. targets: float32 [B, num_classes]. Returns summed loss, logits."""
    optimizer.zero_grad(set_to_none=True)
    compute = getattr(net, 'step_graphs', loss_and_grads)  # made by compile_net
    loss, logits = compute(net, images, targets, whiten_bias_grad)
    optimizer.step()
    return loss, logits


class Training:
    """What the steps of one run need, made of the raw images. Raises UserError."""

    def __init__(self, data: dict, hyp: dict, net: nn.Module, optimizer, device: torch.device):
        self.opt, self.net, self.optimizer = hyp['opt'], net, optimizer
        self.loader = CifarLoader(data, True, self.opt['batch_size'], hyp['aug'], device=device)
        self.step, self.total_steps = 0, math.ceil(len(self.loader) * self.opt['train_epochs'])
        if self.total_steps < 1:
            raise UserError('opt.batch_size and opt.train_epochs leave no step to make')
        net.init_whitening(self.loader.normalize(self.loader.images[:5000]))
        self.lookahead = LookaheadState(net)
        factor = functools.partial(lr_factor, total_steps=self.total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # Row c is the smoothed label of class c: fewer kernels than cross_entropy's own smoothing.
        classes, smoothing = len(self.loader.classes), self.opt['label_smoothing']
        self.targets = torch.eye(classes, device=device) * (1 - smoothing) + smoothing / classes

    def run_epoch(self, epoch: int) -> torch.Tensor:
        """The steps of an epoch (0-based). Returns its last batch's loss and accuracy, [2]."""
        self.net.train()
        whiten_bias_grad = epoch < self.opt['whiten_bias_epochs']
        sizes = self.opt['small_sizes']
        for images, labels in itertools.islice(self.loader, self.total_steps - self.step):
            if epoch < len(sizes):
                images = F.interpolate(images, size=sizes[epoch], mode='bilinear', antialias=True)
            targets = self.targets[labels]
            loss, logits = train_step(self.net, self.optimizer, images, targets, whiten_bias_grad)
            self.scheduler.step()
            self.step += 1
            if self.step % 5 == 0:
                self.lookahead.update(decay=0.95**5 * (self.step / self.total_steps) ** 3)
        if self.step == self.total_steps:
            self.lookahead.update(decay=1.0)  # the network ends as the slow average
        correct = (logits.argmax(1) == labels).sum()
        return torch.stack((loss, correct)) / len(labels)


def flatten(hyp: dict, prefix: str = '') -> dict:  # {'opt': {'lr': 9.0}} -> {'opt.lr': 9.0}
    flat = {}
    for key, value in hyp.items():
        group = isinstance(value, dict)
        flat |= flatten(value, f'{prefix}{key}.') if group else {prefix + key: value}
    return flat


def train(data, seed, hyp=hyp, device=None, net=None, quiet=False, on_epoch=None) -> tuple:
    """One run from scratch on the dict of `load_data`. Returns its record (README) and network.
    net: of `make_net`, perhaps compiled, trained in place of a new one; its weights are drawn
    anew. quiet: evaluate only at the end. on_epoch(row) is called after each epoch but the last,
    off the clock. Reseeds torch. Raises UserError."""
    wall_start = time.perf_counter()
    device = data['train']['images'].device if device is None else torch.device(device)
    torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest kernel, found once
    torch.manual_seed(seed)
    new_net = make_net(hyp, device, len(data['train']['classes']))
    net = new_net if net is None else net
    net.load_state_dict(new_net.state_dict())
    optimizer = make_optimizer(net, hyp)
    torch.manual_seed(seed + 2**32)  # so batches do not depend on the number of weights
    rows, start = [], now(device)
    test_loader = CifarLoader(data, False, EVAL_BATCH[device.type], device=device)
    test_loader.precompute()
    training = Training(data, hyp, net, optimizer, device)
    seconds = now(device) - start
    while training.step < training.total_steps:
        start = now(device)
        results = training.run_epoch(len(rows))
        end = now(device)
        seconds += end - start
        train_loss, train_acc = results.tolist()
        row = {'epoch': len(rows) + 1, 'train_loss': train_loss, 'train_acc': train_acc}
        row['test_acc'] = None if quiet else evaluate(net, test_loader)
        row |= {'clock_seconds': seconds, 'eval_seconds': now(device) - end}
        rows.append(row)
        if on_epoch and training.step < training.total_steps:
            on_epoch(row)
    start = now(device)
    tta_acc = evaluate(net, test_loader, hyp['net']['tta_level'], hyp['net']['tta_share'])
    seconds += now(device) - start
    record = {'seed': seed, 'hyp': flatten(hyp), 'epochs': rows, 'clock_seconds': seconds}
    record |= {'tta_acc': tta_acc, 'eval_seconds': sum(row['eval_seconds'] for row in rows)}
    record |= {f'{split}_images': len(data[split]['labels']) for split in data}
    record |= {'classes': len(test_loader.classes), 'torch': str(torch.__version__)}
    record |= {'device': f'{CPU_NAME}, {torch.get_num_threads()} threads'}
    record |= {'dtype': 'bfloat16 autocast' if CPU_HAS_BFLOAT16 else 'float32'}
    if device.type == 'cuda':
        record |= {'device': torch.cuda.get_device_name(device), 'dtype': 'float16'}
        record['peak_bytes'] = torch.cuda.max_memory_allocated(device)
    record['wall_seconds'] = time.perf_counter() - wall_start
    return record, net


# ---------------------------------------- Trials ----------------------------------------
EPOCH_ROW = '{:>5} {:>4} {:>6} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9}'
TRIAL_ROW = '{!s:7} {:>12} {:>10}  {:16} {:>5} {:>7} {:>9}'


def duration(seconds: float, digits: int = 0) -> str:
    minutes, seconds = divmod(round(seconds, digits), 60)
    return f'{minutes:.0f}m {seconds:0{digits + 3 if digits else 2}.{digits}f}s'


def diverged(runs: list[dict]) -> list[dict]:
    """Runs whose loss is not finite, that end dead, or 10 points under the median (n >= 3)."""
    floor = np.median([run['tta_acc'] for run in runs]) - 0.1 if len(runs) >= 3 else -1

    def is_bad(run):
        losses = [row['train_loss'] for row in run['epochs']]
        dead = abs(losses[-1] - math.log(run['classes'])) < 1e-5
        return dead or run['tta_acc'] < floor - 1e-9 or not np.isfinite(losses).all()  # rounding

    return [*filter(is_bad, runs)]


def table(runs: list[dict], target: float) -> str:
    """The report's table: a row for each trial, then their average. target: in percent."""
    bad, trials = diverged(runs), {}
    for run in runs:
        trials.setdefault(run['trial'], []).append(run)
    if len(trials) > 1:
        trials['Average'] = runs
    head = 'Trial', 'Runtime', 'Clock/run', 'Accuracy +- s.e.', 'Std', f'>={target:g}%', 'Diverged'
    lines = [TRIAL_ROW.format(*head)]
    for name, some in trials.items():
        n, percent = len(some), np.array([100 * run['tta_acc'] for run in some])
        runtime = sum(x['wall_seconds'] for x in some) / len({x['trial'] for x in some})
        cells = [name, duration(runtime, 3), f'{np.mean([x["clock_seconds"] for x in some]):.3f}s']
        std = percent.std(ddof=1) if n > 1 else 0.0
        error, spread = (f' +- {std / math.sqrt(n):.2f}', f'{std:.2f}') if n > 1 else ('', '')
        cells += [f'{percent.mean():.2f}%{error}', spread]
        cells += [f'{sum(percent.round(6) >= target)}/{n}', f'{sum(x in bad for x in some)}/{n}']
        lines.append(TRIAL_ROW.format(*cells))
    lines += [f'Diverged: trial {x["trial"]} run {x["run"]}, {x["tta_acc"]:.2%}' for x in bad]
    return '\n'.join(lines)


class Runs(list):
    """The finished runs' records, and how the runs are shown while they are made."""

    n_runs, n_epochs, start = 0, 0, None  # start: of the first run

    def __repr__(self) -> str:
        return f'<{len(self)} finished runs>'

    def show_row(self, trial: int, run: int, row: dict, tta='', clock=None):
        done = len(self) + (0 if tta else row['epoch'] / self.n_epochs)  # runs; with tta in self
        left = (time.perf_counter() - self.start) * (self.n_runs / done - 1)
        clock = f'{clock or row["clock_seconds"]:.3f}s'
        test = '-' if row['test_acc'] is None else f'{row["test_acc"]:.2%}'
        loss = f'{row["train_loss"]:.4f}' if math.isfinite(row['train_loss']) else 'diverged'
        cells = row['epoch'], loss, f'{row["train_acc"]:.2%}', test, tta, clock, duration(left)
        print(EPOCH_ROW.format(trial, run, *cells), flush=True)


def warm_up(data: dict, hyp: dict, device: torch.device, net=None) -> float:
    """Make runs of one step per epoch, off the clock: all is compiled, kernels are chosen, a GPU is
    awake. Returns roughly the seconds of a whole run. Of the few test images here all get TTA."""
    short, test_batch, few = copy.deepcopy(hyp), EVAL_BATCH[device.type], {}
    short['opt']['train_epochs'] = max(2, hyp['opt']['train_epochs'])  # 2: to time a step
    if device.type == 'cpu' and net is None:  # no kernels to choose: be quick
        short['opt']['batch_size'] = min(128, hyp['opt']['batch_size'])
    n_test = test_batch + len(data['test']['labels']) % test_batch  # a whole batch, and the last
    for split, n in ('train', short['opt']['batch_size']), ('test', n_test):
        images, labels = data[split]['images'][:n], data[split]['labels'][:n]
        few[split] = {**data[split], 'images': images, 'labels': labels}
    for _ in range(20 if device.type == 'cuda' else 1):  # 20: a GPU's times have settled
        record, _ = train(few, 0, short, device, net, quiet=True)
    ends = [row['clock_seconds'] for row in record['epochs']]  # the first has the preparation, too
    step = (ends[-1] - ends[0]) / (len(ends) - 1)
    scale = {split: len(data[split]['labels']) / len(few[split]['labels']) for split in data}
    evaluation = (record['clock_seconds'] - ends[-1]) * (1 + 6 * hyp['net']['tta_share']) / 7
    return step * hyp['opt']['train_epochs'] * scale['train'] + evaluation * scale['test']


def changed_hyp(changes: list[str]) -> dict:
    """A copy of hyp with changes like 'opt.lr=9'. Raises UserError."""
    changed, present = copy.deepcopy(hyp), flatten(hyp)
    for change in changes:
        key, _, text = change.partition('=')
        if key not in present:
            raise UserError(f'no {key}: hyp has {", ".join(present)}; --help names the options')
        kind = type(present[key])
        try:
            value = json.loads(text.lower()) if kind in (bool, list) else kind(text)
        except ValueError:
            value = None
        if type(value) is not kind:
            raise UserError(f'{key}={text}: not of type {kind.__name__}, like {present[key]}')
        *groups, name = key.split('.')
        functools.reduce(dict.get, groups, changed)[name] = value  # changed['net']['widths'][..]
    return changed


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options; among them `changes`, those of --recipe and --hyp. Raises UserError."""
    parser = argparse.ArgumentParser(f'{NAME}.py', exit_on_error=False, allow_abbrev=False)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('--trials', metavar='N', type=int, default=5, help='rows of the table (5)')
    add('--runs', metavar='N', type=int, default=1, help='trainings in a trial (1)')
    add('--seed', metavar='S', type=int, help='of all runs (drawn and printed)')
    gpus = ['cuda', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
    devices = [*gpus, 'cpu', 'auto'] if torch.cuda.is_available() else ['cpu', 'auto']
    add('--device', choices=devices, default='auto', help='a GPU if there is one (auto)')
    add('--compile', action='store_true', help='compiled kernels; warms up longer')
    add('--recipe', choices=RECIPES, default='report', help='a set of changes to hyp (report)')
    add('--hyp', metavar='KEY=VALUE', nargs='+', action='extend', default=[], help='opt.lr=9 ...')
    add('--data-dir', metavar='DIR', default='cifar10', help='has or gets the images (cifar10)')
    add('--log-dir', metavar='DIR', default='logs', help='gets a folder per command (logs)')
    add('--target', metavar='PCT', type=float, default=94.0, help='percent to count from (94)')
    add('--quiet', action='store_true', help='no evaluation between epochs, for timings')
    add('--save', metavar='FILE', help='keep the network of the last run')
    add('--synthetic', action='store_true', help='made-up images, no download')
    args, unknown = parser.parse_known_args(argv)
    args.hyp += unknown  # no options: perhaps hyperparameters
    if min(args.trials, args.runs) < 1 or (args.seed or 0) < 0 or not 1 < args.target <= 100:
        raise UserError('--trials and --runs start at 1, --seed at 0; --target is in percent')
    if args.save and not os.access(pathlib.Path(args.save).absolute().parent, os.W_OK):
        raise UserError(f'--save {args.save}: its folder cannot be written to')
    args.device = devices[0] if args.device == 'auto' else args.device
    args.changes = [f'{key}={value}' for key, value in RECIPES[args.recipe].items()] + args.hyp
    return args


def run_trials(args: argparse.Namespace, runs: Runs):
    """Make all runs: show them, log them, add their records to runs. Raises UserError."""
    hyp = changed_hyp(args.changes)
    data = synthetic_data(args.device) if args.synthetic else load_data(args.data_dir, args.device)
    device, opt = data['train']['images'].device, hyp['opt']
    if opt['batch_size'] > len(data['train']['labels']) or not 0 < opt['train_epochs'] < math.inf:
        raise UserError('opt.batch_size must be at most the images, opt.train_epochs over 0')
    seed = int.from_bytes(os.urandom(4), 'big') if args.seed is None else args.seed
    cells = globals().get('In', [])[1:]  # of a notebook: all that ran
    code = '\n\n# %%\n'.join(cells) if IN_NOTEBOOK else pathlib.Path(__file__).read_text('utf-8')
    stamp = f'{time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())}-{NAME}-{os.urandom(3).hex()}'
    folder = pathlib.Path(args.log_dir, stamp)
    folder.mkdir(parents=True)
    (folder / 'code.py').write_text(code, 'utf-8')
    name = 'synthetic' if args.synthetic else args.data_dir
    options = ['--recipe', args.recipe, *args.hyp, *(['--compile'] if args.compile else [])]
    print(NAME, *options, '--seed', seed, f'\nWarming up on {device}, data: {name}', flush=True)
    start, net = time.perf_counter(), None
    if args.compile:
        net = compile_net(make_net(hyp, device, len(data['train']['classes'])))
    seconds = warm_up(data, hyp, device, net)
    facts = {'script': NAME, 'sha256': hashlib.sha256(code.encode()).hexdigest()}
    facts |= {'data': name, 'compile': args.compile, 'warmup_seconds': time.perf_counter() - start}
    todo = list(itertools.product(range(1, args.trials + 1), range(1, args.runs + 1)))
    spans = [*map(duration, (facts['warmup_seconds'], seconds, seconds * len(todo)))]
    print('Warmed up in {}; about {} a run, {} in all'.format(*spans))
    names = 'trial', 'run', 'epoch', 'loss', 'train', 'test', 'TTA', 'clock', 'left'
    print(EPOCH_ROW.format(*names), flush=True)
    runs.n_epochs, runs.n_runs, runs.start = opt['train_epochs'], len(todo), time.perf_counter()
    try:
        for trial, run in todo:
            run_seed = int(np.random.SeedSequence([seed, trial, run]).generate_state(1)[0])
            show = functools.partial(runs.show_row, trial, run)
            on_epoch = None if args.quiet else show
            record, net = train(data, run_seed, hyp, device, net, args.quiet, on_epoch)
            runs.append({**facts, 'trial': trial, 'run': run, **record})
            line = json.loads(json.dumps(runs[-1]), parse_constant=lambda name: None)  # no NaN
            with open(folder / 'runs.jsonl', 'a', encoding='utf-8') as file:
                file.write(json.dumps(line) + '\n')
                file.flush()
                os.fsync(file.fileno())  # on the disk before its row is seen
            show(record['epochs'][-1], f'{record["tta_acc"]:.2%}', record['clock_seconds'])
            if args.save:
                content = {'hyp': hyp, 'classes': data['train']['classes']}
                torch.save({**content, 'state_dict': net.state_dict()}, args.save)
    finally:
        if runs:
            where = '{device}, {dtype}, torch {torch}, warm-up '.format(**runs[-1]) + spans[0]
            if device.type == 'cuda':
                where += f', peak {runs[-1]["peak_bytes"] >> 20} MiB'
            print(f'\n{table(runs, args.target)}\n{where}\nLog: {folder}', flush=True)


def explain(error: Exception, hyp_given: bool) -> str | None:
    """A line on an error that the user can mend; None on others, which keep their traceback."""
    text = ' '.join(str(error).split())
    signs = 'out of memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine'
    if isinstance(error, (UserError, argparse.ArgumentError)):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f'{error.filename or "log or output"}: {error.strerror}'
    if isinstance(error, MemoryError) or re.search(signs, text):
        return f'out of memory; a smaller opt.batch_size or EVAL_BATCH needs less. {text[:200]}'
    if re.search('inline_container|StreamWriter|cannot be opened', text):
        return f'--save failed: {text[:200]}'
    if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
        return f'--compile failed: {text[:300]}'
    if hyp_given and isinstance(error, (RuntimeError, TypeError, ValueError, ArithmeticError)):
        return f'these hyperparameters fail: {type(error).__name__}: {text[:300]}'


def main(argv: list[str] | None = None) -> Runs:
    """The command line. Returns the finished runs. A failure ends the process (tests/README.md)."""
    runs, args = Runs(), None
    try:
        args = parse_args([] if IN_NOTEBOOK and argv is None else argv)
        run_trials(args, runs)
        return runs
    except SystemExit:  # --help
        return runs
    except KeyboardInterrupt:
        status, message = 130, f'stopped after {len(runs)} finished runs'
    except Exception as error:
        status = 2 if runs.start is None else 1
        if isinstance(error, BrokenPipeError):  # as of `head`: nor is there a last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = explain(error, bool(args and args.hyp) and status == 2)
        if message is None:
            raise
    print(f'{NAME}: {message}', file=sys.stderr)
    return runs if IN_NOTEBOOK else sys.exit(status)


if __name__ == '__main__':
    main()
