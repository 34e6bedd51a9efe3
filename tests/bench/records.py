"""Log of an experiment: a folder with experiment.json, the code, and a line per finished run."""

import contextlib
import dataclasses
import datetime
import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import UserError, one_line

SCHEMA = 1
EXPERIMENT = 'experiment.json'
DIFF_LINES = 12
PROCESS_FILE = re.compile(r'runs(-\d+)?\.jsonl')  # as `runs_file` names them
CHECKSUMS = (
    'train_images_crc32',
    'train_labels_crc32',
    'test_images_crc32',
    'test_labels_crc32',
)


# ---------------------------------------- A run ----------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run; None is what its log does not have."""

    arm: str
    tta_acc: float  # 0 to 1
    clock_seconds: float  # training time
    arm_index: int | None = None  # 0 is the reference; None in a script's own log
    script: str | None = None
    sha256: str | None = None  # of the script's source
    hyp: dict = field(default_factory=dict)  # flat: {'opt.lr': 10.0}
    compile: bool = False
    turn: int | None = None  # from 1; the key 'run' of the JSON
    trial: int | None = None  # of a script's own log
    seed: int | None = None
    base_seed: int | None = None
    data: dict = field(default_factory=dict)  # name, train, test, classes, checksums
    device: str | None = None
    torch: str | None = None
    dtype: str | None = None
    epochs: list = field(default_factory=list)  # a dict for each epoch
    eval_seconds: float | None = None
    wall_seconds: float | None = None
    warmup_seconds: float | None = None
    peak_bytes: int | None = None
    flop: int | None = None
    extra: dict = field(default_factory=dict)  # whatever else the script records

    @classmethod
    def from_json(cls, line: dict) -> 'Run':
        """Return the run of a line, of today's logs or older ones."""
        values = dict(line)
        values['turn'] = values.pop('run', None)
        values['arm'] = values.get('arm') or script_name(values)
        values['compile'] = bool(values.get('compile'))
        values['hyp'] = flat(values.get('hyp') or {})
        values['epochs'] = values.get('epochs') or []
        values['data'] = data_facts(values)
        names = {entry.name for entry in dataclasses.fields(cls)} - {'extra'}
        known = {}
        extra = {}
        for key, value in values.items():
            if key in names:
                known[key] = value
            else:
                extra[key] = value
        return cls(**known, extra=extra)

    def to_json(self) -> dict:
        """Return the dict of a line."""
        values = {}
        for entry in dataclasses.fields(self):
            values[entry.name] = getattr(self, entry.name)
        values['run'] = values.pop('turn')
        return {**values.pop('extra'), **values}

    @property
    def accuracy(self) -> float:
        """TTA accuracy in percent."""
        return 100 * self.tta_acc

    @property
    def losses(self) -> list:
        """Loss of each epoch, None where it was not finite."""
        return [row['train_loss'] for row in self.epochs]

    @property
    def classes(self) -> int:
        return self.data.get('classes') or 10


def flat(tree: dict, prefix: str = '') -> dict:
    """Return {'opt.lr': 10.0} for {'opt': {'lr': 10.0}}."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f'{prefix}{key}.'))
        else:
            leaves[f'{prefix}{key}'] = value
    return leaves


def script_name(values: dict) -> str:
    """Return what people call a script: its stem without airbench94_."""
    stem = Path(values['script']).name.removesuffix('.py')
    return one_line(stem.removeprefix('airbench94_')) or 'script'


def data_facts(values: dict) -> dict:
    """Return the facts about a line's data. Scripts once logged a name and sizes."""
    facts = values.get('data')
    if isinstance(facts, dict):
        facts = dict(facts)
    else:
        facts = {
            'name': str(facts),
            'train': values.get('train_images'),
            'test': values.get('test_images'),
            'classes': values.get('classes'),
        }
    if isinstance(facts.get('classes'), list):
        facts['classes'] = len(facts['classes'])
    return facts


