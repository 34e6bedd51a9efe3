"""airbench94, the baseline: CIFAR-10 in seconds on one GPU. Recipe: K. Jordan, arXiv:2404.00498.

    python airbench94_baseline.py                                             five runs and their table
    python airbench94_baseline.py --trials 5 --runs 25 --quiet                the report's protocol: 125 runs
    python airbench94_baseline.py --runs 5 --versus airbench94_modified.py    which is better?
    torchrun --nproc_per_node=8 airbench94_baseline.py --sweep opt.lr=9,12    which value is, on 8 GPUs

Or paste the whole file into a notebook cell. What follows `train` is tooling. README.md has the results.
"""
NAME = 'airbench94_baseline'
import argparse, builtins, collections, contextlib, datetime, difflib, functools, importlib.util, itertools
import json, linecache, math, os, pathlib, platform, re, shutil, signal, sys, tempfile, time, zipfile, zlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn

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
        'small_epochs': 0, 'small_size': 24,  # so many epochs first, on images scaled to this size
    },
    'aug': {'flip': True, 'translate': 2},  # alternating mirror; random crop after padding by 2 pixels
    'net': {
        'widths': {'block1': 64, 'block2': 256, 'block3': 256},
        'batchnorm_momentum': 0.6,  # share of the OLD running statistic that is kept
        'scaling_factor': 1 / 9,    # multiplies the logits
        'tta_level': 2, 'tta_share': 1.0,  # TTA: 0 none, 1 mirror, 2 also shift; for the least certain share
        'compile': False,           # train with the Engine (`--compile`)
    },
}
RECIPES = {'report': {}}  # name -> {'opt.lr': value, ...}, the differences from hyp

# ---------------------------------------- Loader ----------------------------------------
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

def batch_flip_lr(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image [N, C, H, W] left to right, independently with probability 0.5."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)

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
    or raises ValueError if they differ in number. The first `__iter__` fills proc_images."""
    def __init__(self, path, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None, device=None):
        split = (path if isinstance(path, dict) else load_data(path, device))['train' if train else 'test']
        device = split['images'].device if device is None else torch.device(device)
        images = split['images'].to(device).permute(0, 3, 1, 2)  # channels_last
        self.images = images.to(image_dtype(device)).div_(255)
        self.labels = split['labels'].to(device)
        self.classes, self.batch_size = split['classes'], batch_size
        self.aug = {'flip': False, 'translate': 0, **(aug or {})}
        if len(self.aug) > 2: raise ValueError(f"aug knows 'flip' and 'translate', not {list(self.aug)[2:]}")
        self.drop_last, self.shuffle = (train if flag is None else flag for flag in (drop_last, shuffle))
        self.epoch, self.proc_images, self.proc_source = 0, {}, None
    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(images - mean) / std of each channel, for images [N, 3, H, W] in [0, 1]."""
        stats = torch.tensor((CIFAR_MEAN, CIFAR_STD), dtype=images.dtype).to(images.device, non_blocking=True)
        return (images - stats[0].view(3, 1, 1)).div_(stats[1].view(3, 1, 1))
    @torch.no_grad()
    def precompute(self):
        """Fill proc_images ('norm', with aug 'flip' and 'pad') from images, where that has not been done."""
        if len(self.images) != len(self.labels):
            raise ValueError(f'{len(self.images)} images but {len(self.labels)} labels')
        if self.proc_source is self.images: return
        self.proc_source, pad = self.images, self.aug['translate']
        images = self.normalize(self.images)
        self.proc_images = {'norm': images}
        if self.aug['flip']: images = self.proc_images['flip'] = batch_flip_lr(images)
        if pad:
            padded = F.pad(images, (pad,) * 4, 'reflect')
            self.proc_images['pad'] = padded.contiguous(memory_format=torch.channels_last)
    def __len__(self):
        return (len(self.images) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size
    def __iter__(self):
        self.precompute()
        n, size, device = len(self.images), self.images.shape[-1], self.images.device
        images = self.proc_images.get('flip', self.proc_images['norm'])
        if 'pad' in self.proc_images:
            offsets = torch.randint(2 * self.aug['translate'] + 1, (n, 2), device=device)
            images = batch_crop(self.proc_images['pad'], size, offsets, torch.arange(n, device=device))
        if self.aug['flip'] and self.epoch % 2 == 1: images = images.flip(-1)
        self.epoch += 1
        order = torch.randperm(n, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order.split(self.batch_size)[:len(self)]: yield images[index], self.labels[index]

# ---------------------------------------- Network ----------------------------------------
def image_dtype(device: torch.device) -> torch.dtype:  # of the weights too; BatchNorm stays in float32
    return torch.float16 if device.type == 'cuda' else torch.float32
def autocast(device: torch.device):  # bfloat16 on a CPU that gains from it; on CUDA weights are half
    return torch.autocast('cpu', torch.bfloat16, enabled='bfloat16' in environment(device)['dtype'])

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
        nn.init.dirac_(self.weight.data[:in_channels])

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
        nn.Conv2d(3, 24, kernel_size=2), nn.GELU(),
        ConvGroup(24, widths['block1'], momentum),
        ConvGroup(widths['block1'], widths['block2'], momentum),
        ConvGroup(widths['block2'], widths['block3'], momentum),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),  # 3x3 in full-size images
        nn.Linear(widths['block3'], 10, bias=False), Mul(hyp['net']['scaling_factor']))
    net[0].weight.requires_grad = False
    nn.init.zeros_(net[0].bias)
    net.to(device, image_dtype(device), memory_format=torch.channels_last)
    return net.apply(lambda module: module.float() if isinstance(module, BatchNorm) else None)

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
    opt, kilostep_scale = hyp['opt'], 1024 * (1 + 1 / (1 - hyp['opt']['momentum']))
    lr, wd = opt['lr'] / kilostep_scale, opt['weight_decay'] * opt['batch_size'] / kilostep_scale
    lr_biases = lr * opt['bias_scaler']
    biases = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' in name]  # no scales
    others = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' not in name]
    groups = [{'params': biases, 'lr': lr_biases, 'weight_decay': wd / lr_biases},
              {'params': others, 'lr': lr, 'weight_decay': wd / lr}]
    return torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True, fused=True)

