"""Makes the runs of an experiment: warm-up, turns, looks."""

import contextlib
import math
import shutil
import time
import traceback
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from bench import records, report, stats
from bench.arms import Arm, make_arms
from bench.cost import first_images, run_flop
from bench.errors import ScriptError, UserError, describe, one_line
from bench.job import Job, device_name, pick_device
from bench.progress import Silent

WARM_UP_BATCHES = 3
WARM_UP_TEST_IMAGES = 1000


@dataclass
class Experiment:
    """All that the processes of an experiment agree on, and what this one has of it."""

    options: dict
    arms: list[Arm]
    flop: list[int | None]
    device: torch.device
    data: dict
    facts: dict  # of the data
    folder: str
    runs: list[dict]  # in the log
    unlogged: list[dict]  # finished, but the disk was full
    resumed: bool

    def read_again(self):
        """Takes the runs from the log: a signal may come between a line and its record, and other
        processes may have written lines that this one has not seen."""
        with contextlib.suppress(UserError):  # the folder is gone; then what is known
            self.runs = records.read([self.folder]).runs

    def results(self) -> report.Results:
        """What there is so far, to be judged as the options say."""
        return report.Results(
            records.by_arm([*self.runs, *self.unlogged]),
            target=self.options['target'],
            margin=self.options['margin'],
            until_sure=self.options['until_sure'],
            planned=self.options['runs'],
            searched=bool(self.options['sweep']),
            folders=[self.folder],
        )


# ---------------------------------------- Scripts at work ----------------------------------------


@contextlib.contextmanager
def script_errors(arm: Arm):
    """Turns what a script raises into one line: its own message, or the place of its bug."""
    try:
        yield
    except arm.script.errors as error:
        raise UserError(f'{arm.name}: {one_line(error)}') from None
    except (Exception, SystemExit) as error:
        failure = ScriptError(f'{arm.name}: {describe(error, arm.script.path)}')
        failure.details = traceback.format_exc()
        raise failure from None


def check_record(arm: Arm, result: object) -> dict:
    """The record of a run, if it is one."""
    record = result[0] if isinstance(result, tuple) and result else result
    known = isinstance(record, dict) and records.is_run({'arm': arm.name, **record})
    if not known or not 0 <= record['tta_acc'] <= 1:
        raise UserError(
            f'{arm.name}: train() must return (record, net), record with tta_acc, clock_seconds, '
            'and epochs, a list of dicts with epoch, train_loss, ...'
        )
    return record


def warm_up(
    arm: Arm, data: dict, device: torch.device, net: torch.nn.Module | None
) -> float | None:
    """What must not be on the first run's clock: the script's own warm-up, or a short training.

    Returns the seconds of a run where the script's warm-up tells them.
    """
    module = arm.script.module
    if hasattr(module, 'warm_up'):
        seconds = module.warm_up(data, arm.nested_hyp(), device, net=net)
        return seconds if isinstance(seconds, float) and math.isfinite(seconds) else None
    epochs, batch_size = arm.hyp.get('opt.train_epochs'), arm.hyp.get('opt.batch_size')
    try:
        part = first_images(data, WARM_UP_BATCHES * batch_size, WARM_UP_TEST_IMAGES)
        hyp = arm.nested_hyp(**{'opt.train_epochs': min(epochs, type(epochs)(1))})
        module.train(part, 0, hyp=hyp, device=device, net=net, quiet=True)
    except Exception:  # no such keys, or data that cannot be cut: then a whole run
        module.train(data, 0, hyp=arm.nested_hyp(), device=device, net=net, quiet=True)
    return None


def prepare_arm(
    arm: Arm, data: dict, device: torch.device
) -> tuple[torch.nn.Module | None, float, float | None]:
    """The compiled network of an arm, if it has one, the seconds of its warm-up, and of a run."""
    start, net = time.perf_counter(), None
    with script_errors(arm):
        if arm.compile:
            module = arm.script.module
            net = module.make_net(
                arm.nested_hyp(), device, num_classes=len(data['train']['classes'])
            )
            net = module.compile_net(net) or net
        run_seconds = warm_up(arm, data, device, net)
    return net, time.perf_counter() - start, run_seconds


