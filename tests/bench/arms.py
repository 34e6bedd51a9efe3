"""Arms: which scripts are compared, each with which hyperparameters."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from bench import contract
from bench.contract import Facts
from bench.errors import UserError, one_line

EXPECTED = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    list: 'a list like [16,24]',
}


@dataclass(frozen=True)
class Arm:
    """A script with all its hyperparameters, flat ({'opt.lr': 10.0})."""

    name: str
    script: Facts
    hyp: dict
    compile: bool = False

    def same_training(self, other: 'Arm') -> bool:
        return (self.script, self.hyp, self.compile) == (other.script, other.hyp, other.compile)


# ---------------------------------------- Values ----------------------------------------


def parse_value(key: str, text: str, present: object) -> object:
    """Return the value of a hyperparameter, of the type that it has now."""
    kind = type(present)
    try:
        if kind is bool:
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if kind is list:
            return parse_list(text, present)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError, OverflowError):
        raise UserError(f'{key}={text}: it must be {EXPECTED[kind]}') from None


def parse_list(text: str, present: list) -> list:
    """Return a list of JSON, whose items have the type of the present ones."""
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError
    if not present:
        return items
    kind = type(present[0])
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    if any(type(item) is not kind for item in items):
        raise ValueError
    return items


def value_text(value: object) -> str:
    """Return how the command line writes a value."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(',', ':')).removesuffix('.0')


def split_commas(text: str) -> list[str]:
    """Return ['a=1', 'b=[2,3]'] for 'a=1,b=[2,3]': a comma within brackets does not split."""
    return re.findall(r'(?:\[[^\]]*\]|[^,])+', text)


def parse_pairs(texts: list[str]) -> dict[str, str]:
    """Return {'KEY': 'VALUE'} for ['KEY=VALUE']."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition('=')
        if not equals or not key.strip():
            raise UserError(f'{text!r} should be KEY=VALUE, for example opt.lr=10')
        pairs[key.strip()] = value.strip()
    return pairs


def unknown_key(key: str, hyp: dict) -> UserError:
    """Return the error for a key that a script does not have: it lists those of the group."""
    group = key.rpartition('.')[0]
    while group:
        members = [full for full in hyp if full.startswith(f'{group}.')]
        if members:
            names = ', '.join(full.removeprefix(f'{group}.') for full in members)
            return UserError(f'no {key}; {group} has {names}')
        group = group.rpartition('.')[0]
    return UserError(f'no {key}; there are {", ".join(hyp)}, compile')


# ---------------------------------------- Arms ----------------------------------------


def split_spec(text: str) -> tuple[str, str]:
    """Return (PATH, 'KEY=VALUE,...') for 'PATH:KEY=VALUE,...'; the path may have colons itself."""
    colons = [match.start() for match in re.finditer(':', text)]
    for end in [len(text), *reversed(colons)]:
        if '\0' not in text and os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
    stem, found, changes = text.partition('.py:')
    return (f'{stem}.py', changes) if found else (text, '')


def make_arm(script: Facts, common: dict, own: dict) -> Arm:
    """Return a script's arm with the texts of --hyp (`common`) and of its own changes (`own`)."""
    texts = {**common, **own}
    compiled = parse_value('compile', texts.pop('compile', 'false'), False)
    if compiled and not set(contract.COMPILING) <= set(script.offers):
        names = ' and '.join(contract.COMPILING)
        raise UserError(f'compile=true: {script.name} has no {names}')
    hyp = dict(script.hyp)
    for key, text in texts.items():
        if key not in hyp:
            raise unknown_key(key, hyp)
        hyp[key] = parse_value(key, text, hyp[key])
    changes = [f'{key}={text}' for key, text in own.items()]
    return Arm(one_line(' '.join([script.name, *changes])), script, hyp, compiled)


def sweep_arms(script: Facts, common: dict, own: dict, sweeps: list[str]) -> list[Arm]:
    """Return the arm of a script as it is, and one for every combination of the sweeps' values.

    A combination that trains as the first arm does is left out. The first arm is named with its
    present values of the swept keys, so that all of them can be read in one column.
    """
    axes = []
    for key, values in parse_pairs(sweeps).items():
        axes.append([(key, value) for value in split_commas(values)])
        if not axes[-1]:
            raise UserError(f'--sweep {key}: it needs values, KEY=A,B,...')
    present = make_arm(script, common, own)
    points = [{**own, **dict(point)} for point in itertools.product(*axes)]
    swept = [make_arm(script, common, point) for point in points]
    values = {**present.hyp, 'compile': present.compile}
    name = [present.name]
    for key in parse_pairs(sweeps):
        if key not in own:
            name.append(f'{key}={value_text(values[key])}')
    arms = [dataclasses.replace(present, name=one_line(' '.join(name)))]
    return arms + [arm for arm in swept if not arm.same_training(present)]


def make_arms(
    specs: list[str], common: list[str], sweeps: list[str], facts: Callable[[str], Facts]
) -> list[Arm]:
    """Return the arms of a command line; the first is the reference.

    Args:
        specs: 'PATH[:KEY=VALUE,...]', an arm each.
        common: 'KEY=VALUE' for all arms.
        sweeps: 'KEY=A,B,...', for the first script.
        facts: returns the facts of the script at a path.
    """
    shared = parse_pairs(common)
    arms = []
    for i, spec in enumerate(specs):
        path, changes = split_spec(spec)
        own = parse_pairs(split_commas(changes))
        if i == 0:
            arms += sweep_arms(facts(path), shared, own, sweeps)
        else:
            arms.append(make_arm(facts(path), shared, own))
    return with_unique_names(arms)


def with_unique_names(arms: list[Arm]) -> list[Arm]:
    """Return the arms; those whose name is taken get a number."""
    unique = {}
    for arm in arms:
        name = arm.name
        number = 1
        while name in unique:
            number += 1
            name = f'{arm.name} #{number}'
        unique[name] = dataclasses.replace(arm, name=name)
    return list(unique.values())
