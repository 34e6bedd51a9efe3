"""Arms: which scripts are compared, each with which hyperparameters.

All that the tool knows of a script is its contract (README.md, 'Contract with a script').
"""

import copy
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bench.errors import UserError, describe, one_line

REQUIRED = ('hyp', 'load_data', 'train')
LEAVES = (bool, int, float, str, list)


@dataclass(frozen=True)
class Script:
    """A loaded script: the source that was run, and the module it became."""

    path: str
    name: str  # for people: the file's stem without airbench94_
    source: bytes
    module: ModuleType

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    @property
    def errors(self) -> tuple:
        """The exception types whose message is meant for the user."""
        own = getattr(self.module, 'UserError', UserError)
        return (UserError, own) if isinstance(own, type) else (UserError,)


@dataclass(frozen=True)
class Arm:
    """What is compared: a script with all its hyperparameters, flat ({'opt.lr': 10.0})."""

    name: str
    script: Script
    hyp: dict
    recipe: str | None = None
    compile: bool = False

    def nested_hyp(self, **changes) -> dict:
        """A new hyp as the script has it, for one call of `train`."""
        return nested(self.script.module.hyp, {**self.hyp, **changes})

    def same_training(self, other: 'Arm') -> bool:
        return (self.script, self.hyp, self.compile) == (other.script, other.hyp, other.compile)


# ---------------------------------------- Hyperparameters ----------------------------------------


def flat(tree: dict, prefix: str = '') -> dict:
    """{'opt': {'lr': 10.0}} -> {'opt.lr': 10.0}."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f'{prefix}{key}.'))
        else:
            leaves[f'{prefix}{key}'] = value
    return leaves


def nested(tree: dict, values: dict) -> dict:
    """A deep copy of the tree with flat values put in."""
    tree = copy.deepcopy(tree)
    for key, value in values.items():
        *groups, name = key.split('.')
        branch = tree
        for group in groups:
            branch = branch[group]
        branch[name] = copy.copy(value)
    return tree


def parse_value(key: str, text: str, present: object) -> object:
    """The value of a hyperparameter from the command line, of the type that it has now."""
    kind = type(present)
    try:
        if kind is bool:
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if kind is float and not math.isfinite(float(text)):
            raise ValueError
        if kind in (int, float, str):
            return kind(text)
        if kind is list:
            return _parse_list(text, present)
    except (KeyError, ValueError, OverflowError):
        pass
    wanted = {
        bool: 'true or false',
        int: 'a whole number',
        float: 'a number',
        list: 'a list like [16,24]',
    }
    raise UserError(f'{key}={text}: it must be {wanted.get(kind, "edited in the script")}')


def _parse_list(text: str, present: list) -> list:
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError
    kind = type(present[0]) if present else None
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    if kind and any(type(item) is not kind for item in items):
        raise ValueError
    return items


def split_commas(text: str) -> list[str]:
    """'a=1,b=[2,3]' -> ['a=1', 'b=[2,3]']: a comma within brackets does not split."""
    return re.findall(r'(?:\[[^\]]*\]|[^,])+', text)


def parse_pairs(texts) -> dict[str, str]:
    """['KEY=VALUE', ...] -> {'KEY': 'VALUE'}."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition('=')
        if not equals or not key.strip():
            raise UserError(f'{text!r} should be KEY=VALUE, for example opt.lr=10')
        pairs[key.strip()] = value.strip()
    return pairs


def unknown(key: str, known, where: str) -> UserError:
    """The error for a key that nobody has, with the key that was probably meant."""
    known = list(known)
    endings = [full for full in known if key in (full, full.rpartition('.')[2])]
    close = endings or difflib.get_close_matches(key, known, 1, 0.5)
    hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(known)}'
    return UserError(f'{key}: {where} has no such key; {hint}')


# ---------------------------------------- Scripts ----------------------------------------


