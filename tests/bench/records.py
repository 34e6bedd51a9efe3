"""The log of an experiment: a folder with experiment.json, the code, a line per finished run."""

import contextlib
import datetime
import difflib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import UserError, one_line

SCHEMA = 1
EXPERIMENT = 'experiment.json'
DIFF_LINES = 12


@dataclass
class Log:
    """What `read` found."""

    runs: list[dict]
    experiment: dict | None = None  # where everything is of one experiment
    common: list[str] = field(default_factory=list)  # what --hyp gave all arms
    notes: list[str] = field(default_factory=list)


# ---------------------------------------- Writing ----------------------------------------


def new_folder(log_dir: str) -> str:
    """Creates logs/<UTC time>-bench-<short id>."""
    started = datetime.datetime.now(datetime.timezone.utc)
    folder = os.path.join(log_dir, f'{started:%Y%m%dT%H%M%SZ}-bench-{os.urandom(3).hex()}')
    with disk_errors(folder):
        os.makedirs(folder)
    return folder


@contextlib.contextmanager
def disk_errors(path: str):
    """Turns the errors of a disk (full, read-only, gone) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {one_line(path)}: {error.strerror}') from None


def write_file(folder: str, name: str, content: bytes):
    """A file that is there as a whole or not at all, also after a power cut."""
    path = os.path.join(folder, name)
    with disk_errors(path):
        with open(f'{path}.part', 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f'{path}.part', path)


def to_json(value: object, **options) -> str:
    """JSON with null for numbers that are not finite, and plain numbers for tensors and numpy's."""
    text = json.dumps(value, default=lambda x: x.item() if hasattr(x, 'item') else str(x))
    return json.dumps(json.loads(text, parse_constant=lambda name: None), **options)


def runs_file(rank: int) -> str:
    return f'runs-{rank}.jsonl' if rank else 'runs.jsonl'


def append_run(folder: str, rank: int, record: dict) -> dict:
    """Appends a run; its line is on the disk on return. Returns it as it will be read again."""
    path, line = os.path.join(folder, runs_file(rank)), to_json(record)
    with disk_errors(path), open(path, 'ab', buffering=0) as file:
        end = file.tell()
        data = f'{line}\n'.encode()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, end)  # no half line for the next one to join
            raise
    return json.loads(line)


def drop_cut_lines(folder: str):
    """Truncates what a kill left of a last line, so that the next one does not join it."""
    for path in sorted(Path(folder).glob('runs*.jsonl')):
        with disk_errors(str(path)):
            os.truncate(path, path.read_bytes().rfind(b'\n') + 1)


# ---------------------------------------- Reading ----------------------------------------


class Follower:
    """Reads the lines that other processes add to a log folder."""

    def __init__(self, folder: str, own_rank: int = 0):
        self.folder = Path(folder)
        self.own = runs_file(own_rank)
        self.seen: dict[str, int] = {}

    def new_runs(self) -> Iterator[dict]:
        """The runs that were finished since the last call."""
        for path in sorted(self.folder.glob('runs*.jsonl')):
            if path.name == self.own:
                continue
            with open(path, 'rb') as file:
                file.seek(self.seen.get(path.name, 0))
                data = file.read()
            whole = data[: data.rfind(b'\n') + 1]
            self.seen[path.name] = self.seen.get(path.name, 0) + len(whole)
            for line in whole.splitlines():
                yield json.loads(line)


def is_run(record: object) -> bool:
    """Whether a line has what every run has."""
    if not isinstance(record, dict):
        return False
    numbers = (record.get('tta_acc'), record.get('clock_seconds'))
    named = isinstance(record.get('arm', record.get('script')), str)
    rows = record.get('epochs', [])
    with_losses = isinstance(rows, list) and all(
        isinstance(row, dict) and {'epoch', 'train_loss'} <= row.keys() for row in rows
    )
    return named and with_losses and all(isinstance(x, float | int) for x in numbers)


def read_lines(path: Path) -> tuple[list[dict], list[str]]:
    """The runs of a file, and a note for each line that is none but a last one that was cut off."""
    runs, notes = [], []
    try:
        *lines, _ = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError(f'cannot read {one_line(path)}: {error.strerror}') from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if is_run(record):
            runs.append(record)
        else:
            notes.append(
                f'{one_line(path)}: line {number} is not a finished run and does not count'
            )
    return runs, notes


def read_experiment(folder: str) -> dict:
    """experiment.json of a log folder."""
    try:
        content = json.loads(Path(folder, EXPERIMENT).read_bytes())
        if content['schema'] != SCHEMA:
            raise ValueError(f'schema {content["schema"]}, this tool writes {SCHEMA}')
        return content
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{one_line(folder)} is no log folder of `bench run` ({EXPERIMENT}: {one_line(reason)})'
        ) from None


