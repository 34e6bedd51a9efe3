"""Arms: what is made of the command line's scripts and values, and what is refused in one line."""

import pytest
from bench.arms import flat, make_arms
from bench.errors import UserError
from bench_helpers import write_fake


@pytest.fixture
def fake(tmp_path):
    return str(write_fake(tmp_path))


def only(specs, common=()):
    """The one arm of a command line."""
    (arm,) = make_arms([specs], list(common), [])
    return arm


def refusal(spec):
    """The message for a script or value that is refused."""
    with pytest.raises(UserError) as error:
        make_arms([spec], [], [])
    assert '\n' not in str(error.value)
    return str(error.value)


def test_value_has_the_type_of_the_present_one(fake):
    texts = ['opt.lr=3', 'opt.batch_size=12', 'aug.flip=False', 'fake.word=a=b']
    texts += ['fake.list=[1,2,3]', 'net.widths.block1=16']
    keys, values = [text.split('=')[0] for text in texts], [3.0, 12, False, 'a=b', [1, 2, 3], 16]
    for arm in (only(f'{fake}:{",".join(texts)}'), only(fake, common=texts)):
        assert repr([arm.hyp[key] for key in keys]) == repr(values)  # 3 is not 3.0
        assert flat(arm.nested_hyp()) == arm.hyp
        own = flat(arm.script.module.hyp)
        assert not any(own[key] == arm.hyp[key] for key in keys)


BAD_VALUES = [('opt.batch_size=1.5', 'a whole number'), ('opt.lr=nan', 'a number')]
BAD_VALUES += [('aug.flip=maybe', 'true or false'), ('fake.list=[1', 'a list like')]
BAD_VALUES += [('fake.list=[1.5]', 'a list like'), ('fake.list=3', 'a list like')]
BAD_VALUES += [('lr=3', 'did you mean opt.lr?'), ('zzz=3', 'there are opt.train_epochs')]
BAD_VALUES += [('opt.batchsize=3', 'did you mean opt.batch_size?'), ('opt.lr', 'KEY=VALUE')]
BAD_VALUES += [('recipe=slow', 'report, fast'), ('compile=true', 'no make_net and compile_net')]


@pytest.mark.parametrize('text, message', BAD_VALUES)
def test_bad_value_is_one_line(fake, text, message):
    assert message in refusal(f'{fake}:{text}')


@pytest.mark.parametrize('name', ["it's = a:b,c.py", 'Größe ☃\nline "x"', 'a.py:opt.lr=3'])
def test_any_path_is_a_script(name, tmp_path):
    path = write_fake(tmp_path, name)
    arm = only(f'{path}:opt.lr=3,fake.list=[1,2],aug.flip=false')
    assert (arm.hyp['opt.lr'], arm.hyp['fake.list'], arm.hyp['aug.flip']) == (3.0, [1, 2], False)
    assert arm.name.isprintable() and arm.script.source == path.read_bytes()
    assert not (tmp_path / '__pycache__').exists()


BAD_SCRIPTS = [(b'exit(3)', 'SystemExit: 3 (line 1)'), (b'raise KeyError("a\\nb")', 'KeyError')]
BAD_SCRIPTS += [(b'def (', 'SyntaxError'), (b'\0', 'null bytes')]
BAD_SCRIPTS += [(b'hyp = {}', 'lacks load_data, train')]
BAD_SCRIPTS += [(b'hyp = train = load_data = 3', 'hyp of type int')]
BAD_SCRIPTS += [(b'hyp = {"f": print}\ntrain = load_data = 3', 'f of type builtin')]


@pytest.mark.parametrize('code, message', BAD_SCRIPTS)
def test_bad_script_is_one_line(code, message, tmp_path):
    path = tmp_path / 'bad.py'
    path.write_bytes(code)
    found = refusal(str(path))
    assert message in found and 'bad.py' in found


@pytest.mark.parametrize('path', ['none.py:opt.lr=3', '', '.', 'a\0b.py'])
def test_missing_script_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.removesuffix(':opt.lr=3').replace('\0', ' ')
    assert f'cannot read the script {name}: ' in refusal(path)


def test_sweeps_make_every_combination_of_the_first_script_but_what_it_is(fake, tmp_path):
    specs = [f'{fake}:fake.std=1', str(write_fake(tmp_path, 'other.py'))]
    arms = make_arms(specs, [], ['recipe=report,fast', 'aug.flip=true,false'])
    assert [arm.name for arm in arms] == [
        'fake fake.std=1',
        'fake fake.std=1 recipe=report aug.flip=false',
        'fake fake.std=1 recipe=fast aug.flip=true',
        'fake fake.std=1 recipe=fast aug.flip=false',
        'other',
    ]
    assert [arm.hyp['fake.skill'] for arm in arms] == [94, 94, 93, 93, 94]
    assert [arm.hyp['aug.flip'] for arm in arms] == [True, False, True, False, True]


def test_own_values_go_before_common_ones_and_both_before_the_recipe(fake):
    arm = only(f'{fake}:recipe=fast,fake.std=3', ['fake.std=2', 'fake.skill=90'])
    assert (arm.hyp['fake.std'], arm.hyp['fake.skill'], arm.hyp['opt.train_epochs']) == (3, 90, 1)


def test_names_are_unique_and_a_script_is_loaded_once(fake):
    arms = make_arms([fake, fake, f'{fake}:opt.lr=3', fake], [], [])
    assert [arm.name for arm in arms] == ['fake', 'fake #2', 'fake opt.lr=3', 'fake #3']
    assert len({id(arm.script) for arm in arms}) == 1
