"""Which hyperparameters make a recipe of 0.6 of the cost accurate, and which such recipe is best?

Worker 0: a fractional factorial design (2^(11-6), resolution IV) of eleven factors around one recipe, replicate by
replicate; then recipes with the better level of each factor (+0.03 points or more in the fit of the main effects),
beside the baseline. Worker 1: networks of other widths, at the same time, with the hyperparameters as they are.

    python search.py LAB_DIR DATA_DIR OUT_DIR SECONDS_1 SECONDS_2
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import multiprocessing

sys.path.insert(0, sys.argv[1])
import lab  # noqa: E402

DATA, OUT = sys.argv[2], Path(sys.argv[3])
SECONDS = [float(x) for x in sys.argv[4:6]]
BASE = {'opt.train_epochs': 9.9, 'opt.small_sizes': [24] * 5, 'net.tta_share': 0.2}
KEEP = [[1] * 5 + [0.7] * 4, [1] * 3 + [0.78] * 2 + [0.78] * 5]
FACTORS = {  # name: its two levels
    'opt.weight_decay': (0.0153, 0.02),
    'opt.momentum': (0.85, 0.8),
    'opt.lr': (11.5, 14.0),
    'net.batchnorm_momentum': (0.6, 0.5),
    'opt.lr_end': (0.07, 0.0),
    'opt.label_smoothing': (0.2, 0.15),
    'opt.bias_scaler': (64.0, 32.0),
    'opt.whiten_bias_epochs': (3, 1),
    'opt.drop_noise': (0.0, 0.5),
    'opt.lr_peak': (0.23, 0.15),
    'opt.keep_shares': KEEP,
}
# Factors 6 to 11 are products of an odd number of the first five: no main effect meets a two-factor interaction.
GENERATORS = [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 2, 3), (0, 2, 4), (0, 3, 4)]


def design():
    rows = []
    for base in itertools.product((0, 1), repeat=5):
        rows.append((*base, *(sum(base[i] for i in g) % 2 for g in GENERATORS)))
    return rows


def values(levels):
    return {name: two[level] for (name, two), level in zip(FACTORS.items(), levels)}


def run(data, net, changes, seed, stage, file):
    hyp = lab.changed_hyp([f'{key}={json.dumps(value)}' for key, value in changes.items()])
    record, net = lab.train(data, seed, hyp=hyp, net=net, quiet=True)
    loader = lab.CifarLoader(data, False, 2000)
    extra = {share: lab.evaluate(net, loader, 2, share) for share in (0.1, 0.3, 0.5, 1.0)} if stage != 1 else {}
    record['epochs'] = record['epochs'][-1:]
    record |= {'stage': stage, 'changes': changes, 'shares': extra}
    file.write(json.dumps(record) + '\n')
    file.flush()
    return 100 * record['tta_acc']


def compiled(data, changes):
    lists = [f'{key}={json.dumps(value)}' for key, value in changes.items()]
    hyp = lab.changed_hyp(lists)
    net = lab.compile_net(lab.make_net(hyp, 'cuda'))
    lab.warm_up(data, hyp, torch.device('cuda'), net)
    return net


def real_data():
    while not Path(DATA, 'ready').exists():
        time.sleep(0.1)
    return lab.load_data(DATA, 'cuda')


def profile(data, net):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for size in (24, 32):
        changes = ['opt.train_epochs=2', f'opt.small_sizes=[{size},{size}]', 'opt.whiten_bias_epochs=0', 'net.tta_share=0.2']
        with torch_profile(activities=[ProfilerActivity.CUDA]) as prof:
            lab.train(data, 1, lab.changed_hyp(changes), net=net, quiet=True)
        table = prof.key_averages().table(sort_by='cuda_time_total', row_limit=80, max_name_column_width=160)
        (OUT / f'profile-{size}.txt').write_text(table)


def main_worker(start):
    few, file = lab.synthetic_data('cuda', 2048, 4000), open(OUT / 'runs.jsonl', 'a')
    net = compiled(few, {'opt.small_sizes': [24], 'net.tta_share': 0.2})
    lab.warm_up(few, lab.hyp, torch.device('cuda'), net)
    print(f'worker 0 is warm at {time.time() - start:.0f} s', flush=True)
    data = real_data()
    print(f'worker 0 has its data at {time.time() - start:.0f} s', flush=True)
    rng, rows, x, y, first = np.random.default_rng(501), design(), [], [], time.time()
    for turn in range(1, 9):
        for i in rng.permutation(len(rows)):
            if time.time() - first > SECONDS[0]:
                break
            y.append(run(data, net, BASE | values(rows[i]), 1000 * 501 + turn, 1, file))
            x.append([1, *(2 * np.array(rows[i]) - 1)])
    x, y = np.array(x), np.array(y)
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    std = (y - x @ fit).std(ddof=x.shape[1])
    print(f'Stage 1: {len(y)} runs, mean {y.mean():.3f}, residual std {std:.3f}, s.e. of an effect {2 * std / len(y) ** 0.5:.3f}')
    effects = dict(zip(FACTORS, 2 * fit[1:]))
    for name, effect in effects.items():
        print(f'  {name:24} {effect:+.3f}')
    best = values([int(effect >= 0.03) for effect in effects.values()])
    spread = best.pop('opt.keep_shares') == KEEP[1]
    print('Best:', best, 'spread drop' if spread else '', flush=True)

    def drop(small, large, share, spread=spread):
        """So many epochs on 24 pixels, and then on 32, of which the last 0.9 is whole."""
        keep = [1] * small + [share] * (large - 1)
        if spread:
            keep = [1] * 3 + [share] * (small + large - 3)
        return {'opt.small_sizes': [24] * small, 'opt.train_epochs': small + large - 0.1, 'opt.keep_shares': keep,
                'net.tta_share': 0.2}

    recipes = {
        'baseline': {},
        'baseline, best levels': best,
        '5+5 .7': best | drop(5, 5, 0.7),
        '6+5 .7': best | drop(6, 5, 0.7),
        '5+5 .55': best | drop(5, 5, 0.55),
        '6+5 .55': best | drop(6, 5, 0.55),
        '5+6 .55': best | drop(5, 6, 0.55),
        '6+6 .5': best | drop(6, 6, 0.5),
        '5+5 1': best | drop(5, 5, 1, False),
        '4+6 .6': best | drop(4, 6, 0.6),
        '7+4 .7': best | drop(7, 4, 0.7),
        '8+4 .6': best | drop(8, 4, 0.6),
    }
    first, found = time.time(), {name: [] for name in recipes}
    for turn in range(1, 20):
        for name in rng.permutation(list(recipes)):
            if time.time() - first < SECONDS[1]:
                found[name].append(run(data, net, recipes[name], 1000 * 502 + turn, name, file))
    for name, accuracies in found.items():
        print(f'  {name:24} {np.mean(accuracies):.3f} +- {np.std(accuracies, ddof=1) / len(accuracies) ** 0.5:.3f} n={len(accuracies)} {recipes[name]}')
    try:
        profile(data, net)
    except Exception as error:
        print('profile:', error)
    print(f'worker 0 ends at {time.time() - start:.0f} s', flush=True)


def width_worker(start):
    few, file = lab.synthetic_data('cuda', 2048, 4000), open(OUT / 'runs-1.jsonl', 'a')
    widths = [(64, 192, 256), (48, 256, 256), (64, 224, 224)]
    nets = []
    for width in widths:
        changes = {f'net.widths.block{i + 1}': width[i] for i in range(3)}
        nets.append((changes, compiled(few, changes | {'opt.small_sizes': [24], 'net.tta_share': 0.2})))
    print(f'worker 1 is warm at {time.time() - start:.0f} s', flush=True)
    data, found = real_data(), {width: [] for width in widths}
    for turn in range(1, 9):
        for width, (changes, net) in zip(widths, nets):
            changes = changes | {'opt.small_sizes': [24] * 4, 'net.tta_share': 0.2}
            found[width].append(run(data, net, changes, 1000 * 503 + turn, f'width {width}', file))
    for width, a in found.items():
        print(f'  fast94 {width} {np.mean(a):.3f} +- {np.std(a, ddof=1) / len(a) ** 0.5:.3f} n={len(a)}', flush=True)


if __name__ == '__main__':
    OUT.mkdir(parents=True, exist_ok=True)
    context, start = multiprocessing.get_context('spawn'), time.time()
    workers = [context.Process(target=target, args=(start,)) for target in (main_worker, width_worker)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
