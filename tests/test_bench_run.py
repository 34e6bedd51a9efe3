"""`bench run` as a whole: which runs it makes, and how a mistake ends it."""

import collections
import contextlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench import speed
from bench_helpers import (
    command,
    lines,
    log_of,
    logged,
    outcomes,
    result_of,
    rows,
    tool,
    write_fake,
)
from conftest import environment, in_a_terminal


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    """fake(name, *changes): a script in the current folder, where there is fake.py already."""
    write_fake(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *args: write_fake(tmp_path, *args)


# ---------------------------------------- Runs ----------------------------------------
def test_piped_rows_are_one_per_run(fake):
    fake('[red] ☃.py')
    status, out, err = tool('run', 'fake.py', '[red] ☃.py:fake.word=' + 80 * 'y', '--runs', 3)
    assert (status, err) == (0, '') and '[red] ☃ fake.word=yyy' in out.split('\nArm ')[1]
    assert rows(out) == logged(log_of())


def test_arms_take_turns_with_the_seeds_that_base_seed_and_turn_give():
    assert tool('run', 'fake.py', 'fake.py:fake.skill=93', '--runs', 6, '--seed', 7)[0] == 0
    found = lines(log_of())
    assert [run['run'] for run in found] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    seeds = [int(np.random.SeedSequence([7, run['run']]).generate_state(1)[0]) for run in found]
    assert [run['seed'] for run in found] == seeds
    orders = {(a['arm'], b['arm']) for a, b in zip(found[::2], found[1::2], strict=True)}
    assert orders == {('fake', 'fake fake.skill=93'), ('fake fake.skill=93', 'fake')}


def test_drawn_seed_is_printed_and_repeats_the_runs():
    _, out, _ = tool('run', 'fake.py', '--runs', 2)
    seed = out.split('seed ')[1].split(',')[0]
    tool('run', 'fake.py', '--runs', 2, '--seed', seed, '--log-dir', 'again')
    assert outcomes(log_of('again')) == outcomes(log_of())


def test_until_sure_stops_decided_arms_and_the_rest_goes_on():
    specs = ['fake.py', *(f'fake.py:fake.skill={skill}' for skill in (95, 94.0, 93.9))]
    status, out, _ = tool('run', *specs, '--until-sure', 0.2, '--runs', 60, '--seed', 5)
    counts = collections.Counter(run['arm_index'] for run in lines(log_of()))
    assert status == 0 and counts[0] == max(counts.values())
    assert counts[1] == counts[2] == 5 < counts[3]
    text = ' '.join(out.split())
    assert 'skill=95 is better than fake by' in text
    assert 'skill=94.0: a difference from fake of 0.2 points is ruled out' in text
    assert result_of(tool('show', log_of())[1]) == result_of(out)


def test_winner_of_a_sweep_is_to_be_confirmed():
    out = tool('run', 'fake.py', '--sweep', 'fake.skill=93,95', '--runs', 5)[1]
    assert 'Found by search: confirm the winner' in out and '\nfake fake.skill=94 ' in out
    assert 'Found by search' not in tool('run', 'fake.py', '--runs', 2)[1]


def test_curves_evaluates_each_epoch():
    tool('run', 'fake.py', '--runs', 1)
    tool('run', 'fake.py', '--runs', 1, '--curves', '--log-dir', 'curves')
    assert [row['test_acc'] for row in lines(log_of())[0]['epochs']] == [None, None]
    assert None not in [row['test_acc'] for row in lines(log_of('curves'))[0]['epochs']]


def test_hyp_of_a_script_is_never_changed(fake):
    fake('spoil.py', ('return {', 'hyp["opt"]["lr"] = -1; hyp["net"].clear(); return {'))
    assert tool('run', 'spoil.py', '--runs', 3)[0] == 0
    assert all(run['hyp']['opt.lr'] == 10 for run in lines(log_of()))


# ---------------------------------------- Data ----------------------------------------
def test_holdout_tests_on_the_last_training_images(fake):
    """It is told in the title, in the report and in the log, and stays so when it goes on."""
    shown = "return {'seen': [str(data[s]['labels'].tolist()) for s in data], 'tta_acc': accuracy"
    fake('fake.py', ("return {'tta_acc': accuracy", shown))
    _, out, _ = tool('run', 'fake.py', '--runs', 1, '--holdout', 56, '--seed', 1)
    assert '(200 to train on, 56 to test), the last 56 training images held out' in out
    (held_out,) = lines(log_of())
    tool('run', 'fake.py', '--runs', 1, '--seed', 1, '--log-dir', 'all')
    (plain,) = lines(log_of('all'))
    train, test = (json.loads(text) for text in held_out['seen'])
    assert train + test == json.loads(plain['seen'][0]) and len(test) == 56
    facts = held_out['data']
    assert (facts['name'], facts['holdout']) == ('cifar10', 56)
    assert (facts['train'], facts['test'], facts['classes']) == (200, 56, 10)
    assert facts['train_labels_crc32'] != plain['data']['train_labels_crc32']
    status, _, err = tool('run', '--resume', log_of(), '--holdout', 57, '--runs', 2)
    assert status == 2 and '--holdout is 56 in the log, 57 now' in err
    assert tool('run', '--resume', log_of(), '--runs', 2)[0] == 0
    assert [run['data'] for run in lines(log_of())] == [facts, facts]


def test_holdout_of_synthetic_images_and_one_that_leaves_nothing():
    assert tool('run', 'fake.py', '--runs', 1, '--synthetic', '--holdout', 156)[0] == 0
    assert lines(log_of())[0]['data']['train'] == 100
    status, _, err = tool('run', 'fake.py', '--runs', 1, '--holdout')
    assert (status, err) == (2, 'bench: fake: --holdout 10000: there are 256 training images\n')


def test_holdout_of_images_sorted_by_class_is_refused(fake):
    fake('fake.py', ('labels = rng.integers(0, 10, n)', 'labels = np.arange(n) * 10 // n'))
    status, _, err = tool('run', 'fake.py', '--runs', 1, '--holdout', 50)
    assert status == 2 and 'shuffle the training images' in err


def test_what_a_script_does_to_its_data_stays_in_its_process(fake):
    fake('spoil.py', ('rows = []', "data['train']['labels'][:] = 7; rows = []"))
    looks = ('rows = []', "assert set(data['train']['labels']) != {7}; rows = []")
    fake('fake.py', looks)
    status, _, err = tool('run', 'fake.py', 'spoil.py', '--runs', 2)
    assert status == 0, err


# ---------------------------------------- Mistakes ----------------------------------------
MISTAKES = [
    ('', 'needs a script'),
    ('fake.py --target 0.94', 'did you mean 94?'),
    ('fake.py --runs 0', '--runs 0: it must be from 1'),
    ('fake.py --holdout 0', '--holdout 0: it must be from 1'),
    ('fake.py --device mps', '--device mps'),
    ('fake.py --until-sure', 'compares arms'),
    ('fake.py --sweep opt.lr=', '--sweep'),
    ('fake.py --trails 3', 'unrecognized arguments: --trails 3 (python tests/bench run --help'),
    ('fake.py --log-dir fake.py', 'cannot write fake.py'),
    ('fake.py --hyp opt.lr=-3', 'fake: opt.lr=-3.0: it must be over 0'),
    ('fake.py fake.py:opt.lr=-3', 'fake opt.lr=-3: opt.lr=-3.0: it must be over 0'),
    ('fake.py --sweep opt.lr=9,-3', 'fake opt.lr=-3: opt.lr=-3.0: it must be over 0'),
    ('fake.py --hyp opt.lr', "'opt.lr' should be KEY=VALUE"),
    ('fake.py:recipe=fast', 'no recipe; there are opt.train_epochs'),
]


@pytest.mark.parametrize('args, message', MISTAKES)
def test_mistake_is_one_line_and_status_2(args, message, tmp_path):
    status, _, err = tool('run', *args.split())
    assert status == 2 and err.count('\n') == 1 and message in err
    assert not list(tmp_path.glob('logs/*'))


@pytest.mark.parametrize('wrong', ['--device=cuda:7', '--hyp=opt.lr=-1'])
def test_mistake_is_found_before_the_data_are_loaded(fake, wrong):
    fake('fake.py', ('    return synthetic_data(device, test=64', "    print('loads'); return (0"))
    status, out, err = tool('run', 'fake.py', wrong)
    assert (status, out, err.count('\n')) == (2, '', 1)


def test_speed_counts_each_kernel_once(monkeypatch):
    """On CUDA a profile has a kernel, the operator that launched it, and annotations."""

    def event(key, kind, annotation=False):
        names = {'key': key, 'device_type': SimpleNamespace(name=kind), 'count': 5}
        return SimpleNamespace(**names, is_user_annotation=annotation, self_device_time_total=500)

    events = [event('aten::mm', 'CPU'), event('gemm', 'CUDA'), event('step', 'CUDA', True)]
    events.append(event('relu', 'CUDA'))
    profile = SimpleNamespace(key_averages=lambda: events)
    profiled = contextlib.nullcontext(profile)
    monkeypatch.setattr(torch.profiler, 'profile', lambda activities: profiled)
    monkeypatch.setattr(speed, 'wait', lambda device: None)
    monkeypatch.setattr(speed, 'PROFILED_STEPS', 5)
    rows = speed.kernels(lambda: None, torch.device('cuda'))
    assert rows == [['gemm', 1, 0.1, 0.5], ['relu', 1, 0.1, 0.5]]


def test_speed_needs_the_parts_that_it_measures():
    status, _, err = tool('speed', 'fake.py')
    assert (status, err.count('\n')) == (2, 1)
    assert 'fake: speed measures CifarLoader, make_net, make_optimizer, train_step' in err


def test_scripts_may_stand_anywhere(fake):
    """Also after the pairs of --hyp and --sweep, which do not swallow them."""
    fake('other.py')
    args = ['--hyp', 'fake.std=1', 'fake.py', 'other.py:opt.lr=3', '--runs', '1', 'other.py']
    status, _, err = tool('run', *args)
    assert status == 0, err
    arms = sorted((run['arm_index'], run['arm']) for run in lines(log_of()))
    assert arms == [(0, 'fake'), (1, 'other opt.lr=3'), (2, 'other')]


def test_an_option_with_a_default_value_does_not_swallow_a_script():
    status, _, err = tool('run', '--holdout', 'fake.py', '--runs', '1')
    assert (status, err) == (2, 'bench: fake: --holdout 10000: there are 256 training images\n')
    status, out, _ = tool('run', '--runs', '5', '--until-sure', 'fake.py', 'fake.py:opt.lr=3')
    assert status == 0 and 'Looks after 5 turns' in out


@pytest.mark.parametrize(
    'change, message',
    [
        (('rng.gauss(3, 0.01)', 'None'), 'must return (record, net)'),
        (("'train_loss': ", "'loss': "), 'must return (record, net)'),
        (("return {'tta_acc': accuracy", "return {'tta_acc': 94.0"), 'must be from 0 to 1'),
        (('    rows = []', '    raise UserError("too\\nfew")'), 'fake: too few'),
        (('    rows = []', '    exit(5)'), 'SystemExit: 5 (line 47); the traceback is in '),
        (('return data\n', 'return {}\n'), 'its data lack train images'),
        (('    rows = []', '    import os; os._exit(3)'), 'fake: its process ended (status 3)'),
    ],
)  # fmt: skip
def test_script_that_fails_in_training_is_one_line(change, message, fake):
    fake('fake.py', change)
    status, _, err = tool('run', 'fake.py', '--runs', 2)
    assert status == 2 and err.count('\n') == 1 and message in err
    if 'traceback' in message:
        assert 'Traceback' in (log_of() / 'error-0.txt').read_text()


def test_script_that_fails_later_keeps_the_table_and_status_1(fake):
    later = ('rows = []', 'later.append(1); 1 / (len(later) < 6); rows = []')
    fake('fake.py', later, ('import random\n', 'import random\nlater = []\n'))
    status, out, err = tool('run', 'fake.py', '--runs', 9)
    made = len(lines(log_of()))
    assert status == 1 and 'ZeroDivisionError' in err and 1 <= made < 9
    assert f'\nfake  {made}  ' in out


# ---------------------------------------- Warm-up and cost ----------------------------------------
def trained(out):
    """(images, epochs) of each training of a script that prints them."""
    return [tuple(map(float, line.split()[1:])) for line in out.splitlines() if 'trains' in line]


SHOWN = (
    'rows = []',
    'print("trains", len(data["train"]["labels"]), EPOCHS, flush=True); rows = []',
)


def test_script_without_a_warm_up_makes_a_short_training(fake):
    fake('fake.py', (SHOWN[0], SHOWN[1].replace('EPOCHS', 'hyp["opt"]["train_epochs"]')))
    _, out, _ = tool('run', 'fake.py', '--runs', 1)
    assert trained(out) == [(192, 1), (256, 2)]


def test_script_without_the_usual_keys_is_warmed_up_by_a_whole_run(fake):
    keys = ("'train_epochs': 2.0, 'batch_size': 64, ", '')
    epochs = ("hyp['opt']['train_epochs']", '3')
    fake('odd.py', keys, epochs, (SHOWN[0], SHOWN[1].replace('EPOCHS', '3')))
    _, out, _ = tool('run', 'odd.py', '--runs', 1)
    assert trained(out) == [(256, 3), (256, 3)]
    assert lines(log_of())[0]['flop'] is None


def test_error_in_the_short_warm_up_is_not_swallowed(fake):
    """It once started a whole run in its place."""
    fails = ('rows = []', 'assert len(data["train"]["labels"]) == 256; rows = []')
    fake('fake.py', fails)
    status, _, err = tool('run', 'fake.py', '--runs', 1)
    assert status == 2 and 'AssertionError' in err


def test_why_there_is_no_cost_is_said(fake):
    _, out, _ = tool('run', 'fake.py', '--runs', 1)
    assert '\nfake has no cost: the script does not import torch\n' in out
    fails = ('rows = []', 'assert len(data["train"]["labels"]) > 9; rows = []')
    fake('fake.py', fails, ('import random\n', 'import random\nimport torch\n'))
    _, out, _ = tool('run', 'fake.py', '--runs', 1)
    assert '\nfake has no cost: AssertionError: (line ' in out


CHANGED_LIST = "hyp['fake']['list'][0].append(0); print('list', hyp['fake']['list']); rows = []"
COMPILED = """
make_net = lambda hyp, device, num_classes: ['a net', num_classes]
compile_step = lambda net: net.append('compiled') or 'a step'
warm_up = lambda data, hyp, device, net=None, step=None: print('warmed up with', net, step)

def train("""


def test_compiled_network_is_made_once_warmed_up_and_passed_on(fake):
    shown = ('rows = []', 'print("trains with", net, step); rows = []')
    fake('net.py', ('\ndef train(', COMPILED), shown)
    _, out, _ = tool('run', 'net.py', '--hyp', 'compile=true', '--runs', 2)
    both = "['a net', 10, 'compiled'] a step"
    assert out.count(f'warmed up with {both}') == 1 and out.count(f'trains with {both}') == 2
    assert lines(log_of())[0]['compile'] is True
    _, out, _ = tool('run', 'net.py', '--runs', 2, '--log-dir', 'plain')
    assert out.count('warmed up with None None') == 1


@pytest.mark.parametrize('tree', ['{1: 2}', "{'a.b': 2}", "{'net': {1: 2}}"])
def test_keys_of_hyp_that_no_option_could_name_are_refused(tree, fake):
    fake('odd.py', ("'fake': {", f"'odd': {tree}, 'fake': {{"))
    status, _, err = tool('run', 'odd.py', '--runs', 1)
    assert status == 2 and 'of hyp must be text without a dot' in err and not Path('logs').exists()


def test_what_a_script_does_to_a_list_in_hyp_does_not_reach_the_next_run(fake):
    fake('list.py', ("'list': [16, 24]", "'list': [[16]]"), ('rows = []', CHANGED_LIST))
    _, out, _ = tool('run', 'list.py', '--runs', 2)
    assert out.count('list [[16, 0]]') == 3  # the warm-up, too


def test_error_of_a_compiler_is_shown_as_it_is_below_a_line(fake):
    fake('net.py', ('\ndef train(', COMPILED.replace("'a step'", "1 / 0")))  # fmt: skip
    status, _, err = tool('run', 'net.py', 'net.py:compile=true', '--runs', 2)
    first, second = err.splitlines()
    assert status == 2
    assert first == 'bench: net compile=true: with compile=true it failed:'
    assert second.startswith('ZeroDivisionError: division by zero; the traceback is in ')


# ---------------------------------------- What people see ----------------------------------------
def test_terminal_shows_a_board_that_is_replaced_by_the_report(tmp_path):
    words = command('run', 'fake.py', 'fake.py:fake.skill=93', '--runs', 3)
    out = in_a_terminal(tmp_path, words)
    board, _, rest = out.rpartition('\x1b[2K')  # which erases a line
    assert 'Difference (95% CI)' in board and '6/6' in board
    assert 'No run diverged' in rest and 'Difference (95% CI)' not in rest


def test_name_that_stdout_cannot_show_does_not_end_it(fake, tmp_path):
    fake('schön ☃.py', ('rows = []', 'print("☃"); rows = []'))
    variables = {'PYTHONIOENCODING': 'ascii', 'COLUMNS': '80'}
    words = command('run', 'schön ☃.py', '--runs', '2')
    process = subprocess.run(words, cwd=tmp_path, env=environment(**variables), capture_output=True)
    assert process.returncode == 0, process.stderr
    assert len(lines(log_of())) == 2 and b'sch?n ?' in process.stdout


def test_help_names_every_option_and_starts_without_scipy():
    program = 'import sys; sys.path.insert(0, "."); from bench import cli; cli.main(["--help"]); '
    program += (
        'print([name for name in ("scipy", "rich", "numpy", "torch") if name in sys.modules])'
    )
    words = [command()[0], '-c', program]
    process = subprocess.run(words, cwd=command()[1] + '/..', capture_output=True, text=True)
    assert process.stdout.endswith('[]\n') and 'python tests/bench speed' in process.stdout
