"""Ways to run the tool on bench_fake.py, and to read what it printed and logged."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

from bench import cli

os.environ.setdefault('OMP_NUM_THREADS', '1')  # of the arms' processes, so that results repeat
BENCH = Path(__file__).resolve().parent / 'bench'


def write_fake(folder: Path, name: str = 'fake.py', *changes: tuple) -> Path:
    """The fake script in a folder, with (old, new) put in."""
    text = BENCH.with_name('bench_fake.py').read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def command(*args, processes: int | None = None) -> list[str]:
    """The tool's command line for subprocess, under torchrun with so many processes."""
    words = [sys.executable]
    if processes:
        words += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*words, str(BENCH), *map(str, args)]


def tool(*args) -> tuple[int, str, str]:
    """The tool in this process: its exit status, and what it prints on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


def log_of(logs: str | Path = 'logs') -> Path:
    """The one log folder in a folder of logs."""
    (log,) = Path(logs).iterdir()
    return log


def lines(log: Path) -> list[dict]:
    """The whole lines of a log folder, of all processes."""
    texts = [path.read_text() for path in sorted(log.glob('runs*.jsonl'))]
    return [json.loads(line) for text in texts for line in text.split('\n')[:-1]]


def outcomes(log: Path) -> list[tuple]:
    """What must not depend on how the runs of a log were made. No run is there twice."""
    found = [(r['arm'], r['run'], r['seed'], r['tta_acc'], r['clock_seconds']) for r in lines(log)]
    assert len({row[:2] for row in found}) == len(found)
    return sorted(found)


def result_of(out: str) -> tuple[str, list]:
    """What the same runs give, however they were made: the report down to its method, and the runs
    in the log that it names."""
    report = f'\n{out}'.split('\nArm ')[1].split('\ncpu\n')[0]
    log = re.findall(r'^Log: (.*)$', out, re.M)[-1]
    return report, outcomes(Path(log))


def rows(out: str) -> list[tuple]:
    """(turn, accuracy in percent) of each row of a finished run, above the report."""
    found = re.findall(r'^ *(\d+)  +(\d+\.\d\d)%  ', out.split('\nArm ')[0], re.M)
    return [(int(turn), accuracy) for turn, accuracy in found]


def logged(log: Path) -> list[tuple]:
    """What `rows` must give for the runs of a log."""
    return [(run['run'], f'{100 * run["tta_acc"]:.2f}') for run in lines(log)]
