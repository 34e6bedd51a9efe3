"""`bench run` as a whole, in this process: which runs it makes, and how a mistake ends it."""

import collections

import numpy as np
import pytest
import torch
from bench.errors import UserError
from bench.job import pick_device
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
from conftest import in_a_terminal


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    """fake(name, *changes): a script in the current folder, where there is fake.py already."""
    write_fake(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *args: write_fake(tmp_path, *args)


def test_piped_rows_are_one_per_run_and_narrow(fake):
    fake('[red] ☃.py')
    status, out, err = tool('run', 'fake.py', '[red] ☃.py:fake.word=' + 80 * 'y', '--runs', 3)
    assert (status, err) == (0, '') and '[red] ☃ fake.word=yyy' in out.split('\nArm ')[1]
    assert rows(out) == logged(log_of())
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith('Log:'))


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '1')
    for name, device in (('auto', 'cuda:1'), ('cuda', 'cuda:1'), ('cuda:0', 'cuda:0')):
        assert pick_device(name) == torch.device(device)
    with pytest.raises(UserError, match='finds 2 CUDA devices'):
        pick_device('cuda:2')


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
    specs = ['fake.py', *(f'fake.py:fake.skill={skill}' for skill in (95, 94.0, 93.8))]
    status, out, _ = tool('run', *specs, '--until-sure', 0.3, '--runs', 60, '--seed', 2)
    counts = collections.Counter(run['arm_index'] for run in lines(log_of()))
    assert status == 0 and counts == {0: 18, 1: 5, 2: 8, 3: 18}
    assert 'skill=95 is better than fake by 0.98 points, n = 5 (look 1)' in out
    assert 'skill=94.0: a difference from fake of 0.3 points is excluded, n = 8 (look 2)' in out
    assert 'skill=93.8 is worse than fake by 0.28 points, n = 18 (look 4)' in out
    assert 'so that 5% holds over all looks and 3 comparison(s)' in ' '.join(out.split())
    assert result_of(tool('show', log_of())[1]) == result_of(out)


def test_winner_of_a_sweep_is_to_be_confirmed():
    out = tool('run', 'fake.py', '--sweep', 'fake.skill=93,95', '--runs', 5)[1]
    assert 'Found by search: confirm the winner' in out and '(Holm)' in out
    assert 'Found by search' not in tool('run', 'fake.py', '--runs', 2)[1]


def test_one_run_each_is_not_compared():
    status, out, _ = tool('run', 'fake.py', 'fake.py', '--runs', 1)
    assert status == 0 and 'one run or none, no comparison' in out


def test_curves_evaluates_each_epoch():
    tool('run', 'fake.py', '--runs', 1)
    tool('run', 'fake.py', '--runs', 1, '--curves', '--log-dir', 'curves')
    assert [row['test_acc'] for row in lines(log_of())[0]['epochs']] == [None, None]
    assert None not in [row['test_acc'] for row in lines(log_of('curves'))[0]['epochs']]


def test_hyp_of_a_script_is_never_changed(fake):
    fake('spoil.py', ('return {', 'hyp["opt"]["lr"] = -1; hyp["net"].clear(); return {'))
    assert tool('run', 'spoil.py', '--runs', 3)[0] == 0
    assert all(run['hyp']['opt.lr'] == 10 for run in lines(log_of()))


MISTAKES = [('', 'needs a script'), ('fake.py --target 0.94', 'did you mean 94?')]
MISTAKES += [('fake.py --runs 0', '--runs 0'), ('fake.py --device mps', '--device mps')]
MISTAKES += [('fake.py --until-sure', 'compares arms'), ('fake.py --sweep opt.lr=', '--sweep')]
MISTAKES += [('fake.py --foo', '--foo'), ('fake.py --log-dir fake.py', 'cannot write fake.py')]


@pytest.mark.parametrize('args, message', MISTAKES)
def test_mistake_is_one_line_and_status_2(args, message, tmp_path):
    status, _, err = tool('run', *args.split())
    assert status == 2 and err.count('\n') == 1 and message in err
    assert not (tmp_path / 'logs').exists()


