"""`python tests/bench speed`: how fast the parts of scripts are."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import cost
from bench.arms import make_arms
from bench.cli import DEVICE_HELP, SPEC, Option
from bench.contract import BATCH_SIZE, SPEED, Facts, Script
from bench.errors import UserError
from bench.worker import Worker, pick_device

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ('airbench94_baseline.py', 'airbench94_modified.py', 'tests/bench/examples/fast94.py')
TRAIN_IMAGES = 50000
TEST_IMAGES = 10000
GPU_STEPS = 20  # in a measurement
KERNELS = 10  # rows of the table
PROFILED_STEPS = 3
SCRIPTS_HELP = 'what is measured (default: the two scripts and fast94)'
OPTIONS = [
    Option('scripts', SPEC, SCRIPTS_HELP, many=True),
    Option('--eager', None, 'compile nothing'),
    Option('--device', 'D', DEVICE_HELP),
    Option('--rounds', 'N', 'interleaved measurements (default: 5)', int, None, (1, 10**6)),
]


# ---------------------------------------- In a script's process ----------------------------------


def random_data(device) -> dict:
    """Return images and labels of CIFAR-10's sizes, in the form of load_data."""
    import torch

    data = {}
    for split, n in (('train', TRAIN_IMAGES), ('test', TEST_IMAGES)):
        data[split] = {
            'images': torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8).to(device),
            'labels': torch.randint(10, (n,)).to(device),
            'classes': list('abcdefghij'),
        }
    return data


def make_step(script: Script, hyp: dict, data: dict, device, mode: str):
    """Return a function that makes one training step on a whole batch.

    mode: eager, compiled, or plain (float32, NCHW, no autocast, no fused optimizer).
    """
    import torch
    import torch.nn.functional as F

    torch.backends.cudnn.benchmark = True
    images, labels = next(iter(script.loader(data, hyp, device)))
    targets = F.one_hot(labels, 10).float()
    net, optimizer, step = script.training_step(hyp, device, 10, mode == 'compiled')
    if mode == 'plain':
        net.to(torch.float32, memory_format=torch.contiguous_format)
        images = images.float().contiguous()
    for group in optimizer.param_groups:
        # A network that has not been whitened should not diverge.
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(1e-6)  # a CUDA graph reads it
        else:
            group['lr'] = 1e-6
        if mode == 'plain':
            group['fused'] = False
            group['foreach'] = False

    def plain_step():
        loss = F.cross_entropy(net(images), targets, reduction='sum')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if mode == 'plain':
        return plain_step
    return lambda: step(net, optimizer, images, targets)


def wait(device):
    """Wait until a GPU has finished."""
    if device.type == 'cuda':
        import torch

        torch.cuda.synchronize(device)


