"""No figure without its log: what the READMEs show of tests/bench/results is what `show` prints."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, environment

RESULTS = ROOT / 'tests' / 'bench' / 'results'
READMES = (ROOT / 'README.md', ROOT / 'tests' / 'bench' / 'README.md')
# A block that starts with the command, and then has lines that it prints.
SHOWN = re.compile(
    r'^( *)\$ python (tests/bench show tests/bench/results/\S+.*)\n((?:\1.*\n)+)', re.M
)


def shown_blocks():
    for readme in READMES:
        for indent, command, lines in SHOWN.findall(readme.read_text()):
            output = [line.removeprefix(indent) for line in lines.splitlines()]
            yield pytest.param(
                command, output, id=f'{readme.parent.name}: {command.split("/")[-1]}'
            )


@pytest.mark.parametrize('command, shown', list(shown_blocks()))
def test_a_readme_shows_what_the_log_says(command, shown):
    process = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    printed = [line.rstrip() for line in process.stdout.splitlines()]
    wanted = [line.rstrip() for line in shown if line.strip() and not line.startswith('```')]
    missing = [line for line in wanted if line not in [*printed, '...']]
    assert missing == []


def test_the_first_screen_shows_a_result():
    first_screen = READMES[0].read_text().splitlines()[:40]
    assert any('tests/bench show tests/bench/results/' in line for line in first_screen)


@pytest.mark.parametrize('folder', sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_every_result_says_what_was_asked_and_has_its_runs(folder):
    assert (folder / 'README.md').read_text().startswith('Asked: ')
    assert list(folder.glob('runs*.jsonl'))
