"""The shape of the three scripts: what differs between them, order, imports, names and values."""

import ast
import difflib
import subprocess
import symtable
import sys

import pytest
from conftest import FILES, ROOT, SCRIPTS, environment

SOURCES = {name: path.read_text() for name, path in FILES.items()}
EXPERIMENTS = {  # what each may have of its own
    'airbench94_modified': {'header', 'NAME', 'hyp', 'batch_crop', 'CifarLoader', 'ConvGroup'},
    'fast94': {
        *('header', 'NAME', 'hyp', 'hyp_limits', 'CifarNet', 'infer', 'evaluate', 'train'),
        *('make_optimizer', 'lr_factor', 'LookaheadState'),
        *('PRODUCT_DTYPE', 'orthogonalize', 'Muon', 'MuonAndSGD', 'make_schedule'),
        *('RecordedStep', 'CompiledStep', 'warm_up', 'above hyp', 'above make_optimizer'),
    },
}
PUBLIC = """
default_hyp flat_hyp check_hyp load_data synthetic_data batch_flip_lr batch_crop CifarLoader Conv
BatchNorm ConvGroup CifarNet make_net make_optimizer lr_factor infer evaluate train_step
compile_step train warm_up main
"""
OPTIMIZERS = {'fast94': ['orthogonalize', 'Muon', 'MuonAndSGD', 'make_schedule']}
each_script = pytest.mark.parametrize('name', SCRIPTS)


def name_of(node):
    """Return what a top-level statement defines, or nothing for an import and what has no name."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], 'id', '')
    if isinstance(node, ast.Expr):
        return 'header'
    return getattr(node, 'name', '')


def parts(source):
    """Return {name: text of what is defined}, and the lines of the rest, with names in place.

    'above NAME': the comments and headings above a definition.
    """
    lines = source.splitlines()
    nodes = ast.parse(source).body
    starts = [0, *(node.end_lineno for node in nodes)]
    texts = {}
    for node, start in reversed(list(zip(nodes, starts, strict=False))):
        name = name_of(node)
        if name:
            decorators = getattr(node, 'decorator_list', [])
            first = min(part.lineno for part in [node, *decorators]) - 1
            texts[name] = lines[first : node.end_lineno]
            texts[f'above {name}'] = [line for line in lines[start:first] if line]
            lines[start : node.end_lineno] = [f'<{name}>']
    return texts, lines


def crossings(baseline, other, experiment):
    """Return the name of each shared definition that differs, and the lines of it."""
    texts, rest = parts(baseline)
    other_texts, other_rest = parts(other)
    pairs = [(name, texts[name], other_texts.get(name, [])) for name in texts]
    own = [f'<{name}>' for name in experiment]
    rest = [line for line in rest if line not in own or line in other_rest]
    other_rest = [line for line in other_rest if line not in own or line in rest]
    pairs.append(('rest', rest, other_rest))
    found = []
    for name, ours, theirs in pairs:
        if name not in experiment:
            diff = difflib.unified_diff(ours, theirs, name, name, n=0, lineterm='')
            found += list(diff)[1:]
    return found


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_what_an_experiment_does_not_change_is_the_baselines_text(name):
    found = crossings(SOURCES['airbench94_baseline'], SOURCES[name], EXPERIMENTS[name])
    assert not found, '\n'.join(found)


def test_what_crosses_is_named():
    baseline = SOURCES['airbench94_baseline']
    changed = baseline.replace('lr = opt[', 'lr = 2 * opt[').replace('import math', 'import cmath')
    found = crossings(baseline, changed, EXPERIMENTS['airbench94_modified'])
    assert '+++ make_optimizer' in found and '+import cmath' in found
    assert len([line for line in found if line.startswith('+++')]) == 2


@each_script
def test_every_name_is_defined_above_its_first_user(name):
    """A function or class may use what is defined above it, and itself."""
    nodes = ast.parse(SOURCES[name]).body
    defined = {name_of(node): node.lineno for node in nodes if name_of(node)}

    def globals_of(scope):
        found = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        return found.union(*(globals_of(inner) for inner in scope.get_children()))

    late = []
    for scope in symtable.symtable(SOURCES[name], f'{name}.py', 'exec').get_children():
        for used in globals_of(scope):
            if defined.get(used, 0) > scope.get_lineno() and used != scope.get_name():
                late.append(f'{scope.get_name()} uses {used}')
    assert not late


@each_script
def test_only_three_packages_and_the_standard_library_are_imported(name):
    modules = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split('.')[0])
    assert modules - sys.stdlib_module_names == {'torch', 'torchvision', 'numpy'}


def test_public_functions_and_classes_are_documented(script):
    names = [*PUBLIC.split(), *OPTIMIZERS.get(script.NAME, ['LookaheadState'])]
    assert [name for name in names if not getattr(script, name).__doc__] == []


def test_hyperparameters_are_those_of_the_specification(baseline, modified):
    expected = {
        'opt': {
            'train_epochs': 9.9,
            'batch_size': 1024,
            'lr': 11.5,
            'momentum': 0.85,
            'weight_decay': 0.0153,
            'bias_scaler': 64.0,
            'label_smoothing': 0.2,
            'whiten_bias_epochs': 3,
        },
        'aug': {'flip': True, 'translate': 2},
        'net': {
            'widths': {'block1': 64, 'block2': 256, 'block3': 256},
            'batchnorm_momentum': 0.6,
            'scaling_factor': 1 / 9,
            'tta_level': 2,
        },
    }
    assert baseline.hyp == expected
    expected['opt'].update(train_epochs=8.0, batch_size=1536, lr=17.25)
    assert modified.hyp == expected


def test_hyperparameters_have_limits_and_are_within_them(script):
    assert script.hyp_limits.keys() == script.flat_hyp(script.hyp).keys()
    script.check_hyp(script.hyp)


def test_import_has_no_side_effect(tmp_path):
    code = f"""
import os, sys, torch

def state():
    return (
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
        torch.initial_seed(), torch.get_rng_state().tolist(), sys.argv,
    )

before = state()
sys.path[:0] = {[str(path.parent) for path in FILES.values()]!r}
import {', '.join(SCRIPTS)}
assert state() == before
assert not torch.cuda.is_initialized() and not os.listdir()
assert 'torchvision' not in sys.modules  # it takes a second
"""
    words = [sys.executable, '-c', code, '--nonsense', '--trials', 'x']
    env = environment(PYTHONDONTWRITEBYTECODE='1')
    process = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='asks git which files are the project')
def test_top_level_shows_the_five_entries_of_the_design():
    listing = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    visible = {path.split('/')[0] for path in listing.stdout.splitlines() if path[0] != '.'}
    scripts = {'airbench94_baseline.py', 'airbench94_modified.py'}
    assert visible == {'README.md', 'requirements.txt', 'tests', *scripts}