def lr_factor(step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by after `step` finished steps: 0.2, up to 1, down to 0.07."""
    warmup = int(0.23 * total_steps)
    rise, fall = step / max(warmup, 1), (step - warmup) / (total_steps - warmup)
    return 0.2 + 0.8 * rise if step < warmup else 1 - 0.93 * fall

class LookaheadState:
    """Slow average of the floating-point state of a network: parameters, the frozen ones too, and BatchNorm
    statistics. Source: Zhang et al. 2019, arXiv:1907.08610, with airbench94's rising decay."""
    def __init__(self, net: nn.Module):
        tensors = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
        dtypes = {tensor.dtype for tensor in tensors}  # foreach is one kernel for tensors of one dtype
        self.fast = [[tensor for tensor in tensors if tensor.dtype is dtype] for dtype in dtypes]
        self.slow = [[tensor.clone() for tensor in tensors] for tensors in self.fast]
    @torch.no_grad()
    def update(self, decay: float):
        """slow <- decay x slow + (1 - decay) x fast, then fast (the network) <- slow."""
        for slow, fast in zip(self.slow, self.fast):
            torch._foreach_lerp_(slow, fast, 1 - decay)
            torch._foreach_copy_(fast, slow)

# ---------------------------------------- Evaluation ----------------------------------------
@torch.no_grad()
def infer(model: nn.Module, loader: CifarLoader, tta_level: int = 0, tta_share: float = 1.0) -> torch.Tensor:
    """float32 logits [N, 10] of the loader's images, in order, not augmented. tta_level 0: the image; 1: mean
    of it and its mirror; 2: half of that, a quarter each of the same one pixel up-left and down-right.
    tta_share: part of the images that gets it, those whose two best logits are closest, in whole batches."""
    def predict(images, weights):  # weights of image, mirror, both up-left, both down-right
        for batch in images.split(loader.batch_size):
            padded = F.pad(batch, (1,) * 4, 'reflect')
            crops = batch, padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
            views = torch.cat([view for crop in crops for view in (crop, crop.flip(-1))][:len(weights)])
            with autocast(batch.device):
                outputs = model(views.contiguous(memory_format=torch.channels_last)).float()
            yield sum(map(torch.mul, outputs.chunk(len(weights)), weights))
    model.eval()
    loader.precompute()
    images, weights = loader.proc_images['norm'], [[1], [0.5] * 2, [0.25] * 2 + [0.125] * 4]
    if tta_share == 1: return torch.cat([*predict(images, weights[tta_level])])
    logits = torch.cat([*predict(images, weights[0])])
    batches = math.ceil(tta_share * len(images) / loader.batch_size)  # whole ones: no new shapes to compile
    unsure = logits.topk(2).values.diff()[:, 0].topk(min(batches * loader.batch_size, len(images))).indices
    logits[unsure] = torch.cat([*predict(images[unsure], weights[tta_level])])
    return logits

def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)
def evaluate(model: nn.Module, loader: CifarLoader, tta_level: int = 0) -> float:
    """Accuracy in [0, 1] of `infer` on the loader's labels."""
    return accuracy(infer(model, loader, tta_level), loader.labels)

# ---------------------------------------- Training ----------------------------------------
def now(device: torch.device) -> float:  # host seconds, when the device has finished all its work
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return time.perf_counter()

def summed_loss(net, images, labels, label_smoothing):
    """The loss, summed over the batch in float32, and the logits. It is what the Engine compiles."""
    logits = net(images)
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction='sum'), logits