@pytest.mark.parametrize(
    'change, message',
    [
        (('rng.gauss(3, 0.01)', 'None'), 'must return (record, net)'),
        (("'train_loss': ", "'loss': "), 'must return (record, net)'),
        (("return {'tta_acc': accuracy", "return {'tta_acc': 94.0"), 'must return (record, net)'),
        (('rows = []', 'raise UserError("too\\nfew")'), 'fake: too few'),
        (('rows = []', 'exit(5)'), 'SystemExit: 5 (line 41); the traceback is in '),
    ],
)
def test_script_that_fails_in_training_is_one_line(change, message, fake):
    fake('fake.py', change)
    status, _, err = tool('run', 'fake.py', '--runs', 2)
    assert status == 2 and err.count('\n') == 1 and message in err
    if 'traceback' in message:
        assert 'Traceback' in (log_of() / 'error-0.txt').read_text()


def test_script_that_fails_later_keeps_the_table_and_status_1(fake):
    later = ('rows = []', 'later.append(1); 1 / (len(later) < 6); rows = []')
    fake('fake.py', later, ('import torch\n', 'import torch\nlater = []\n'))
    status, out, err = tool('run', 'fake.py', '--runs', 9)
    made = len(lines(log_of()))
    assert status == 1 and 'ZeroDivisionError' in err and 1 <= made < 9
    assert f'\nfake  {made}  ' in out


def test_script_without_the_usual_keys_is_warmed_up_by_a_whole_run(fake):
    keys = ("'train_epochs': 2.0, 'batch_size': 64, ", '')
    fake('odd.py', keys, ("hyp['opt']['train_epochs']", '3'), (", 'opt.train_epochs': 1.0", ''))
    assert tool('run', 'odd.py', '--runs', 2)[0] == 0
    assert lines(log_of())[0]['flop'] is None


COMPILED = """
make_net = lambda hyp, device, num_classes: ['a net', num_classes]
compile_net = lambda net: net.append('compiled')
warm_up = lambda data, hyp, device, net: print('warmed up with', net)

def train("""


def test_compiled_network_is_made_once_warmed_up_and_passed_on(fake):
    shown = ('rows = []', 'print("trains with", net); rows = []')
    fake('net.py', ('\ndef train(', COMPILED), shown)
    _, out, _ = tool('run', 'net.py', '--hyp', 'compile=true', '--runs', 2)
    net = "['a net', 10, 'compiled']"
    assert out.count(f'warmed up with {net}') == 1 and out.count(f'trains with {net}') == 2
    assert lines(log_of())[0]['compile'] is True
    _, out, _ = tool('run', 'net.py', '--runs', 2, '--log-dir', 'plain')
    assert out.count('warmed up with None') == 1


def test_the_time_is_estimated_before_the_first_run(fake):
    fake('slow.py', ('\ndef train(', '\nwarm_up = lambda *args, net: 90.0\n\ndef train('))
    args = ['slow.py', 'slow.py:fake.skill=93', '--runs', 4]
    out = tool('run', *args)[1]
    assert out.index('About 3m 00s a turn, 12m 00s left\n') < out.index('difference')
    assert 'a turn, at most 12m' in tool('run', *args, '--until-sure', '--log-dir', 'sure')[1]
    assert 'a turn, 6m 00s left' in tool('run', '--resume', log_of(), '--runs', 6)[1]


def test_terminal_shows_a_board_that_is_replaced_by_the_report(tmp_path):
    words = command('run', 'fake.py', 'fake.py:fake.skill=93', '--runs', 3)
    out = in_a_terminal(tmp_path, words)
    board, _, rest = out.rpartition('\x1b[2K')  # which erases a line
    assert 'Difference (95% CI)' in board and '6/6' in board
    assert 'Accuracy (95% CI)' in rest and 'Difference (95% CI)' not in rest
