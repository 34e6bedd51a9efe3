"""`bench run` as a whole, in this process: which runs it makes, and how a mistake ends it."""

import contextlib
import os

import numpy as np
import pytest
from bench import cli
from bench_helpers import command, lines, log_of, outcomes, report_of, rows, write_fake
from conftest import live


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """bench(*args): the exit status, what is on stdout and on stderr, in a folder with fake.py."""
    write_fake(tmp_path)
    monkeypatch.chdir(tmp_path)

    def bench(*args):
        capsys.readouterr()
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return bench


def test_piped_rows_are_one_per_run_and_narrow(bench, tmp_path):
    status, out, err = bench(
        'run', 'fake.py', 'fake.py:fake.word=' + 80 * 'y', '--runs', 3, '--seed', 1
    )
    assert (status, err) == (0, '')
    assert [(turn, text) for turn, text in rows(out)] == [
        (r['run'], f'{100 * r["tta_acc"]:.2f}') for r in lines(log_of(tmp_path))
    ]
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith('Log:'))


def test_seeds_are_drawn_from_base_seed_and_turn(bench, tmp_path):
    assert bench('run', 'fake.py', '--runs', 3, '--seed', 7)[0] == 0
    seeds = [int(np.random.SeedSequence([7, i]).generate_state(1)[0]) for i in (1, 2, 3)]
    assert [record['seed'] for record in lines(log_of(tmp_path))] == seeds


def test_drawn_seed_is_printed_and_repeats_the_runs(bench, tmp_path):
    _, out, _ = bench('run', 'fake.py', '--runs', 2, '--log-dir', 'logs')
    seed = out.split('seed ')[1].split(',')[0]
    bench('run', 'fake.py', '--runs', 2, '--seed', seed, '--log-dir', 'again')
    (again,) = (tmp_path / 'again').iterdir()
    assert outcomes(again) == outcomes(log_of(tmp_path))


def test_until_sure_stops_decided_arms_and_the_rest_goes_on(bench, tmp_path):
    specs = [
        'fake.py',
        'fake.py:fake.skill=95',
        'fake.py:fake.skill=93.88',
        'fake.py:fake.skill=94.0',
    ]
    status, out, _ = bench('run', *specs, '--until-sure', '0.1', '--runs', 60, '--seed', 2)
    counts = {}
    for record in lines(log_of(tmp_path)):
        counts[record['arm']] = counts.get(record['arm'], 0) + 1
    assert status == 0 and counts['fake fake.skill=95'] == 5
    assert counts['fake'] == max(counts.values()) > 5
    assert 'fake fake.skill=95 is better than fake' in out and 'n = 5 (look 1)' in out
    assert 'so that 5% holds over all looks and 3 comparison(s)' in ' '.join(out.split())
    assert report_of(bench('show', log_of(tmp_path))[1]) == report_of(out)


def test_equal_arms_end_with_the_difference_excluded(bench, tmp_path):
    status, out, _ = bench(
        'run', 'fake.py', 'fake.py:fake.word=z', '--until-sure', 0.5, '--seed', 1
    )
    assert status == 0 and 'a difference from fake of 0.5 points is excluded' in out
    assert len(lines(log_of(tmp_path))) < 100


def test_winner_of_a_sweep_is_to_be_confirmed(bench):
    out = bench('run', 'fake.py', '--sweep', 'fake.skill=93,95', '--runs', 5)[1]
    assert 'Found by search: confirm the winner' in out and '(Holm)' in out
    assert 'Found by search' not in bench('run', 'fake.py', '--runs', 2)[1]


def test_one_run_each_is_not_compared(bench):
    status, out, _ = bench('run', 'fake.py', 'fake.py', '--runs', 1)
    assert status == 0 and 'one run or none, no comparison' in out


def test_curves_evaluates_each_epoch(bench, tmp_path):
    bench('run', 'fake.py', '--runs', 1)
    bench('run', 'fake.py', '--runs', 1, '--curves', '--log-dir', 'curves')
    (curves,) = (tmp_path / 'curves').iterdir()
    assert [row['test_acc'] for row in lines(log_of(tmp_path))[0]['epochs']] == [None, None]
    assert None not in [row['test_acc'] for row in lines(curves)[0]['epochs']]


def test_hyp_of_a_script_is_never_changed(bench, tmp_path):
    text = '\ndef spoil(hyp):\n    hyp["opt"]["lr"] = -1\n    hyp["net"].clear()\n'
    write_fake(
        tmp_path,
        'spoil.py',
        ('\ndef train(', text + '\ndef train('),
        ('return {', 'spoil(hyp)\n    return {'),
    )
    assert bench('run', 'spoil.py', '--runs', 3)[0] == 0
    assert all(record['hyp']['opt.lr'] == 10 for record in lines(log_of(tmp_path)))