def train_step(net, optimizer, images, labels, label_smoothing, loss_function=summed_loss):
    """Forward, backward, update. Returns the summed loss and the logits."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device):
        loss, logits = loss_function(net, images, labels, label_smoothing)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()

def train(data: dict, seed: int, device: torch.device | str | None = None, engine=None,
          quiet: bool = False, on_epoch=None) -> tuple[dict, nn.Module]:
    """One run from scratch on the dict of `load_data`, under hyp. Returns its record and the trained network.
    engine: an `Engine`, whose network is trained in place of a new one. quiet: evaluate only at the end.
    on_epoch(row): called after each epoch but the last, off the clock. The record: README, runs.jsonl.
    Reseeds torch, leaves cuDNN's benchmark mode on; UserError where the images do not fill a batch."""
    wall_start, opt = time.perf_counter(), hyp['opt']
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try cuDNN's kernels once, keep the fastest
    device = data['train']['images'].device if device is None else torch.device(device)
    torch.manual_seed(seed)
    net = make_net(device)
    optimizer, step_function = make_optimizer(net), train_step
    peak_lrs = [group['lr'] for group in optimizer.param_groups]
    if engine: net, optimizer, step_function = engine.reset(net)
    torch.manual_seed(seed + 2 ** 32)  # a stream of its own: batches do not depend on the network's init
    start = now(device)
    train_loader = CifarLoader(data, train=True, batch_size=opt['batch_size'], aug=hyp['aug'], device=device)
    test_loader = CifarLoader(data, False, 1000 if device.type == 'cuda' else 100, device=device)
    test_loader.precompute()  # once, on the clock, for all evaluations of the run
    init_whitening_conv(net[0], train_loader.normalize(train_loader.images[:5000]))
    lookahead = LookaheadState(net)
    step, rows, total_steps = 0, [], math.ceil(len(train_loader) * opt['train_epochs'])
    if not total_steps:
        raise UserError(f"opt.batch_size={opt['batch_size']} is over the {len(train_loader.images)} images")
    seconds = now(device) - start
    while step < total_steps:
        start = now(device)
        net.train()
        net[0].bias.requires_grad = len(rows) < opt['whiten_bias_epochs']
        for images, labels in train_loader:
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs):
                group['lr'] = peak_lr * lr_factor(step, total_steps)
            if len(rows) < opt['small_epochs']:
                images = F.interpolate(images, size=opt['small_size'], mode='bilinear', antialias=True)
            loss, logits = step_function(net, optimizer, images, labels, opt['label_smoothing'])
            step += 1
            if step % 5 == 0: lookahead.update(decay=0.95 ** 5 * (step / total_steps) ** 3)
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
        if on_epoch and step < total_steps: on_epoch(rows[-1])
    start = now(device)
    logits = infer(net, test_loader, hyp['net']['tta_level'], hyp['net']['tta_share'])
    seconds += now(device) - start
    return {'seed': seed, 'epochs': rows, 'tta_acc': accuracy(logits, test_loader.labels),
            'clock_seconds': seconds, 'eval_seconds': sum(row['eval_seconds'] for row in rows),
            'wall_seconds': time.perf_counter() - wall_start}, net

# ---------------------------------------- Engine: net.compile ----------------------------------------
class Engine:
    """A compiled network, its optimizer and the step that trains it, made once under the hyp of its runs, and
    reset for each. On CUDA the third step of each kind (size of the images, whitening bias trained or frozen)
    is captured as a CUDA graph, which later ones replay. A stream other than the default stays current."""
    def __init__(self, device: torch.device, **options):
        self.net, self.graphs, self.calls = make_net(device), {}, collections.Counter()
        self.optimizer, self.pool = make_optimizer(self.net), None
        torch._dynamo.config.cache_size_limit += 32  # kinds of batches; what is over it runs eager
        self.lrs = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        if device.type == 'cuda':
            torch.cuda.synchronize(device)  # the tensors above are ready; the default stream can't capture
            torch.cuda.current_stream(device).cuda_stream or torch.cuda.set_stream(torch.cuda.Stream(device))
            self.pool = torch.cuda.graph_pool_handle()
        for module in self.net.modules():  # on a CPU ATen's are faster than the compiler's
            if device.type == 'cpu' and isinstance(module, (nn.MaxPool2d, BatchNorm)):
                module.forward = torch.compiler.disable(module.forward)
        self.net.compile(dynamic=False, **options)  # for evaluation
        self.loss_function = torch.compile(summed_loss, dynamic=False, **options)
    def reset(self, net: nn.Module) -> tuple:
        """Network, optimizer and step of a new run: the same tensors, with net's weights and no momentum."""
        self.net.load_state_dict(net.state_dict())
        for state in self.optimizer.state.values(): state['momentum_buffer'].zero_()
        return self.net, self.optimizer, self.step
    def step(self, net, optimizer, images, labels, label_smoothing):
        """`train_step`. On CUDA the next step overwrites the results."""
        def make_step(*batch): return train_step(net, optimizer, *batch, label_smoothing, self.loss_function)
        for lr, group in zip(self.lrs, optimizer.param_groups):
            group['lr'] = lr.fill_(group['lr'])  # all but the batch that changes from step to step
        kind = images.shape, net[0].bias.requires_grad
        self.calls[kind] += 1
        if self.pool is None or self.calls[kind] < 3: return make_step(images, labels)  # compiles
        if self.calls[kind] == 3:
            graph, batch = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(images.device)):
                self.graphs[kind] = graph, batch, make_step(*batch)
        graph, batch, results = self.graphs[kind]
        for static, new in zip(batch, (images, labels)): static.copy_(new)
        graph.replay()
        return results

# ---------------------------------------- Data files and machine ----------------------------------------
class UserError(ValueError): """What the user can mend, in one line."""
def load_data(data_dir: str, device: torch.device | str | None = None) -> dict:
    """{'train': {'images': uint8 [N, 32, 32, 3], 'labels': int64 [N], 'classes': 10 names}, 'test': ...} from
    data_dir/train.pt and test.pt, which torchvision downloads where one is missing. Raises UserError."""
    paths = {split: os.path.join(data_dir, f'{split}.pt') for split in ('train', 'test')}
    if not all(map(os.path.exists, paths.values())): download(data_dir, paths)
    return {split: read_cache(path, device or pick_device('auto')) for split, path in paths.items()}