def is_run(line: object) -> bool:
    """Return whether a line of JSON has what every run has."""
    if not isinstance(line, dict):
        return False
    if not isinstance(line.get('arm', line.get('script')), str):
        return False
    for key in ('tta_acc', 'clock_seconds'):
        if not isinstance(line.get(key), float | int):
            return False
    if not 0 < line['clock_seconds'] < math.inf:
        return False
    rows = line.get('epochs', [])
    if not isinstance(rows, list):
        return False
    for row in rows:
        if not isinstance(row, dict) or not {'epoch', 'train_loss'} <= row.keys():
            return False
    return isinstance(line.get('hyp', {}), dict)


def parse_run(text: bytes) -> dict | None:
    """Return a line of a log, or None where it is not a finished run."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if is_run(line) else None


# ---------------------------------------- Writing ----------------------------------------


def new_folder(log_dir: str) -> str:
    """Create logs/<UTC time>-bench-<short id>."""
    started = datetime.datetime.now(datetime.timezone.utc)
    name = f'{started:%Y%m%dT%H%M%SZ}-bench-{os.urandom(3).hex()}'
    folder = os.path.join(log_dir, name)
    with disk_errors(folder):
        os.makedirs(folder)
    return folder


@contextlib.contextmanager
def disk_errors(path: str):
    """Turn errors of a disk (full, read-only, gone) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {one_line(path)}: {error.strerror}') from None


def write_file(folder: str, name: str, content: bytes):
    """Write a file that is there as a whole or not at all, also after a power cut."""
    path = os.path.join(folder, name)
    with disk_errors(path):
        with open(f'{path}.part', 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f'{path}.part', path)


def plain_number(value: object) -> object:
    """Return a tensor's or numpy's number as Python's, anything else as text."""
    if hasattr(value, 'item'):
        return value.item()
    return str(value)


def to_json(value: object, **options) -> str:
    """Return JSON, with null for numbers that are not finite."""
    text = json.dumps(value, default=plain_number)
    finite = json.loads(text, parse_constant=lambda name: None)
    return json.dumps(finite, **options)


def runs_file(rank: int) -> str:
    """Return the file name of a process's runs."""
    return f'runs-{rank}.jsonl' if rank else 'runs.jsonl'


def append_run(folder: str, rank: int, run: Run) -> Run:
    """Append a run; its line is on the disk on return.

    Returns the run as it will be read again.
    """
    path = os.path.join(folder, runs_file(rank))
    line = to_json(run.to_json())
    with disk_errors(path), open(path, 'ab', buffering=0) as file:
        end = file.tell()
        data = f'{line}\n'.encode()
        try:
            while data:
                written = file.write(data)
                data = data[written:]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, end)  # no half line for the next one to join
            raise
    return Run.from_json(json.loads(line))


def mend_last_lines(folder: str):
    """Drop what a kill left of a last line, or end a whole one: the next one must not join it."""
    for path in sorted(Path(folder).glob('runs*.jsonl')):
        content = path.read_bytes()
        end = content.rfind(b'\n') + 1
        with disk_errors(str(path)):
            if parse_run(content[end:]):
                with open(path, 'ab') as file:
                    file.write(b'\n')
            else:
                os.truncate(path, end)


# ---------------------------------------- Reading ----------------------------------------


@dataclass
class Log:
    """Runs that `read` found."""

    runs: list[Run]
    experiment: dict | None = None  # where everything is of one experiment
    common: list[str] = field(default_factory=list)  # what --hyp gave all arms
    notes: list[str] = field(default_factory=list)


class Follower:
    """Reads the lines that other processes add to a log folder."""

    def __init__(self, folder: str, own_rank: int = 0):
        self.folder = Path(folder)
        self.own = runs_file(own_rank)
        self.seen: dict[str, int] = {}

    def new_runs(self) -> Iterator[Run]:
        """Yield the runs that were finished since the last call."""
        for path in sorted(self.folder.glob('runs*.jsonl')):
            if path.name == self.own:
                continue
            start = self.seen.get(path.name, 0)
            with open(path, 'rb') as file:
                file.seek(start)
                data = file.read()
            whole = data[: data.rfind(b'\n') + 1]
            self.seen[path.name] = start + len(whole)
            for line in map(parse_run, whole.splitlines()):
                if line is not None:
                    yield Run.from_json(line)


