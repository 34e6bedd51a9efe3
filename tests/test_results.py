"""No figure without its log: what the READMEs show of tests/bench/results is what `show` prints."""

import re
import shlex

import pytest
from bench import cli
from conftest import ROOT

RESULTS = ROOT / 'tests' / 'bench' / 'results'
READMES = (ROOT / 'README.md', ROOT / 'tests' / 'bench' / 'README.md')
# An indented block that starts with the command, and then has lines that it prints, or none.
SHOW = re.compile(
    r' {4}\$ python (tests/bench show tests/bench/results/.*)\n((?:(?! {4}\$ )(?: {4}.*)?\n)+)'
)
BLOCKS = [block for readme in READMES for block in SHOW.findall(readme.read_text())]
INTERVAL = re.compile(r'[+-]\d\.\d\d\s(?:points\s)?\([+-]\d\.\d\d\sto\s[+-]\d\.\d\d\)')


@pytest.fixture
def show(monkeypatch, capsys):
    """show(command): the lines that it prints."""
    monkeypatch.chdir(ROOT)

    def show(command):
        assert cli.main(shlex.split(command)[1:]) == 0
        return [*map(str.rstrip, capsys.readouterr().out.splitlines())]

    return show


@pytest.mark.parametrize('command, lines', BLOCKS, ids=[text.split('/')[-1] for text, _ in BLOCKS])
def test_a_readme_shows_what_the_log_says(command, lines, show):
    printed = [*show(command), '...', '']
    assert [line for line in lines.splitlines() if line[4:].rstrip() not in printed] == []


def test_every_difference_in_the_prose_is_shown_by_a_command(show):
    """Written as there, with its interval: -0.52 points (-0.73 to -0.32), 'points' or not."""
    commands = {command for command, _ in BLOCKS}
    commands |= {f'tests/bench show {shlex.quote(str(folder))}' for folder in RESULTS.iterdir()}
    shown = '\n'.join(line for command in commands for line in show(command))
    prose = {found for readme in READMES for found in INTERVAL.findall(readme.read_text())}
    differences = {' '.join(found.replace('points', '').split()) for found in prose}
    assert differences
    assert [one for one in differences if one not in shown.replace(' points', '')] == []


def test_the_first_screen_shows_a_result():
    first_screen = READMES[0].read_text().splitlines()[:40]
    assert any('tests/bench show tests/bench/results/' in line for line in first_screen)


@pytest.mark.parametrize('folder', sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_every_result_says_what_was_asked_and_has_its_runs(folder):
    assert (folder / 'README.md').read_text().startswith('Asked: ')
    assert list(folder.glob('runs*.jsonl'))