# ---------------------------------------- Preparation ----------------------------------------


def load_data(arm: Arm, options: dict, device: torch.device) -> dict:
    """The data of all arms, by the first script's functions."""
    module = arm.script.module
    if options['synthetic'] and not hasattr(module, 'synthetic_data'):
        raise UserError(f'--synthetic: {arm.script.name} has no synthetic_data')
    with script_errors(arm):
        if options['synthetic']:
            data = module.synthetic_data(device)
        else:
            data = module.load_data(options['data_dir'], device)
        return {split: data[split] for split in ('train', 'test')}


def data_facts(data: dict, options: dict) -> dict:
    """The name, the sizes and checksums of the data."""
    facts = {'name': 'synthetic images' if options['synthetic'] else options['data_dir']}
    for split, content in data.items():
        facts[split] = len(content['labels'])
        for key in ('images', 'labels'):
            raw = content[key].cpu().contiguous().view(torch.uint8).numpy()
            facts[f'{split}_{key}_crc32'] = zlib.crc32(raw)
    facts['classes'] = len(data['train']['classes'])
    return facts


def describe_arm(arm: Arm, flop: int | None, number: int) -> dict:
    """An arm in experiment.json."""
    return {
        'name': arm.name,
        'script': arm.script.path,
        'code': f'code-{number}-{arm.script.name}.py'.replace('/', ' '),
        'sha256': arm.script.sha256,
        'hyp': arm.hyp,
        'recipe': arm.recipe,
        'compile': arm.compile,
        'flop': flop,
    }


