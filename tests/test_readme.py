"""Every fenced block of a README runs as it stands.

The ```python blocks of a README run in their order in one process, in a folder with the scripts, a
small ./cifar10, ./pictures and a saved network. Commands in ```bash blocks are checked by their
parsers; those with --synthetic are also started: in the ordinary suite until the first row, in the
campaign to their end.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from bench import cli, speed
from conftest import FILES, NARROW_ARGS, ROOT, environment, live
from PIL import Image

READMES = ['README.md', 'tests/README.md', 'tests/bench/README.md']
KNOWN = ('python', 'torchrun', 'pip', 'cp', 'git', 'cd')  # what a block may begin a line with
NAMES = {str(path.relative_to(ROOT)): name for name, path in FILES.items()}


def blocks(readme, language):
    """Return the fenced blocks of a language in a README."""
    return re.findall(rf'^```{language}\n(.*?)^```$', (ROOT / readme).read_text(), re.M | re.S)


def commands(readme):
    """Return the words of each command in the bash blocks: lines, without comments, split at &&."""
    found = []
    for block in blocks(readme, 'bash'):
        for line in re.split('\n|&&', block.replace('\\\n', ' ')):
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


COMMANDS = [words for readme in READMES for words in commands(readme)]
TRAINING = [words for words in COMMANDS if words[0] == 'python' and words[1] in NAMES]
TOOL = [words for words in COMMANDS if 'tests/bench' in words]
SYNTHETIC = [words for words in TRAINING + TOOL if '--synthetic' in words]


def ids(words):
    return ' '.join(words)[:70]


@pytest.fixture
def folder(baseline, tmp_path):
    """Return what a fresh clone has at its top, and a few images in ./cifar10."""
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    shutil.copy(FILES['airbench94_baseline'], tmp_path / 'mine.py')  # an edited copy
    (tmp_path / 'tests').symlink_to(ROOT / 'tests')
    (tmp_path / 'cifar10').mkdir()
    for split, content in baseline.synthetic_data('cpu', train=600, test=100).items():
        torch.save(content, tmp_path / 'cifar10' / f'{split}.pt')
    return tmp_path


def test_readme_has_blocks_of_both_kinds_and_the_documented_commands():
    assert blocks('README.md', 'python') and TRAINING and TOOL and SYNTHETIC
    assert not [words for words in COMMANDS if words[0] not in KNOWN]


@pytest.mark.parametrize('readme', [name for name in READMES if blocks(name, 'python')])
def test_python_blocks_run_in_their_order(readme, folder, call, baseline):
    for split in ('train', 'test'):
        for name, colour in (('day', 'skyblue'), ('night', 'black')):
            pictures = folder / 'pictures' / split / name
            pictures.mkdir(parents=True)
            Image.new('RGB', (40, 30), colour).save(pictures / 'one.jpg')
    call('--trials', 1, '--quiet', '--save', 'net.pt', *NARROW_ARGS)
    source = '\n'.join(blocks(readme, 'python'))
    options = {'cwd': folder, 'env': environment(), 'capture_output': True, 'text': True}
    process = subprocess.run([sys.executable, '-c', source], **options)
    assert process.returncode == 0, process.stderr
    if 'mydata' in source:
        data = baseline.load_data(folder / 'mydata', 'cpu')
        assert data['train']['classes'] == ['day', 'night']
        for image, label in zip(data['test']['images'], data['test']['labels'], strict=True):
            assert (image.float().mean() < 50) == (label == 1)  # each picture has its own label


@pytest.mark.parametrize('words', TRAINING, ids=ids)
def test_options_of_the_scripts_are_known(words):
    script = importlib.import_module(NAMES[words[1]])
    assert script.parse_args(words[2:])


@pytest.mark.parametrize('words', TOOL, ids=ids)
def test_options_of_the_tool_are_known(words, folder, monkeypatch):
    given = []
    for module, name in ((cli, 'command_run'), (cli, 'command_show'), (speed, 'command_speed')):
        monkeypatch.setattr(module, name, lambda *args: given.append(args))
    cli.dispatch(words[words.index('tests/bench') + 1 :])
    assert given
    assert all((folder / word.partition(':')[0]).exists() for word in words if '.py' in word)


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