def read_cache(path: str, device: torch.device | str) -> dict:
    """A train.pt or test.pt that may be anybody's: no code in it is run, and its content is checked."""
    try:
        file = zipfile.ZipFile(path)  # torch.load checks no sums, leaves what has a folder's flag unfilled
        size = sum(math.inf if x.external_attr & 16 else x.file_size for x in file.infolist())
        cache = size > os.path.getsize(path) or file.testzip() or torch.load(path, 'cpu', weights_only=True)
        images, labels, classes = map(cache.get, ('images', 'labels', 'classes'))
        if ((images.dtype, images.shape[1:]) != (torch.uint8, (32, 32, 3)) or not len(labels)
                or (labels.dtype, labels.shape) != (torch.int64, images.shape[:1])
                or any(x.is_meta or x.nbytes > x.untyped_storage().nbytes() for x in (images, labels))
                or not set(labels.tolist()) <= set(range(10)) or [*map(type, [] + classes)] != [str] * 10):
            raise ValueError
    except Exception as error:  # a damaged file fails anywhere, with any type
        oom = re.search('^MemoryError|allocate memory', repr(error))
        raise MemoryError(f'{path}: {error}') if oom else UserError(
            f'{path} is damaged, holds pickled code or lacks images (uint8 [N, 32, 32, 3]), labels (int64 '
            '[N], 0 to 9) or 10 class names: delete it, and CIFAR-10 is downloaded again') from None
    return {'images': images.to(device), 'labels': labels.to(device), 'classes': classes}
def download(data_dir: str, paths: dict):  # by torchvision, in a private folder; whole files move to paths
    print(f'No train.pt and test.pt in {data_dir} yet: getting CIFAR-10 (170 MB)', flush=True)
    try:
        os.makedirs(data_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.download-', dir=data_dir) as folder:
            from torchvision.datasets import CIFAR10  # here, as the import takes a second
            with contextlib.suppress(FileNotFoundError):  # an archive that the user put there
                shutil.copy(os.path.join(data_dir, CIFAR10.filename), folder)
            for split in (split for split, path in paths.items() if not os.path.exists(path)):
                dataset, file = CIFAR10(folder, split == 'train', download=True), os.path.join(folder, split)
                torch.save({'images': torch.from_numpy(dataset.data), 'labels': torch.tensor(dataset.targets),
                            'classes': dataset.classes}, file)
                read_cache(file, 'cpu') and os.replace(file, paths[split])  # torch 2.4 hides a full disk
    except Exception as error:  # network, archive and disk fail in many ways
        raise UserError(
            f'CIFAR-10 could not be downloaded to {data_dir} ({error}): put train.pt and test.pt there, or '
            'cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html; or try --synthetic') from None
def synthetic_data(device: torch.device | str, train: int = 50000, test: int = 10000) -> dict:
    """What `load_data` returns, made up: each class has a pattern, in some images faint, under noise."""
    rng, data = torch.Generator().manual_seed(94), {}
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=rng), 32, mode='bicubic')
    for split, n in (('train', train), ('test', test)):
        labels, contrast = torch.randint(10, (n,), generator=rng), 40 * torch.rand(n, 1, 1, 1, generator=rng)
        images = torch.randn(n, 3, 32, 32, generator=rng).mul_(40).addcmul_(patterns[labels], contrast)
        images = images.add_(128).clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()
        data[split] = {'images': images.to(device), 'labels': labels.to(device), 'classes': [*'abcdefghij']}
    return data
def pick_device(name: str) -> torch.device:
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == 'cuda' else name  # torchrun: a GPU each
    if name not in ['cpu', *map('cuda:{}'.format, range(torch.cuda.device_count()))]:
        raise UserError(f'--device {name}: torch finds {torch.cuda.device_count()} CUDA devices and cpu')
    return torch.device(name)
@functools.cache
def environment(device: torch.device) -> dict:
    facts = {'torch': torch.__version__, 'python': platform.python_version()}
    if device.type == 'cuda':
        return {'device': torch.cuda.get_device_name(device), 'dtype': 'float16', 'CUDA': torch.version.cuda,
                'cuDNN': str(torch.backends.cudnn.version()), **facts}
    text = pathlib.Path('/proc/cpuinfo').read_text() if sys.platform == 'linux' else ''
    name = [*re.findall(r'model name\s*: (.*)', text), platform.machine()][0]
    return {'device': f'{name} ({torch.get_num_threads()} threads)', **facts,
            'dtype': 'float32' + ' under bfloat16 autocast' * bool(re.search('avx512_bf16|amx_bf16', text))}

# ---------------------------------------- Arms: what is compared ----------------------------------------
LIMITS = {int: (1, 10**9), float: (1e-9, 1e9), bool: (False, True), 'aug.translate': (0, 31),  # from, to
    'opt.momentum': (1e-6, 0.9999), 'opt.weight_decay': (0, 1e9), 'opt.label_smoothing': (0, 1),
    'opt.whiten_bias_epochs': (0, 1e9), 'opt.small_epochs': (0, 1e9), 'opt.small_size': (17, 1e3),
    'net.batchnorm_momentum': (0, 1), 'net.tta_level': (0, 2), 'net.tta_share': (1e-9, 1)}
