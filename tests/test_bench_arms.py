"""Arms: what is made of the command line's scripts and values, and what is refused in one line."""

import copy

import pytest
from bench.arms import flat, make_arms, nested, split_commas
from bench.errors import UserError
from bench_helpers import write_fake
from hypothesis import given
from hypothesis import strategies as st

KEYS = st.text('abc_', min_size=1, max_size=4)
TREES = st.dictionaries(KEYS, st.dictionaries(KEYS, st.integers() | st.booleans(), min_size=1))


@pytest.fixture
def fake(tmp_path):
    return str(write_fake(tmp_path))


def only(specs, common=(), sweeps=()):
    """The one arm of a command line."""
    (arm,) = make_arms([specs], list(common), list(sweeps))
    return arm


@given(TREES)
def test_flat_hyp_goes_back_into_the_tree(tree):
    before = copy.deepcopy(tree)
    changed = nested(tree, {key: None for key in flat(tree)})
    assert tree == before and set(flat(changed).values()) <= {None}
    assert nested(changed, flat(tree)) == tree


@pytest.mark.parametrize(
    'text, key, value',
    [
        ('opt.lr=3', 'opt.lr', 3.0),
        ('opt.lr=1e-3', 'opt.lr', 0.001),
        ('opt.batch_size=12', 'opt.batch_size', 12),
        ('aug.flip=False', 'aug.flip', False),
        ('aug.flip=1', 'aug.flip', True),
        ('fake.word=a=b', 'fake.word', 'a=b'),
        ('fake.list=[1,2,3]', 'fake.list', [1, 2, 3]),
        ('fake.list=[]', 'fake.list', []),
        ('net.widths.block1=16', 'net.widths.block1', 16),
    ],
)
def test_value_has_the_type_of_the_present_one(fake, text, key, value):
    for arm in (only(f'{fake}:{text}'), only(fake, common=[text])):
        assert arm.hyp[key] == value and type(arm.hyp[key]) is type(value)
        assert flat(arm.nested_hyp())[key] == value
        assert flat(arm.script.module.hyp)[key] != value or key == 'aug.flip'


@pytest.mark.parametrize(
    'text, message',
    [
        ('opt.batch_size=1.5', 'a whole number'),
        ('opt.lr=nan', 'a number'),
        ('opt.lr=', 'a number'),
        ('aug.flip=maybe', 'true or false'),
        ('fake.list=[1', 'a list like'),
        ('fake.list=[1,x]', 'a list like'),
        ('fake.list=3', 'a list like'),
        ('lr=3', 'did you mean opt.lr?'),
        ('opt.batchsize=3', 'did you mean opt.batch_size?'),
        ('zzz=3', 'there are opt.train_epochs'),
        ('recipe=slow', 'report, fast'),
        ('compile=true', 'no make_net and compile_net'),
        ('opt.lr', 'KEY=VALUE'),
        ('=3', 'KEY=VALUE'),
    ],
)
def test_bad_value_is_one_line(fake, text, message):
    with pytest.raises(UserError, match='.') as error:
        make_arms([f'{fake}:{text}'], [], [])
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name',
    [
        "it's = a:b,c.py",
        'two\nlines "x".py',
        'Größe ☃.py',
        'no_suffix',
        'a.py:opt.lr=3',
        '[red].py',
    ],
)
def test_any_path_is_a_script(name, tmp_path):
    path = write_fake(tmp_path, name)
    arm = only(f'{path}:opt.lr=3,fake.list=[1,2],aug.flip=false')
    assert (arm.hyp['opt.lr'], arm.hyp['fake.list'], arm.hyp['aug.flip']) == (3.0, [1, 2], False)
    assert arm.name.isprintable() and arm.script.source == path.read_bytes()
    assert not (tmp_path / '__pycache__').exists()


@pytest.mark.parametrize(
    'code, message',
    [
        (b'import sys; sys.exit(3)', 'SystemExit: 3 (line 1)'),
        (b'1/0', 'ZeroDivisionError'),
        (b'raise KeyError("a\\nb")', 'KeyError'),
        (b'def (', 'SyntaxError'),
        (b'\0', 'null bytes'),
        (b'\xff', 'SyntaxError'),
        (b'hyp = {}', 'lacks load_data, train'),
        (b'hyp = train = load_data = 3', 'hyp of type int'),
        (b'hyp = {"opt": {"f": print}}\ntrain = load_data = 3', 'opt.f of type builtin'),
    ],
)
def test_bad_script_is_one_line(code, message, tmp_path):
    path = tmp_path / 'bad.py'
    path.write_bytes(code)
    with pytest.raises(UserError) as error:
        make_arms([str(path)], [], [])
    assert (
        message in str(error.value)
        and '\n' not in str(error.value)
        and 'bad.py' in str(error.value)
    )


@pytest.mark.parametrize('path', ['none.py', 'none.py:opt.lr=3', '', '.', 'a\0b.py'])
def test_missing_script_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='cannot read the script'):
        make_arms([path], [], [])


def test_commas_split_outside_of_brackets_only():
    assert split_commas('a=1,b=[2,3],,c=x') == ['a=1', 'b=[2,3]', 'c=x'] and split_commas('') == []


# ---------------------------------------- Several arms ----------------------------------------


def test_sweep_is_compared_with_the_script_as_it_is(fake):
    arms = make_arms([fake], [], ['opt.lr=9,10,14'])
    assert [arm.name for arm in arms] == [
        'fake',
        'fake opt.lr=9',
        'fake opt.lr=14',
    ]  # 10 is what it has
    assert [arm.hyp['opt.lr'] for arm in arms] == [10, 9, 14]


def test_several_sweeps_make_every_combination_of_the_first_script(fake, tmp_path):
    other = str(write_fake(tmp_path, 'other.py'))
    arms = make_arms(
        [f'{fake}:fake.std=1', other], [], ['recipe=report,fast', 'aug.flip=true,false']
    )
    assert [arm.name for arm in arms] == [
        'fake fake.std=1',
        'fake fake.std=1 recipe=report aug.flip=false',
        'fake fake.std=1 recipe=fast aug.flip=true',
        'fake fake.std=1 recipe=fast aug.flip=false',
        'other',
    ]


def test_own_values_go_before_common_ones_and_both_before_the_recipe(fake):
    arm = only(f'{fake}:recipe=fast,fake.std=3', ['fake.std=2', 'fake.skill=90'])
    assert (arm.hyp['fake.std'], arm.hyp['fake.skill'], arm.hyp['opt.train_epochs']) == (3, 90, 1)


def test_names_are_unique_and_a_script_is_loaded_once(fake):
    arms = make_arms([fake, fake, f'{fake}:opt.lr=3', fake], [], [])
    assert [arm.name for arm in arms] == ['fake', 'fake #2', 'fake opt.lr=3', 'fake #3']
    assert len({id(arm.script) for arm in arms}) == 1