def time_in_turns(functions: dict, counts: dict, device, rounds: int) -> dict:
    """Return the seconds of a call, [rounds] for each function, which take turns.

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


def kernels(step, device) -> list[list]:
    """Return [name, calls, ms, share] of the kernels (on a CPU: operators) of a step by time."""
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    key = 'self_cpu_time_total'
    if device.type == 'cuda':
        activities.append(profiler.ProfilerActivity.CUDA)
        key = 'self_device_time_total'
    step()
    wait(device)
    with profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        wait(device)
    events = profile.key_averages()
    if device.type == 'cuda':  # operators and annotations have the time of their kernels, too
        events = [event for event in events if event.device_type.name == 'CUDA']
        # torch 2.4 does not tell which events are annotations.
        events = [event for event in events if not getattr(event, 'is_user_annotation', False)]
    events = sorted(events, key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    rows = []
    for event in events[:KERNELS]:
        micros = getattr(event, key)
        calls = event.count / PROFILED_STEPS
        rows.append([event.key, calls, micros / PROFILED_STEPS / 1000, micros / total])
    return rows


def measure(script: Script, hyp: dict, device: str, rounds: int, modes: list[str]) -> dict:
    """Measure the parts of a script. Returns images per second, ratios to plain, and kernels."""
    device = pick_device(device)
    flop = None
    with contextlib.suppress(UserError):  # where they cannot be counted, its speed still counts
        flop = cost.run_flop(script, hyp, random_data('cpu'))
    data = random_data(device)
    loader = script.loader(data, hyp, device)
    functions = {mode: make_step(script, hyp, data, device, mode) for mode in modes}
    functions['loader'] = lambda: [None for _ in loader]
    steps = GPU_STEPS if device.type == 'cuda' else 1
    counts = {name: steps for name in functions}
    counts['loader'] = 1
    seconds = time_in_turns(functions, counts, device, rounds)
    speeds = {}
    for mode in modes:
        ratio = np.median(seconds['plain'] / seconds[mode])
        speeds[mode] = [hyp[BATCH_SIZE] / np.median(seconds[mode]), ratio]
    images = len(loader) * hyp[BATCH_SIZE]
    return {
        'device': str(device),
        'speeds': speeds,
        'loader': images / np.median(seconds['loader']),
        'flop': flop,
        'kernels': kernels(functions['eager'], device),
    }


# ---------------------------------------- The command ----------------------------------------


def start_up_seconds(path: str) -> float:
    """Return the seconds of a process that only prints the script's help."""
    start = time.perf_counter()
    subprocess.run([sys.executable, path, '--help'], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def command_speed(given: dict) -> int:
    """Measure scripts, each in a process of its own, and print tables. Returns the status."""
    from bench import data
    from bench.report import QuietConsole, table_lines

    specs = given.get('scripts') or [str(ROOT / name) for name in SCRIPTS]
    modes = ['plain', 'eager']
    if not given.get('eager'):
        modes.append('compiled')
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's, which reports on itself
    data_file = data.make_file()
    with contextlib.ExitStack() as workers:

        def start(path: str) -> tuple[Worker, Facts]:
            worker = Worker(path, data_file)
            workers.callback(worker.close)
            return worker, Facts(**worker.answer())

        arms = make_arms(specs, [], [], lambda path: start(path)[1])
        for arm in arms:
            missing = [name for name in SPEED if name not in arm.script.offers]
            if missing:
                raise UserError(f'{arm.name}: speed measures {", ".join(missing)}, which it lacks')
        measured = []
        for arm in arms:
            worker, _ = start(arm.script.path)
            worker.label = arm.name
            device = given.get('device', 'auto')
            measured.append(worker.call('speed', arm.hyp, device, given.get('rounds', 5), modes))
            worker.close()

    columns = {}
    for arm, parts in zip(arms, measured, strict=True):
        cells = {}
        for mode, (speed, ratio) in parts['speeds'].items():
            cells[mode] = f'{speed:,.0f} (x {ratio:.2f})'
        cells['loader'] = f'{parts["loader"]:,.0f}'
        cells['start-up'] = f'{start_up_seconds(arm.script.path):.1f} s'
        cells['PFLOP'] = '-'
        if parts['flop'] is not None:
            cells['PFLOP'] = f'{parts["flop"] / 1e15:.3f}'
        for head, cell in cells.items():
            columns.setdefault(head, []).append(cell)
    console = QuietConsole()
    print_lines(console, ['Images per second (ratio to plain), and PFLOP of a run:'])
    print_lines(console, table_lines([arm.name for arm in arms], columns, console.width))
    for arm, parts in zip(arms, measured, strict=True):
        print_lines(console, ['', f'{arm.name} on {parts["device"]}, an eager step by time:'])
        print_lines(console, ['    ms   share  calls  kernel'])
        for name, calls, ms, share in parts['kernels']:
            row = f'{ms:>6.2f}  {100 * share:>4.0f} %  {calls:>5.0f}  {name[:60]}'
            print_lines(console, [row])
    return 0


def print_lines(console, lines: list[str]):
    for line in lines:
        console.print(line, soft_wrap=True)