Arm = collections.namedtuple('Arm', 'name script source hyp')  # hyp: {'opt.lr': 10.0, ...}, with every key
def flat(tree: dict, prefix: str = '') -> dict:  # {'opt': {'lr': 10.0}} -> {'opt.lr': 10.0}
    return {key: leaf for name, branch in tree.items() for key, leaf in (
        flat(branch, f'{prefix}{name}.') if isinstance(branch, dict) else {prefix + name: branch}).items()}
def overrides(values: dict, tree: dict = hyp) -> contextlib.ExitStack:  # a context with {'opt.lr': 10.0}
    with contextlib.ExitStack() as stack:
        for key, value in values.items():
            *groups, name = key.split('.')
            stack.enter_context(mock.patch.dict(functools.reduce(dict.get, groups, tree), {name: value}))
        return stack.pop_all()
def parse_hyp(pairs: dict, known: dict) -> dict:
    """{'opt.lr': '10', ...} -> {'opt.lr': 10.0, ...}, with keys and types of known, within LIMITS."""
    values = {}
    for key, text in pairs.items():
        if key not in known: raise UserError(f"{key}: no such hyperparameter; there are {', '.join(known)}")
        kind = type(known[key]) if isinstance(known[key], (int, float, str)) else float
        low, high = LIMITS.get(key, LIMITS[kind] if key in flat(hyp) else (-1e9, 1e9))
        with contextlib.suppress(KeyError, ValueError):
            values[key] = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
        if kind is not str and not low <= values.get(key, math.nan) <= high:
            raise UserError(f'{key}={text}: it must be {kind.__name__}, from {low:g} to {high:g}')
    return values
def make_arms(args: argparse.Namespace) -> list[Arm]:
    """This script, once for each combination of --sweep's values, then those of --versus; --hyp for all."""
    def pairs(texts): return {key: value for key, _, value in (text.partition('=') for text in texts)}
    sweeps = ([(key, value) for value in text.split(',')] for key, text in pairs(args.sweep).items())
    label = f'{NAME} {args.recipe}'.removesuffix(' report')
    own = main.__code__.co_filename, label, sys.modules[__name__], RECIPES[args.recipe]
    todo, arms = [(*own, dict(point)) for point in itertools.product(*sweeps)], []
    for stem, _, changes in (text.replace('.py:', ':').removesuffix('.py').partition(':')
                             for text in dict.fromkeys(args.versus)):
        try:
            spec = importlib.util.spec_from_file_location(f'versus_{len(sys.modules)}', f'{stem}.py')
            script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for torch.compile
            spec.loader.exec_module(script)
            script.train, script.hyp['opt']['batch_size'], json.dumps(script.hyp, allow_nan=False)  # or fails
            todo.append((f'{stem}.py', stem, script, {}, pairs(filter(None, changes.split(',')))))
        except (Exception, SystemExit) as error:
            raise error if getattr(error, 'code', 0) == 128 + signal.SIGTERM else UserError(
                f'--versus {stem}.py: {type(error).__name__}: {error}') from None
    for path, label, script, recipe, changes in todo:
        name = ' '.join([label.removeprefix('airbench94_'), *map('='.join, changes.items())])
        name += f' #{len(arms) + 1}' * (name in [arm.name for arm in arms])
        known = {**flat(script.hyp), **recipe}
        every = {**known, **parse_hyp({**pairs(args.hyp), **changes}, known)}
        arms.append(Arm(name, script, ''.join(linecache.checkcache(path) or linecache.getlines(path)), every))
    return arms

# ---------------------------------------- Statistics ----------------------------------------
def student(df: float) -> tuple[np.ndarray, np.ndarray]:
    """t >= 0 and P(T < t) of Student's t on a grid: atan(t / sqrt(df)) has a density like cos^(df - 1)."""
    angle = math.pi / 2 * np.sin(np.linspace(0, math.pi / 2, 50000))  # finest where the tail is
    area = np.append(0, np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (df - 1) * np.diff(angle)))
    return np.tan(angle) * math.sqrt(df), 0.5 + 0.5 * area / area[-1]
def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """mean(a) - mean(b), half the width of its 95% confidence interval, and p of Welch's t-test."""
    difference, (va, vb) = a.mean() - b.mean(), (x.var(ddof=1) / len(x) for x in (a, b))
    if va + vb < 1e-20: return difference, 0.0, float(abs(difference) < 1e-9)  # equal but for rounding
    df, error = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1)), math.sqrt(va + vb)
    t, cdf = student(df)
    return difference, np.interp(0.975, cdf, t) * error, 2 - 2 * np.interp(abs(difference) / error, t, cdf)
def group(runs: list, key: str) -> dict:
    return {name: [run for run in runs if run[key] == name] for name in dict.fromkeys(r[key] for r in runs)}
def diverged(runs: list) -> list:  # loss not finite (None in a log), dead (ln 10), 10 points under the median
    floor = np.median([run['tta_acc'] for run in runs]) - 0.1 - 1e-9 if len(runs) >= 3 else 0
    return [run for run in runs if run['tta_acc'] < floor or None in (
        losses := [row['train_loss'] for row in run['epochs']]) or abs(losses[-1] - math.log(10)) < 1e-5]
def duration(seconds: float, digits: int = 3) -> str:
    minutes, seconds = divmod(round(seconds, digits), 60)
    return f'{int(minutes)}m {seconds:0{digits + 3 if digits else 2}.{digits}f}s'