def open_folder(
    options: dict, arms: list[Arm], facts: dict, data: dict
) -> tuple[str, list[int | None]]:
    """The log folder, new or that of --resume, and the FLOP of the arms."""
    kept = {key: value for key, value in options.items() if key not in ('command', 'resume')}
    folder = options['resume']
    if folder:
        content = check_resume(folder, arms, facts)
        records.drop_cut_lines(folder)
        content['resumed'] = [*content.get('resumed', []), options['command']]
        content['options'] = kept  # some may have been given again
        flop = [arm['flop'] for arm in content['arms']]
        records.write_file(folder, records.EXPERIMENT, records.to_json(content, indent=1).encode())
        return folder, flop
    flop = [run_flop(arm, facts['train'], facts['test'], data) for arm in arms]
    folder = records.new_folder(options['log_dir'])
    try:
        content = {
            'schema': records.SCHEMA,
            'command': options['command'],
            'base_seed': options['seed'],
            'options': kept,
            'arms': write_code(folder, arms, flop),
            'data': facts,
        }
        records.write_file(folder, records.EXPERIMENT, records.to_json(content, indent=1).encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # without experiment.json it is of no use
        raise
    return folder, flop


def write_code(folder: str, arms: list[Arm], flop: list[int | None]) -> list[dict]:
    """Writes each distinct script to the log folder. Returns the arms of experiment.json."""
    paths = list(dict.fromkeys(arm.script.path for arm in arms))
    described = []
    for arm, count in zip(arms, flop, strict=True):
        described.append(describe_arm(arm, count, paths.index(arm.script.path)))
        records.write_file(folder, described[-1]['code'], arm.script.source)
    return described


def check_resume(folder: str, arms: list[Arm], facts: dict) -> dict:
    """The experiment.json of a log. Raises UserError where it is not of the experiment at hand."""
    logged = records.read_experiment(folder)
    names = [entry['name'] for entry in logged['arms']], [arm.name for arm in arms]
    records.refuse_other_values('the arms', {'names': names[0]}, {'names': names[1]})
    for arm, entry in zip(arms, logged['arms'], strict=True):
        records.refuse_other_code(folder, entry, arm.script.source)
        records.refuse_other_values(f'hyperparameters of {arm.name}', entry['hyp'], arm.hyp)
    without_name = [
        {key: value for key, value in x.items() if key != 'name'} for x in (logged['data'], facts)
    ]
    records.refuse_other_values('the data', *without_name)
    return logged


def prepare(options: dict, job: Job) -> Experiment:
    """Checks all that can be checked before training, loads the data, opens the log folder."""
    arms = make_arms(options['scripts'], options['hyp'], options['sweep'])
    if options['until_sure'] and len(arms) < 2:
        raise UserError('--until-sure compares arms: give a second script or --sweep')
    device = pick_device(options['device'])
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    shared = None
    if job.rank == 0:
        data = load_data(arms[0], options, device)
        with script_errors(arms[0]):
            facts = data_facts(data, options)
        folder, flop = open_folder(options, arms, facts, data)
        shared = (folder, flop, facts)
    folder, flop, facts = job.share(shared)
    if job.rank > 0:
        records.read_experiment(folder)  # fails where the nodes do not share the log folder
        data = load_data(arms[0], options, device)
        own = data_facts(data, options)
        records.refuse_other_values('the data of the processes', facts, own)
    log = records.read([folder])
    resumed = bool(options['resume'])
    return Experiment(options, arms, flop, device, data, facts, folder, log.runs, [], resumed)


# ---------------------------------------- Runs ----------------------------------------


def run_seed(base_seed: int, turn: int) -> int:
    """The seed of a run: the same for all arms of a turn."""
    return int(np.random.SeedSequence([base_seed, turn]).generate_state(1)[0])


class Runner:
    """One process of an experiment."""

    def __init__(self, experiment: Experiment, job: Job, display: Silent):
        self.experiment, self.job, self.display = experiment, job, display
        self.follower = records.Follower(experiment.folder, job.rank)
        self.made = {(run['arm'], run['run']) for run in experiment.runs}
        for _ in self.follower.new_runs():
            pass  # those of an earlier process are known
        self.prepared: dict[str, tuple] = {}

    def warm_up(self):
        """Prepares every arm, uncounted: before the first run that this process makes."""
        for number, arm in enumerate(self.experiment.arms, start=1):
            self.display.line(f'Warm-up {number} of {len(self.experiment.arms)}: {arm.name}')
            self.prepared[arm.name] = prepare_arm(arm, self.experiment.data, self.experiment.device)
        self.show_estimate()
        self.display.begin()

    def looks(self) -> list[int]:
        """The turns after which the processes wait for each other: a look's, or the last."""
        runs = self.experiment.options['runs']
        return stats.planned_looks(runs) if self.experiment.options['until_sure'] else [runs]

    def show_estimate(self):
        """How long it will take, before the first run has shown it."""
        seconds = {name: run_seconds for name, (_, _, run_seconds) in self.prepared.items()}
        if None in seconds.values():
            return
        done = {(run['arm'], run['run']) for run in self.experiment.runs}
        left, first = 0.0, 1
        for n in self.looks():
            shares = [0.0] * self.job.world  # the processes wait for each other at a look
            for turn in range(first, n + 1):
                todo = [name for name in seconds if (name, turn) not in done]
                shares[turn % self.job.world] += sum(seconds[name] for name in todo)
            left, first = left + max(shares), n + 1
        turn, left = map(report.duration, (sum(seconds.values()), left))
        most = 'at most ' if self.experiment.options['until_sure'] else ''
        self.display.line(f'About {turn} a turn, {most}{left} left')

    def turn_order(self, turn: int) -> list[Arm]:
        """The arms in the order of a turn, which does not depend on what was made before."""
        rng = np.random.default_rng([self.experiment.options['seed'], turn])
        return [self.experiment.arms[i] for i in rng.permutation(len(self.experiment.arms))]

    def machine_facts(self) -> dict:
        """What a record may say better itself."""
        return {
            'device': device_name(self.experiment.device),
            'torch': torch.__version__,
            'dtype': None,
            'peak_bytes': None,
        }

    def identity_of(self, arm: Arm) -> dict:
        """What the tool knows better than a record."""
        index = self.experiment.arms.index(arm)
        return {
            'arm': arm.name,
            'arm_index': index,
            'script': arm.script.path,
            'sha256': arm.script.sha256,
            'hyp': arm.hyp,
            'recipe': arm.recipe,
            'compile': arm.compile,
            'flop': self.experiment.flop[index],
            'base_seed': self.experiment.options['seed'],
            'data': self.experiment.facts,
        }

    def make_run(self, arm: Arm, turn: int):
        """Trains once, logs it, shows it."""
        experiment, options = self.experiment, self.experiment.options
        if not self.prepared:
            self.warm_up()
        net, warmup_seconds, _ = self.prepared[arm.name]
        seed, start = run_seed(options['seed'], turn), time.perf_counter()
        if experiment.device.type == 'cuda':  # the peak is that of the run, not of the process
            torch.cuda.reset_peak_memory_stats(experiment.device)

        def on_epoch(row):
            self.display.epoch(arm.name, row, arm.hyp.get('opt.train_epochs', 1))

        with script_errors(arm):
            record = check_record(
                arm,
                arm.script.module.train(
                    experiment.data,
                    seed,
                    hyp=arm.nested_hyp(),
                    device=experiment.device,
                    net=net,
                    quiet=not options['curves'],
                    on_epoch=on_epoch if self.display.wants_epochs else None,
                ),
            )
        own = {**self.machine_facts(), **record, **self.identity_of(arm)}
        own |= {'run': turn, 'seed': seed, 'warmup_seconds': warmup_seconds}
        own.setdefault('wall_seconds', time.perf_counter() - start)
        try:
            experiment.runs.append(records.append_run(experiment.folder, self.job.rank, own))
        except UserError:
            experiment.unlogged.append(own)
            raise
        self.display.finished(experiment.runs[-1])

    def show_others(self):
        """Shows what the other processes have finished."""
        if self.job.rank == 0 and self.job.world > 1:
            for record in self.follower.new_runs():
                self.experiment.runs.append(record)
                self.display.finished(record)

    def make_turns(self, turns: range, active: list[Arm]):
        """This process's share of some turns; then waits for the others' shares."""
        for turn in turns:
            if turn % self.job.world != self.job.rank:
                continue
            for arm in self.turn_order(turn):
                if arm in active and (arm.name, turn) not in self.made:
                    self.make_run(arm, turn)
                    self.show_others()
        self.job.wait(self.show_others)
        self.show_others()

    def undecided(self, arms: list[Arm], n: int) -> list[str]:
        """The names of the arms that go on after n turns; none if all are decided."""
        known = records.read([self.experiment.folder]).runs
        by_arm = records.by_arm([run for run in known if run['run'] <= n])
        samples = {name: report.percent(runs) for name, runs in by_arm.items()}
        reference, *others = (arm.name for arm in arms)
        comparisons = len(self.experiment.arms) - 1
        looks, p = report.sequential_plan(self.experiment.options['runs'], comparisons)
        points = self.experiment.options['until_sure']
        going = []
        for name in others:
            found = stats.sequential(samples[name], samples[reference], looks, p, points)
            if found.verdict == 'undecided':
                going.append(name)
        return [reference, *going] if going else []

    def make_runs(self):
        """All runs that the log lacks, look by look."""
        options, active, first = self.experiment.options, list(self.experiment.arms), 1
        for n in self.looks():
            self.make_turns(range(first, n + 1), active)
            first = n + 1
            if options['until_sure']:
                names = self.job.share(self.undecided(active, n) if self.job.rank == 0 else None)
                active = [arm for arm in active if arm.name in names]
            if not active:
                break
