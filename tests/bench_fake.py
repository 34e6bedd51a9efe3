"""A script that keeps the contract of tests/bench but draws its results instead of training.

They, the clock too, depend on seed and hyp only. fake.skill and fake.std are the mean and standard
deviation of its accuracy in percent; fake.seconds is how long an epoch really takes.
"""

import math
import random
import time

import torch

hyp = {
    'opt': {'train_epochs': 2.0, 'batch_size': 64, 'lr': 10.0},
    'fake': {'skill': 94.0, 'std': 0.13, 'seconds': 0.0, 'word': 'x', 'list': [16, 24]},
    'aug': {'flip': True},
    'net': {'widths': {'block1': 8}},
}
RECIPES = {'report': {}, 'fast': {'fake.skill': 93.0, 'opt.train_epochs': 1.0}}


class UserError(Exception):
    pass


def synthetic_data(device, train=256, test=128):
    rng, data = torch.Generator().manual_seed(1), {}
    for split, n in (('train', train), ('test', test)):
        images = torch.randint(0, 255, (n, 4, 4, 3), dtype=torch.uint8, generator=rng)
        labels = torch.randint(0, 10, (n,), generator=rng)
        data[split] = {'images': images, 'labels': labels, 'classes': list('abcdefghij')}
    return data


def load_data(data_dir, device):
    return synthetic_data(device, test=64 if data_dir == 'other' else 128)


def train(data, seed, hyp=hyp, device=None, net=None, quiet=False, on_epoch=None):
    rng, fake = random.Random(f'{seed} {hyp}'), hyp['fake']
    rows = []
    for epoch in range(1, math.ceil(hyp['opt']['train_epochs']) + 1):
        row = {'epoch': epoch, 'train_loss': 1 + rng.random() / epoch, 'train_acc': 0.8}
        row['test_acc'] = None if quiet else 0.8 + 0.05 * epoch
        row |= {'clock_seconds': 0.1 * epoch, 'eval_seconds': 0.0}
        rows.append(row)
        time.sleep(fake['seconds'])
        if on_epoch:
            on_epoch(row)
    accuracy = min(1.0, rng.gauss(fake['skill'], fake['std']) / 100)
    return {'tta_acc': accuracy, 'clock_seconds': rng.gauss(3, 0.01), 'epochs': rows}, None
