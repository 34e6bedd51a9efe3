"""Arms that cannot touch each other: each is a process of its own."""

import json
import re
import subprocess
import sys

import pytest
import torch
from bench.errors import UserError
from bench.worker import pick_device
from bench_helpers import command, lines, log_of, tool, write_fake
from conftest import NARROW, ROOT, environment

CHANGES = [
    f'{key}={value}'
    for key, value in {**NARROW, 'opt.train_epochs': 0.5, 'net.tta_level': 0}.items()
]
AFTER_IMPORTS = '\nhyp = {\n'
EDITS = {
    'plain': '',
    'functions': 'F.gelu = F.relu; torch.manual_seed = lambda seed: None',
    'settings': """
torch.backends.mkldnn.enabled = False
torch.set_num_threads(2)
torch.set_default_dtype(torch.float64)
os.environ['OMP_NUM_THREADS'] = os.environ['RANK'] = '3'
""",
}
BY_ITSELF = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import airbench94_baseline as script
data = script.load_data(sys.argv[1], 'cpu')
hyp = script.changed_hyp(sys.argv[3:])
record, _ = script.train(data, int(sys.argv[2]), hyp, quiet=True)
print(json.dumps({{'tta_acc': record['tta_acc'], 'epochs': record['epochs']}}))
"""


def numbers(run):
    """What must be the same in a run of equal code, data, seed and threads, to the last bit."""
    kept = ('epoch', 'train_loss', 'train_acc', 'test_acc')
    return run['tta_acc'], [[row[key] for key in kept] for row in run['epochs']]


def test_what_an_arm_changes_in_its_process_does_not_reach_another(data_dir, tmp_path):
    """The plain copy gives the numbers of the script by itself, whatever is edited beside it."""
    text = (ROOT / 'airbench94_baseline.py').read_text()
    assert text.count(AFTER_IMPORTS) == 1
    paths = []
    for name, edit in EDITS.items():
        path = tmp_path / f'{name}.py'
        path.write_text(text.replace(AFTER_IMPORTS, f'\n{edit}\n{AFTER_IMPORTS}'))
        paths.insert(0, path)  # an edited one is the reference, which loads the data
    fixed = ['--runs', '1', '--seed', '4', '--device', 'cpu', '--data-dir', data_dir]
    words = command('run', *paths, *fixed, '--log-dir', tmp_path / 'logs', '--hyp', *CHANGES)
    process = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    runs = {run['arm']: run for run in lines(log_of(tmp_path / 'logs'))}
    words = [sys.executable, '-c', BY_ITSELF, data_dir, str(runs['plain']['seed']), *CHANGES]
    own = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert numbers(runs['plain']) == numbers(json.loads(own.stdout))
    for name in ('functions', 'settings'):
        assert numbers(runs[name]) != numbers(runs['plain'])  # the edit did something


def test_the_process_that_compares_runs_no_code_of_a_script(tmp_path, monkeypatch):
    """Nor does it import what the script imports."""
    monkeypatch.chdir(tmp_path)
    who = 'print("loaded in", os.getpid(), os.environ.get("RANK"))'
    write_fake(tmp_path, 'fake.py', ('import random\n', f'import random\nimport os\n{who}\n'))
    words = command('run', 'fake.py', 'fake.py:opt.lr=3', '--runs', '2')
    with subprocess.Popen(words, env=environment(RANK='0'), stdout=-1, text=True) as process:
        out = process.stdout.read()
    found = re.findall(r'loaded in (\d+) (.*)', out)
    assert len(dict(found)) == 2 and str(process.pid) not in dict(found)
    assert {rank for _, rank in found} == {'None'}


def test_what_a_script_prints_is_shown_where_the_tool_prints(tmp_path, monkeypatch):
    """Text and bytes, also where the script has replaced the stream."""
    monkeypatch.chdir(tmp_path)
    imports = 'import io\nimport random\nimport sys\n'
    imports += 'sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")\n'
    prints = """
    print("on", "stdout")
    print("on stderr", file=sys.stderr)
    data = "bytes \\u00fc\\n".encode()
    sys.stderr.buffer.write(data[:7])  # half a character
    sys.stderr.buffer.write(data[7:])
    rows = []"""
    write_fake(tmp_path, 'fake.py', ('\n    rows = []', prints), ('import random\n', imports))
    status, out, err = tool('run', 'fake.py', '--runs', 2)
    assert status == 0 and out.count('on stdout\n') == err.count('on stderr\n') == 3
    assert err.count('bytes \u00fc\n') == 3


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, device in (('auto', 'cuda:1'), ('cuda', 'cuda:1'), ('cuda:0', 'cuda:0')):
        assert pick_device(name, local_rank=1) == torch.device(device)
    with pytest.raises(UserError, match='finds 2 CUDA devices'):
        pick_device('cuda:2')
