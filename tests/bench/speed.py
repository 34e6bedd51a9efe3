"""`python tests/bench speed`: how fast the parts of the scripts are, and what they ask of a GPU."""

import argparse
import ctypes
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import profiler

from bench.arms import Arm, make_arms
from bench.cost import run_flop
from bench.errors import UserError
from bench.job import device_name, pick_device
from bench.report import QuietConsole

ROOT = Path(__file__).resolve().parents[2]
BASELINE = 'airbench94_baseline.py'
SCRIPTS = (BASELINE, 'airbench94_modified.py', f'{BASELINE}:recipe=fast94')
TRAIN_IMAGES, TEST_IMAGES = 50000, 10000
PARTS = ('make_net', 'make_optimizer', 'train_step', 'compile_net', 'CifarLoader')


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser('bench speed', description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add('scripts', nargs='*', metavar='SCRIPT[:KEY=VALUE,...]', help='(both scripts, and fast94)')
    add('--cuda-host', action='store_true', help='launches, bytes, memory and host time per step')
    add('--eager', action='store_true', help='nothing compiled')
    add('--device', default='auto', help='auto, cpu, cuda, cuda:1')
    add('--rounds', type=int, default=5, help='interleaved measurements of each part (5)')
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f'--rounds {args.rounds}: it must be at least 1')
    args.scripts = args.scripts or [str(ROOT / name) for name in SCRIPTS]
    return args


def random_data(device: torch.device) -> dict:
    """Images and labels of CIFAR-10's sizes, in the form of `load_data`."""
    data = {}
    for split, n in (('train', TRAIN_IMAGES), ('test', TEST_IMAGES)):
        images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8).to(device)
        labels = torch.randint(10, (n,)).to(device)
        data[split] = {'images': images, 'labels': labels, 'classes': [*'abcdefghij']}
    return data


# ---------------------------------------- What a GPU is asked -----------------------------------


