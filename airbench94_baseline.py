"""airbench94, the baseline: CIFAR-10 in seconds on one GPU. Recipe: K. Jordan, arXiv:2404.00498.

    python airbench94_baseline.py                                five runs, one row each, and their table
    python airbench94_baseline.py --trials 5 --runs 25 --quiet   the report's protocol: 125 runs
    python airbench94_baseline.py --help                         every option, with examples

Or paste the whole file into one notebook cell. Needs Python 3.10, torch, torchvision, numpy; gets CIFAR-10.
Read it top to bottom: what follows `train` is tooling. The results, and how they were measured: README.md.
"""
NAME = 'airbench94_baseline'

import argparse, builtins, contextlib, datetime, functools, itertools, json, linecache, math, os
import pathlib, platform, re, secrets, shlex, shutil, sys, tempfile, time, zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

hyp = {  # `--hyp opt.lr=10` overrides one, `--recipe NAME` a named set
    'opt': {
        'train_epochs': 9.9,        # may be fractional
        'batch_size': 1024,
        'lr': 11.5,                 # per 1024 examples: the loss is a sum, so steps grow with the batch
        'momentum': 0.85,           # Nesterov
        'weight_decay': 0.0153,     # per 1024 examples, decoupled from lr
        'bias_scaler': 64.0,        # multiplies the lr (not the weight decay) of the BatchNorm biases
        'label_smoothing': 0.2,
        'whiten_bias_epochs': 3,    # the whitening bias trains for this many epochs, then freezes
    },
    'aug': {'flip': True, 'translate': 2},  # alternating mirror; random crop after padding by 2 pixels
    'net': {
        'widths': {'block1': 64, 'block2': 256, 'block3': 256},
        'batchnorm_momentum': 0.6,  # share of the OLD running statistic that is kept
        'scaling_factor': 1 / 9,    # multiplies the logits
        'tta_level': 2,             # test-time augmentation: 0 none, 1 mirror, 2 mirror and translate
    },
}
RECIPES = {'report': {}}  # name -> {'opt.lr': value, ...}, the differences from hyp

# ---------------------------------------- Loader ----------------------------------------

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)

