"""The training step (forward, loss, backward, SGD, lookahead) of both scripts, eager and compiled:
images per second, and FLOP per second as a share of the matrix product rate measured beside it.

    python tests/benchmarks/bench_step.py                      all four, at each script's own batch size
    python tests/benchmarks/bench_step.py --batch-size 512     both at the same one

The variants take turns. FLOP are those of the convolutions and the linear layer, forward and backward.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_baseline as baseline
import airbench94_modified as modified


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
    """One script, eager or compiled, with its own network and one batch of random images."""

    def __init__(self, script, compiled, device, batch_size):
        self.script, self.device = script, device
        self.batch_size = batch_size or script.hyp['opt']['batch_size']
        self.name = f"{script.NAME.split('_')[1]} {'compiled' if compiled else 'eager'}"
        data = script.synthetic_data(device, train=self.batch_size, test=1)
        loader = script.CifarLoader(data, batch_size=self.batch_size, aug=script.hyp['aug'])
        self.images, self.labels = next(iter(loader))
        self.net = script.make_net(device).train()
        script.init_whitening_conv(self.net[0], loader.normalize(loader.images))
        self.optimizer, self.lookahead = script.make_optimizer(self.net), script.LookaheadState(self.net)
        self.net[0].bias.requires_grad = False  # as in two thirds of the epochs
        with FlopCounterMode(display=False) as counter:
            self.steps(1)
        self.flops = counter.get_total_flops() / self.batch_size
        if compiled:
            self.net.compile(dynamic=False)

    def steps(self, count):
        """Seconds per step, over count steps."""
        start = self.script.now(self.device)
        for step in range(1, count + 1):
            self.script.train_step(self.net, self.optimizer, self.images, self.labels, 0.2)
            if step % 5 == 0:
                self.lookahead.update(0.5)
        return (self.script.now(self.device) - start) / count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--steps', type=int, default=5, help='steps per repeat')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--eager-only', action='store_true')
    args = parser.parse_args()
    device = baseline.pick_device(args.device)
    print(baseline.environment(device), flush=True)
    modes = (False,) if args.eager_only else (False, True)
    variants = [Variant(script, compiled, device, args.batch_size)
                for compiled in modes for script in (baseline, modified)]
    torch.backends.cudnn.benchmark = True  # as train does
    for variant in variants:
        variant.steps(args.steps)  # warm up, compile
    times = {variant: [] for variant in variants}
    for _ in range(args.repeats):
        for variant in variants:
            times[variant].append(variant.steps(args.steps))
    peak = matmul_rate(device)
    print(f'matrix product: {peak / 1e12:.2f} TFLOP/s\nvariant               batch  images/s      '
          f'(min to max)  MFLOP/image  TFLOP/s  of product')
    for variant, seconds in times.items():
        rates = sorted(variant.batch_size / value for value in seconds)
        rate = statistics.median(rates)
        flops = rate * variant.flops
        print(f'{variant.name:20} {variant.batch_size:6} {rate:9.0f} {rates[0]:8.0f} to {rates[-1]:8.0f} '
              f'{variant.flops / 1e6:12.0f} {flops / 1e12:8.2f} {flops / peak:10.1%}')


if __name__ == '__main__':
    main()
