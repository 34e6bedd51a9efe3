"""Display of an experiment at work: rows in a pipe, a table and a bar in a terminal."""

import math
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from bench import stats
from bench.compare import accuracies, times
from bench.records import Run
from bench.report import digits_of, duration, table_lines

FEWEST_TURNS = 3  # of a running difference
SLOW_EPOCH = 20.0  # seconds
REFRESH_SECONDS = 5.0  # of the bar within an epoch


class Display:
    """Keeps count and shows nothing: the display of a process that is not the first."""

    def __init__(self, arms: list[str], total: int, done: list[Run]):
        self.total = total
        self.reference = arms[0]
        self.made: dict[str, dict] = {arm: {} for arm in arms}  # arm -> turn -> run
        self.new = 0  # runs of this process's time
        self.start = self.last_event = time.monotonic()
        self.arm: str | None = None  # of the run under way, after its first epoch
        self.epochs_done = 0
        self.epochs = 1.0
        self.epoch_seconds: dict[str, float] = {}
        for run in done:
            self.made[run.arm][run.turn] = run

    def line(self, text: str):
        """Show a line above or between the rows."""

    def begin(self):
        """Note that the first run starts, after the warm-up."""
        self.start = self.last_event = time.monotonic()

    def epoch(self, arm: str, row: dict, epochs: float):
        """Note that an epoch of a run of so many epochs has ended."""
        now = time.monotonic()
        self.epoch_seconds[arm] = now - self.last_event
        self.last_event = now
        self.arm = arm
        self.epochs_done = row['epoch']
        self.epochs = max(epochs, row['epoch'])

    def finished(self, run: Run):
        """Note that a run has ended."""
        self.made[run.arm][run.turn] = run
        self.new += 1
        self.arm = None
        self.epochs_done = 0
        self.last_event = time.monotonic()

    def close(self):
        """Stop, before anything else is printed."""

    @property
    def count(self) -> int:
        """How many runs are made."""
        return sum(len(runs) for runs in self.made.values())

    def share(self) -> float:
        """Return the share of the run under way that is done, by the time within an epoch."""
        if self.arm is None:
            return 0.0
        seconds = self.epoch_seconds[self.arm]
        passed = time.monotonic() - self.last_event
        within = min(0.95, passed / max(seconds, 1e-9))
        return min(1.0, (self.epochs_done + within) / self.epochs)

    def left(self) -> float:
        """Return the seconds until all runs are made; nan before anything is known."""
        share = self.share()
        done = self.new + share
        if done == 0:
            return math.nan
        passed = time.monotonic() - self.start
        return passed / done * (self.total - self.count - share)

    def difference(self, arm: str) -> stats.Difference | None:
        """Return the difference from the reference in the turns that both have finished."""
        own, base = self.made[arm], self.made[self.reference]
        turns = [turn for turn in own if turn in base]
        if arm == self.reference or len(turns) < FEWEST_TURNS:
            return None
        sample = accuracies([own[turn] for turn in turns])
        reference = accuracies([base[turn] for turn in turns])
        return stats.paired(sample, reference)


def difference_text(difference: stats.Difference | None) -> str:
    if difference is None:
        return ''
    return f'{difference.value:+.2f} +- {difference.half:.2f}'


def seconds_text(seconds: float) -> str:
    return f'{seconds:.{digits_of(seconds)}f} s'


class Rows(Display):
    """A line per finished run, for a pipe, a file or a notebook."""

    def __init__(self, console: Console, *args):
        super().__init__(*args)
        self.console = console
        self.with_heads = True
        self.with_estimate = True

    def line(self, text: str):
        self.console.print(text, soft_wrap=True)

    def row(self, turn, accuracy, seconds, difference, left, arm):
        numbers = f'{turn:>6}  {accuracy:>8}  {seconds:>10}  {difference:>14}  {left:>8}'
        self.line(f'{numbers}  {arm}')

    def epoch(self, arm: str, row: dict, epochs: float):
        super().epoch(arm, row, epochs)
        seconds = self.epoch_seconds[arm]
        if self.with_estimate and self.new == 0 and seconds > SLOW_EPOCH:
            self.line(f'An epoch took {duration(seconds)}; about {duration(self.left())} left')
        self.with_estimate = False

    def finished(self, run: Run):
        super().finished(run)
        if self.with_heads:
            self.row('turn', 'accuracy', 'time', 'difference', 'left', 'arm')
            self.with_heads = False
        self.row(
            run.turn,
            f'{run.accuracy:.2f}%',
            seconds_text(run.clock_seconds),
            difference_text(self.difference(run.arm)),
            duration(self.left()),
            run.arm,
        )


class Board(Display):
    """A table of the arms and a bar, drawn after each epoch and every few seconds."""

    def __init__(self, console: Console, *args):
        super().__init__(*args)
        self.console = console
        columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn('{task.fields[left]}'), console=console)
        self.task = self.bar.add_task('', total=self.total, completed=self.count, left='')
        self.live = Live(
            console=console,
            get_renderable=self.picture,
            refresh_per_second=1 / REFRESH_SECONDS,
            transient=True,
        )
        self.live.start()

    def line(self, text: str):
        self.console.print(text)

    def picture(self) -> Group:
        """Return the table and the bar as they are now."""
        description = ''
        if self.arm is not None:
            epoch = min(self.epochs_done + 1, math.ceil(self.epochs))
            description = f'{self.arm}, epoch {epoch}'
        left = self.left()
        self.bar.update(
            self.task,
            description=description[-40:],
            completed=self.count + self.share(),
            left='' if math.isnan(left) else f'{duration(left)} left',
        )
        return Group(self.table(), self.bar)

    def table(self) -> Text:
        """Return the arms so far."""
        names = []
        columns = {'n': [], 'Accuracy': [], 'Time/run': [], 'Difference (95% CI)': []}
        for arm, made in self.made.items():
            runs = list(made.values())
            if not runs:
                continue
            names.append(arm)
            columns['n'].append(str(len(runs)))
            columns['Accuracy'].append(f'{accuracies(runs).mean():.2f} %')
            columns['Time/run'].append(seconds_text(times(runs).mean()))
            columns['Difference (95% CI)'].append(difference_text(self.difference(arm)))
        if not names:
            return Text()
        lines = table_lines(names, columns, self.console.width)
        return Text('\n'.join(lines), no_wrap=True, overflow='ellipsis')

    def epoch(self, arm: str, row: dict, epochs: float):
        super().epoch(arm, row, epochs)
        self.live.refresh()

    def finished(self, run: Run):
        super().finished(run)
        self.live.refresh()

    def close(self):
        self.live.stop()


def make_display(console: Console | None, arms: list[str], total: int, done: list[Run]) -> Display:
    """Return the display that fits: none without a console."""
    if console is None:
        return Display(arms, total, done)
    kind = Board if console.is_terminal else Rows
    return kind(console, arms, total, done)