def table(runs: list, target: float) -> list[str]:  # a row per trial; of arms a row each, differences
    arms, samples = group(runs, 'arm'), {}
    bad = [run for members in arms.values() for run in diverged(members)]
    rows = [('Trial' if len(arms) == 1 else 'Arm', 'n', 'Runtime', 'Clock/run (95% CI)', 'Accuracy (95% CI)',
             'Std', f'>={target:g}%', 'Diverged')]
    for name, members in ({**group(runs, 'trial'), 'Average': runs} if len(arms) == 1 else arms).items():
        n, n_bad, trials = len(members), sum(map(bad.count, members)), group(members, 'trial').values()
        walls = [sum(run['wall_seconds'] for run in x) for x in trials if len(x) == max(map(len, trials))]
        x = samples[name] = np.array([(100 * run['tta_acc'], run['clock_seconds']) for run in members])
        (acc, clock), (std, clock_std) = x.mean(0), x.std(0, ddof=1) if n > 1 else [math.nan] * 2
        t = np.interp(0.975, *student(n - 1)[::-1]) / math.sqrt(n) if n > 1 else 1
        rows.append([str(name)] + [cell.replace('nan', '-') for cell in (
            str(n), duration(np.mean(walls)), f'{clock:.3f}s +- {t * clock_std:.3f}', f'{acc:.2f}% +- '
            f'{t * std:.2f}', f'{std:.2f}', f'{sum(x[:, 0].round(6) >= target)}/{n}', f'{n_bad}/{n}')])
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += ['Warning: {arm} trial {trial} run {run} diverged, {tta_acc:.2%}'.format(**run) for run in bad]
    *others, (last, b) = samples.items()
    for name, a in others if len(arms) > 1 and min(map(len, arms.values())) > 1 else []:
        points, half, p = welch(a[:, 0], b[:, 0])
        ratio, spread = a[:, 1].mean() / b[:, 1].mean(), welch(*(x[:, 1] / x[:, 1].mean() for x in (a, b)))[1]
        low, high, n = ratio / math.exp(spread), ratio * math.exp(spread), min(len(a), len(b))
        verdict = (f': no difference in accuracy from {last} shown at n = {n}' if p >= 0.05 else
                   f" is {abs(points):.2f} points {'more' if points > 0 else 'less'} accurate than {last}")
        lines += [f"{name}{verdict} (p {'<' if p < 0.001 else '='} {max(p, 0.001):.3f})" + (
            f', and it takes {ratio:.3f} of the time' * (not low <= 1 <= high)), f'    {points:+.2f} points '
            f'({points - half:+.2f} to {points + half:+.2f}), clock x {ratio:.3f} ({low:.3f} to {high:.3f})']
    return lines

# ---------------------------------------- Command line ----------------------------------------
def parse_args(argv: list[str]) -> argparse.Namespace:
    def fail(message): raise UserError(f'{message} (--help shows every option)')
    parser = argparse.ArgumentParser(f'{NAME}.py', allow_abbrev=False, epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add, many = fail, parser.add_argument, {'nargs': '+', 'action': 'extend', 'default': []}
    add('--trials', metavar='N', type=int, default=5, help='rows of the table (5)')
    add('--runs', metavar='N', type=int, default=1, help='trainings per trial (1); in the report 25')
    add('--seed', metavar='S', type=int, help='seed of all runs (drawn and printed)')
    add('--device', metavar='D', default='auto', help='cuda, cuda:1, cpu, or auto: CUDA where it is (auto)')
    add('--hyp', metavar='KEY=VALUE', **many, help='other hyperparameters, in all arms')
    add('--compile', action='append_const', dest='hyp', const='net.compile=True', help='by the Engine')
    add('--recipe', choices=RECIPES, default='report', help='hyperparameters of this script by name (report)')
    add('--versus', metavar='SCRIPT[:KEY=VALUE,...]', **many, help='scripts to compare with')
    add('--sweep', metavar='KEY=A,B,...', **many, help='values to compare')
    add('--data-dir', metavar='DIR', default='cifar10', help='has train.pt, test.pt; or gets them (cifar10)')
    add('--log-dir', metavar='DIR', default='logs', help='gets a folder per experiment (logs)')
    add('--resume', metavar='DIR', help='finish the experiment of this log folder, with its options')
    add('--target', metavar='PCT', type=float, default=94.0, help='accuracy in percent to count from (94)')
    add('--quiet', action='store_true', help='one row per run: no evaluation after each epoch')
    add('--synthetic', action='store_true', help='generated images in place of CIFAR-10')
    re.search(r'[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]', ' '.join(argv)) and fail('control character')
    resume = parser.parse_args(argv).resume  # what is not given again is as in the log
    args = parser.parse_args([*(read_log(resume)[0]['command'][1:] if resume else []), *argv])
    for name, low, high in ('trials', 1, 10**9), ('runs', 1, 10**9), ('seed', 0, 2**64), ('target', 0, 100):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} {getattr(args, name)}: it must be from {low} to {high}')
    return args
def write_log(folder: str, name: str, text: str):
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), 'a', encoding='utf-8') as file:
            print(text, end='', file=file, flush=True)
            os.fsync(file.fileno())  # before its row is printed
    except OSError as error:
        raise UserError(f'cannot write {os.path.join(folder, name)}: {error.strerror}') from None