@pytest.mark.parametrize(
    'args, message',
    [
        ([], 'needs a script'),
        (['fake.py', '--runs', '0'], '--runs 0'),
        (['fake.py', '--target', '0.94'], 'did you mean 94?'),
        (['fake.py', '--device', 'mps'], '--device mps'),
        (['fake.py', '--until-sure'], 'compares arms'),
        (['fake.py', '--sweep', 'opt.lr='], '--sweep'),
        (['fake.py', '--foo'], '--foo'),
        (['fake.py', '--log-dir', 'fake.py'], 'cannot write fake.py'),
        (['fake.py', '--margin', 'x'], '--margin'),
    ],
)
def test_mistake_is_one_line_and_status_2(args, message, bench, tmp_path):
    status, _, err = bench('run', *args)
    assert status == 2 and err.count('\n') == 1 and message in err
    assert not (tmp_path / 'logs').exists()


@pytest.mark.parametrize(
    'change, message',
    [
        (('rng.gauss(3, 0.01)', 'None'), 'must return (record, net)'),
        (("return {'tta_acc': accuracy", "return {'tta_acc': 94.0"), 'must return (record, net)'),
        (('rows = []', 'undefined_name; rows = []'), "NameError: name 'undefined_name'"),
        (('rows = []', 'raise UserError("too\\nfew"); rows = []'), 'fake: too few'),
        (('rows = []', 'exit(5); rows = []'), 'SystemExit: 5'),
    ],
)
def test_script_that_fails_in_training_is_one_line(change, message, bench, tmp_path):
    write_fake(tmp_path, 'fake.py', change)
    status, _, err = bench('run', 'fake.py', '--runs', 2)
    assert status == 2 and err.count('\n') == 1 and message in err
    if 'traceback is in' in err:
        assert 'Traceback' in (log_of(tmp_path) / 'error-0.txt').read_text()


def test_script_that_fails_later_keeps_the_table_and_status_1(bench, tmp_path):
    later = ('rows = []', 'later.append(1); 1 / (len(later) < 6); rows = []')
    write_fake(tmp_path, 'fake.py', later, ('import torch\n', 'import torch\nlater = []\n'))
    status, out, err = bench('run', 'fake.py', '--runs', 9)
    made = len(lines(log_of(tmp_path)))
    assert status == 1 and 'ZeroDivisionError' in err and 1 <= made < 9
    assert f'\nfake  {made}  ' in out


def test_script_without_the_usual_keys_is_warmed_up_by_a_whole_run(bench, tmp_path):
    write_fake(
        tmp_path,
        'odd.py',
        ("'train_epochs': 2.0, 'batch_size': 64, ", ''),
        ("hyp['opt']['train_epochs']", '3'),
        (", 'opt.train_epochs': 1.0", ''),
    )
    assert bench('run', 'odd.py', '--runs', 2)[0] == 0
    assert lines(log_of(tmp_path))[0]['flop'] is None


COMPILED = """
def make_net(hyp, device, num_classes=10):
    return ['a net', num_classes]


def compile_net(net):
    net.append('compiled')


def warm_up(data, hyp, device, net=None):
    print('warmed up with', net)
    return 1.0


def train("""


def test_compiled_network_is_made_once_warmed_up_and_passed_on(bench, tmp_path):
    shown = ('rows = []', 'print("trains with", net); rows = []')
    write_fake(tmp_path, 'net.py', ('\ndef train(', COMPILED), shown)
    _, out, _ = bench('run', 'net.py', '--hyp', 'compile=true', '--runs', 2)
    net = "['a net', 10, 'compiled']"
    assert out.count(f'warmed up with {net}') == 1 and out.count(f'trains with {net}') == 2
    _, out, _ = bench('run', 'net.py', '--runs', 2, '--log-dir', 'plain')
    assert out.count('warmed up with None') == 1
    assert lines(log_of(tmp_path))[0]['compile'] is True


def test_terminal_shows_a_board_that_is_replaced_by_the_report(tmp_path):
    pty = pytest.importorskip('pty')
    write_fake(tmp_path)
    main, other = pty.openpty()
    words = command('run', tmp_path / 'fake.py', f'{tmp_path}/fake.py:fake.skill=93', '--runs', 3)
    with live(tmp_path, words, stdout=other, stderr=other) as process:
        os.close(other)
        out = b''
        with contextlib.suppress(OSError):  # its end
            while data := os.read(main, 4096):
                out += data
        assert process.wait(timeout=60) == 0
    os.close(main)
    assert b'Difference (95% CI)' in out and b'6/6' in out and b'Accuracy (95% CI)' in out
