"""The command line: run, show, speed."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from bench import records
from bench.errors import ScriptError, UserError, one_line, stopping_signals

DEFAULTS = {
    'scripts': [],
    'runs': None,
    'sweep': [],
    'hyp': [],
    'until_sure': None,
    'margin': None,
    'seed': None,
    'device': 'auto',
    'data_dir': 'cifar10',
    'synthetic': False,
    'curves': False,
    'log_dir': 'logs',
    'target': 94.0,
    'resume': None,
}
RUNS, RUNS_UNTIL_SURE, POINTS = 25, 100, 0.1
FIXED = ('scripts', 'sweep', 'hyp', 'seed', 'synthetic', 'curves')  # in a resumed experiment
LIMITS = {
    'runs': (1, 10**6),
    'until_sure': (1e-3, 100),
    'margin': (1e-3, 100),
    'seed': (0, 2**64 - 1),
    'target': (0, 100),
}

EXAMPLES = """\
examples
  python tests/bench run airbench94_modified.py mine.py --runs 25
  python tests/bench run mine.py --sweep opt.lr=9,11.5,14 --until-sure 0.1
  python tests/bench run airbench94_baseline.py airbench94_baseline.py:recipe=fast94 --margin 0.1
  torchrun --nproc_per_node=8 tests/bench run airbench94_baseline.py mine.py --runs 200
  python tests/bench run --resume logs/20260101T000000Z-bench-1a2b3c
  python tests/bench show logs/A logs/B --plot figure.png
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and which has no defaults: only what was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args,
            **kwargs,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise UserError(f'{one_line(message)} (python tests/bench --help)')


def add_run_options(run: Parser):
    add, many = run.add_argument, {'nargs': '+', 'action': 'extend'}
    add(
        'scripts',
        nargs='*',
        metavar='SCRIPT[:KEY=VALUE,...]',
        help='arms; the first is the reference',
    )
    add(
        '--runs',
        type=int,
        metavar='N',
        help=f'runs per arm ({RUNS}), or at most ({RUNS_UNTIL_SURE})',
    )
    add(
        '--sweep',
        **many,
        metavar='KEY=A,B,...',
        help='arms of the first script, one for each value',
    )
    add(
        '--hyp',
        **many,
        metavar='KEY=VALUE',
        help='hyperparameters of all arms; recipe=NAME, compile=true',
    )
    add(
        '--until-sure',
        nargs='?',
        const=POINTS,
        type=float,
        metavar='POINTS',
        help=f'stop when a difference is shown, or one of POINTS ({POINTS}) is excluded',
    )
    add('--margin', type=float, metavar='POINTS', help='is it not inferior by more than POINTS?')
    add('--seed', type=int, metavar='S', help='of the whole experiment (drawn and printed)')
    add('--device', metavar='D', help='auto, cpu, cuda, cuda:1 (auto: CUDA where it is)')
    add('--data-dir', metavar='DIR', help='what the scripts read their data from (cifar10)')
    add(
        '--synthetic',
        action='store_true',
        help="the first script's synthetic_data in place of CIFAR-10",
    )
    add('--curves', action='store_true', help='evaluate after each epoch, for the figures')
    add('--log-dir', metavar='DIR', help='gets a folder for the experiment (logs)')
    add('--target', type=float, metavar='PCT', help='accuracy in percent to count from (94)')
    add('--resume', metavar='DIR', help='make the runs that this log folder lacks')


def add_show_options(show: Parser):
    add = show.add_argument
    add('logs', nargs='+', metavar='LOG', help='log folders or runs.jsonl files')
    add('--plot', metavar='FILE', help='draw a figure; its suffix is the format')
    add('--target', type=float, metavar='PCT', help='accuracy in percent to count from (94)')
    add('--margin', type=float, metavar='POINTS', help='is it not inferior by more than POINTS?')
    add('--reference', metavar='ARM', help='what to compare with (the first arm)')
    add('--no-clock', action='store_true', help='for runs of a busy machine: no clocks')


def make_parser() -> Parser:
    """The parser of all subcommands but speed, which has its own."""
    parser = Parser('bench', description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest='subcommand', metavar='run | show | speed', required=True)
    add_run_options(commands.add_parser('run', help='compare scripts by new runs', epilog=EXAMPLES))
    add_show_options(commands.add_parser('show', help='table, comparison and figures of logs'))
    commands.add_parser('speed', help='how fast the parts of the scripts are', add_help=False)
    return parser


def check_limits(options: dict):
    """Raises UserError for a number out of range."""
    for name, (low, high) in LIMITS.items():
        value = options.get(name)
        if value is not None and not low <= value <= high:
            option = name.replace('_', '-')
            raise UserError(f'--{option} {value}: it must be from {low} to {high}')
    target = options.get('target')
    if target is not None and 0 < target <= 1:
        raise UserError(f'--target {target:g}: it is in percent; did you mean {100 * target:g}?')


# ---------------------------------------- run ----------------------------------------


def run_options(given: dict) -> dict:
    """All options of `run`: those given, else those of the resumed log, else the defaults."""
    check_limits(given)
    logged = {}
    if 'resume' in given:
        experiment = records.read_experiment(given['resume'])
        logged = experiment['options']
        for name in FIXED:
            if name in given and given[name] != logged[name]:
                raise UserError(
                    f'--resume: {name.replace("_", " ")} of the log: {one_line(logged[name])}, '
                    f'now: {one_line(given[name])}; leave it out, or start a new experiment'
                )
        given = {key: value for key, value in given.items() if key not in FIXED}
    options = {**DEFAULTS, **logged, **given}
    if not options['scripts']:
        raise UserError('run needs a script, or --resume DIR')
    if options['runs'] is None:
        options['runs'] = RUNS_UNTIL_SURE if options['until_sure'] else RUNS
    if options['seed'] is None:
        options['seed'] = int.from_bytes(os.urandom(4), 'big')
    return options