def batch_flip_lr(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image [N, C, H, W] left to right, independently with probability 0.5."""
    mask = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(-1), images)

def batch_crop(images: torch.Tensor, size: int, offsets: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Crop images[index] of [N, C, H, W] at offsets[index], int64 [N, 2]: row and column of the first pixel.
    One gather from a view, no synchronization. Returns [len(index), C, size, size], channels_last."""
    channels = images.shape[1]
    rows = images.permute(0, 2, 3, 1).flatten(2)  # NHWC: a row of a crop is one contiguous piece
    windows = rows.unfold(1, size, 1).unfold(2, size * channels, channels)  # [n, y, x]: image n's crop there
    return windows[(index, *offsets[index].unbind(1))].unflatten(2, (size, channels)).permute(0, 3, 1, 2)

class CifarLoader:
    """Batches of normalized, augmented images and their labels, all made on the device.

    path: directory or dict of `load_data`. train: which split, and the default of drop_last and shuffle.
    aug: {'flip': bool, 'translate': pixels}. Yields images [B, 3, 32, 32], float16 on CUDA, else float32,
    channels_last, and int64 labels [B]. Draws flips, then per epoch offsets and permutation. images: [N, 3,
    32, 32] in [0, 1], not normalized. The next iteration takes newly assigned (not edited) images and labels,
    or raises ValueError where their lengths differ.
    The first `__iter__` fills proc_images; every epoch crops and mirrors a copy of all images.
    """

    def __init__(self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None, device=None):
        data = path if isinstance(path, dict) else load_data(path, device)
        split = data['train' if train else 'test']
        device = split['images'].device if device is None else torch.device(device)
        images = split['images'].to(device).permute(0, 3, 1, 2)  # channels_last
        self.images = images.to(image_dtype(device)).div_(255)
        self.labels = split['labels'].to(device)
        self.classes = split['classes']
        self.batch_size = batch_size
        self.aug = {'flip': False, 'translate': 0, **(aug or {})}
        if len(self.aug) > 2:
            raise ValueError(f"aug knows 'flip' and 'translate', not {list(self.aug)[2:]}")
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.epoch, self.proc_images, self.proc_source = 0, {}, None

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(images - mean) / std of each channel, for images [N, 3, H, W] in [0, 1]."""
        mean, std = (torch.tensor(v, dtype=images.dtype).view(3, 1, 1).to(images.device, non_blocking=True)
                     for v in (CIFAR_MEAN, CIFAR_STD))
        return (images - mean).div_(std)

    @torch.no_grad()
    def precompute(self):
        """Fill proc_images ('norm', with aug 'flip' and 'pad') from images, where that has not been done."""
        if len(self.images) != len(self.labels):
            raise ValueError(f'{len(self.images)} images but {len(self.labels)} labels')
        if self.proc_source is self.images:
            return
        self.proc_source, pad = self.images, self.aug['translate']
        images = self.normalize(self.images)
        self.proc_images = {'norm': images}
        if self.aug['flip']:
            images = self.proc_images['flip'] = batch_flip_lr(images)
        if pad:
            padded = F.pad(images, (pad,) * 4, 'reflect')
            self.proc_images['pad'] = padded.contiguous(memory_format=torch.channels_last)

    def __len__(self):
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        self.precompute()
        n, size, device = len(self.images), self.images.shape[-1], self.images.device
        images = self.proc_images.get('flip', self.proc_images['norm'])
        if 'pad' in self.proc_images:
            offsets = torch.randint(2 * self.aug['translate'] + 1, (n, 2), device=device)
            images = batch_crop(self.proc_images['pad'], size, offsets, torch.arange(n, device=device))
        if self.aug['flip'] and self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        order = torch.randperm(n, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order.split(self.batch_size)[:len(self)]:
            yield images[index], self.labels[index]

# ---------------------------------------- Network ----------------------------------------

def image_dtype(device: torch.device) -> torch.dtype:
    """dtype of images and weights; BatchNorm stays in float32."""
    return torch.float16 if device.type == 'cuda' else torch.float32

def autocast(device: torch.device):
    """bfloat16 autocast on a CPU that gains from it; on CUDA the weights themselves have half precision."""
    return torch.autocast('cpu', torch.bfloat16, enabled=device.type == 'cpu' and cpu_has_bfloat16())

class Mul(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor

class Conv(nn.Conv2d):
    """3x3 convolution without bias; its first in_channels filters start as the identity."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=3, padding='same', bias=False)

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[:self.in_channels])

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose scale stays 1. momentum: the share of the OLD statistic kept (PyTorch: of the new)."""

    def __init__(self, num_features, momentum):
        super().__init__(num_features, eps=1e-12, momentum=1 - momentum)
        self.weight.requires_grad = False

class ConvGroup(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2]."""

    def __init__(self, in_channels, out_channels, batchnorm_momentum):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = BatchNorm(out_channels, batchnorm_momentum)
        self.conv2 = Conv(out_channels, out_channels)
        self.norm2 = BatchNorm(out_channels, batchnorm_momentum)

    def forward(self, x):
        x = F.gelu(self.norm1(self.pool(self.conv1(x))))
        return F.gelu(self.norm2(self.conv2(x)))

def make_net(device: torch.device | str = 'cpu') -> nn.Sequential:
    """The network of hyp['net']: images [N, 3, 32, 32] -> logits [N, 10]. net[0] needs `init_whitening_conv`.
    The weights are drawn on the CPU, so that a seed gives the same ones on every device."""
    device, widths, momentum = torch.device(device), hyp['net']['widths'], hyp['net']['batchnorm_momentum']
    net = nn.Sequential(
        nn.Conv2d(3, 24, kernel_size=2),
        nn.GELU(),
        ConvGroup(24, widths['block1'], momentum),
        ConvGroup(widths['block1'], widths['block2'], momentum),
        ConvGroup(widths['block2'], widths['block3'], momentum),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(widths['block3'], 10, bias=False),
        Mul(hyp['net']['scaling_factor']),
    )
    net[0].weight.requires_grad = False
    nn.init.zeros_(net[0].bias)
    net.to(device, image_dtype(device), memory_format=torch.channels_last)
    for norm in (module for module in net.modules() if isinstance(module, BatchNorm)):
        norm.float()
    return net

@torch.no_grad()
def init_whitening_conv(layer: nn.Conv2d, train_images: torch.Tensor, eps: float = 5e-4):
    """Set weight [24, 3, 2, 2] to whiten the 2x2 patches of images [N, 3, H, W]: eigenvectors of their second
    moment by falling eigenvalue, over sqrt(eigenvalue + eps), and the negatives. Source: arXiv:2404.00498."""
    patches = train_images.float().unfold(2, 2, 1).unfold(3, 2, 1)  # a view: [N, 3, H - 1, W - 1, 2, 2]
    patches = patches.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches @ patches.T / patches.shape[1])
    filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.flip(0).reshape(-1, *layer.weight.shape[1:])
    layer.weight.copy_(torch.cat((filters, -filters)))

# ---------------------------------------- Optimizer ----------------------------------------