def read_lines(path: Path) -> tuple[list[dict], list[str]]:
    """Return the lines of a file that are runs, and a note for each that is none.

    The last line gets no note where it was cut off, or is empty.
    """
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError(f'cannot read {one_line(path)}: {error.strerror}') from None
    found = []
    notes = []
    for number, text in enumerate(lines, start=1):
        line = parse_run(text)
        if line is not None:
            found.append(line)
        elif number < len(lines):
            place = f'{one_line(path)}: line {number}'
            notes.append(f'{place} is not a finished run and does not count')
    return found, notes


def read_experiment(folder: str) -> dict:
    """Return the experiment.json of a log folder."""
    try:
        content = json.loads(Path(folder, EXPERIMENT).read_bytes())
        if content['schema'] != SCHEMA:
            raise ValueError(f'schema {content["schema"]}, this tool writes {SCHEMA}')
        return content
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = one_line(getattr(error, 'strerror', None) or error)
        raise UserError(
            f'{one_line(folder)} is no log folder of `bench run` ({EXPERIMENT}: {reason})'
        ) from None


def no_runs(folder: Path) -> UserError:
    """Return the error for a folder without runs."""
    message = f'{one_line(folder)} has no runs*.jsonl'
    below = sorted(folder.glob('*/runs*.jsonl'))
    if below:
        example = one_line(below[0].parent)
        message += f'; its subfolders are logs: show {example}, or several of them'
    return UserError(message)


def files_of(path: Path, alone: bool) -> tuple[list[Path], list[str]]:
    """Return the files of runs that a path of the command line means, and notes."""
    if not path.is_dir():
        return [path], []
    files = sorted(path.glob('runs*.jsonl'))
    if files:
        return files, []
    if alone and not (path / EXPERIMENT).exists() or list(path.glob('*/runs*.jsonl')):
        raise no_runs(path)
    # A command that was stopped before its first run was finished.
    return [], [f'{one_line(path)} has no finished run']


def left_out(files: list[Path]) -> list[str]:
    """Return a note where a process's file was named without those of its peers."""
    given = {file.resolve() for file in files}
    notes = []
    for file in files:
        if not PROCESS_FILE.fullmatch(file.name):
            continue
        missing = []
        for peer in sorted(file.parent.glob('runs*.jsonl')):
            if PROCESS_FILE.fullmatch(peer.name) and peer.resolve() not in given:
                missing.append(peer.name)
        if missing:
            others = one_line(', '.join(missing))
            notes.append(
                f'{one_line(file)} has the runs of one process; not read: {others} '
                f'(show {one_line(file.parent)} reads all)'
            )
    return notes


def stopped_early(files: list[Path]) -> list[str]:
    """Return a note for each experiment of --until-sure whose files are read without it."""
    notes = []
    for folder in sorted({file.parent for file in files}):
        if not (folder / EXPERIMENT).exists():
            continue
        if read_experiment(str(folder))['options'].get('until_sure'):
            name = one_line(folder)
            notes.append(
                f'{name} was stopped by --until-sure: p and intervals do not allow for its looks '
                f'(show {name} alone does)'
            )
    return notes


def read(paths: list[str]) -> Log:
    """Return the runs of log folders and runs.jsonl files, the tool's or a script's.

    Copies of a run count once.
    """
    lines = []
    notes = []
    files = []
    experiments = []
    for path in map(Path, paths):
        has_experiment = (path / EXPERIMENT).exists()
        experiments.append(read_experiment(str(path)) if has_experiment else None)
        found, remarks = files_of(path, alone=len(paths) == 1)
        files += found
        notes += remarks
    for file in files:
        found, remarks = read_lines(file)
        lines += found
        notes += remarks
    notes += left_out(files)
    experiment = None
    if len(experiments) == 1:
        experiment = experiments[0]
    if experiment is None:
        notes += stopped_early(files)
    unique = {}
    repeated = 0
    for run in name_script_arms(lines):
        key = to_json([*identity(run), run.seed, run.trial, run.turn])
        if key in unique and unique[key] != run:
            repeated += 1
        unique[key] = run
    if repeated:
        notes.append(f'{repeated} runs repeat others (arm, seed and turn): the later ones count')
    given = []
    for one in experiments:
        given.append(one['options'].get('hyp', []) if one else [])
    same = all(options == given[0] for options in given)
    return Log(
        list(unique.values()),
        experiment,
        given[0] if same else [],
        notes,
    )


