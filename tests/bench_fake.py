"""A script that keeps the contract of tests/bench but draws its results instead of training.

They, the training time too, depend on seed and hyp only. fake.skill and fake.std are the mean and
standard deviation of its accuracy in percent; fake.seconds is how long an epoch really takes. It
does not import torch, so that a process of it starts at once.
"""

import math
import random
import time

import numpy as np

hyp = {
    'opt': {'train_epochs': 2.0, 'batch_size': 64, 'lr': 10.0},
    'fake': {'skill': 94.0, 'std': 0.13, 'seconds': 0.0, 'word': 'x', 'list': [16, 24]},
    'aug': {'flip': True},
    'net': {'widths': {'block1': 8}},
}


class UserError(Exception):
    pass


def check_hyp(hyp):
    if hyp['opt']['lr'] <= 0:
        raise UserError(f'opt.lr={hyp["opt"]["lr"]}: it must be over 0')


def synthetic_data(device, train=256, test=128):
    rng = np.random.default_rng(1)
    data = {}
    for split, n in (('train', train), ('test', test)):
        images = rng.integers(0, 255, (n, 4, 4, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, n)
        data[split] = {'images': images, 'labels': labels, 'classes': list('abcdefghij')}
    return data


def load_data(data_dir, device):
    return synthetic_data(device, test=64 if data_dir == 'other' else 128)


def train(data, seed, hyp=hyp, device=None, net=None, quiet=False, on_epoch=None, step=None):
    rng = random.Random(f'{seed} {hyp}')
    rows = []
    for epoch in range(1, math.ceil(hyp['opt']['train_epochs']) + 1):
        row = {'epoch': epoch, 'train_loss': 1 + rng.random() / epoch, 'train_acc': 0.8}
        row['test_acc'] = None if quiet else 0.8 + 0.05 * epoch
        row['clock_seconds'] = 0.1 * epoch
        row['eval_seconds'] = 0.0
        rows.append(row)
        time.sleep(hyp['fake']['seconds'])
        if on_epoch:
            on_epoch(row)
    accuracy = min(1.0, rng.gauss(hyp['fake']['skill'], hyp['fake']['std']) / 100)
    return {'tta_acc': accuracy, 'clock_seconds': rng.gauss(3, 0.01), 'epochs': rows}, None