def make_optimizer(net: nn.Module) -> torch.optim.SGD:
    """Nesterov SGD: group 0 the BatchNorm biases, group 1 every other trainable parameter. Learning rates and
    weight decays are decoupled and per 1024 examples. Source: arXiv:2404.00498."""
    opt = hyp['opt']
    kilostep_scale = 1024 * (1 + 1 / (1 - opt['momentum']))
    lr = opt['lr'] / kilostep_scale
    lr_biases = lr * opt['bias_scaler']
    wd = opt['weight_decay'] * opt['batch_size'] / kilostep_scale
    biases = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' in name]  # no scales
    others = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' not in name]
    groups = [{'params': biases, 'lr': lr_biases, 'weight_decay': wd / lr_biases},
              {'params': others, 'lr': lr, 'weight_decay': wd / lr}]
    return torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True)

def lr_factor(step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by after `step` finished steps: 0.2, up to 1, down to 0.07."""
    warmup = int(0.23 * total_steps)
    rise, fall = step / max(warmup, 1), (step - warmup) / (total_steps - warmup)
    return 0.2 + 0.8 * rise if step < warmup else 1 - 0.93 * fall

class LookaheadState:
    """Slow average of the floating-point state of a network: parameters, the frozen ones too, and BatchNorm
    statistics. Source: Zhang et al. 2019, arXiv:1907.08610, with airbench94's rising decay."""

    def __init__(self, net: nn.Module):
        self.fast = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
        self.slow = [tensor.clone() for tensor in self.fast]

    @torch.no_grad()
    def update(self, decay: float):
        """slow <- decay x slow + (1 - decay) x fast, then fast (the network) <- slow."""
        torch._foreach_lerp_(self.slow, self.fast, 1 - decay)
        torch._foreach_copy_(self.fast, self.slow)

# ---------------------------------------- Evaluation ----------------------------------------

@torch.no_grad()
def infer(model: nn.Module, loader: CifarLoader, tta_level: int = 0) -> torch.Tensor:
    """float32 logits [N, 10] of the loader's images, in order, not augmented. tta_level 0: the image; 1: mean
    of it and its mirror; 2: half of that, a quarter each of the same one pixel up-left and down-right."""
    def mirror(x):
        return 0.5 * model(x) + 0.5 * model(x.flip(-1))

    def mirror_translate(x):
        padded = F.pad(x, (1,) * 4, 'reflect')
        shifted = (padded[:, :, i:i + x.shape[2], i:i + x.shape[3]] for i in (0, 2))
        up_left, down_right = (mirror(s.contiguous(memory_format=torch.channels_last)) for s in shifted)
        return 0.5 * mirror(x) + 0.5 * (0.5 * up_left + 0.5 * down_right)

    model.eval()
    loader.precompute()
    predict = (model, mirror, mirror_translate)[tta_level]
    images = loader.proc_images['norm']
    with autocast(images.device):
        return torch.cat([predict(batch).float() for batch in images.split(loader.batch_size)])

def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)

def evaluate(model: nn.Module, loader: CifarLoader, tta_level: int = 0) -> float:
    """Accuracy in [0, 1] of `infer` on the loader's labels."""
    return accuracy(infer(model, loader, tta_level), loader.labels)

# ---------------------------------------- Training ----------------------------------------

def now(device: torch.device) -> float:
    """Host seconds, when the device has finished all its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()

def train_step(net, optimizer, images, labels, label_smoothing):
    """Forward, backward, update. Returns the loss, summed over the batch in float32, and the logits."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device):
        logits = net(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction='sum')
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()

