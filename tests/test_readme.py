"""Every fenced block of a README runs as it stands.

The ```python blocks run in their order in one process, in a folder with a small ./cifar10 and the
scripts. Commands in ```bash blocks are checked by their parsers; those with --synthetic are also
started: in the ordinary suite until the first epoch begins, in the campaign to their end.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from bench.cli import make_parser
from conftest import ROOT, SCRIPTS, environment, live

READMES = ['README.md', 'tests/README.md', 'tests/bench/README.md']
KNOWN = ('python', 'torchrun', 'pip', 'cp', 'git', 'cd')  # what a block may begin a line with


def blocks(readme, language):
    """The fenced blocks of a language in a README."""
    return re.findall(rf'^```{language}\n(.*?)^```$', (ROOT / readme).read_text(), re.M | re.S)


def commands(readme):
    """The words of each command in the bash blocks: lines, without comments, split at &&."""
    for block in blocks(readme, 'bash'):
        for line in re.split('\n|&&', block.replace('\\\n', ' ')):
            if words := shlex.split(line, comments=True):
                yield words


COMMANDS = [words for readme in READMES for words in commands(readme)]
TRAINING = [words for words in COMMANDS if words[0] == 'python' and words[1][:9] == 'airbench9']
TOOL = [words for words in COMMANDS if 'tests/bench' in words[:3]]
SYNTHETIC = [words for words in TRAINING + TOOL if '--synthetic' in words]


def ids(words):
    return ' '.join(words)[:70]


@pytest.fixture
def folder(baseline, tmp_path):
    """What a fresh clone has at its top, and a few images in ./cifar10."""
    for name in SCRIPTS:
        shutil.copy(ROOT / f'{name}.py', tmp_path)
        shutil.copy(ROOT / f'{name}.py', tmp_path / 'mine.py')  # an edited copy
    (tmp_path / 'tests').symlink_to(ROOT / 'tests')
    (tmp_path / 'cifar10').mkdir()
    for split, content in baseline.synthetic_data('cpu', train=600, test=100).items():
        torch.save(content, tmp_path / 'cifar10' / f'{split}.pt')
    return tmp_path


def test_readme_has_blocks_of_both_kinds_and_the_documented_commands():
    assert blocks('README.md', 'python') and TRAINING and TOOL and SYNTHETIC
    assert not [words for words in COMMANDS if words[0] not in KNOWN]


# The scripts' own hyp would train a whole network for minutes: a narrow one takes its place.
NARROW = """
import airbench94_baseline, airbench94_modified
for script in airbench94_baseline, airbench94_modified:
    script.hyp['opt'] |= {'train_epochs': 1.0, 'batch_size': 64}
    script.hyp['net']['widths'] = {'block1': 8, 'block2': 8, 'block3': 8}
"""


@pytest.mark.parametrize('readme', [name for name in READMES if blocks(name, 'python')])
def test_python_blocks_run_in_their_order(readme, folder):
    source = NARROW + '\n'.join(blocks(readme, 'python'))
    options = {'cwd': folder, 'env': environment(), 'capture_output': True, 'text': True}
    process = subprocess.run([sys.executable, '-c', source], **options)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('words', TRAINING, ids=ids)
def test_options_of_the_scripts_are_known(words):
    script = importlib.import_module(words[1].removesuffix('.py'))
    assert script.changed_hyp(script.parse_args(words[2:]).changes)


@pytest.mark.parametrize('words', TOOL, ids=ids)
def test_options_of_the_tool_are_known(words, folder):
    options = words[words.index('tests/bench') + 1 :]
    make_parser().parse_args(options)
    assert all((folder / word.partition(':')[0]).exists() for word in options if '.py' in word)


@pytest.mark.parametrize('words', SYNTHETIC, ids=ids)
@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_commands_without_data_run(words, whole, folder):
    words = [sys.executable if word == 'python' else word for word in words]
    with live(folder, words) as process:
        for line in process.stdout:
            if not whole and re.match(' *trial +run|.*epoch', line):
                return
        process.wait()
    assert whole and process.returncode == 0
