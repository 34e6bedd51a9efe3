"""An experiment at work: processes for the arms, turns, looks, the log."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from bench import data, records, report, stats
from bench.arms import Arm, make_arms
from bench.compare import accuracies
from bench.contract import TRAIN_EPOCHS, Facts
from bench.display import Display
from bench.errors import ScriptError, UserError
from bench.job import Job
from bench.records import Run
from bench.worker import Worker


def run_seed(base_seed: int, turn: int) -> int:
    """Return the seed of a run: the same for all arms of a turn."""
    return int(np.random.SeedSequence([base_seed, turn]).generate_state(1)[0])


class Experiment:
    """One process's part in an experiment: it gives its arms' processes turns, logs and shows."""

    def __init__(self, options: dict, job: Job):
        self.options = options
        self.job = job
        self.arms: list[Arm] = []
        self.scripts: dict[str, Facts] = {}  # by path
        self.loaded: dict[str, Worker] = {}  # path of a script -> its first process
        self.workers: dict[str, Worker] = {}  # arm's name -> its process
        self.warmup_seconds: dict[str, float] = {}
        self.data_facts: dict = {}  # of the data
        self.layout: dict = {}
        self.flop: list[int | None] = []
        self.folder: str | None = None  # of the log, once it is known to be the right one
        self.runs: list[Run] = []  # in the log
        self.unlogged: list[Run] = []  # finished, but the disk was full
        self.data_file = data.make_file()
        self.display = Display(['nobody'], 0, [])

    # ------------------------------------ Preparation ------------------------------------

    def prepare(self):
        """Check all that can be checked before training, and load the data."""
        options = self.options
        options['seed'] = self.job.share(options['seed'])
        self.arms = make_arms(options['scripts'], options['hyp'], options['sweep'], self.load)
        if options['until_sure'] and len(self.arms) < 2:
            raise UserError('--until-sure compares arms: give a second script or --sweep')
        for arm in self.arms:
            worker = self.loaded[arm.script.path]
            worker.label = arm.name
            worker.call('check', arm.hyp, options['device'], self.job.local_rank)
        self.start_workers()
        self.load_data()
        if options['resume']:
            self.check_resume(options['resume'])
            self.folder = options['resume']
            self.read_again()

    def load(self, path: str) -> Facts:
        """Return a script's facts, from its first process."""
        if path not in self.scripts:
            self.loaded[path] = Worker(path, self.data_file)
            self.scripts[path] = Facts(**self.loaded[path].answer())
        return self.scripts[path]

    def start_workers(self):
        """Give each arm a process: the first arm of a script takes the one that is there."""
        new = []
        for arm in self.arms:
            worker = self.loaded.pop(arm.script.path, None)
            if worker is None:
                worker = Worker(arm.script.path, self.data_file)
                new.append((arm, worker))
            worker.label = arm.name
            self.workers[arm.name] = worker
        for arm, worker in new:
            if Facts(**worker.answer()) != arm.script:
                raise UserError(f'{arm.script.path} was changed while it was loaded')

    def load_data(self):
        """Let the reference load the data, and all arms take them."""
        if self.job.rank == 0:
            self.make_data()
        facts = self.job.share(self.data_facts)  # rank 0 reads them, or downloads them, first
        if self.job.rank > 0:
            self.make_data()
            keys = records.differing(facts, self.data_facts)
            if keys:
                names = ', '.join(keys)
                raise UserError(f'the processes of torchrun read data that differ in {names}')
        for worker in self.workers.values():
            worker.send('open_data', self.layout, self.options['device'], self.job.local_rank)
        for worker in self.workers.values():
            worker.answer()

    def make_data(self):
        """Let the reference write the data to the file that all arms read."""
        options = self.options
        data_dir = None if options['synthetic'] else options['data_dir']
        made = self.workers[self.arms[0].name].call('make_data', data_dir, options['holdout'])
        self.data_facts = made['facts']
        self.layout = made['layout']

    def check_resume(self, folder: str):
        """Raise UserError where a log is not of the experiment at hand."""
        logged = records.read_experiment(folder)
        names = [arm.name for arm in self.arms]
        logged_names = [entry['name'] for entry in logged['arms']]
        records.refuse_other_values('the arms', {'names': logged_names}, {'names': names})
        for arm, entry in zip(self.arms, logged['arms'], strict=True):
            records.refuse_other_code(folder, entry, arm.script.source)
            hyp = json.loads(records.to_json(arm.hyp))  # as it was logged
            records.refuse_other_values(f'hyperparameters of {arm.name}', entry['hyp'], hyp)
        facts = dict(self.data_facts)
        logged_facts = dict(logged['data'])
        facts.pop('name')  # the same data may lie elsewhere
        logged_facts.pop('name')
        records.refuse_other_values('the data', logged_facts, facts)
        self.flop = [entry['flop'] for entry in logged['arms']]
        known = []
        for entry in logged['arms']:
            known.append((entry['name'], entry['sha256'], entry['hyp'], entry['compile']))
        seed = self.options['seed']
        for run in records.read([folder]).runs:
            arm = (run.arm, run.sha256, run.hyp, run.compile)
            if arm not in known or run.base_seed != seed:
                raise UserError(
                    f'--resume: {folder} has runs of another experiment ({run.arm}, seed '
                    f'{run.base_seed}): move them to another folder'
                )

    # ------------------------------------ The log ------------------------------------

    def open_log(self):
        """Count FLOP and make the log folder, or go on with that of --resume."""
        if self.job.rank == 0:
            if self.options['resume']:
                self.continue_log()
            else:
                self.flop = [self.count_flop(arm) for arm in self.arms]
                self.make_log()
        self.folder, self.flop = self.job.share((self.folder, self.flop))
        if self.job.rank > 0:
            records.read_experiment(self.folder)  # fails where the nodes do not share the folder

    def count_flop(self, arm: Arm) -> int | None:
        """Return the FLOP of a run of an arm; where they cannot be counted, say why."""
        counted = self.workers[arm.name].call('count_flop', arm.hyp)
        if 'reason' in counted:
            self.display.line(f'{arm.name} has no cost: {counted["reason"]}')
        return counted.get('flop')

    def kept_options(self) -> dict:
        """Return the options that the log keeps."""
        kept = dict(self.options)
        del kept['command']
        del kept['resume']
        return kept

    def continue_log(self):
        """Note in a log that its experiment goes on."""
        records.mend_last_lines(self.folder)
        content = records.read_experiment(self.folder)
        content['resumed'] = [*content.get('resumed', []), self.options['command']]
        content['options'] = self.kept_options()  # some may have been given again
        self.write_experiment(content)

    def make_log(self):
        """Make the log folder with the code and experiment.json."""
        self.folder = records.new_folder(self.options['log_dir'])
        content = {
            'schema': records.SCHEMA,
            'command': self.options['command'],
            'base_seed': self.options['seed'],
            'options': self.kept_options(),
            'arms': [],
            'data': self.data_facts,
        }
        paths = []
        for arm, flop in zip(self.arms, self.flop, strict=True):
            script = arm.script
            if script.path not in paths:
                paths.append(script.path)
            number = paths.index(script.path)
            entry = {
                'name': arm.name,
                'script': script.path,
                'code': f'code-{number}-{script.name}.py'.replace('/', ' '),
                'sha256': script.sha256,
                'hyp': arm.hyp,
                'compile': arm.compile,
                'flop': flop,
            }
            content['arms'].append(entry)
            records.write_file(self.folder, entry['code'], script.source.encode())
        self.write_experiment(content)

    def write_experiment(self, content: dict):
        text = records.to_json(content, indent=1)
        records.write_file(self.folder, records.EXPERIMENT, text.encode())

    def read_again(self):
        """Take the runs from the log: other processes may have written some."""
        if self.folder is None:
            return
        with contextlib.suppress(UserError):  # the folder is gone; then what is known
            self.runs = records.read([self.folder]).runs

    def results(self) -> report.Results:
        """Return what there is so far, to be judged as the options say."""
        return report.Results(
            records.by_arm([*self.runs, *self.unlogged]),
            target=self.options['target'],
            margin=self.options['margin'],
            until_sure=self.options['until_sure'],
            planned=self.options['runs'],
            searched=bool(self.options['sweep']),
            folders=[self.folder],
        )

    def keep_traceback(self, error: ScriptError) -> str:
        """Write a traceback of a script's bug beside the log. Returns where it is."""
        if self.folder is None:
            return ''
        name = f'error-{self.job.rank}.txt'
        try:
            records.write_file(self.folder, name, error.details.encode(errors='replace'))
        except UserError as problem:
            return f'; {problem}'
        return f'; the traceback is in {os.path.join(self.folder, name)}'

    # ------------------------------------ Runs ------------------------------------

    def warm_up(self, active: list[Arm]):
        """Prepare the arms, uncounted: before the first run that this process makes."""
        for number, arm in enumerate(active, start=1):
            self.display.line(f'Warm-up {number} of {len(active)}: {arm.name}')
            worker = self.workers[arm.name]
            self.warmup_seconds[arm.name] = worker.call('prepare', arm.hyp, arm.compile)
        self.display.begin()

    def turn_order(self, turn: int) -> list[Arm]:
        """Return the arms in the order of a turn, which does not depend on earlier ones."""
        rng = np.random.default_rng([self.options['seed'], turn])
        return [self.arms[i] for i in rng.permutation(len(self.arms))]

    def make_run(self, arm: Arm, turn: int):
        """Train once, log it, show it."""
        seed = run_seed(self.options['seed'], turn)

        def on_epoch(row: dict):
            self.display.epoch(arm.name, row, arm.hyp.get(TRAIN_EPOCHS, 1))

        worker = self.workers[arm.name]
        quiet = not self.options['curves']
        record = worker.call('train', seed, quiet, on_epoch=on_epoch, meanwhile=self.show_others)
        index = self.arms.index(arm)
        run = Run.from_json(
            {
                **record,
                'arm': arm.name,
                'arm_index': index,
                'script': arm.script.path,
                'sha256': arm.script.sha256,
                'hyp': arm.hyp,
                'compile': arm.compile,
                'run': turn,
                'seed': seed,
                'base_seed': self.options['seed'],
                'data': self.data_facts,
                'warmup_seconds': self.warmup_seconds[arm.name],
                'flop': self.flop[index],
            }
        )
        try:
            run = records.append_run(self.folder, self.job.rank, run)
        except UserError:
            self.unlogged.append(run)
            raise
        self.runs.append(run)
        self.display.finished(run)

    def show_others(self):
        """Show what the other processes have finished."""
        if self.job.rank == 0 and self.job.world > 1:
            for run in self.follower.new_runs():
                self.runs.append(run)
                self.display.finished(run)

    def make_turns(self, turns: range, active: list[Arm]):
        """Make this process's share of some turns; then wait for the others' shares."""
        for turn in turns:
            if turn % self.job.world != self.job.rank:
                continue
            for arm in self.turn_order(turn):
                if arm not in active or (arm.name, turn) in self.made:
                    continue
                if not self.warmup_seconds:
                    self.warm_up(active)
                self.make_run(arm, turn)
                self.show_others()
        self.job.wait(self.show_others)
        self.show_others()

    def undecided(self, active: list[Arm], n: int) -> list[str]:
        """Return the names of the arms that go on after n turns; none if all are decided."""
        runs = records.read([self.folder]).runs
        by_arm = records.by_arm([run for run in runs if run.turn <= n])
        comparisons = len(self.arms) - 1
        looks, p = stats.sequential_plan(self.options['runs'], comparisons)
        points = self.options['until_sure']
        reference = active[0].name
        going = []
        for arm in active[1:]:
            samples = accuracies(by_arm[arm.name]), accuracies(by_arm[reference])
            if stats.sequential(*samples, looks, p, points).verdict == 'undecided':
                going.append(arm.name)
        return [reference, *going] if going else []

    def make_runs(self):
        """Make all runs that the log lacks, look by look."""
        until_sure = self.options['until_sure']
        runs = self.options['runs']
        self.made = {(run.arm, run.turn) for run in self.runs}
        self.follower = records.Follower(self.folder, self.job.rank)
        for _ in self.follower.new_runs():
            pass  # those of an earlier process are known
        active = list(self.arms)
        first = 1
        for n in stats.planned_looks(runs) if until_sure else [runs]:
            self.make_turns(range(first, n + 1), active)
            first = n + 1
            if not until_sure:
                continue
            names = self.job.share(self.undecided(active, n) if self.job.rank == 0 else None)
            for arm in active:
                if arm.name not in names:
                    self.workers[arm.name].close()  # its memory is free again
            active = [arm for arm in active if arm.name in names]
            if not active:
                break

    # ------------------------------------ The end ------------------------------------

    def close(self):
        """End the processes of the arms."""
        self.display.close()
        for worker in [*self.loaded.values(), *self.workers.values()]:
            worker.close()
        os.close(self.data_file)

    def remove_empty_log(self):
        """Remove the folder of an experiment that has no run and no traceback."""
        if self.folder is None or self.options['resume'] or self.job.rank > 0:
            return
        folder = Path(self.folder)
        if not [*folder.glob('runs*'), *folder.glob('error-*')]:
            shutil.rmtree(folder, ignore_errors=True)
