"""The shape of the two files: what may differ between them, their length, their order, what they import."""
import ast
import difflib
import subprocess

import pytest

from conftest import ROOT, SCRIPTS

SOURCES = {name: (ROOT / f'{name}.py').read_text() for name in SCRIPTS}
EXPERIMENT = {'NAME', 'hyp', 'RECIPES', 'batch_crop', 'CifarLoader', 'ConvGroup'}
PACKAGES = {'torch', 'torchvision', 'numpy'}


def name_of(node):
    """What a top-level statement defines; '' for the docstring and everything without a name."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return getattr(node, 'name', getattr(target, 'id', ''))


def shared_lines(source):
    """(line number, line) of all that the experiment must not change: no docstring, nothing of EXPERIMENT."""
    lines, statements = dict(enumerate(source.splitlines(), start=1)), ast.parse(source).body
    for node in [statements[0], *(node for node in statements if name_of(node) in EXPERIMENT)]:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, 'decorator_list', []))])
        for number in range(first, node.end_lineno + 1):
            del lines[number]
    return list(lines.items())


def differences(one, other):
    """Lines outside the experiment that only one of two sources has, as 'one:12: text'."""
    sides = {'one': shared_lines(one), 'other': shared_lines(other)}
    texts = [[line for _, line in side] for side in sides.values()]
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        if tag != 'equal':
            found += [f'one:{number}: {line}' for number, line in sides['one'][a:b]]
            found += [f'other:{number}: {line}' for number, line in sides['other'][c:d]]
    return found


def test_scripts_differ_in_nothing_but_the_experiment():
    assert differences(*SOURCES.values()) == []


def test_differences_names_a_line_that_only_one_script_has():
    changed = SOURCES['airbench94_modified'].replace('momentum=opt[', 'momentum=0.9 * opt[')
    number = 1 + changed[:changed.index('momentum=0.9')].count('\n')
    found = differences(SOURCES['airbench94_baseline'], changed)
    assert len(found) == 2 and found[1].startswith(f'other:{number}:') and 'momentum=0.9' in found[1]


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_keeps_its_line_budget(name):
    lines = SOURCES[name].splitlines()
    train = next(node for node in ast.parse(SOURCES[name]).body if name_of(node) == 'train')
    assert len(lines) <= 700
    assert train.end_lineno <= 380
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 110] == []


@pytest.mark.parametrize('name', SCRIPTS)
def test_training_comes_first_and_in_reading_order(name):
    names = [name_of(node) for node in ast.parse(SOURCES[name]).body]
    order = ['hyp', 'RECIPES', 'batch_flip_lr', 'batch_crop', 'CifarLoader', 'Conv', 'BatchNorm', 'ConvGroup',
             'make_net', 'init_whitening_conv', 'LookaheadState', 'infer', 'evaluate', 'train', 'load_data',
             'main']
    assert [name for name in names if name in order] == order


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_imports_three_packages_and_the_standard_library(name, baseline):
    modules = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split('.')[0])
    assert modules - baseline.sys.stdlib_module_names == PACKAGES


@pytest.mark.parametrize('name', SCRIPTS)
def test_public_functions_and_classes_are_documented(name):
    documented = {node.name for node in ast.parse(SOURCES[name]).body
                  if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)}
    public = {'batch_flip_lr', 'batch_crop', 'CifarLoader', 'Conv', 'BatchNorm', 'ConvGroup', 'make_net',
              'init_whitening_conv', 'make_optimizer', 'lr_factor', 'LookaheadState', 'infer', 'evaluate',
              'train_step', 'train', 'Engine', 'UserError', 'load_data', 'main'}
    assert public - documented == set()


def test_limits_are_those_of_hyperparameters_that_there_are(script):
    def keys(tree, prefix=''):
        for key, value in tree.items():
            yield from keys(value, f'{prefix}{key}.') if isinstance(value, dict) else [prefix + key]

    assert {key for key in script.LIMITS if isinstance(key, str)} <= set(keys(script.hyp))


def test_hyperparameters_are_those_of_the_specification(baseline, modified):
    opt = {'train_epochs': 9.9, 'batch_size': 1024, 'lr': 11.5, 'momentum': 0.85, 'weight_decay': 0.0153,
           'bias_scaler': 64.0, 'label_smoothing': 0.2, 'whiten_bias_epochs': 3}
    neutral = {'small_epochs': 0, 'small_size': 24}, {'tta_share': 1.0, 'compile': False}
    opt.update(neutral[0])
    rest = {'aug': {'flip': True, 'translate': 2},
            'net': {'widths': {'block1': 64, 'block2': 256, 'block3': 256}, 'batchnorm_momentum': 0.6,
                    'scaling_factor': 1 / 9, 'tta_level': 2, **neutral[1]}}
    assert baseline.hyp == {'opt': opt, **rest}
    assert modified.hyp == {'opt': {**opt, 'train_epochs': 8.0, 'batch_size': 1536, 'lr': 17.25}, **rest}


def test_recipes_are_differences_from_hyp_within_the_limits(script):
    known = script.flat(script.hyp)
    assert script.RECIPES['report'] == {}
    for name, recipe in script.RECIPES.items():
        assert script.parse_hyp({key: str(value) for key, value in recipe.items()}, known) == recipe, name
        assert all(value != known[key] and type(value) is type(known[key]) for key, value in recipe.items())


def test_the_modified_script_has_one_recipe_more(baseline, modified):
    assert (list(baseline.RECIPES), list(modified.RECIPES)) == (['report'], ['report', 'fast94'])


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='asks git which files belong to the project')
def test_top_level_shows_the_five_entries_of_the_design():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    visible = {path.split('/')[0] for path in files.splitlines() if not path.startswith('.')}
    assert visible == {'README.md', 'requirements.txt', 'tests', *(f'{name}.py' for name in SCRIPTS)}