def read_log(folder: str) -> tuple[dict, list]:  # experiment.json; the runs, but no line that a kill cut off
    try:
        log = json.loads(pathlib.Path(folder, 'experiment.json').read_text('utf-8'))
        files = [file.read_text('utf-8') for file in sorted(pathlib.Path(folder).glob('runs*.jsonl'))]
        runs = [json.loads(line) for file in files for line in file.split('\n')[:-1]]
        return [*log['command'], log][-1], [*{(r['arm'], r['trial'], r['run']): r for r in runs}.values()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f'{folder} is no log folder: {error}') from None
def open_log(args: argparse.Namespace, content: dict, code: dict) -> tuple[str, list]:
    """A new log folder, or --resume's if it is of the same experiment; the runs in it."""
    folder = args.resume or os.path.join(args.log_dir, f"{content['started']}-{NAME}-{os.urandom(3).hex()}")
    files = {**code, 'experiment.json': json.dumps(content, indent=1)}
    if not args.resume:
        for name, text in files.items(): write_log(folder, name, text)
        return folder, []
    logged, runs = read_log(folder)
    logged.update((key, content[key]) for key in ('command', 'started', 'environment', 'data'))  # may differ
    for name, text in reversed(files.items()):
        old = pathlib.Path(folder, name).read_text('utf-8') if name in code else json.dumps(logged, indent=1)
        changes = [*difflib.unified_diff(old.splitlines(), text.splitlines(), n=0, lineterm='')][2:]
        if changes: raise UserError(f"--resume {folder}: {name} differs: {' '.join(changes[:9])}")
    for file in pathlib.Path(folder).glob('runs*.jsonl'):  # else the next line would join what a kill cut off
        os.truncate(file, file.read_bytes().rfind(b'\n') + 1)
    return folder, runs
def warm_up(arm: Arm, data: dict, device: torch.device, engine) -> float:
    """A few steps and evaluations of every kind in a run. Returns the seconds on the clock of a whole run."""
    whiten, small = (arm.hyp.get(key, 0) for key in ('opt.whiten_bias_epochs', 'opt.small_epochs'))
    changes = {'opt.train_epochs': 4.0, 'opt.whiten_bias_epochs': min(whiten, 1 + (whiten > small)),
               'opt.small_epochs': min(small, 1 + (small > whiten))}  # both have ended after two epochs
    few = {'train': arm.hyp['opt.batch_size'], 'test': 1000 + len(data['test']['labels']) % 1000}
    part = {split: {key: value[:few[split]] for key, value in data[split].items()} for split in few}
    with overrides(changes, arm.script.hyp):
        for _ in range(3 if engine else 1):  # the third step of each kind is captured
            record, _ = arm.script.train(part, 0, device, engine, quiet=True)
    with overrides({'opt.train_epochs': 0.001, 'net.tta_level': 0}, arm.script.hyp):  # captures free memory
        arm.script.train({**data, 'test': part['test']}, 0, device, engine, quiet=True)
    *_, third, fourth = (row['clock_seconds'] for row in record['epochs'])
    train, test = (len(data[split]['labels']) / len(part[split]['labels']) for split in few)  # how many parts
    return arm.hyp['opt.train_epochs'] * (fourth - third) * train + (record['clock_seconds'] - fourth) * test
