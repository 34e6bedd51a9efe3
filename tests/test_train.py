"""One training from scratch: what it depends on, what it times, what it records, and that it learns."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import NARROW, NARROW_ARGS, ROOT, environment

TIMES = ('clock_seconds', 'eval_seconds', 'wall_seconds')


def results(record):
    """A record without its times and the numbers of trial and run."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in record['epochs']]
    return {'seed': record['seed'], 'tta_acc': record['tta_acc'], 'epochs': rows}


def assert_same_state(net, state):
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.fixture
def idle(narrow, monkeypatch):
    """Each script with steps that do not train: losses 64, 128, ..., and of 64 predictions 16 wrong."""
    losses = iter(range(64, 10**6, 64))

    def train_step(net, optimizer, images, labels, label_smoothing):
        wrong = torch.arange(64) >= 48
        return torch.tensor(float(next(losses))), torch.eye(10)[(labels + wrong) % 10]

    monkeypatch.setattr(narrow, 'train_step', train_step)
    return narrow


# What a run depends on

FREEZING = {**NARROW, 'opt.whiten_bias_epochs': 1}  # after the first of two epochs


@pytest.fixture
def second(script, data):
    """Record and network of seed 2, trained after seed 1 in this process, under FREEZING."""
    with script.overrides(FREEZING):
        script.train(data, 1, 'cpu')
        yield script.train(data, 2, 'cpu')


def test_the_second_run_of_a_process_is_that_run_alone_bit_for_bit(second, script, tmp_path):
    code = f'''import torch, {script.NAME} as script
with script.overrides({FREEZING}):
    record, net = script.train(script.synthetic_data('cpu', 256, 100), 2, 'cpu')
torch.save((record, net.state_dict()), 'alone.pt')'''
    threads = environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads()))
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=threads, check=True, timeout=100)
    record, state = torch.load(tmp_path / 'alone.pt', weights_only=True)
    assert results(second[0]) == results(record)
    assert_same_state(second[1], state)


def test_another_seed_is_another_run(narrow, data):
    one, two = (narrow.train(data, seed, 'cpu', quiet=True)[0] for seed in (1, 2))
    assert one['epochs'][0]['train_loss'] != two['epochs'][0]['train_loss']


def test_evaluating_every_epoch_does_not_change_a_run(narrow, data):
    (quiet, net), (_, evaluated) = (narrow.train(data, 1, 'cpu', quiet=quiet) for quiet in (True, False))
    assert_same_state(net, evaluated.state_dict())


def test_a_run_leaves_hyp_and_data_as_they_were(narrow, data):
    before = json.dumps(narrow.hyp), data['train']['images'].clone()
    narrow.train(data, 1, 'cpu')
    assert json.dumps(narrow.hyp) == before[0] and torch.equal(data['train']['images'], before[1])


def test_runs_of_main_depend_on_seed_trial_and_run_alone(script, data_dir, tmp_path):
    folders = '--data-dir', str(data_dir), '--log-dir', str(tmp_path)
    one, two = (script.main([*NARROW_ARGS, *folders, '--seed', '5', '--trials', '2', '--runs', runs])
                for runs in ('1', '2'))
    one, two = ({(run['trial'], run['run']): results(run) for run in runs} for runs in (one, two))
    assert (list(one), list(two)) == ([(1, 1), (2, 1)], [(1, 1), (1, 2), (2, 1), (2, 2)])
    assert len({run['seed'] for run in two.values()}) == 4
    assert one == {key: two[key] for key in one}


def test_both_scripts_train_on_the_same_batches(baseline, modified, data, monkeypatch):
    streams = []
    for script in (baseline, modified):
        stream, train_step = [], script.train_step
        monkeypatch.setattr(script, 'train_step', lambda *args: stream.append(args[2:4]) or train_step(*args))
        with script.overrides({**NARROW, 'opt.train_epochs': 1.5}):
            script.train(data, 1, 'cpu', quiet=True)
        streams.append(stream)
    assert [len(stream) for stream in streams] == [6, 6]
    assert all(torch.equal(a, b) for pair in zip(*streams) for a, b in zip(*pair))


