"""The shape of the two files: what differs between them, their order, imports, names and values."""

import ast
import difflib
import subprocess
import symtable
import sys

import pytest
from conftest import ROOT, SCRIPTS, environment

SOURCES = {name: (ROOT / f'{name}.py').read_text() for name in SCRIPTS}
EXPERIMENT = {'NAME', 'hyp', 'RECIPES', 'batch_crop', 'CifarLoader', 'ConvGroup'}
PYTHON_FILES = [*ROOT.glob('*.py'), *ROOT.glob('tests/*.py'), *ROOT.glob('tests/bench/*.py')]
PUBLIC = 'load_data batch_flip_lr batch_crop CifarLoader Conv BatchNorm ConvGroup CifarNet make_net'
PUBLIC += ' make_optimizer lr_factor LookaheadState infer evaluate train_step train main'
each_script = pytest.mark.parametrize('name', SCRIPTS)


def name_of(node):
    """What a top-level statement defines; '' for the docstring and what has no name."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    target = target.value if isinstance(target, ast.Subscript) else target  # RECIPES['fast94'] = ..
    return getattr(node, 'name', getattr(target, 'id', ''))


def shared_lines(source):
    """The lines of all that the experiment must leave alone."""
    lines = source.splitlines()
    docstring, *named = ast.parse(source).body
    experiment = [docstring, *(node for node in named if name_of(node) in EXPERIMENT)]
    for node in reversed(experiment):
        del lines[node.lineno - 1 : node.end_lineno]
    return lines


def differences(one, other):
    """The unified diff of two sources, without its header, outside of the experiment."""
    return [*difflib.unified_diff(shared_lines(one), shared_lines(other), n=0, lineterm='')][2:]


def test_scripts_differ_in_nothing_but_the_experiment():
    assert differences(*SOURCES.values()) == []


def test_a_line_that_crosses_is_shown():
    baseline, modified = SOURCES.values()
    changed = modified.replace('momentum=opt[', 'momentum=0.9 * opt[')
    _, ours, theirs = differences(baseline, changed)
    assert ours[0] == '-' and theirs == '+' + ours[1:].replace('momentum=', 'momentum=0.9 * ')


@each_script
def test_script_has_at_most_800_lines(name):
    assert len(SOURCES[name].splitlines()) <= 800


@each_script
def test_every_name_is_defined_above_its_first_user(name):
    """A function or class may use what is defined above it, and itself."""
    nodes = ast.parse(SOURCES[name]).body
    defined = {name_of(node): node.lineno for node in nodes if name_of(node)}

    def globals_of(scope):
        found = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        return found.union(*(globals_of(inner) for inner in scope.get_children()))

    module = symtable.symtable(SOURCES[name], f'{name}.py', 'exec')
    late = {
        f'{scope.get_name()} uses {used}'
        for scope in module.get_children()
        for used in globals_of(scope)
        if defined.get(used, 0) > scope.get_lineno() and used != scope.get_name()
    }
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
    assert [name for name in PUBLIC.split() if not getattr(script, name).__doc__] == []


def test_no_expression_stands_for_a_statement():
    """As `x and f()`, `f() if x else g()`, `a(), b()`, `[f(x) for x in y]`."""
    golf = (ast.BoolOp, ast.IfExp, ast.Compare, ast.Tuple, ast.ListComp, ast.Subscript)
    found = []
    for path in PYTHON_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, golf):
                found.append(f'{path.relative_to(ROOT)}:{node.lineno}')
    assert not found


def test_hyperparameters_are_those_of_the_specification(baseline, modified):
    opt = dict(train_epochs=9.9, batch_size=1024, lr=11.5, momentum=0.85, weight_decay=0.0153)
    opt |= dict(bias_scaler=64.0, label_smoothing=0.2, whiten_bias_epochs=3)
    opt['small_sizes'] = []  # neutral, as tta_share
    net = dict(widths=dict(block1=64, block2=256, block3=256), batchnorm_momentum=0.6)
    net |= dict(scaling_factor=1 / 9, tta_level=2, tta_share=1.0)
    rest = dict(aug=dict(flip=True, translate=2), net=net)
    assert baseline.hyp == {'opt': opt, **rest}
    opt |= dict(train_epochs=8.0, batch_size=1536, lr=17.25)
    assert modified.hyp == {'opt': opt, **rest}


def test_recipes_are_differences_from_hyp(script):
    known = script.flatten(script.hyp)
    assert script.RECIPES['report'] == {}
    for recipe in script.RECIPES.values():
        for key, value in recipe.items():
            assert value != known[key] and type(value) is type(known[key]), key


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
sys.path.insert(0, {str(ROOT)!r})
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
    assert visible == {'README.md', 'requirements.txt', 'tests', *(f'{n}.py' for n in SCRIPTS)}
