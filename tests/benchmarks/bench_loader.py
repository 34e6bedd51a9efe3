"""Both loaders from construction through some epochs of batches: images per second, and their ratio.

    python tests/benchmarks/bench_loader.py                       CIFAR-shaped synthetic images
    python tests/benchmarks/bench_loader.py --data-dir cifar10    the images of a data directory

The two scripts take turns, so that what else the machine does hits both. Each repeat prints a line.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_baseline as baseline
import airbench94_modified as modified


def seconds(script, data, device, batch_size, epochs):
    torch.manual_seed(0)
    start = script.now(device)
    loader = script.CifarLoader(data, batch_size=batch_size, aug=script.hyp['aug'], device=device)
    for _ in range(epochs):
        for _ in loader:
            pass
    return script.now(device) - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--batch-size', type=int, default=1024)
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    device = baseline.pick_device(args.device)
    data = baseline.load_data(args.data_dir, device) if args.data_dir else baseline.synthetic_data(device)
    n = len(data['train']['labels'])
    images = args.epochs * (n // args.batch_size) * args.batch_size
    print(f"{n} {'real' if args.data_dir else 'synthetic'} images, batch size {args.batch_size}, "
          f'{args.epochs} epochs; {baseline.environment(device)}', flush=True)
    ratios = []
    for repeat in range(args.repeats + 1):
        base, mod = (seconds(script, data, device, args.batch_size, args.epochs)
                     for script in (baseline, modified))
        if repeat:  # the first warms up
            ratios.append(base / mod)
            print(f'baseline {base:7.3f}s {images / base:10.0f} images/s   modified {mod:7.3f}s '
                  f'{images / mod:10.0f} images/s   ratio {ratios[-1]:.2f}', flush=True)
    print(f'modified / baseline images per second: median {statistics.median(ratios):.2f}, '
          f'{min(ratios):.2f} to {max(ratios):.2f}, n = {args.repeats}')


if __name__ == '__main__':
    main()
