"""The contract between the tool and a script. No other module knows a name of a script.

A script is a Python file that is complete alone. It needs

    hyp                    a dict of groups of hyperparameters: bool, int, float, str or list; its
                           keys are text without dots
    load_data(data_dir, device)
                           {'train': split, 'test': split}; a split has images (uint8 [N, ...]),
                           labels (int64 [N]) and classes (a list)
    train(data, seed, hyp=..., device=..., quiet=..., on_epoch=...)
                           a run from scratch. Returns (record, net): record['tta_acc'] is the
                           accuracy (0 to 1), record['clock_seconds'] the training time (over 0),
                           record['epochs'] a list of rows with epoch, train_loss, train_acc,
                           test_acc (None if quiet), clock_seconds and eval_seconds.
                           on_epoch(row) is called after every epoch, while no time is measured

and may have

    UserError              an exception whose message is for the user
    check_hyp(hyp)         raises UserError for values out of range, before any work
    synthetic_data(device) what load_data returns, made up: for --synthetic
    warm_up(data, hyp, device, net=None, step=None)
                           whatever must not be in the first run's time
    make_net(hyp, device, num_classes=...) and compile_step(net)
                           for compile=true: `compile_step` compiles the network in place and
                           returns its training step; both are given to train(net=..., step=...)
    hyp['opt']['batch_size'] and hyp['opt']['train_epochs']
                           for the FLOP of a run, and for the short warm-up of a script that
                           has no warm_up
    CifarLoader, make_net, make_optimizer, train_step
                           for `speed`

device is a torch.device, or the text 'cpu' where the script has not imported torch at its top. The
tool gives copies of hyp, and never changes it. Each arm has a process of its own.
"""

import copy
import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bench import records
from bench.errors import UserError, describe, one_line

NEEDED = ('hyp', 'load_data', 'train')
COMPILING = ('make_net', 'compile_step')
OPTIONAL = ('check_hyp', 'synthetic_data', 'warm_up', *COMPILING)
SPEED = ('CifarLoader', 'make_net', 'make_optimizer', 'train_step')
BATCH_SIZE = 'opt.batch_size'
TRAIN_EPOCHS = 'opt.train_epochs'
LEAVES = (bool, int, float, str, list)
WARM_UP_BATCHES = 3
WARM_UP_TEST_IMAGES = 1000


@dataclass(frozen=True)
class Facts:
    """All that the process which compares the scripts knows of one; it never runs its code."""

    path: str
    name: str  # for people: the file's stem without airbench94_
    source: str
    sha256: str  # of the source
    hyp: dict  # flat: {'opt.lr': 10.0}
    offers: list  # the names of OPTIONAL and SPEED that it has


def script_name(path: str) -> str:
    """Return what people call a script."""
    return one_line(Path(path).stem.removeprefix('airbench94_')) or 'script'


