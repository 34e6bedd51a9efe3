"""Arms: what is made of the command line's scripts and values, and what is refused in one line."""

import hashlib

import pytest
from bench import records
from bench.arms import make_arms
from bench.contract import load_script
from bench.errors import UserError
from bench_helpers import write_fake


def facts(path):
    return load_script(path).facts()


def arms_of(specs, common=(), sweeps=()):
    return make_arms(specs, list(common), list(sweeps), facts)


@pytest.fixture
def fake(tmp_path):
    return str(write_fake(tmp_path))


def refusal(spec, **options):
    """The message for a script or value that is refused."""
    with pytest.raises(UserError) as error:
        arms_of([spec], **options)
    return str(error.value)


def test_value_has_the_type_of_the_present_one(fake):
    texts = ['opt.lr=3', 'opt.batch_size=12', 'aug.flip=False', 'fake.word=a=b']
    texts += ['fake.list=[1,2,3]', 'net.widths.block1=16']
    keys = [text.split('=')[0] for text in texts]
    values = [3.0, 12, False, 'a=b', [1, 2, 3], 16]
    script = load_script(fake)
    for arm in (*arms_of([f'{fake}:{",".join(texts)}']), *arms_of([fake], common=texts)):
        assert repr([arm.hyp[key] for key in keys]) == repr(values)  # 3 is not 3.0
        assert records.flat(script.nested(arm.hyp)) == arm.hyp
    own = records.flat(script.module.hyp)
    assert not any(own[key] == value for key, value in zip(keys, values, strict=True))


BAD_VALUES = [
    ('opt.batch_size=1.5', 'opt.batch_size=1.5: it must be a whole number'),
    ('opt.lr=nan', 'a number'),
    ('aug.flip=maybe', 'true or false'),
    ('fake.list=[1', 'a list like'),
    ('fake.list=[1.5]', 'a list like'),
    ('fake.list=3', 'a list like'),
    ('opt.learning_rate=3', 'no opt.learning_rate; opt has train_epochs, batch_size, lr'),
    ('net.widhts.block1=3', 'no net.widhts.block1; net has widths.block1'),
    ('lr=3', 'no lr; there are opt.train_epochs, opt.batch_size, opt.lr, '),
    ('opt.lr', 'KEY=VALUE'),
    ('compile=true', 'no make_net and compile_step'),
]


@pytest.mark.parametrize('text, message', BAD_VALUES)
def test_bad_value_is_refused(fake, text, message):
    assert message in refusal(f'{fake}:{text}')


@pytest.mark.parametrize('name', ["it's = a:b,c.py", 'Größe ☃\nline "x"', 'a.py:opt.lr=3'])
def test_any_path_is_a_script(name, tmp_path):
    path = write_fake(tmp_path, name)
    (arm,) = arms_of([f'{path}:opt.lr=3,fake.list=[1,2],aug.flip=false'])
    assert (arm.hyp['opt.lr'], arm.hyp['fake.list'], arm.hyp['aug.flip']) == (3.0, [1, 2], False)
    assert arm.name.isprintable()
    assert not (tmp_path / '__pycache__').exists()


def test_line_ends_do_not_change_a_script(fake, tmp_path):
    """Its hash is that of the text with '\\n', as a script logs it, and a BOM does not matter."""
    text = load_script(fake).source
    path = tmp_path / 'windows.py'
    path.write_bytes(text.replace('\n', '\r\n').encode())
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert facts(str(path)).sha256 == facts(fake).sha256 == sha256
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert facts(str(path)).hyp == facts(fake).hyp


BAD_SCRIPTS = [
    (b'exit(3)', 'SystemExit: 3 (line 1)'),
    (b'raise KeyError("a\\nb")', 'KeyError'),
    (b'def (', 'SyntaxError'),
    (b'\0', 'null bytes'),
    (b'hyp = {}', 'lacks load_data, train'),
    (b'hyp = train = load_data = 3', 'hyp of type int'),
    (b'hyp = {"f": print}\ntrain = load_data = 3', 'f of type builtin'),
]


@pytest.mark.parametrize('code, message', BAD_SCRIPTS)
def test_bad_script_is_refused(code, message, tmp_path):
    path = tmp_path / 'bad.py'
    path.write_bytes(code)
    found = refusal(str(path))
    assert message in found and 'bad.py' in found


@pytest.mark.parametrize('path', ['none.py:opt.lr=3', '', '.', 'a\0b.py'])
def test_missing_script_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f'cannot read the script {path.removesuffix(":opt.lr=3")}: ' in refusal(path)


def test_sweep_makes_every_combination_and_names_the_present_values(fake, tmp_path):
    specs = [f'{fake}:fake.std=1', str(write_fake(tmp_path, 'other.py'))]
    arms = arms_of(specs, sweeps=['opt.lr=8,10,12.5', 'aug.flip=true,false'])
    assert [arm.name for arm in arms] == [
        'fake fake.std=1 opt.lr=10 aug.flip=true',  # what it has anyway
        'fake fake.std=1 opt.lr=8 aug.flip=true',
        'fake fake.std=1 opt.lr=8 aug.flip=false',
        'fake fake.std=1 opt.lr=10 aug.flip=false',
        'fake fake.std=1 opt.lr=12.5 aug.flip=true',
        'fake fake.std=1 opt.lr=12.5 aug.flip=false',
        'other',
    ]
    assert [arm.hyp['opt.lr'] for arm in arms] == [10, 8, 8, 10, 12.5, 12.5, 10]
    assert [arm.hyp['aug.flip'] for arm in arms] == [True, True, False, False, True, False, True]


def test_sweep_without_the_present_value_is_compared_with_it(fake):
    arms = arms_of([fake], common=['opt.lr=7'], sweeps=['opt.lr=8,9'])
    assert [arm.name for arm in arms] == ['fake opt.lr=7', 'fake opt.lr=8', 'fake opt.lr=9']
    arms = arms_of([fake], sweeps=['fake.list=[1,2],[3]'])
    assert [arm.name for arm in arms][:2] == ['fake fake.list=[16,24]', 'fake fake.list=[1,2]']
    assert 'it needs values' in refusal(fake, sweeps=['opt.lr='])


def test_own_values_go_before_common_ones(fake):
    (arm,) = arms_of([f'{fake}:fake.std=3'], common=['fake.std=2', 'fake.skill=90'])
    assert (arm.hyp['fake.std'], arm.hyp['fake.skill']) == (3, 90)


def test_names_are_unique(fake):
    arms = arms_of([fake, fake, f'{fake}:opt.lr=3', fake])
    assert [arm.name for arm in arms] == ['fake', 'fake #2', 'fake opt.lr=3', 'fake #3']