def title(experiment) -> list[str]:
    """The lines above the rows."""
    from bench.report import common_lines

    options, facts = experiment.options, experiment.facts
    count = f'at most {options["runs"]}' if options['until_sure'] else options['runs']
    arms = len(experiment.arms)
    what = [f'{arms} arm{"s" if arms > 1 else ""} x {count} runs']
    what.append(f'seed {options["seed"]}')
    what.append(
        f'{one_line(facts["name"])} ({facts["train"]} to train on, {facts["test"]} to test)'
    )
    lines = [', '.join(what)]
    names = [arm.name for arm in experiment.arms]
    return lines + common_lines(options['hyp'], names)


def command_run(given: dict, argv: list[str]) -> int:
    """`bench run`. Imports torch only now, so that --help and `show` start at once."""
    from bench import runner
    from bench.job import Job
    from bench.progress import make_display
    from bench.report import QuietConsole, print_report

    options = {**run_options(given), 'command': argv}
    job, experiment, console = Job(), None, None
    try:
        if job.rank == 0:
            console = QuietConsole()
        options['seed'] = job.share(options['seed'])
        experiment = runner.prepare(options, job)
        names = [arm.name for arm in experiment.arms]
        total = len(names) * options['runs']
        display = make_display(console, names, total, experiment.runs)
        try:
            for line in title(experiment):
                display.line(line)
            work = runner.Runner(experiment, job, display)
            work.make_runs()
        finally:
            display.close()
    except BrokenPipeError:
        console = None
        raise
    except KeyboardInterrupt:
        if experiment is not None:
            experiment.read_again()
        raise KeyboardInterrupt(stopped_line(experiment) if job.rank == 0 else '') from None
    except UserError as error:
        if experiment is not None:
            keep_details(experiment, error, job.rank)
            error.status = 1 if experiment.runs or experiment.unlogged else 2
        raise
    finally:
        if experiment is not None:
            finish(experiment, console, job, print_report)
    return 0


def stopped_line(experiment) -> str:
    """What is said of an experiment that a signal ended."""
    runs = [*experiment.runs, *experiment.unlogged] if experiment else []
    line = f'stopped after {len(runs)} finished runs'
    if not runs:
        return line
    return f'{line}; `python tests/bench run --resume {one_line(experiment.folder)}` goes on'


def keep_details(experiment, error: UserError, rank: int):
    """Writes the traceback of a script's bug beside the log."""
    if isinstance(error, ScriptError):
        name = f'error-{rank}.txt'
        records.write_file(experiment.folder, name, error.details.encode(errors='replace'))
        error.args = (f'{error}; the traceback is in {os.path.join(experiment.folder, name)}',)


def finish(experiment, console, job, print_report):
    """The report of what there is; an experiment without a run leaves no folder."""
    experiment.read_again()
    if experiment.runs or experiment.unlogged:
        if console is not None:
            console.print('')
            print_report(console, experiment.results())
    elif (
        job.world == 1
        and not experiment.resumed
        and not list(Path(experiment.folder).glob('error-*'))
    ):
        shutil.rmtree(experiment.folder, ignore_errors=True)


# ---------------------------------------- show ----------------------------------------


def results_of(logs: list[str], options: dict):
    """The runs of logs, judged as their experiment was unless the options say otherwise."""
    from bench import report

    log = records.read(logs)
    logged = log.experiment['options'] if log.experiment else {}
    arms = records.by_arm(log.runs)
    if not arms:
        raise UserError(f'{", ".join(map(one_line, logs))}: no finished run yet')
    return report.Results(
        report.put_reference_first(arms, options.get('reference')),
        target=options.get('target', logged.get('target', DEFAULTS['target'])),
        margin=options.get('margin', logged.get('margin')),
        until_sure=logged.get('until_sure') if 'reference' not in options else None,
        planned=logged.get('runs', 0),
        searched=bool(logged.get('sweep')),
        with_clocks=not options.get('no_clock'),
        common=log.common,
        notes=log.notes,
        folders=logs,
    )


def command_show(given: dict) -> int:
    """`bench show`."""
    from bench import report

    check_limits(given)
    if 'plot' in given:
        from bench import plot  # matplotlib takes a second

        plot.check_suffix(given['plot'])
    results = results_of(given['logs'], given)
    try:
        report.print_report(report.QuietConsole(), results)
    finally:  # also where `| head` has closed the pipe
        if 'plot' in given:
            with records.disk_errors(given['plot']):
                plot.figure(results.arms, results.target).savefig(given['plot'], dpi=200)
    return 0


# ---------------------------------------- main ----------------------------------------


def dispatch(argv: list[str]) -> int:
    if argv[:1] == ['speed']:
        from bench import speed

        return speed.main(argv[1:]) or 0
    given = vars(make_parser().parse_args(argv))
    if given.pop('subcommand') == 'show':
        return command_show(given)
    return command_run(given, argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 and 2 (errors), 130 and 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a name may hold what the terminal cannot show
    with stopping_signals() as signals:
        try:
            return dispatch(argv)
        except UserError as error:
            print(f'bench: {error}', file=sys.stderr)
            return error.status
        except KeyboardInterrupt as stop:
            if str(stop) or argv[:1] != ['run']:  # one process of several speaks
                print(f'bench: {str(stop) or "stopped"}', file=sys.stderr)
            return 128 + (signals[0] if signals else 2)
        except BrokenPipeError:  # `| head`; the interpreter must not write to it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