class Script:
    """A script at work, in the process of its arm. hyp is flat in all arguments."""

    def __init__(self, path: str, source: str, module: ModuleType):
        self.path = path
        self.source = source
        self.module = module
        self.tree = copy.deepcopy(module.hyp)  # the script may change its own

    def has(self, *names: str) -> bool:
        """Return whether the script has all these names."""
        return all(hasattr(self.module, name) for name in names)

    def facts(self) -> Facts:
        return Facts(
            path=self.path,
            name=script_name(self.path),
            source=self.source,
            sha256=hashlib.sha256(self.source.encode()).hexdigest(),
            hyp=records.flat(self.tree),
            offers=[name for name in dict.fromkeys(OPTIONAL + SPEED) if self.has(name)],
        )

    @property
    def user_errors(self) -> tuple:
        """The exceptions whose message is for the user."""
        own = getattr(self.module, 'UserError', None)
        return (UserError, own) if isinstance(own, type) else (UserError,)

    def nested(self, hyp: dict) -> dict:
        """Return a new nested dict of flat hyperparameters, as the script has it."""
        tree = copy.deepcopy(self.tree)
        for key, value in hyp.items():
            *groups, name = key.split('.')
            branch = tree
            for group in groups:
                branch = branch[group]
            branch[name] = copy.deepcopy(value)
        return tree

    def check_hyp(self, hyp: dict):
        """Raise the script's UserError for values out of range."""
        if self.has('check_hyp'):
            self.module.check_hyp(self.nested(hyp))

    def load_data(self, data_dir: str | None) -> dict:
        """Return the data on the CPU; without data_dir the synthetic ones."""
        if data_dir is None and not self.has('synthetic_data'):
            raise UserError('--synthetic: it has no synthetic_data')
        if data_dir is None:
            data = self.module.synthetic_data(cpu())
        else:
            data = self.module.load_data(data_dir, cpu())
        for split in ('train', 'test'):
            for key in ('images', 'labels', 'classes'):
                if not isinstance(data, dict) or key not in data.get(split, {}):
                    raise UserError(f'its data lack {split} {key}')
        return {split: data[split] for split in ('train', 'test')}

    def compile(self, hyp: dict, device, classes: int) -> dict:
        """Return the compiled network and its step, as arguments of `train` and `warm_up`."""
        net = self.module.make_net(self.nested(hyp), device, num_classes=classes)
        return {'net': net, 'step': self.module.compile_step(net)}

    def train(self, data: dict, seed: int, hyp: dict, device, **arguments) -> dict:
        """Train from scratch. Returns the checked record."""
        hyp = self.nested(hyp)
        result = self.module.train(data, seed, hyp=hyp, device=device, **arguments)
        record = result[0] if isinstance(result, tuple) and result else None
        if not records.is_run({'arm': '', **record} if isinstance(record, dict) else None):
            raise UserError(
                'train() must return (record, net), record with tta_acc, clock_seconds over 0, and '
                'epochs, a list of dicts with epoch, train_loss, ...'
            )
        if not 0 <= record['tta_acc'] <= 1:
            raise UserError(f'tta_acc is {record["tta_acc"]}; it must be from 0 to 1')
        return record

    def warm_up(self, data: dict, hyp: dict, device, compiled: dict):
        """Do what must not be in the first run's time: the script's own warm-up, or a short run.

        The short run trains for an epoch on three batches. A script without the hyperparameters
        for that makes a whole run.
        """
        if self.has('warm_up'):
            self.module.warm_up(data, self.nested(hyp), device, **compiled)
            return
        if BATCH_SIZE in hyp and TRAIN_EPOCHS in hyp:
            data = first_images(data, WARM_UP_BATCHES * hyp[BATCH_SIZE], WARM_UP_TEST_IMAGES)
            epochs = hyp[TRAIN_EPOCHS]
            hyp = {**hyp, TRAIN_EPOCHS: min(epochs, type(epochs)(1))}
        self.train(data, 0, hyp, device, quiet=True, on_epoch=lambda row: None, **compiled)

    def loader(self, data: dict, hyp: dict, device):
        """Return the loader of training batches, for `speed`."""
        tree = self.nested(hyp)
        batch_size = tree['opt']['batch_size']
        return self.module.CifarLoader(data, True, batch_size, tree['aug'], device=device)

    def training_step(self, hyp: dict, device, classes: int, compiled: bool) -> tuple:
        """Return a network, its optimizer, and step(net, optimizer, images, targets)."""
        if compiled:
            net, step = self.compile(hyp, device, classes).values()
        else:
            net = self.module.make_net(self.nested(hyp), device, num_classes=classes)
            step = self.module.train_step
        return net, self.module.make_optimizer(net, self.nested(hyp)), step


def cpu():
    """Return the CPU as a torch.device, or as text where the script has not imported torch."""
    torch = sys.modules.get('torch')
    return 'cpu' if torch is None else torch.device('cpu')


def first_images(data: dict, train: int, test: int) -> dict:
    """Return the data with the first images and labels only."""
    part = {}
    for split, count in (('train', train), ('test', test)):
        part[split] = dict(data[split])
        for key in ('images', 'labels'):
            part[split][key] = data[split][key][:count]
    return part


def load_script(path: str) -> Script:
    """Run the source of a file as a module. Raises UserError, whatever the file does."""
    try:
        source = records.decode(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        raise UserError(f'cannot read the script {path}: {reason}') from None
    # Not by importlib's loader: it may take a stale __pycache__, and leaves a new one behind.
    spec = importlib.util.spec_from_loader('bench_script', loader=None, origin=path)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = os.path.abspath(path)
    sys.modules[spec.name] = module  # torch.compile and dataclasses look a module up by its name
    try:
        exec(compile(source.removeprefix('\ufeff'), path, 'exec'), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f'{path} cannot be loaded: {describe(error, path)}') from None
    check_contract(module, path)
    return Script(path, source, module)


def odd_keys(tree: dict) -> list:
    """Return the keys that KEY=VALUE cannot name: those that are no text, or have a dot."""
    odd = []
    for key, value in tree.items():
        if not isinstance(key, str) or '.' in key:
            odd.append(key)
        if isinstance(value, dict):
            odd += odd_keys(value)
    return odd


def check_contract(module: ModuleType, path: str):
    """Raise UserError where a script lacks what the tool needs."""
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if missing:
        names = ', '.join(missing)
        raise UserError(f'{path} does not keep the contract of tests/bench: it lacks {names}')
    if not isinstance(module.hyp, dict):
        raise UserError(f'{path}: hyp of type {type(module.hyp).__name__}; it must be a dict')
    odd = odd_keys(module.hyp)
    if odd:
        raise UserError(f'{path}: the key {odd[0]!r} of hyp must be text without a dot')
    for key, value in records.flat(module.hyp).items():
        if not isinstance(value, LEAVES):
            kind = type(value).__name__
            raise UserError(
                f'{path}: {key} of type {kind}; hyp needs bool, int, float, str or list'
            )
