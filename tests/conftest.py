"""What every test file uses: both scripts as modules, small data, a network narrow enough for a CPU."""
import contextlib
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ('airbench94_baseline', 'airbench94_modified')
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tests' work is tiny: on a busy machine a second thread waits for its turn

# A run of a second or two: 4 steps per epoch on the 256 images of `data`.
NARROW = {'net.widths.block1': 8, 'net.widths.block2': 8, 'net.widths.block3': 8,
          'opt.batch_size': 64, 'opt.train_epochs': 2.0}
NARROW_ARGS = ['--device', 'cpu', '--hyp', *(f'{key}={value}' for key, value in NARROW.items())]


# ---------------------------------------- The campaign ----------------------------------------

CAMPAIGN = 'campaign: the long form of the fault tests, left out here: python -m pytest tests -m campaign'


def times(short, long):
    """Parametrizes a fault test with n: the short form, and the long one in the campaign."""
    return pytest.mark.parametrize('n', [short, pytest.param(long, marks=pytest.mark.campaign)])


def pytest_configure(config):
    config.addinivalue_line('markers', CAMPAIGN)


def pytest_report_header(config):
    return None if 'campaign' in config.option.markexpr else CAMPAIGN


def pytest_collection_modifyitems(config, items):
    if 'campaign' not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker('campaign')]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


# ---------------------------------------- Fixtures ----------------------------------------

@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the two scripts, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope='session')
def baseline():
    return importlib.import_module('airbench94_baseline')


@pytest.fixture(scope='session')
def modified():
    return importlib.import_module('airbench94_modified')


@pytest.fixture
def narrow(script):
    """Each script with NARROW in its hyp for the length of a test."""
    with script.overrides(NARROW):
        yield script


@pytest.fixture(scope='session')
def data(baseline):
    """The dict of `load_data` with 256 training and 100 test images, on the CPU."""
    return baseline.synthetic_data('cpu', train=256, test=100)


@pytest.fixture(scope='session')
def data_dir(data, tmp_path_factory):
    """A directory with the train.pt and test.pt of `data`."""
    folder = tmp_path_factory.mktemp('data')
    for split, content in data.items():
        torch.save(content, folder / f'{split}.pt')
    return folder


def set_autocast(monkeypatch, script, enabled):
    """Make a script believe that its CPU gains from bfloat16, or that it does not."""
    dtype = 'float32 under bfloat16 autocast' if enabled else 'float32'
    monkeypatch.setattr(script, 'environment', lambda device: {'dtype': dtype})


def command(name, *args):
    """The command line of a script, for subprocess."""
    return [sys.executable, str(ROOT / f'{name}.py'), *map(str, args)]


def environment(**variables):
    """The environment of a subprocess: one thread, so that results repeat and tests can share a machine."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', **variables}


@contextlib.contextmanager
def live(folder, words, **options):
    """A running process in a session of its own, which is ended with it; options of Popen.
    (A shell's background job ignores Ctrl-C and hands that down: it is undone.)"""
    process = subprocess.Popen(words, cwd=folder, **{
        'env': environment(), 'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE,
        'stderr': subprocess.STDOUT, 'text': True, 'start_new_session': True,
        'preexec_fn': lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options})
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run(tmp_path):
    """run(name, *args, **variables): a script's command line in an empty folder, as a finished process."""
    def run(name, *args, **variables):
        return subprocess.run(command(name, *args), cwd=tmp_path, env=environment(**variables),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    return run