def stand_in() -> ctypes.CDLL | None:
    """The library of a stand-in for a GPU, which names kernels and executes none, if it is one."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, 'fakegpu_dump') else None


class Kernels:
    """Counts the kernels launched between start and stop."""

    def __init__(self):
        self.stand_in, self.profile = stand_in(), None

    def start(self):
        if self.stand_in:
            self.stand_in.fakegpu_reset()
            return
        self.profile = profiler.profile(activities=[profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def stop(self) -> int:
        if not self.stand_in:
            self.profile.stop()
            events = self.profile.events()
            return sum(e.device_type.name == 'CUDA' and 'Mem' not in e.name for e in events)
        with tempfile.NamedTemporaryFile('r') as file:
            self.stand_in.fakegpu_dump(file.name.encode())
            return sum(line.startswith('kernel\t') for line in file)


def count_triton_bytes():
    """Let Inductor keep, in `metrics.nodes_num_elem`, what each kernel of a new graph moves."""
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True  # a cached graph is not counted
    log = logging.getLogger('torch._inductor.compile_fx.__inductor_metrics')
    log.setLevel(logging.INFO)  # it counts only where it would also log
    log.propagate = False


def triton_bytes() -> int:
    """What all graphs compiled so far read and write in generated kernels: no convolutions."""
    from torch._inductor import metrics

    return sum(4 * n for node, n in metrics.nodes_num_elem if not node.is_extern())


def make_network(arm: Arm, device: torch.device, compiled: bool):
    """A network to be passed to every `train`, or None: then each makes its own."""
    if not compiled:
        return None
    module = arm.script.module
    net = module.make_net(arm.nested_hyp(), device)
    return module.compile_net(net) or net


def clock(row: dict) -> float:
    """Seconds at the end of an epoch: of the host on a stand-in, whose GPU takes none."""
    return time.process_time() if stand_in() else row['clock_seconds']


def host_row(arm: Arm, data: dict, device: torch.device, compiled: bool, rounds: int) -> list[str]:
    """Per step of an epoch, with all that belongs to it: batch, step, schedule, lookahead. In the
    second epoch the whitening bias trains, in the last whole one it does not."""
    module, kernels, net = arm.script.module, Kernels(), make_network(arm, device, compiled)
    moved, launches, seconds = [triton_bytes()] if compiled else [], [], []

    def train(on_epoch):
        hyp = arm.nested_hyp()
        return module.train(data, 0, hyp=hyp, device=device, net=net, quiet=True, on_epoch=on_epoch)

    train((lambda row: moved.append(triton_bytes())) if compiled else None)
    kernels.start()

    def count_epoch(row):
        launches.append(kernels.stop())
        kernels.start()

    train(count_epoch)
    kernels.stop()
    torch.cuda.reset_peak_memory_stats(device)
    train(None)
    peak = torch.cuda.max_memory_allocated(device)
    for _ in range(rounds):
        clocks = []
        train(lambda row, clocks=clocks: clocks.append(clock(row)))
        seconds.append(np.diff(clocks))
    if len(launches) < 3:
        raise UserError(f'{arm.name}: --cuda-host needs at least four epochs')
    steps = TRAIN_IMAGES // arm.hyp['opt.batch_size']
    graphs = [size for size in np.diff(moved) if size] if compiled else []
    fastest = 1000 * np.min(seconds, 0) / steps
    cells = [arm.name, 'compiled' if compiled else 'eager']
    cells.append(f'{launches[1] / steps:.0f}, {launches[-1] / steps:.0f}')
    cells.append(f'{graphs[0] / 1e9:.2f}, {graphs[-1] / 1e9:.2f}' if graphs else '')
    cells.append('' if compiled else f'{peak / 2**20:,.0f}')  # it lacks the memory of CUDA graphs
    return [*cells, f'{fastest[0]:.2f}, {fastest[-1]:.2f}']


def cuda_host(console, arms: list[Arm], device: torch.device, args: argparse.Namespace):
    if device.type != 'cuda':
        raise UserError('--cuda-host needs a GPU, or a stand-in for one')
    fake = ' - a stand-in that executes nothing' if stand_in() else ''
    table = Table(title=f'Per step (second epoch, last epoch): {device_name(device)}{fake}')
    table.add_column('Script', no_wrap=True)
    table.add_column('Mode')
    time_column = 'Host ms' if stand_in() else 'Clock ms'
    for name in ('Launches', 'Triton GB', 'Peak MiB', time_column):
        table.add_column(name, justify='right', no_wrap=True)
    count_triton_bytes()
    data = random_data(device)
    for arm in arms:
        for compiled in (False, True)[: 1 if args.eager else 2]:
            table.add_row(*host_row(arm, data, device, compiled, args.rounds))
    console.print(table)


# ---------------------------------------- How fast ----------------------------------------


def make_step(arm: Arm, data: dict, device: torch.device, mode: str):
    """A function that makes one training step on a batch of the full size.

    mode: eager, compiled, or plain: float32, NCHW, no autocast, no fused optimizer.
    """
    module, hyp = arm.script.module, arm.nested_hyp()
    torch.backends.cudnn.benchmark = True
    net = module.make_net(hyp, device)
    loader = module.CifarLoader(data, True, hyp['opt']['batch_size'], hyp['aug'], device=device)
    images, labels = next(iter(loader))
    targets = F.one_hot(labels, 10).float()
    if mode == 'compiled':
        net = module.compile_net(net) or net
    if mode == 'plain':
        net.to(torch.float32, memory_format=torch.contiguous_format)
        images = images.float().contiguous()
    optimizer = module.make_optimizer(net, hyp)
    for group in optimizer.param_groups:
        group['lr'] = 1e-6  # a net that has not been whitened should not diverge

    def plain_step():
        loss = F.cross_entropy(net(images), targets, reduction='sum')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if mode != 'plain':
        return lambda: module.train_step(net, optimizer, images, targets)
    for group in optimizer.param_groups:
        group['fused'], group['foreach'] = False, False
    return plain_step


def wait(device: torch.device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(functions: dict, counts: dict, device: torch.device, rounds: int) -> dict:
    """Seconds of a call, [rounds] for each function, which take turns.

    Each is called twice before that: a CUDA graph is recorded by the second call.
    """
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(counts[name]):
                function()
            wait(device)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: np.array(values) for name, values in seconds.items()}


def start_up_seconds(path: str) -> float:
    """A process that only prints the script's help."""
    start = time.perf_counter()
    subprocess.run([sys.executable, path, '--help'], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def speed(console, arms: list[Arm], device: torch.device, args: argparse.Namespace):
    table = Table(title=f'Images per second (ratio to plain): {device_name(device)}')
    modes = ('plain', 'eager') if args.eager else ('plain', 'eager', 'compiled')
    table.add_column('Script', no_wrap=True)
    for name in (*modes, 'loader', 'Start-up s', 'PFLOP of a run'):
        table.add_column(name, justify='right')
    data = random_data(device)
    for arm in arms:
        batch_size, steps = arm.hyp['opt.batch_size'], 20 if device.type == 'cuda' else 1
        functions = {mode: make_step(arm, data, device, mode) for mode in modes}
        aug = arm.nested_hyp()['aug']
        loader = arm.script.module.CifarLoader(data, True, batch_size, aug, device=device)
        functions['loader'] = lambda loader=loader: [None for _ in loader]
        counts = {name: 1 if name == 'loader' else steps for name in functions}
        seconds = measure(functions, counts, device, args.rounds)
        cells = [arm.name]
        for mode in modes:
            ratio = np.median(seconds['plain'] / seconds[mode])
            cells.append(f'{batch_size / np.median(seconds[mode]):,.0f} (x {ratio:.2f})')
        cells.append(f'{len(loader) * batch_size / np.median(seconds["loader"]):,.0f}')
        flop = run_flop(arm, TRAIN_IMAGES, TEST_IMAGES, data)
        start_up = f'{start_up_seconds(arm.script.path):.1f}'
        table.add_row(*cells, start_up, f'{flop / 1e15:.3f}' if flop else '')
    console.print(table)
    for arm in arms:
        console.print(kernel_table(arm, data, device))


def kernel_table(arm: Arm, data: dict, device: torch.device, steps: int = 3) -> Table:
    """The kernels (on a CPU: the operators) that an eager step spends its time in."""
    step = make_step(arm, data, device, 'eager')
    step()
    wait(device)
    activities = [profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(profiler.ProfilerActivity.CUDA)
    with profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        wait(device)
    key = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    table = Table('Kernel', 'calls', 'ms', '%', title=f'{arm.name}: an eager step by time')
    for event in events[:10]:
        micros = getattr(event, key) / steps
        share = 100 * micros * steps / total
        calls = f'{event.count / steps:.0f}'
        table.add_row(event.key[:60], calls, f'{micros / 1e3:.2f}', f'{share:.0f}')
    return table


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    arms = make_arms(args.scripts, [], [])
    for arm in arms:
        missing = [part for part in PARTS if not hasattr(arm.script.module, part)]
        if missing and not args.cuda_host:
            raise UserError(f'{arm.name}: speed measures {", ".join(missing)}, which it lacks')
    device = pick_device(args.device)
    report = cuda_host if args.cuda_host else speed
    report(QuietConsole(), arms, device, args)
    return 0
