"""The command line: run, show, speed."""

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass

from bench import records
from bench.errors import ScriptError, UserError, ignore_signals, stopping_signals

RUNS = 25
RUNS_UNTIL_SURE = 100
POINTS = 0.1
HELD_OUT = 10000
PAIR = re.compile(r'\w+(\.\w+)*=')  # the beginning of KEY=VALUE

DESCRIPTION = """\
Compare training scripts run by run.

  python tests/bench run    train scripts in turns, log and compare the runs
  python tests/bench show   table, comparison and figures of logs
  python tests/bench speed  how fast the parts of scripts are

Each has a --help of its own.
"""
EXAMPLES = """\
examples
  python tests/bench run airbench94_baseline.py mine.py
  python tests/bench run airbench94_baseline.py mine.py --holdout --runs 50 --margin 0.1
  python tests/bench run mine.py mine.py:opt.lr=9,opt.momentum=0.9
  python tests/bench run mine.py --sweep opt.lr=9,11.5,14 --until-sure
  python tests/bench run --resume logs/20260101T000000Z-bench-1a2b3c
  torchrun --nproc_per_node=8 tests/bench run airbench94_baseline.py mine.py --runs 200
"""


# ---------------------------------------- Options ----------------------------------------


@dataclass(frozen=True)
class Option:
    """An option: all that the parser, the defaults, the limits and --resume need to know."""

    name: str  # '--until-sure', or 'scripts'
    metavar: str | None  # None: a flag
    help: str
    kind: type = str
    default: object = None
    limits: tuple | None = None
    many: bool = False  # takes several values
    alone: object = None  # the value where the option is given without one
    fixed: bool = False  # --resume keeps what the log has

    @property
    def key(self) -> str:
        return self.name.removeprefix('--').replace('-', '_')

    def add_to(self, parser: argparse.ArgumentParser):
        arguments = {'help': self.help}
        if self.metavar is None:
            arguments['action'] = 'store_true'
        else:
            arguments['type'] = self.kind
            arguments['metavar'] = self.metavar
        if self.many:
            arguments['nargs'] = '*'
            if self.name.startswith('--'):
                arguments['nargs'] = '+'
                arguments['action'] = 'extend'
        if self.alone is not None:
            arguments['nargs'] = '?'
            arguments['const'] = self.alone
        parser.add_argument(self.name, **arguments)

    def check(self, value: object):
        """Raise UserError for a number out of range."""
        if self.limits is None or value is None:
            return
        low, high = self.limits
        if not low <= value <= high:
            raise UserError(f'{self.name} {value}: it must be from {low} to {high}')


SCRIPTS_HELP = 'an arm each; the first is the reference'
RUNS_HELP = f'runs of each arm (default: {RUNS}; with --until-sure at most {RUNS_UNTIL_SURE})'
HYP_HELP = 'hyperparameters of all arms; compile=true compiles them'
SWEEP_HELP = 'an arm of the first script for each value; several keys make all combinations'
SURE_HELP = f'stop when a difference is shown, or one of POINTS (default: {POINTS}) is ruled out'
HOLDOUT_HELP = f'test on the last N (default: {HELD_OUT}) training images, train on the others'
SEED_HELP = 'seed of the experiment (default: drawn and printed)'
DEVICE_HELP = 'auto, cpu, cuda or cuda:1 (default: auto, which is CUDA where there is a GPU)'
DATA_HELP = 'the folder that the reference reads the data of all arms from (default: cifar10)'
TARGET_HELP = 'count the runs at or above this accuracy (default: 94)'
MARGIN_HELP = 'say whether an arm is not inferior by more than POINTS'
PANELS_HELP = 'panels of the figure, with commas (default: all that the logs have)'

