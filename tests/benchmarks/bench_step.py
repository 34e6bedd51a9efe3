"""The training step (forward, loss, backward, SGD, lookahead) of both scripts, plain, eager and compiled:
images per second, FLOP per second as a share of the matrix product rate measured beside it, and the longest
kernels (on a CPU: operators) of a step.

    python tests/benchmarks/bench_step.py                      all modes, at each script's own batch size
    python tests/benchmarks/bench_step.py --batch-size 512     both at the same one
    python tests/benchmarks/bench_step.py --modes eager compiled
    python tests/benchmarks/bench_step.py --modes own-graphs

Plain is the same step in float32 and NCHW, without autocast; compiled is the script's Engine, as by
--compile. On CUDA there are two more: autotuned, the Engine with max-autotune-no-cudagraphs, and own-graphs,
the compiler's own CUDA graphs (reduce-overhead) in place of the Engine's. Those free workspaces that captured
graphs use, so own-graphs needs a process of its own and is no default. The variants take turns; the speed-up
is the median over the repeats of the rate over that of the script's first mode. FLOP are those of the
convolutions and the linear layer, forward and backward.
"""
import argparse
import contextlib
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_baseline as baseline
import airbench94_modified as modified

MODES = ('plain', 'eager', 'compiled')
ENGINES = {'compiled': {}, 'autotuned': {'mode': 'max-autotune-no-cudagraphs'},
           'own-graphs': {'mode': 'reduce-overhead'}}  # options of torch.compile


def matmul_rate(device):
    """FLOP per second of a square matrix product in the dtype of the convolutions, best of ten."""
    size = 8192 if device.type == 'cuda' else 2048
    names = baseline.environment(device)['dtype'].split()  # 'float32 under bfloat16 autocast'
    dtype = next(getattr(torch, name) for name in ('float16', 'bfloat16', 'float32') if name in names)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float('inf')
    for _ in range(10):
        start = baseline.now(device)
        a @ b
        best = min(best, baseline.now(device) - start)
    return 2 * size ** 3 / best


class Variant:
    """One script in one mode, with its own network and one batch of random images."""

    def __init__(self, script, mode, device, batch_size):
        self.script, self.mode, self.device = script, mode, device
        self.batch_size = batch_size or script.hyp['opt']['batch_size']
        self.name = f"{script.NAME.split('_')[1]} {mode}"
        data = script.synthetic_data(device, train=self.batch_size, test=1)
        loader = script.CifarLoader(data, batch_size=self.batch_size, aug=script.hyp['aug'])
        self.images, self.labels = next(iter(loader))
        self.net = script.make_net(device)
        script.init_whitening_conv(self.net[0], loader.normalize(loader.images))
        if mode == 'plain':
            self.net.float().to(memory_format=torch.contiguous_format)
            self.images = self.images.float().contiguous()
        self.optimizer, self.step = script.make_optimizer(self.net), script.train_step
        self.rates = [group['lr'] for group in self.optimizer.param_groups]
        self.prepare()
        with FlopCounterMode(display=False) as counter:
            self.steps(1)
        self.flops = counter.get_total_flops() / self.batch_size
        if mode in ENGINES:
            engine = script.Engine(device, **ENGINES[mode])
            engine.pool = None if mode == 'own-graphs' else engine.pool  # None: it captures nothing
            self.net, self.optimizer, self.step = engine.reset(self.net)
            self.prepare()

    def prepare(self):
        self.net.train()
        self.net[0].bias.requires_grad = False  # as in two thirds of the epochs
        self.lookahead = self.script.LookaheadState(self.net)

    def steps(self, count):
        """Seconds per step, over count steps."""
        plain = mock.patch.object(self.script, 'autocast', lambda device: contextlib.nullcontext())
        with plain if self.mode == 'plain' else contextlib.nullcontext():
            start = self.script.now(self.device)
            for step in range(1, count + 1):
                for group, rate in zip(self.optimizer.param_groups, self.rates):
                    group['lr'] = rate
                self.step(self.net, self.optimizer, self.images, self.labels, 0.2)
                if step % 5 == 0:
                    self.lookahead.update(0.5)
            return (self.script.now(self.device) - start) / count

    def kernels(self, count=10):
        """(name, milliseconds, share) of the longest kernels of a step, summed over their calls."""
        kind = 'cuda' if self.device.type == 'cuda' else 'cpu'
        activities = {getattr(torch.profiler.ProfilerActivity, kind.upper())}
        with torch.profiler.profile(activities=activities) as profile:
            self.steps(5)
        attribute = f"self_{'device' if kind == 'cuda' else 'cpu'}_time_total"
        times = {event.key: getattr(event, attribute) / 5000 for event in profile.key_averages()}
        total = sum(times.values())
        longest = sorted(times, key=times.get, reverse=True)[:count]
        return [(name, times[name], times[name] / total) for name in longest]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--steps', type=int, default=5, help='steps per repeat')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--modes', nargs='+', choices=[*MODES, 'autotuned', 'own-graphs'],
                        help='default: all but own-graphs, on a CPU the first three')
    args = parser.parse_args()
    device = baseline.pick_device(args.device)
    modes = args.modes or [*MODES, *['autotuned'] * (device.type == 'cuda')]
    if 'own-graphs' in modes and len(modes) > 1:
        parser.error('own-graphs needs a process of its own')
    print(baseline.environment(device), flush=True)
    torch.backends.cudnn.benchmark = True  # as train does
    scripts = [[Variant(script, mode, device, args.batch_size) for mode in modes]
               for script in (baseline, modified)]
    variants = [variant for modes in zip(*scripts) for variant in modes]
    for variant in variants:
        variant.steps(max(args.steps, 4))  # warm up, compile, capture
    seconds = [[variant.steps(args.steps) for variant in variants] for _ in range(args.repeats)]
    times = dict(zip(variants, zip(*seconds)))
    peak = matmul_rate(device)
    print(f'matrix product: {peak / 1e12:.2f} TFLOP/s\nvariant               batch  images/s      '
          f'(min to max)  speed-up  MFLOP/image  TFLOP/s  of product')
    for first, *_ in scripts:
        for variant in (x for x in variants if x.script is first.script):
            rates = sorted(variant.batch_size / value for value in times[variant])
            rate = statistics.median(rates)
            speedup = statistics.median(map(lambda a, b: a / b, times[first], times[variant]))
            flops = rate * variant.flops
            print(f'{variant.name:20} {variant.batch_size:6} {rate:9.0f} {rates[0]:8.0f} to {rates[-1]:8.0f} '
                  f'{speedup:9.2f} {variant.flops / 1e6:12.0f} {flops / 1e12:8.2f} {flops / peak:10.1%}')
    for variant in variants:
        print(f"\n{variant.name}: the longest {'kernels' if device.type == 'cuda' else 'operators'} of a step")
        for name, milliseconds, share in variant.kernels():
            print(f'{milliseconds:10.2f} ms {share:6.1%}  {name[:90]}')


if __name__ == '__main__':
    main()
