"""What every test file uses: the three scripts as modules, small data, a narrow network."""

import contextlib
import functools
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import configuration

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    'airbench94_baseline': ROOT / 'airbench94_baseline.py',
    'airbench94_modified': ROOT / 'airbench94_modified.py',
    'fast94': ROOT / 'tests' / 'bench' / 'examples' / 'fast94.py',
}
SCRIPTS = tuple(FILES)
REPORT_SCRIPTS = SCRIPTS[:2]  # Nesterov SGD with lookahead; fast94 has Muon
for path in FILES.values():
    sys.path.insert(0, str(path.parent))
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), 'hypothesis'))
torch.set_num_threads(1)  # the work is tiny: on a busy machine a second thread waits for its turn

# A run of a second or less: 4 steps per epoch on the 256 images of `data`.
NARROW = {
    'opt.batch_size': 64,
    'opt.train_epochs': 2.0,
    'net.widths.block1': 8,
    'net.widths.block2': 8,
    'net.widths.block3': 8,
}
NARROW_ARGS = ['--device', 'cpu', '--hyp', *(f'{key}={value}' for key, value in NARROW.items())]


def set_value(hyp: dict, key: str, value):
    """Set hyp['opt']['lr'] for the key 'opt.lr'."""
    *groups, name = key.split('.')
    for group in groups:
        hyp = hyp[group]
    hyp[name] = value


def narrow_hyp(script, **changes) -> dict:
    """Return a copy of a script's hyp with NARROW and the changes: lr=9 or **{'opt.lr': 9}.

    Of fast94's two epochs, the first is on small images.
    """
    hyp = script.default_hyp()
    known = script.flat_hyp(hyp)
    values = dict(NARROW)
    if 'opt.low_res_epochs' in known:
        values['opt.low_res_epochs'] = [24]
    for change, value in {**values, **changes}.items():
        (key,) = [key for key in known if key == change or key.endswith(f'.{change}')]
        set_value(hyp, key, value)
    return hyp


# ---------------------------------------- The campaign ----------------------------------------
def times(short, long):
    """Parametrize a fault test with n: the short form, and the long one in the campaign."""
    return pytest.mark.parametrize('n', [short, pytest.param(long, marks=pytest.mark.campaign)])


def pytest_configure(config):
    """Leave the long forms out, unless `-m campaign` asks for them."""
    chosen = config.option.markexpr
    if 'campaign' not in chosen:
        config.option.markexpr = f'({chosen}) and not campaign' if chosen else 'not campaign'


# ---------------------------------------- Scripts and data ----------------------------------------
@pytest.fixture(params=SCRIPTS)
def script(request):
    """Return each of the three scripts, as a module."""
    return importlib.import_module(request.param)


with_sgd = pytest.mark.parametrize('script', REPORT_SCRIPTS, indirect=True)


@pytest.fixture(scope='session')
def baseline():
    return importlib.import_module('airbench94_baseline')


@pytest.fixture(scope='session')
def modified():
    return importlib.import_module('airbench94_modified')


@pytest.fixture(scope='session')
def fast94():
    return importlib.import_module('fast94')


@pytest.fixture
def float32(monkeypatch):
    """Let all scripts believe that this CPU gains nothing from bfloat16; Muon's products, too."""
    for name in SCRIPTS:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, 'cpu_has_bfloat16', lambda: False)
    monkeypatch.setitem(importlib.import_module('fast94').PRODUCT_DTYPE, 'cpu', torch.float32)


@pytest.fixture(scope='session')
def data(baseline):
    """Return the dict of `load_data` with 256 training and 100 test images, on the CPU."""
    return baseline.synthetic_data('cpu', train=256, test=100)


@pytest.fixture(scope='session')
def data_dir(data, tmp_path_factory):
    """Return a directory with the train.pt and test.pt of `data`."""
    folder = tmp_path_factory.mktemp('data')
    for split, content in data.items():
        torch.save(content, folder / f'{split}.pt')
    return folder


# ---------------------------------------- Commands ----------------------------------------
@pytest.fixture
def call(baseline, tmp_path, monkeypatch, capsys):
    """Return call(*args, script=baseline): main in an empty folder; status, out, err and runs."""
    monkeypatch.chdir(tmp_path)

    def call(*args, script=baseline):
        status, runs = 0, None
        capsys.readouterr()
        try:
            runs = script.main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, runs=runs)

    return call


def assert_refused(result, status=2):
    """Check that a command ended with a status and one line of at least four words."""
    assert result.status == status, result.err
    assert result.err.count('\n') == 1 and 'Traceback' not in result.err, result.err
    assert len(result.err.split()) >= 4, result.err


def runs_in_table(out):
    """Return how many runs the last row of a script's table is of."""
    return int(re.findall(r'^(?:1|Average) .*% .* \d+/(\d+)$', out, re.M)[-1])


@contextlib.contextmanager
def limited(kind, value):
    """Put this process under a limit of the operating system, such as resource.RLIMIT_FSIZE."""
    before, writes = resource.getrlimit(kind), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # no half .pyc may stay of what is imported meanwhile
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)
        sys.dont_write_bytecode = writes


def environment(**variables):
    """Return the environment of a subprocess: one thread, so that results repeat."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', **variables}


@contextlib.contextmanager
def live(folder, words, **options):
    """Run a process in a session of its own, which ends with it; options of Popen.

    A shell's background job ignores Ctrl-C and hands that down: it is undone.
    """
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    options = {'env': environment(), **pipes, 'text': True, 'start_new_session': True, **options}
    ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(words, cwd=folder, preexec_fn=ctrl_c, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def in_a_terminal(folder, words):
    """Return what a command that ends well writes to a terminal, with line ends of a file."""
    pty = pytest.importorskip('pty')
    ours, theirs = pty.openpty()
    with live(folder, words, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b''
        with contextlib.suppress(OSError):  # the other side is closed
            while chunk := os.read(ours, 1000):
                shown += chunk
        process.wait()
    os.close(ours)
    shown = shown.decode().replace('\r\n', '\n')
    assert process.returncode == 0, shown
    return shown