def experiment(args: argparse.Namespace, argv: list[str], runs: list, state: dict):  # state is for main
    device, arms, rank, world, shared = pick_device(args.device), make_arms(args), 0, 1, [None]
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun
        distributed.init_process_group('gloo', timeout=datetime.timedelta(days=30))
        rank, world = distributed.get_rank(), distributed.get_world_size()
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    load = synthetic_data if args.synthetic else functools.partial(load_data, args.data_dir)
    source, machine = 'synthetic images' if args.synthetic else args.data_dir, {**environment(device)}
    if rank == 0:  # prepares data and log; the others wait for the broadcast
        data, utc = load(device=device), datetime.datetime.now(datetime.timezone.utc)
        seed = int.from_bytes(os.urandom(4), 'big') if args.seed is None else args.seed
        shared = [(seed, *open_log(args, {
            'schema': 3, 'script': NAME, 'command': [f'{NAME}.py', *argv, '--seed', str(seed)], 'seed': seed,
            'started': f'{utc:%Y%m%dT%H%M%SZ}', 'data': source, 'environment': machine, 'recipe': args.recipe,
            'hyp': hyp, 'arms': [{'name': arm.name, 'hyp': arm.hyp} for arm in arms],
            'crc32': {f'{x} labels': zlib.crc32(data[x]['labels'].cpu().numpy()) for x in data}},
            {f"code{i or ''}.py": arm.source for i, arm in enumerate(arms)}))]
    world > 1 and distributed.broadcast_object_list(shared)
    seed, folder, runs[:] = shared[0]
    data = data if rank == 0 else read_log(folder) and load(device=device)  # every node needs the log folder
    names, n_train, n_test = [arm.name for arm in arms], *(len(data[x]['labels']) for x in ('train', 'test'))
    title = f"{', '.join(names)}: {source} ({n_train} to train on, {n_test} to test), seed {seed}"
    made = {(run['trial'], run['run'], run['arm']) for run in runs}
    todo = [[(trial, run, arm) for arm in arms if (trial, run, arm.name) not in made]
            for trial, run in itertools.product(range(1, args.trials + 1), range(1, args.runs + 1))]
    todo = [*itertools.chain(*[*filter(None, todo)][rank::world])]  # all arms of a run in one process
    line = '{:>5} {:>4} {:>6} {:>11} {:>10} {:>9} {:>9} {:>11} {:>10}  {}'.format
    start, seconds, engines = time.perf_counter(), 0, {}
    try:
        say(title, 'Warming up', sep='\n')
        torch.compiler.reset()  # forget what an earlier call in this process compiled
        state['batch'] = ' or '.join({str(arm.hyp['opt.batch_size']): 0 for arm in arms})
        for arm in arms if todo else []:
            with overrides(arm.hyp, arm.script.hyp):
                engines[arm.name] = arm.script.Engine(device) if arm.hyp.get('net.compile') else None
                seconds += warm_up(arm, data, device, engines[arm.name]) / len(arms)
        machine['warm-up'] = duration(time.perf_counter() - start)
        if todo and device.type == 'cpu' and not args.resume:
            say(f'No GPU: about {duration(seconds, 0)} a run, {duration(seconds * len(todo), 0)} all.',
                'Shorter: --trials 1 --runs 1 --hyp opt.train_epochs=1')
        say(line(*'trial,run,epoch,train loss,train acc,test acc,tta acc,clock,left,arm'.split(',')))
        state['begun'], start = True, time.perf_counter()
        for done, (trial, run, arm) in enumerate(todo):
            def show(row, tta_acc='', clock=None):
                share = (done + min(1, row['epoch'] / arm.hyp['opt.train_epochs'])) / len(todo)
                left = duration((time.perf_counter() - start) * (1 / share - 1), 0)
                say(line(trial, run, row['epoch'], re.sub('nan|inf', 'diverged', f"{row['train_loss']:.4f}"),
                         f"{row['train_acc']:.2%}", '-' if args.quiet else f"{row['test_acc']:.2%}", tta_acc,
                         f"{clock or row['clock_seconds']:.3f}s", left, arm.name))
            run_seed = int(np.random.SeedSequence([seed, trial, run]).generate_state(1)[0])
            with overrides(arm.hyp, arm.script.hyp):
                record, _ = arm.script.train(
                    data, run_seed, device, engines[arm.name], args.quiet, None if args.quiet else show)
            record = {'arm': arm.name, 'trial': trial, 'run': run, 'data': source, **machine, **record}
            runs.append(json.loads(json.dumps(record), parse_constant=lambda name: None))  # NaN -> null
            write_log(folder, f"runs{rank or ''}.jsonl", json.dumps(runs[-1]) + '\n')
            show(record['epochs'][-1], f"{record['tta_acc']:.2%}", record['clock_seconds'])
        world > 1 and distributed.barrier()
    finally:
        if 'CUDA' in machine: machine['peak memory'] = f'{torch.cuda.max_memory_allocated(device) >> 20} MiB'
        runs += [run for run in read_log(folder)[1] if run not in runs] if world > 1 else []
        mean = {name: np.mean([run['tta_acc'] for run in x]) for name, x in group(runs, 'arm').items()}
        swept = sum(arm.script is arms[0].script for arm in arms)
        names = sorted(names[:swept], key=lambda name: -mean.get(name, 0)) + names[swept:]  # best first
        runs.sort(key=lambda run: (names.index(run['arm']), run['trial'], run['run']))
        if runs:
            say('', title, *table(runs, args.target), ', '.join(map(' '.join, machine.items())),
                f'Elapsed: {duration(time.perf_counter() - start)}', f'Log: {folder}', sep='\n')
        elif world == 1 and not args.resume: shutil.rmtree(folder, ignore_errors=True)
def main(argv: list[str] | None = None) -> list[dict]:
    """The command line; argv None: the process's, in a notebook []. Returns the finished runs, or exits."""
    notebook, runs, args, state = hasattr(builtins, '__IPYTHON__'), [], None, {'batch': '?'}
    argv = ([] if notebook else sys.argv[1:]) if argv is None else argv
    try:
        args = parse_args(argv)
        experiment(args, argv, runs, state)
        return runs
    except (KeyboardInterrupt, SystemExit) as end:
        status = getattr(end, 'code', 130) or int(args is not None)  # 0: --help
        reason = f"stopped after {len(runs)} finished runs{'; --resume goes on' * bool(runs)}"
    except Exception as error:
        status, reason = 1 if 'begun' in state else 2, str(error).split('\n\n')[0]
        if re.search('MemoryError|out of memory|allocate memory|ALLOC_FAILED|overflowed', repr(error)):
            ram = sys.platform == 'linux' and os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 20
            reason = f'out of memory, batch size {state["batch"]}, {ram or "?"} MiB free: try less. {reason}'
        elif status == 2 and type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            reason = f'--compile failed (needs a C++ compiler, on CUDA also Triton): {reason}'
        elif type(error).__name__ != 'UserError' and 'by peer' not in reason:  # any script's; rank 0 said why
            raise
    status and print(f"{NAME}: {' '.join(reason.split())}", file=sys.stderr)
    return runs if notebook else sys.exit(status)

if __name__ == '__main__':
    if is_script := '__file__' in globals():  # a pasted cell has none, and another program's sys.argv
        signal.signal(signal.SIGTERM, lambda n, _: signal.signal(n, signal.SIG_IGN) and sys.exit(128 + n))
    main(sys.argv[1:] if is_script else [])