SPEC = 'SCRIPT[:KEY=VALUE,...]'
TARGET = Option('--target', 'PERCENT', TARGET_HELP, float, 94.0, (0, 100))
MARGIN = Option('--margin', 'POINTS', MARGIN_HELP, float, None, (1e-3, 100))
RUN_OPTIONS = [
    Option('scripts', SPEC, SCRIPTS_HELP, str, [], many=True, fixed=True),
    Option('--runs', 'N', RUNS_HELP, int, None, (1, 10**6)),
    Option('--hyp', 'KEY=VALUE', HYP_HELP, str, [], many=True, fixed=True),
    Option('--sweep', 'KEY=A,B,...', SWEEP_HELP, str, [], many=True, fixed=True),
    Option('--until-sure', 'POINTS', SURE_HELP, float, None, (1e-3, 100), alone=POINTS),
    MARGIN,
    TARGET,
    Option('--holdout', 'N', HOLDOUT_HELP, int, None, (1, 10**9), alone=HELD_OUT, fixed=True),
    Option('--seed', 'S', SEED_HELP, int, None, (0, 2**64 - 1), fixed=True),
    Option('--device', 'D', DEVICE_HELP, str, 'auto'),
    Option('--data-dir', 'DIR', DATA_HELP, str, 'cifar10'),
    Option('--synthetic', None, "the reference's synthetic_data", bool, False, fixed=True),
    Option('--curves', None, 'evaluate after every epoch, for figures', bool, False, fixed=True),
    Option('--log-dir', 'DIR', 'gets a folder for the experiment (default: logs)', str, 'logs'),
    Option('--resume', 'DIR', 'make the runs that this log folder lacks'),
]
ALONE = {option.name: option.alone for option in RUN_OPTIONS if option.alone is not None}
SHOW_OPTIONS = [
    Option('logs', 'LOG', 'log folders or runs.jsonl files', many=True),
    Option('--plot', 'FILE', 'draw a figure; the suffix is its format'),
    Option('--panels', 'LIST', PANELS_HELP),
    Option('--label', 'ARM=TEXT', 'show an arm as TEXT', many=True),
    Option('--reference', 'ARM', 'compare with this arm (default: the first)'),
    TARGET,
    MARGIN,
    Option('--no-time', None, 'leave out the times: those of a busy machine say nothing'),
]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and which returns only what was given."""

    def __init__(self, command: str, options: list[Option], epilog: str | None = None):
        super().__init__(
            f'python tests/bench {command}',
            usage=f'%(prog)s {options[0].metavar} ... [options]',
            epilog=epilog,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.options = options
        for option in options:
            option.add_to(self)

    def error(self, message: str):
        raise UserError(f'{message} ({self.prog} --help lists the options)')

    def given(self, argv: list[str]) -> dict:
        """Return the options of a command line, checked; those not given are left out."""
        given = vars(self.parse_intermixed_args(argv))
        for option in self.options:
            option.check(given.get(option.key))
        target = given.get('target')
        if target is not None and 0 < target <= 1:
            wanted = 100 * target
            raise UserError(f'--target {target:g}: it is in percent; did you mean {wanted:g}?')
        return given


def sort_pairs(argv: list[str]) -> list[str]:
    """Return a command line with '--hyp=KEY=VALUE' in place of '--hyp KEY=VALUE KEY=VALUE'.

    argparse gives an option of many values all words up to the next option, scripts too.
    """
    words = []
    option = None
    for i, word in enumerate(argv):
        if word.startswith('--'):
            option = word if word in ('--hyp', '--sweep') else None
            following = argv[i + 1] if i + 1 < len(argv) else '--'
            if word in ALONE and not following[:1].isdigit():
                words.append(f'{word}={ALONE[word]}')  # a script may follow
            elif option is None or following.startswith('--'):
                words.append(word)
            continue
        is_script = ':' in word or word.endswith('.py') or os.path.isfile(word)
        if option is None or (is_script and not PAIR.match(word)):
            words.append(word)
        else:
            words.append(f'{option}={word}')
    return words


# ---------------------------------------- run ----------------------------------------


def run_options(given: dict) -> dict:
    """Return all options of `run`: those given, else those of the resumed log, else defaults."""
    logged = {}
    if 'resume' in given:
        logged = records.read_experiment(given['resume'])['options']
    options = {}
    for option in RUN_OPTIONS:
        key = option.key
        value = logged.get(key, option.default)
        if key in given:
            if logged and option.fixed and given[key] != value:
                change = f'{option.name} is {value} in the log, {given[key]} now'
                raise UserError(f'--resume: {change}; leave it out, or start a new experiment')
            value = given[key]
        options[key] = value
    if not options['scripts']:
        raise UserError('run needs a script, or --resume DIR (python tests/bench run --help)')
    if options['runs'] is None:
        options['runs'] = RUNS_UNTIL_SURE if options['until_sure'] else RUNS
    if options['seed'] is None:
        options['seed'] = int.from_bytes(os.urandom(4), 'big')
    return options


def title(experiment) -> list[str]:
    """Return the lines above the rows."""
    from bench.compare import counted
    from bench.report import common_lines

    options = experiment.options
    facts = experiment.data_facts
    names = [arm.name for arm in experiment.arms]
    most = 'at most ' if options['until_sure'] else ''
    line = f'{counted(len(names), "arm")} x {most}{counted(options["runs"], "run")}, '
    line += f'seed {options["seed"]}, {facts["name"]} '
    line += f'({facts["train"]} to train on, {facts["test"]} to test)'
    if options['holdout']:
        line += f', the last {options["holdout"]} training images held out'
    return [line, *common_lines(options['hyp'], names)]


def command_run(given: dict, argv: list[str]) -> int:
    """Make an experiment. Returns the exit status."""
    # Imported here, as scipy and rich take a second, so that --help starts at once.
    from bench.display import make_display
    from bench.job import Job
    from bench.report import QuietConsole, print_report
    from bench.runner import Experiment

    options = {**run_options(given), 'command': argv}
    job = Job()
    console = QuietConsole() if job.rank == 0 else None
    experiment = Experiment(options, job)
    status = 0
    message = None
    try:
        experiment.prepare()
        names = [arm.name for arm in experiment.arms]
        total = len(names) * options['runs']
        experiment.display = make_display(console, names, total, experiment.runs)
        for line in title(experiment):
            experiment.display.line(line)
        experiment.open_log()
        experiment.make_runs()
    except UserError as error:
        message = str(error)
        status = 1
        if isinstance(error, ScriptError):
            message += experiment.keep_traceback(error)
    except KeyboardInterrupt as stop:
        status = 128 + stop.args[0]
    finally:
        ignore_signals()  # torchrun ends all processes when one has failed
        experiment.close()
    experiment.read_again()
    finished = [*experiment.runs, *experiment.unlogged]
    if status == 1 and not finished:
        status = 2
    if status > 2 and job.rank == 0:
        message = f'stopped after {len(finished)} finished runs'
        if options['resume'] and experiment.folder is None:
            message = 'stopped before it went on'
        if finished:
            folder = shlex.quote(experiment.folder)
            message += f'; `python tests/bench run --resume {folder}` goes on'
    if finished and console is not None:
        console.print('')
        print_report(console, experiment.results())
    if not finished:
        experiment.remove_empty_log()
    if message is not None:
        print_error(message)
    return status


# ---------------------------------------- show ----------------------------------------


def command_show(given: dict) -> int:
    """Print the report of logs, and draw a figure. Returns the exit status."""
    from bench import report

    if not given.get('logs'):
        raise UserError('show needs a log folder (python tests/bench show --help)')
    panels = None
    if 'plot' in given:
        from bench import plot  # matplotlib takes a second

        plot.check_suffix(given['plot'])
        if 'panels' in given:
            panels = plot.panel_names(given['panels'])
    elif 'panels' in given:
        raise UserError('--panels are those of --plot FILE')
    results = report.results_of(given['logs'], given)
    try:
        report.print_report(report.QuietConsole(), results)
    finally:  # also where `| head` has closed the pipe
        if 'plot' in given:
            with records.disk_errors(given['plot']):
                judged = None
                if results.until_sure:
                    judged = {one.name: one.difference for one in report.judged_arms(results)}
                figure = plot.figure(results.arms, results.target, panels, judged)
                figure.savefig(given['plot'], dpi=150)
    return 0


# ---------------------------------------- main ----------------------------------------


def print_error(message: str):
    """Print a message for the user, without control characters that names may have."""
    shown = (char if char.isprintable() or char == '\n' else ' ' for char in message)
    print(f'bench: {"".join(shown)}', file=sys.stderr)


def dispatch(argv: list[str]) -> int:
    """Run a command. Returns the exit status."""
    command = argv[0] if argv else ''
    rest = argv[1:]
    if command == 'run':
        parser = Parser('run', RUN_OPTIONS, EXAMPLES)
        return command_run(parser.given(sort_pairs(rest)), argv)
    if command == 'show':
        return command_show(Parser('show', SHOW_OPTIONS).given(rest))
    if command == 'speed':
        from bench import speed

        return speed.command_speed(Parser('speed', speed.OPTIONS).given(rest))
    if command in ('-h', '--help'):
        print(f'{DESCRIPTION}\n{EXAMPLES}')
        return 0
    raise UserError(f'{command or "no command"}: there are run, show and speed (--help)')


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 or 2 (errors), 130 or 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a name may hold what the terminal cannot show
    with stopping_signals():
        try:
            return dispatch(argv)
        except UserError as error:
            print_error(str(error))
            return 2
        except ModuleNotFoundError as error:
            print_error(f'{error}: pip install -r requirements.txt -r tests/requirements.txt')
            return 2
        except KeyboardInterrupt as stop:
            print_error('stopped')
            return 128 + stop.args[0]
        except BrokenPipeError:  # `| head`; the interpreter must not write to it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