def name_script_arms(lines: list[dict]) -> list[Run]:
    """Return the runs; those that a script logged itself get its name.

    Where the hyperparameters of its runs differ, the name has those, too.
    """
    runs = [Run.from_json(line) for line in lines]
    own: dict[str, list] = {}
    for i, line in enumerate(lines):
        if 'arm' not in line:
            own.setdefault(runs[i].arm, []).append(i)
    for script, places in own.items():
        settings = {i: {**runs[i].hyp, 'compile': runs[i].compile} for i in places}
        keys = dict.fromkeys(key for values in settings.values() for key in values)
        differing = []
        for key in keys:
            texts = {to_json(values.get(key)) for values in settings.values()}
            if len(texts) > 1:
                differing.append(key)
        for i, values in settings.items():
            name = script
            for key in differing:
                if key in values:
                    name += f' {key}={to_json(values[key])}'
            runs[i] = dataclasses.replace(runs[i], arm=one_line(name))
    return runs


def data_key(run: Run) -> str:
    """Return what tells a run's data from others: sizes and checksums, else name and sizes."""
    names = ['train', 'test', *CHECKSUMS]
    if CHECKSUMS[0] not in run.data:
        names = ['name', 'train', 'test']
    return to_json([run.data.get(name) for name in names])


def identity(run: Run) -> tuple:
    """Return what makes two runs members of one arm: code, hyperparameters and data, too."""
    settings = to_json([run.hyp, run.compile], sort_keys=True)
    return run.arm, run.sha256, settings, data_key(run)


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of each arm by turn, the reference first; equal names get numbers.

    What a script logged by itself comes after the reference of an experiment.
    """
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)

    def position(members: list[Run]) -> float:
        index = members[0].arm_index
        return 0.5 if index is None else index

    arms: dict[str, list] = {}
    for members in sorted(groups.values(), key=position):
        label = name = members[0].arm
        number = 1
        while label in arms:
            number += 1
            label = f'{name} #{number}'
        arms[label] = sorted(members, key=lambda run: (run.trial or 0, run.turn or 0))
    return arms


# ---------------------------------------- Resume ----------------------------------------


def decode(source: bytes) -> str:
    r"""Return source code as text with '\n' at the end of each line, as a script hashes it."""
    text = source.decode('utf-8', errors='replace')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def refuse_other_code(folder: str, arm: dict, source: str):
    """Raise UserError with a short diff where a script is not the one of the log."""
    logged = Path(folder, arm['code'])
    try:
        old = decode(logged.read_bytes())
    except OSError as error:
        raise UserError(f'cannot read {one_line(logged)}: {error.strerror}') from None
    if old == source:
        return
    texts = old.splitlines(), source.splitlines()
    changes = list(difflib.unified_diff(*texts, 'logged', 'now', n=0, lineterm=''))
    message = [f'--resume: {one_line(arm["script"])} is not what the log has:']
    for line in changes[:DIFF_LINES]:
        message.append(f'  {line[:98]}')
    if len(changes) > DIFF_LINES:
        message.append(f'  ... and {len(changes) - DIFF_LINES} lines more')
    message.append(f'start a new experiment, or put back the code in {one_line(logged)}')
    raise UserError('\n'.join(message))


def refuse_other_values(what: str, logged: dict, now: dict):
    """Raise UserError naming the keys that differ."""
    keys = differing(logged, now)
    if not keys:
        return
    message = [f'--resume: {what} differ:']
    for key in keys:
        message.append(f'  {key}: {logged.get(key)} in the log, {now.get(key)} now')
    message.append('start a new experiment without --resume')
    raise UserError('\n'.join(message))


def differing(ours: dict, theirs: dict) -> list[str]:
    """Return the keys whose values differ."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