def load_script(path: str) -> Script:
    """Runs the source of a file as a module. Raises UserError, whatever the file does."""
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        raise UserError(f'cannot read the script {one_line(path)}: {reason}') from None
    name = one_line(Path(path).stem.removeprefix('airbench94_')) or 'script'
    # Not by importlib's loader: it may take a stale __pycache__, and leaves a new one behind.
    spec = importlib.util.spec_from_loader(
        f'bench_script_{len(sys.modules)}', loader=None, origin=path
    )
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    sys.modules[spec.name] = module  # torch.compile and dataclasses look a module up by its name
    try:
        exec(compile(source, path, 'exec'), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f'{one_line(path)} cannot be loaded: {describe(error, path)}') from None
    check_contract(module, one_line(path))
    return Script(path, name, source, module)


def check_contract(module: ModuleType, path: str):
    """Raises UserError where a script lacks what the tool needs."""
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise UserError(
            f'{path} does not keep the contract of tests/bench: it lacks {", ".join(missing)}'
        )
    if not isinstance(module.hyp, dict):
        raise UserError(f'{path}: hyp of type {type(module.hyp).__name__}; it must be a dict')
    for key, value in flat(module.hyp).items():
        if not isinstance(value, LEAVES):
            kind = type(value).__name__
            raise UserError(
                f'{path}: {key} of type {kind}; hyp needs bool, int, float, str or list'
            )


def split_spec(text: str) -> tuple[str, str]:
    """'PATH:KEY=VALUE,...' -> (PATH, 'KEY=VALUE,...'); the path may have colons itself."""
    ends = [len(text), *(match.start() for match in reversed(list(re.finditer(':', text))))]
    for end in ends:
        if '\0' not in text and os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
    stem, found, changes = text.partition('.py:')
    return (f'{stem}.py', changes) if found else (text, '')


# ---------------------------------------- Arms ----------------------------------------


def make_arm(script: Script, common: dict, own: dict) -> Arm:
    """A script's arm with the texts of --hyp (`common`) and of its own changes (`own`)."""
    texts = {**common, **own}
    recipe = texts.pop('recipe', None)
    recipes = getattr(script.module, 'RECIPES', {})
    if recipe is not None and recipe not in recipes:
        raise UserError(f'recipe={recipe}: {script.name} has {", ".join(recipes) or "no recipes"}')
    compiled = parse_value('compile', texts.pop('compile', 'false'), False)
    if compiled and not (
        hasattr(script.module, 'make_net') and hasattr(script.module, 'compile_net')
    ):
        raise UserError(f'compile=true: {script.name} has no make_net and compile_net')
    hyp = {**flat(script.module.hyp), **recipes.get(recipe, {})}
    for key, text in texts.items():
        if key not in hyp:
            raise unknown(key, [*hyp, 'recipe', 'compile'], script.name)
        hyp[key] = parse_value(key, text, hyp[key])
    changes = (f'{key}={text}' for key, text in own.items())
    return Arm(one_line(' '.join([script.name, *changes])), script, hyp, recipe, compiled)


def make_arms(specs: list[str], common: list[str], sweeps: list[str]) -> list[Arm]:
    """The arms of a command line; the first is the reference.

    specs: 'PATH[:KEY=VALUE,...]'; common: 'KEY=VALUE' for all; sweeps: 'KEY=A,B,...': every
    combination becomes an arm of the first script, unless it is what that script has anyway.
    """
    scripts, todo, shared = {}, [], parse_pairs(common)
    axes = [
        [(key, value) for value in split_commas(values)]
        for key, values in parse_pairs(sweeps).items()
    ]
    if any(not axis for axis in axes):
        raise UserError('--sweep needs values: KEY=A,B,...')
    for i, spec in enumerate(specs):
        path, changes = split_spec(spec)
        if path not in scripts:
            scripts[path] = load_script(path)
        own = parse_pairs(split_commas(changes))
        todo.append(make_arm(scripts[path], shared, own))
        if i == 0 and axes:
            points = [{**own, **dict(point)} for point in itertools.product(*axes)]
            swept = [make_arm(scripts[path], shared, point) for point in points]
            todo += [arm for arm in swept if not arm.same_training(todo[0])]
    return with_unique_names(todo)


def with_unique_names(todo: list[Arm]) -> list[Arm]:
    arms, taken = [], set()
    for arm in todo:
        name, number = arm.name, 1
        while name in taken:
            number += 1
            name = f'{arm.name} #{number}'
        taken.add(name)
        arms.append(Arm(name, arm.script, arm.hyp, arm.recipe, arm.compile))
    return arms