def read(paths: list[str]) -> Log:
    """The runs of log folders and runs.jsonl files, the tool's or a script's; copies count once."""
    runs, notes, experiments = [], [], []
    for path in map(Path, paths):
        files = sorted(path.glob('runs*.jsonl')) if path.is_dir() else [path]
        is_experiment = path.is_dir() and (path / EXPERIMENT).exists()
        experiments.append(read_experiment(str(path)) if is_experiment else None)
        if not files and not (is_experiment or path.is_dir() and len(paths) > 1):
            raise UserError(f'{one_line(path)} has no runs*.jsonl')
        if not files:  # of a command that was stopped before its first run was finished
            notes.append(f'{one_line(path)} has no finished run')
        for file in files:
            found, lost = read_lines(file)
            runs += found
            notes += lost
    name_script_arms(runs)
    unique = {to_json([*identity(run), run.get('seed'), run.get('run')]): run for run in runs}
    given = [one['options'].get('hyp', []) if one else [] for one in experiments]
    return Log(
        [*unique.values()],
        experiments[0] if len(experiments) == 1 else None,
        given[0] if all(one == given[0] for one in given) else [],
        notes,
    )


def name_script_arms(runs: list[dict]):
    """Gives the runs that a script logged an arm: its name, and where they differ their hyp."""
    own = [run for run in runs if 'arm' not in run]
    settings = [{**run.get('hyp', {}), 'compile': run.get('compile', False)} for run in own]
    keys = {
        key: {to_json(values.get(key)) for values in settings}
        for key in dict.fromkeys(itertools.chain(*settings))
    }
    differing = [key for key, found in keys.items() if len(found) > 1]
    for run, values in zip(own, settings, strict=True):
        changes = [f'{key}={to_json(values[key])}' for key in differing if key in values]
        stem = Path(run['script']).name.removesuffix('.py').removeprefix('airbench94_')
        run['arm'] = one_line(' '.join([stem, *changes]))


def data_key(run: dict) -> str:
    """What tells a run's data: sizes and checksums, or else its name and sizes."""
    data = run.get('data')
    if not isinstance(data, dict):  # in the log of a script
        return to_json([data, run.get('train_images'), run.get('test_images')])
    facts = {key: value for key, value in data.items() if key != 'name'}
    return to_json(facts if 'train_images_crc32' in facts else data, sort_keys=True)


def identity(run: dict) -> tuple:
    """What makes two runs members of one arm: code, hyperparameters and data, not only the name."""
    settings = to_json([run.get('hyp'), run.get('compile', False)], sort_keys=True)
    return run['arm'], run.get('sha256'), settings, data_key(run)


def by_arm(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each arm by turn, the reference first; arms that share a name get numbers.

    What a script logged by itself comes after the reference of an experiment.
    """
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)
    arms: dict[str, list] = {}
    for members in sorted(groups.values(), key=lambda members: members[0].get('arm_index', 0.5)):
        label, number = members[0]['arm'], 1
        while label in arms:
            number += 1
            label = f'{members[0]["arm"]} #{number}'
        arms[label] = sorted(members, key=lambda run: run.get('run', 0))
    return arms


# ---------------------------------------- Resume ----------------------------------------


def refuse_other_code(folder: str, arm: dict, source: bytes):
    """Raises UserError with a short diff where a script is not the one of the log."""
    logged = Path(folder, arm['code'])
    try:
        old = logged.read_bytes()
    except OSError as error:
        raise UserError(f'cannot read {one_line(logged)}: {error.strerror}') from None
    if old == source:
        return
    texts = [text.decode(errors='replace').splitlines() for text in (old, source)]
    changes = list(difflib.unified_diff(*texts, 'logged', 'now', n=0, lineterm=''))
    shown = [f'  {line[:98]}' for line in changes[:DIFF_LINES]]
    if len(changes) > DIFF_LINES:
        shown.append(f'  ... and {len(changes) - DIFF_LINES} lines more')
    advice = f'start a new experiment, or put back the code in {one_line(logged)}'
    raise UserError(
        '\n'.join([f'--resume: {one_line(arm["script"])} is not what the log has:', *shown, advice])
    )


def refuse_other_values(what: str, logged: dict, now: dict):
    """Raises UserError naming the keys that differ."""
    keys = [key for key in {**logged, **now} if logged.get(key) != now.get(key)]
    if keys:
        changes = (f'  {key}: {logged.get(key)} in the log, {now.get(key)} now' for key in keys)
        raise UserError(
            '\n'.join(
                [f'--resume: {what} differ:', *changes, 'start a new experiment without --resume']
            )
        )