def train(data: dict, seed: int, device: torch.device | str | None = None, net: nn.Module | None = None,
          quiet: bool = False, on_epoch=None) -> tuple[dict, nn.Module]:
    """One run from scratch on the dict of `load_data`, under hyp. Returns its record and the trained network.

    net: of `make_net`, perhaps compiled: reset and trained in place of a new one. quiet: evaluate only at the
    end. on_epoch(row): called after each epoch but the last, off the clock. The record: README, runs.jsonl.
    Reseeds torch, leaves cuDNN's benchmark mode on; ValueError where the images do not fill a batch.
    """
    wall_start, opt = time.perf_counter(), hyp['opt']
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try cuDNN's kernels once, keep the fastest
    device = data['train']['images'].device if device is None else torch.device(device)
    torch.manual_seed(seed)
    fresh = make_net(device)
    net = fresh if net is None else net
    net.load_state_dict(fresh.state_dict())
    net[0].bias.requires_grad = True
    optimizer = make_optimizer(net)
    peak_lrs = [group['lr'] for group in optimizer.param_groups]
    torch.manual_seed(seed + 2 ** 32)  # a stream of its own: batches do not depend on the network's init
    start = now(device)
    train_loader = CifarLoader(data, train=True, batch_size=opt['batch_size'], aug=hyp['aug'], device=device)
    test_loader = CifarLoader(data, train=False, batch_size=2000, device=device)
    test_loader.precompute()  # once, on the clock, for all evaluations of the run
    init_whitening_conv(net[0], train_loader.normalize(train_loader.images[:5000]))
    lookahead = LookaheadState(net)
    total_steps = math.ceil(len(train_loader) * opt['train_epochs'])
    if not total_steps:
        raise ValueError(f"batch size {opt['batch_size']} is over {len(train_loader.images)} training images")
    seconds = now(device) - start
    step, rows = 0, []
    while step < total_steps:
        start = now(device)
        net.train()
        net[0].bias.requires_grad = len(rows) < opt['whiten_bias_epochs']
        for images, labels in train_loader:
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs):
                group['lr'] = peak_lr * lr_factor(step, total_steps)
            loss, logits = train_step(net, optimizer, images, labels, opt['label_smoothing'])
            step += 1
            if step % 5 == 0:
                lookahead.update(decay=0.95 ** 5 * (step / total_steps) ** 3)
            if step == total_steps:
                lookahead.update(decay=1.0)
                break
        eval_start = now(device)
        seconds += eval_start - start
        net[0].bias.requires_grad = False  # else a compiled network would compile evaluation twice
        test_acc = None if quiet else evaluate(net, test_loader)
        rows.append({'epoch': len(rows) + 1, 'train_acc': accuracy(logits, labels), 'test_acc': test_acc,
                     'train_loss': loss.item() / len(labels), 'clock_seconds': seconds,
                     'eval_seconds': now(device) - eval_start})
        if on_epoch and step < total_steps:
            on_epoch(rows[-1])
    start = now(device)
    logits = infer(net, test_loader, hyp['net']['tta_level'])
    seconds += now(device) - start
    record = {'seed': seed, 'epochs': rows, 'tta_acc': accuracy(logits, test_loader.labels),
              'clock_seconds': seconds, 'eval_seconds': sum(row['eval_seconds'] for row in rows),
              'wall_seconds': time.perf_counter() - wall_start}
    return record, net

# ---------------------------------------- Data files and machine ----------------------------------------

class UserError(Exception):
    """What the user can mend, in one line."""

def load_data(data_dir: str, device: torch.device | str | None = None) -> dict:
    """{'train': {'images': uint8 [N, 32, 32, 3], 'labels': int64 [N], 'classes': 10 names}, 'test': ...} from
    data_dir/train.pt and test.pt, which torchvision downloads where one is missing. Raises UserError."""
    paths = {split: os.path.join(data_dir, f'{split}.pt') for split in ('train', 'test')}
    if not all(map(os.path.exists, paths.values())):
        download(data_dir, paths)
    return {split: read_cache(path, device or pick_device('auto')) for split, path in paths.items()}

def read_cache(path: str, device: torch.device | str) -> dict:
    """A train.pt or test.pt that may be anybody's: no code in it is run, and its content is checked."""
    fault = 'cannot be read, is truncated, is not a torch file or holds pickled code'
    try:
        zipfile.ZipFile(path).close()  # else torch.load tries older formats
        cache = torch.load(path, map_location='cpu', weights_only=True)
        fault = "does not hold a dict of the tensors 'images' and 'labels' and the list 'classes'"
        images, labels, classes = map(dict(cache).__getitem__, ('images', 'labels', 'classes'))
        faults = {
            'has images other than uint8 [N, 32, 32, 3]': images.dtype != torch.uint8 or not len(images)
                or images.layout != torch.strided or images.shape[1:] != (32, 32, 3),
            'has labels other than an int64 from 0 to 9 for each image': labels.dtype != torch.int64
                or labels.shape != images.shape[:1] or not set(labels.tolist()) <= set(range(10)),
            'has classes other than 10 names': type(classes) is str or [*map(type, classes)] != [str] * 10}
        fault = next((text for text, found in faults.items() if found), None)
    except Exception as error:  # a damaged file fails anywhere, with any type
        if out_of_memory(error):
            raise
    if fault:
        raise UserError(f'{path} {fault}: delete it, and CIFAR-10 is downloaded again')
    return {'images': images.to(device), 'labels': labels.to(device), 'classes': classes}