def test_the_first_epochs_train_on_small_images(narrow, data, monkeypatch):
    given, train_step = {size: [] for size in (32, 24)}, narrow.train_step
    for size, epochs in ((32, 0), (24, 1)):
        monkeypatch.setattr(
            narrow, 'train_step', lambda *args: given[size].append(args[2]) or train_step(*args))
        with narrow.overrides({'opt.small_epochs': epochs}):
            narrow.train(data, 1, 'cpu', quiet=True)
    assert [batch.shape[2:] for batch in given[24]] == [(24, 24)] * 4 + [(32, 32)] * 4
    for small, batch in zip(given[24][:4], given[32]):
        expected = torch.nn.functional.interpolate(batch, size=24, mode='bilinear', antialias=True)
        assert torch.equal(small, expected)
    assert all(torch.equal(*pair) for pair in zip(given[24][4:], given[32][4:]))


def test_whitening_takes_the_first_5000_normalized_unaugmented_images(idle, monkeypatch):
    given = []
    monkeypatch.setattr(idle, 'init_whitening_conv', lambda layer, images: given.append(images))
    data = idle.synthetic_data('cpu', train=5003, test=10)
    with idle.overrides({'opt.train_epochs': 0.001}):
        idle.train(data, 1, 'cpu', quiet=True)
    images = idle.CifarLoader(data).normalize(data['train']['images'][:5000].permute(0, 3, 1, 2) / 255)
    assert torch.equal(given[0], images)


def test_a_batch_size_over_the_training_set_is_an_error(narrow, data):
    with narrow.overrides({'opt.batch_size': 257}), pytest.raises(ValueError, match='257'):
        narrow.train(data, 1, 'cpu')


# Clock

@pytest.fixture
def tick(idle, monkeypatch):
    """tick(owner, name): stands the script's time still, except for one second per call of that function."""
    seconds = [0.0]
    monkeypatch.setattr(idle, 'time', SimpleNamespace(perf_counter=lambda: seconds[0]))

    def tick(owner, name):
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            seconds[0] += 1
            return function(*args, **kwargs)
        monkeypatch.setattr(owner, name, slow)
    return tick


@pytest.mark.parametrize('name, clock, evaluation, wall', [
    ('make_net', 0, 0, 1), ('make_optimizer', 0, 0, 1),
    ('CifarLoader.__init__', 2, 0, 2), ('init_whitening_conv', 1, 0, 1), ('LookaheadState', 1, 0, 1),
    ('train_step', 8, 0, 8), ('evaluate', 0, 2, 2), ('infer', 1, 2, 3)])
def test_what_is_on_the_clock_of_two_epochs_of_four_steps(name, clock, evaluation, wall, idle, tick, data):
    owner, _, method = name.rpartition('.')
    tick(getattr(idle, owner) if owner else idle, method)
    record, _ = idle.train(data, 1, 'cpu')
    assert tuple(record[key] for key in TIMES) == (clock, evaluation, wall)


def test_on_epoch_is_off_the_clock(idle, tick, data):
    callbacks = SimpleNamespace(on_epoch=lambda row: None)
    tick(callbacks, 'on_epoch')
    record, _ = idle.train(data, 1, 'cpu', on_epoch=lambda row: callbacks.on_epoch(row))
    assert tuple(record[key] for key in TIMES) == (0, 0, 1)


def test_the_clock_of_an_epoch_is_the_runs_until_its_end(idle, tick, data):
    tick(idle, 'train_step')
    record, _ = idle.train(data, 1, 'cpu')
    assert [row['clock_seconds'] for row in record['epochs']] == [4, 8]


