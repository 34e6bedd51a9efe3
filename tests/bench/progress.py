"""What is seen while the runs are made: rows in a pipe, a table and a bar in a terminal."""

import math
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from bench import stats
from bench.report import duration, percent


class Silent:
    """The display of a process that is not the first, and the base of the others."""

    wants_epochs = False

    def __init__(self, arms: list[str], total: int, done: list[dict]):
        self.total, self.count = total, 0
        self.made = {arm: [] for arm in arms}
        self.reference = arms[0]
        self.start, self.new = time.monotonic(), 0
        for record in done:
            self.add(record)

    def add(self, record: dict):
        self.made[record['arm']].append(record)
        self.count += 1

    def line(self, text: str):
        """A line above or between the rows."""

    def epoch(self, arm: str, row: dict, epochs: float):
        """An epoch has ended."""

    def finished(self, record: dict):
        """A run has ended."""
        self.add(record)
        self.new += 1

    def close(self):
        """Before anything else is printed."""

    def begin(self):
        """Before the first run, after the warm-up."""
        self.start = time.monotonic()

    def left(self, more: float = 0.0) -> float:
        """Seconds until all runs are made; `more` is the share of a run under way."""
        if self.new + more == 0:
            return math.nan
        return (
            (time.monotonic() - self.start) / (self.new + more) * (self.total - self.count - more)
        )

    def difference(self, arm: str) -> stats.Difference | None:
        """The difference of an arm from the reference so far."""
        pair = [self.made[arm], self.made[self.reference]]
        if arm == self.reference or not all(pair):
            return None
        return stats.welch(*(percent(runs) for runs in pair))


def difference_text(difference: stats.Difference | None) -> str:
    if difference is None:
        return ''
    text = f'{difference.value:+.2f}'
    return text if math.isnan(difference.p) else f'{text} +- {difference.half:.2f}'


class Rows(Silent):
    """A line per finished run, for a pipe or a file."""

    def __init__(self, console: Console, *args):
        super().__init__(*args)
        self.console = console
        self.width = min(42, max([3, *map(len, self.made)]))
        self.heads = ['turn', 'arm', 'TTA acc', 'clock', 'difference', 'left']

    def line(self, text: str):
        self.console.print(text)

    def row(self, turn, arm, accuracy, clock, difference, left):
        text = f'{turn:>6}  {arm:<{self.width}.{self.width}}  {accuracy:>7}  {clock:>10}'
        self.console.print(f'{text}  {difference:>16}  {left:>8}')

    def finished(self, record: dict):
        super().finished(record)
        if self.heads:
            self.row(*self.heads)
            self.heads = []
        self.row(
            record['run'],
            record['arm'],
            f'{record["tta_acc"]:.2%}',
            f'{record["clock_seconds"]:.3f}s',
            difference_text(self.difference(record['arm'])),
            duration(self.left()),
        )


class Board(Silent):
    """A table of the arms and a bar, drawn again after each epoch: never while a clock runs."""

    wants_epochs = True

    def __init__(self, console: Console, *args):
        super().__init__(*args)
        columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn('{task.fields[left]}'), console=console)
        self.task = self.bar.add_task('', total=self.total, completed=self.count, left='')
        self.live = Live(self.bar, console=console, auto_refresh=False, transient=True)
        self.live.start()

    def line(self, text: str):
        self.live.console.print(text)

    def draw(self, description: str, share: float):
        left = self.left(share)
        self.bar.update(
            self.task,
            description=description[:50],
            completed=self.count + share,
            left='' if math.isnan(left) else f'{duration(left)} left',
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ('Arm', 'n', 'Accuracy', 'Clock/run', 'Difference (95% CI)'):
            table.add_column(head)
        for arm, runs in self.made.items():
            if runs:
                clock = sum(run['clock_seconds'] for run in runs) / len(runs)
                difference = difference_text(self.difference(arm))
                table.add_row(
                    arm, str(len(runs)), f'{percent(runs).mean():.2f}%', f'{clock:.3f}s', difference
                )
        self.live.update(Group(table, self.bar), refresh=True)

    def epoch(self, arm: str, row: dict, epochs: float):
        self.draw(f'{arm}, epoch {row["epoch"]}', min(1.0, row['epoch'] / max(epochs, 1e-9)))

    def finished(self, record: dict):
        super().finished(record)
        self.draw(record['arm'], 0.0)

    def close(self):
        self.live.stop()


def make_display(console: Console | None, *args) -> Silent:
    """The display that fits: none without a console."""
    if console is None:
        return Silent(*args)
    return (Board if console.is_terminal else Rows)(console, *args)
