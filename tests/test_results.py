"""No figure without its log: what the READMEs show of tests/bench/results is what `show` prints."""

import re
import shlex

import pytest
from bench import cli
from conftest import ROOT

RESULTS = ROOT / 'tests' / 'bench' / 'results'
READMES = (ROOT / 'README.md', ROOT / 'tests' / 'bench' / 'README.md')
# An indented block that starts with the command, and then has lines that it prints.
SHOW = re.compile(r' {4}\$ python (tests/bench show tests/bench/results/.*)\n((?: {4}.*\n)+)')
BLOCKS = [block for readme in READMES for block in SHOW.findall(readme.read_text())]


@pytest.mark.parametrize('command, lines', BLOCKS, ids=[text.split('/')[-1] for text, _ in BLOCKS])
def test_a_readme_shows_what_the_log_says(command, lines, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)[1:]) == 0
    printed = [*map(str.rstrip, capsys.readouterr().out.splitlines()), '...']
    shown = [line[4:].rstrip() for line in lines.splitlines()]
    assert [line for line in shown if line not in printed] == []


def test_the_first_screen_shows_a_result():
    first_screen = READMES[0].read_text().splitlines()[:40]
    assert any('tests/bench show tests/bench/results/' in line for line in first_screen)


@pytest.mark.parametrize('folder', sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_every_result_says_what_was_asked_and_has_its_runs(folder):
    assert (folder / 'README.md').read_text().startswith('Asked: ')
    assert list(folder.glob('runs*.jsonl'))