def download(data_dir: str, paths: dict):
    """CIFAR-10 by torchvision, in a private folder from which whole files move to their paths."""
    print(f'No train.pt and test.pt in {data_dir} yet: getting CIFAR-10 (170 MB)', flush=True)
    try:
        os.makedirs(data_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.download-', dir=data_dir) as folder:
            from torchvision.datasets import CIFAR10  # here, as the import takes a second
            with contextlib.suppress(FileNotFoundError):  # an archive that the user put there
                shutil.copy(os.path.join(data_dir, CIFAR10.filename), folder)
            for split, path in paths.items():
                if not os.path.exists(path):
                    dataset = CIFAR10(folder, train=split == 'train', download=True)
                    torch.save({'images': torch.from_numpy(dataset.data), 'classes': dataset.classes,
                                'labels': torch.tensor(dataset.targets)}, os.path.join(folder, split))
                    os.replace(os.path.join(folder, split), path)
    except Exception as error:  # network, archive and disk fail in many ways
        raise UserError(
            f'CIFAR-10 could not be downloaded to {data_dir} ({error}): put train.pt and test.pt there, or '
            'cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html; or try --synthetic') from None
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(data_dir)  # goes through only where it is empty

def synthetic_data(device: torch.device | str, train: int = 50000, test: int = 10000) -> dict:
    """What `load_data` returns, made up: an image blends two of ten fixed patterns under noise; its label is
    the stronger one's, in about one image of eleven the weaker's."""
    rng, data = torch.Generator().manual_seed(94), {}
    patterns = 40 * F.interpolate(torch.randn(10, 3, 4, 4, generator=rng), 32, mode='bicubic')
    for split, n in (('train', train), ('test', test)):
        labels = torch.randint(10, (n,), generator=rng)
        others = (labels + torch.randint(1, 10, (n,), generator=rng)) % 10
        share = 0.45 + 0.55 * torch.rand(n, 1, 1, 1, generator=rng)
        images = torch.randint(64, 192, (n, 3, 32, 32), generator=rng, dtype=torch.uint8)
        for i in torch.arange(n).split(1000):  # in parts, to save memory
            blend = patterns[others[i]].lerp(patterns[labels[i]], share[i])
            images[i] = (images[i] + blend).clamp(0, 255).byte()
        data[split] = {'images': images.permute(0, 2, 3, 1).contiguous().to(device),
                       'labels': labels.to(device), 'classes': [f'pattern {i}' for i in range(10)]}
    return data

def proc(name: str) -> str:
    """Linux's /proc/name; empty on other systems."""
    path = pathlib.Path('/proc', name)
    return path.read_text() if path.exists() else ''

@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products; on others bfloat16 is slower than float32."""
    return bool(re.search('avx512_bf16|amx_bf16', proc('cpuinfo')))

def pick_device(name: str) -> torch.device:
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    known, count = re.fullmatch(r'cpu|cuda(:\d+)?', name), torch.cuda.device_count()
    if not known or name != 'cpu' and int(name[5:] or 0) >= count:
        raise UserError(f'--device {name}: choose auto, cpu, cuda or cuda:N; torch {torch.__version__} finds '
                        f'{count} CUDA devices here')
    return torch.device(name) if name == 'cpu' else torch.device('cuda', int(name[5:] or 0))

def environment(device: torch.device) -> dict:
    cpu = (re.findall(r'model name\s*: (.*)', proc('cpuinfo')) or [platform.machine()])[0]
    facts = {'device': f'{cpu} ({torch.get_num_threads()} threads)',
             'dtype': 'float32 under bfloat16 autocast' if cpu_has_bfloat16() else 'float32',
             'torch': torch.__version__, 'python': platform.python_version()}
    return facts if device.type == 'cpu' else {
        **facts, 'device': torch.cuda.get_device_name(device), 'dtype': 'float16', 'CUDA': torch.version.cuda,
        'cuDNN': torch.backends.cudnn.version()}

def warm_up(data: dict, device: torch.device, net: nn.Module | None, quiet: bool) -> float:
    """A few steps and evaluations of every kind in a run. Returns the seconds that a run should take."""
    opt, n = hyp['opt'], {split: len(data[split]['labels']) for split in data}
    few = {'train': min(n['train'], 2 * opt['batch_size']), 'test': min(n['test'], 2000 + n['test'] % 2000)}
    part = {split: {key: value[:few[split]] for key, value in data[split].items()} for split in data}
    next(iter(CifarLoader(data, batch_size=opt['batch_size'], aug=hyp['aug'])))  # at full size
    with overrides({'opt.train_epochs': 3.0, 'opt.whiten_bias_epochs': 1}):
        record, _ = train(part, 0, device, net, quiet=True)
    _, second, third = (row['clock_seconds'] for row in record['epochs'])
    epoch, tta = (third - second) / few['train'], (record['clock_seconds'] - third) / few['test']
    evaluations = 1 + (0 if quiet else opt['train_epochs'] / (1, 2, 6)[hyp['net']['tta_level']])  # views
    return opt['train_epochs'] * epoch * n['train'] + evaluations * tta * n['test']

def out_of_memory(error: Exception) -> bool:
    signs = 'out of memory|allocate memory|ALLOC_FAILED'
    return isinstance(error, MemoryError) or bool(re.search(signs, str(error)))

def explained(error: Exception, args: argparse.Namespace | None, state: dict) -> str | None:
    """One line on an error that the user can mend. args: the command line, None if the error is in it."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        device, kib = pick_device(args.device), re.findall(r'MemAvailable:\s*(\d+)', proc('meminfo'))
        free = ', '.join(f'{int(size) / 2**20:.2f} GiB free' for size in kib)
        with contextlib.suppress(RuntimeError, ValueError):  # no GPU, or one too full to tell
            free = f'{torch.cuda.mem_get_info(device)[0] / 2**30:.2f} GiB free'
        return f"out of memory ({device}, batch size {state['batch']}, {free}): try --hyp opt.batch_size=512"
    if args and args.compile and not state['begun']:
        return '--compile failed (needs a C++ compiler, on CUDA also Triton): ' + str(error).split('\n\n')[0]

# ---------------------------------------- Table ----------------------------------------

def t_quantile(p: float, df: int) -> float:
    """What Student's t with df degrees of freedom stays under with probability p >= 0.5, by bisection on
    atan(t / sqrt(df)), an angle with a density proportional to cos^(df - 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        area = scale * angle / 2 * (weights @ np.cos((nodes + 1) * angle / 2) ** (df - 1))
        low, high = (angle, high) if 0.5 + area < p else (low, angle)
    return math.tan(low) * math.sqrt(df)

def diverged(runs: list) -> list[bool]:
    """Whose loss was not finite (None in a log) or, of three or more, is 10 points under the median."""
    floor = np.median([run['tta_acc'] for run in runs]) - 0.1 if len(runs) >= 3 else 0
    losses = [np.array([row['train_loss'] for row in run['epochs']], dtype=float) for run in runs]
    return [run['tta_acc'] < floor or not np.isfinite(loss).all() for run, loss in zip(runs, losses)]

def duration(seconds: float, digits: int = 3) -> str:
    minutes, seconds = divmod(round(seconds, digits), 60)
    return f'{int(minutes)}m {seconds:0{digits + 3 if digits else 2}.{digits}f}s'

def percent(accuracy: float | None) -> str:
    return '-' if accuracy is None else f'{100 * accuracy:.2f}%'

def table(runs: list, runs_per_trial: int, target: float) -> str:
    """The report's table. Diverged runs count in every figure, and are named below it."""
    line, runtimes, bad = '{:<10}{:<14}{:<12}{:<19}{:<7} {}'.format, [], diverged(runs)
    lines = [line('Trial', 'Runtime', 'Clock/run', 'Accuracy   Std', f'>={target:g}%', 'Diverged')]
    for trial in [*sorted({run['trial'] for run in runs}), 'Average']:
        members = [i for i, run in enumerate(runs) if trial in (run['trial'], 'Average')]
        n, accuracies = len(members), np.array([100 * runs[i]['tta_acc'] for i in members])
        accuracy, std = f'{accuracies.mean():.2f}%', accuracies.std(ddof=1) if n > 1 else None
        clock, runtime = (sum(runs[i][f'{kind}_seconds'] for i in members) for kind in ('clock', 'wall'))
        if trial == 'Average':
            half_width = '-' if std is None else f'{t_quantile(0.975, n - 1) * std / math.sqrt(n):.2f}'
            accuracy += f" +- {half_width} (95% CI over {n} run{'s' * (n > 1)})   "
            runtime = np.mean(runtimes) if runtimes else None
        else:  # a stopped trial's runtime stays out of the average
            accuracy = f"{accuracy:<11}{'-' if std is None else f'{std:.2f}'}"
            runtimes += [runtime] * (n == runs_per_trial)
            trial = trial if n == runs_per_trial else f'{trial} ({n}/{runs_per_trial})'
        lines.append(line(trial, '-' if runtime is None else duration(runtime), f'{clock / n:.3f}s', accuracy,
                          f'{sum(accuracies.round(6) >= target)}/{n}', f'{sum(bad[i] for i in members)}/{n}'))
    return '\n'.join(lines + [f"Diverged: trial {run['trial']} run {run['run']}, {percent(run['tta_acc'])}"
                              for run, is_bad in zip(runs, bad) if is_bad])

# ---------------------------------------- Command line ----------------------------------------

LIMITS = {  # the type and the range, ends included, of every hyperparameter
    'opt.train_epochs': (0.001, 1e5), 'opt.batch_size': (1, 10**6), 'opt.lr': (1e-9, 1e9),
    'opt.momentum': (1e-6, 0.9999), 'opt.weight_decay': (0.0, 100.0), 'opt.bias_scaler': (1e-6, 1e6),
    'opt.label_smoothing': (0.0, 1.0), 'opt.whiten_bias_epochs': (0, 10**5), 'aug.flip': (False, True),
    'aug.translate': (0, 31), 'net.widths.block1': (1, 8192), 'net.widths.block2': (1, 8192),
    'net.widths.block3': (1, 8192), 'net.batchnorm_momentum': (0.0, 1.0), 'net.scaling_factor': (1e-6, 1e6),
    'net.tta_level': (0, 2)}

@contextlib.contextmanager
def overrides(values: dict):
    """hyp with {'opt.lr': 10.0, ...} put in; afterwards these are as before."""
    undo = []
    try:
        for key, value in values.items():
            *groups, name = key.split('.')
            group = functools.reduce(dict.__getitem__, groups, hyp)
            undo.append((group, name, group[name]))
            group[name] = value
        yield
    finally:
        for group, name, value in reversed(undo):
            group[name] = value

def parse_hyp(pairs: list[str]) -> dict:
    """['opt.lr=10', ...] -> {'opt.lr': 10.0, ...}, type and range checked."""
    values = {}
    for key, _, text in (pair.partition('=') for pair in pairs):
        if key not in LIMITS:
            raise UserError(f"--hyp {key}: no such hyperparameter; there are {', '.join(LIMITS)}")
        low, high = LIMITS[key]
        try:
            values[key] = {'true': True, 'false': False}[text.lower()] if low is False else type(low)(text)
        except (KeyError, ValueError):
            values[key] = math.nan
        if not low <= values[key] <= high:
            raise UserError(f'--hyp {key}={text}: it must be {type(low).__name__}, from {low} to {high}')
    return values

def parse_args(argv: list[str]) -> argparse.Namespace:
    def fail(message):
        raise UserError(f'{message} (--help shows every option)')
    parser = argparse.ArgumentParser(
        f'{NAME}.py', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train CIFAR-10 networks and print runtime and accuracy.', epilog=f"""examples:
  python {NAME}.py --trials 5 --runs 25 --quiet           the report's protocol
  python {NAME}.py --hyp opt.lr=10 net.widths.block1=32   other hyperparameters""")
    parser.error = fail
    add = parser.add_argument
    add('--trials', metavar='N', type=int, default=5, help='rows of the table (5)')
    add('--runs', metavar='N', type=int, default=1, help='trainings per trial (1); in the report 25')
    add('--seed', metavar='S', type=int, help='seed of all runs (drawn and printed)')
    add('--device', metavar='D', default='auto', help='cuda, cuda:1, cpu, or auto: CUDA where it is (auto)')
    add('--compile', action='store_true', help='torch.compile the network')
    add('--hyp', metavar='KEY=VALUE', nargs='+', action='extend', default=[], help='other hyperparameters')
    add('--recipe', choices=list(RECIPES), default='report', help='a named set of hyperparameters (report)')
    add('--data-dir', metavar='DIR', default='cifar10', help='has train.pt, test.pt; or gets them (cifar10)')
    add('--log-dir', metavar='DIR', default='logs', help='gets a folder per experiment (logs)')
    add('--target', metavar='PCT', type=float, default=94.0, help='accuracy in percent to count from (94)')
    add('--quiet', action='store_true', help='one row per run: no evaluation after each epoch')
    add('--synthetic', action='store_true', help='generated images in place of CIFAR-10')
    args = parser.parse_args(argv)
    for name, low, high in ('trials', 1, 10**9), ('runs', 1, 10**9), ('seed', 0, 2**64), ('target', 0, 100):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f'--{name} {value}: it must be from {low} to {high}')
    return args

def write_log(folder: str, name: str, text: str):
    """Append text, and be sure that it is on the disk."""
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), 'a', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f'cannot write {os.path.join(folder, name)}: {error.strerror}') from None

def experiment(args: argparse.Namespace, argv: list[str], runs: list, state: dict):
    """Make all runs; append their records to runs and to the log; print rows and table. state is for main."""
    device, say = pick_device(args.device), functools.partial(print, flush=True)
    line = '{:>5} {:>4} {:>6} {:>11} {:>10} {:>9} {:>9} {:>11} {:>10}'.format
    epochs, state['batch'] = hyp['opt']['train_epochs'], hyp['opt']['batch_size']
    data = synthetic_data(device) if args.synthetic else load_data(args.data_dir, device)
    n_train, n_test = (len(data[split]['labels']) for split in ('train', 'test'))
    if state['batch'] > n_train:
        raise UserError(f"opt.batch_size={state['batch']} is over the {n_train} training images")
    source = 'synthetic images' if args.synthetic else args.data_dir
    seed, n_runs = secrets.randbits(32) if args.seed is None else args.seed, args.trials * args.runs
    title = f'{NAME}, recipe {args.recipe}, {source} ({n_train} to train on, {n_test} to test), seed {seed}'
    machine, utc = environment(device), datetime.datetime.now(datetime.timezone.utc)
    folder = os.path.join(args.log_dir, f'{utc:%Y%m%dT%H%M%SZ}-{NAME}-{secrets.token_hex(3)}')
    try:
        write_log(folder, 'code.py', ''.join(linecache.getlines(main.__code__.co_filename)))
        write_log(folder, 'experiment.json', json.dumps({
            'schema': 1, 'script': NAME, 'command': [f'{NAME}.py', *argv], 'started': utc.isoformat(),
            'options': vars(args), 'recipe': args.recipe, 'hyp': hyp, 'seed': seed, 'data': source,
            'train_images': n_train, 'test_images': n_test, 'environment': machine}, indent=1))
        say(title, 'Warming up', sep='\n')
        start, net = time.perf_counter(), make_net(device) if args.compile else None
        if args.compile:
            torch.compiler.reset()  # forget what an earlier call in this process compiled
            net.compile(dynamic=False)
        seconds = warm_up(data, device, net, args.quiet)
        machine['warm-up'] = duration(time.perf_counter() - start)
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        else:
            one, whole, short = (duration(seconds * factor, 0) for factor in (1, n_runs, 1 / epochs))
            say(f"No GPU in use: on {machine['device']} a run takes about {one}, the whole command {whole}. "
                f"Shorter: python {shlex.join([f'{NAME}.py', *argv])} --trials 1 --runs 1 "
                f'--hyp opt.train_epochs=1, about {short}.')
        say(line('trial', 'run', 'epoch', 'train loss', 'train acc', 'test acc', 'tta acc', 'clock', 'left'))
        state['begun'], start = True, time.perf_counter()
        def show(row, clock_seconds, tta_acc=''):
            done = len(runs) + (0 if tta_acc else min(1, row['epoch'] / epochs))
            left = duration((time.perf_counter() - start) * (n_runs / done - 1), 0)
            loss = f"{row['train_loss']:.4f}" if math.isfinite(row['train_loss']) else 'diverged'
            say(line(trial, run, row['epoch'], loss, percent(row['train_acc']), percent(row['test_acc']),
                     tta_acc, f'{clock_seconds:.3f}s', left))
        for trial, run in itertools.product(range(1, args.trials + 1), range(1, args.runs + 1)):
            run_seed = int(np.random.SeedSequence([seed, trial, run]).generate_state(1)[0])
            on_epoch = None if args.quiet else lambda row: show(row, row['clock_seconds'])
            record, _ = train(data, run_seed, device, net, args.quiet, on_epoch)
            text = json.dumps({'trial': trial, 'run': run, 'data': source, **record})
            runs.append(json.loads(text, parse_constant=lambda name: None))  # NaN, Infinity -> null
            write_log(folder, 'runs.jsonl', json.dumps(runs[-1]) + '\n')
            show(record['epochs'][-1], record['clock_seconds'], percent(record['tta_acc']))
    finally:
        if device.type == 'cuda':
            machine['peak memory'] = f'{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB'
        if runs:
            facts = ', '.join(f'{name} {fact}' for name, fact in machine.items())
            say('', title, table(runs, args.runs, args.target), facts, f'Log: {folder}', sep='\n')
        else:
            shutil.rmtree(folder, ignore_errors=True)

def main(argv: list[str] | None = None) -> list[dict]:
    """The command line: argv, by default the process's own, in a notebook none. Returns the finished runs.
    What the user can mend is one printed line; it ends the process, unless that is a notebook, with status 2
    if it was found before the first run, else with 1. Ctrl-C: 130."""
    notebook, runs, args, state = hasattr(builtins, '__IPYTHON__'), [], None, {'begun': False}
    argv = ([] if notebook else sys.argv[1:]) if argv is None else argv
    try:
        args = parse_args(argv)
        with overrides({**RECIPES[args.recipe], **parse_hyp(args.hyp)}):
            experiment(args, argv, runs, state)
        return runs
    except KeyboardInterrupt:
        status, message = 130, f'stopped after {len(runs)} finished runs'
    except SystemExit:  # --help
        return runs
    except Exception as error:
        status, message = 1 if state['begun'] else 2, explained(error, args, state)
        if message is None:
            raise
    print(f"{NAME}: {' '.join(message.split())}", file=sys.stderr)
    if not notebook:
        sys.exit(status)
    return runs

if __name__ == '__main__':
    main(sys.argv[1:] if '__file__' in globals() else [])  # a pasted cell has no __file__, and others' argv