def test_the_clock_runs_and_within_the_wall_clock(narrow, data):
    record, _ = narrow.train(data, 1, 'cpu')
    assert 0 < record['clock_seconds'] and 0 < record['eval_seconds']
    assert record['clock_seconds'] + record['eval_seconds'] <= record['wall_seconds']


def test_test_images_are_normalized_once_per_run(idle, data, monkeypatch):
    normalized, normalize = [], idle.CifarLoader.normalize
    monkeypatch.setattr(idle.CifarLoader, 'normalize',
                        lambda self, images: normalized.append(len(images)) or normalize(self, images))
    idle.train(data, 1, 'cpu')
    assert normalized.count(100) == 1


# Record

def test_record_layout(narrow, data):
    record, net = narrow.train(data, 7, 'cpu')
    assert set(record) == {'seed', 'epochs', 'tta_acc', *TIMES} and record['seed'] == 7
    assert set(record['epochs'][0]) == {'epoch', 'train_loss', 'train_acc', 'test_acc', *TIMES[:2]}
    assert isinstance(net, torch.nn.Module) and json.loads(json.dumps(record)) == record


@pytest.mark.parametrize('epochs, rows', [(1.0, 1), (2.0, 2), (2.25, 3), (0.3, 1)])
def test_epochs_count_from_1_and_include_the_partial_last_one(epochs, rows, idle, data):
    with idle.overrides({'opt.train_epochs': epochs}):
        record, _ = idle.train(data, 1, 'cpu')
    assert [row['epoch'] for row in record['epochs']] == list(range(1, rows + 1))


def test_loss_and_training_accuracy_are_those_of_the_epochs_last_batch(idle, data):
    record, _ = idle.train(data, 1, 'cpu', quiet=True)
    assert [(row['train_loss'], row['train_acc']) for row in record['epochs']] == [(4, 0.75), (8, 0.75)]


@pytest.mark.parametrize('quiet', [True, False])
def test_epochs_have_a_test_accuracy_unless_quiet(quiet, idle, data):
    record, _ = idle.train(data, 1, 'cpu', quiet=quiet)
    assert [row['test_acc'] is None for row in record['epochs']] == [quiet] * 2


def test_accuracies_are_without_tta_after_an_epoch_and_with_tta_at_the_end(idle, data, monkeypatch):
    """infer answers right in as many images as its tta_level says."""
    def infer(net, loader, tta_level=0, tta_share=1.0):
        answers = (loader.labels + 1) % 10
        answers[:tta_level] = loader.labels[:tta_level]
        return torch.eye(10)[answers]

    monkeypatch.setattr(idle, 'infer', infer)
    record, _ = idle.train(data, 1, 'cpu')
    assert ([row['test_acc'] for row in record['epochs']], record['tta_acc']) == ([0, 0], 0.02)


def test_tta_is_for_the_share_of_hyp(idle, data, monkeypatch):
    given = []
    monkeypatch.setattr(idle, 'infer', lambda net, *args: given.append(args[1:]) or torch.zeros(100, 10))
    with idle.overrides({'net.tta_share': 0.25}):
        idle.train(data, 1, 'cpu', quiet=True)
    assert given == [(2, 0.25)]


def test_on_epoch_gets_every_row_but_the_last(idle, data):
    rows = []
    with idle.overrides({'opt.train_epochs': 2.25}):
        record, _ = idle.train(data, 1, 'cpu', on_epoch=rows.append)
    assert rows == record['epochs'][:-1] and len(rows) == 2


# Learning

def test_a_narrow_network_learns(script):
    widths = {f'net.widths.block{i}': 16 for i in (1, 2, 3)}
    data = script.synthetic_data('cpu', train=1024, test=200)
    with script.overrides({**widths, 'opt.batch_size': 64, 'opt.train_epochs': 3.0}):
        record, _ = script.train(data, 1, 'cpu', quiet=True)
    assert record['tta_acc'] > 0.3  # chance: 0.1
