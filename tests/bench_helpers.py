"""Ways to run the tool on bench_fake.py, and to read what it printed and logged."""

import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent / 'bench'

FAKE = (BENCH.parent / 'bench_fake.py').read_text()


def write_fake(folder: Path, name: str = 'fake.py', *changes: tuple) -> Path:
    """The fake script in a folder, with (old, new) put in."""
    text = FAKE
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


def log_of(folder: Path) -> Path:
    """The one log folder under a folder."""
    (log,) = (folder / 'logs').iterdir()
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


def report_of(out: str) -> list[str]:
    """The lines of a report from the table to the method, which the same runs give again."""
    start = out.index('\nArm ') + 1 if not out.startswith('Arm ') else 0
    return [line.rstrip() for line in out[start : out.index('\ncpu (')].splitlines()]


def rows(out: str) -> list[tuple]:
    """(turn, accuracy in percent) of each printed row of a finished run."""
    words = [line.split() for line in out.splitlines()]
    return [
        (int(row[0]), text.rstrip('%'))
        for row in words
        for text in row[2:5]
        if row[0].isdigit() and text.endswith('%')
    ]


def memory_of(pid: int) -> float:
    """Resident MiB of a process (Linux)."""
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20
