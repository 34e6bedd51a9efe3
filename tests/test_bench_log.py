"""Logs: how they are read, what `show` says and draws of them, what a resumed one refuses."""

import json
import re
import shutil
import warnings

import matplotlib.image
import pytest
from bench import cli, plot, records, report
from bench_helpers import lines, log_of, outcomes, report_of, write_fake


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A folder with the log of an experiment of two arms, and what it printed."""
    folder = tmp_path_factory.mktemp('made')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_fake(folder)
        assert (
            cli.main(['run', 'fake.py', 'fake.py:fake.skill=93', '--runs', '6', '--seed', '5']) == 0
        )
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(made, tmp_path / 'copy')
    monkeypatch.chdir(tmp_path / 'copy')
    return tmp_path / 'copy'


@pytest.fixture
def bench(capsys):
    """bench(*args): the exit status, what is on stdout, and on stderr."""

    def bench(*args):
        capsys.readouterr()
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return bench


# ---------------------------------------- What is logged ----------------------------------------


def test_line_of_a_run_is_complete_in_itself(here):
    record = lines(log_of(here))[0]
    wanted = (
        'arm script sha256 hyp recipe compile run base_seed seed data device torch dtype epochs'
    )
    wanted += ' tta_acc clock_seconds wall_seconds warmup_seconds peak_bytes flop'
    assert set(wanted.split()) <= record.keys()
    assert record['hyp']['opt.lr'] == 10.0 and record['data']['classes'] == 10
    code = log_of(here) / 'code-0-fake.py'
    assert code.read_bytes() == (here / 'fake.py').read_bytes()
    experiment = json.loads((log_of(here) / 'experiment.json').read_text())
    assert experiment['arms'][0]['sha256'] == record['sha256']
    assert experiment['base_seed'] == record['base_seed'] == 5


def test_numbers_that_are_not_finite_are_null():
    assert records.to_json({'a': [float('nan'), float('inf'), 1.5]}) == '{"a": [null, null, 1.5]}'


def test_arms_take_turns_with_the_same_seeds_in_changing_order(here):
    found = lines(log_of(here))
    turns = [found[i : i + 2] for i in range(0, len(found), 2)]
    assert all(a['seed'] == b['seed'] and a['run'] == b['run'] for a, b in turns)
    assert len({a['seed'] for a, _ in turns}) == len(turns)
    assert len({a['arm'] for a, _ in turns}) == 2


# ---------------------------------------- show ----------------------------------------


def test_show_repeats_the_report(here, bench):
    status, out, err = bench('show', log_of(here))
    assert (status, err) == (0, '')
    assert re.search(
        r'^fake fake.skill=93 is worse than fake by [01]\.\d\d points \(p < 0.001\)', out, re.M
    )
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith('Log'))


def test_line_that_a_kill_cut_off_does_not_count(here, bench):
    file = log_of(here) / 'runs.jsonl'
    file.write_bytes(file.read_bytes()[:-5])
    assert '11 of' not in bench('show', log_of(here))[1]
    log = records.read([str(log_of(here))])
    assert len(log.runs) == 11 and not log.notes


@pytest.mark.parametrize('junk', ['{"tta_acc": 1', 'null', '[' * 10**5, '{"arm": 3}', '\udcff'])
def test_line_that_is_no_run_is_noted(junk, here, bench):
    file = log_of(here) / 'runs.jsonl'
    file.write_bytes(junk.encode(errors='surrogateescape') + b'\n' + file.read_bytes())
    status, out, _ = bench('show', file)
    assert status == 0 and 'line 1 is not a finished run' in out
    assert len(records.read([str(file)]).runs) == 12


def test_copies_count_once_and_cat_makes_a_log(here, bench):
    text = (log_of(here) / 'runs.jsonl').read_text()
    other = text.replace('"seed": ', '"seed": 1')  # another experiment
    (here / 'cat.jsonl').write_text(text + text + other)
    assert len(records.read([str(here / 'cat.jsonl'), str(log_of(here))]).runs) == 24
    assert bench('show', 'cat.jsonl')[0] == 0


def test_other_code_and_other_data_are_not_pooled_under_one_name(here):
    text = (log_of(here) / 'runs.jsonl').read_text()
    for change in (('"sha256": "', '"sha256": "0'), ('"train": 256', '"train": 128')):
        (here / 'other.jsonl').write_text(text.replace(*change))
        arms = records.by_arm(records.read([str(log_of(here)), 'other.jsonl']).runs)
        names = {'fake fake.skill=93', 'fake', 'fake fake.skill=93 #2', 'fake #2'}
        assert arms.keys() == names
        assert all(len(runs) == 6 for runs in arms.values())


def test_log_of_a_script_has_arms_by_its_name_and_differing_hyp(here):
    found = lines(log_of(here))
    for run in found:
        del run['arm']
    (here / 'runs.jsonl').write_text('\n'.join(json.dumps(run) for run in found) + '\n')
    arms = records.by_arm(records.read(['runs.jsonl']).runs)
    assert set(arms) == {'fake fake.skill=94.0', 'fake fake.skill=93.0'}


def test_reference_target_and_margin_of_show(here, bench):
    name = 'fake fake.skill=93'
    _, out, _ = bench('show', log_of(here), '--reference', name, '--target', 93, '--margin', 0.5)
    assert f'fake is better than {name}' in out and '>=93%' in out
    assert 'not inferior by more than 0.5 points' in ' '.join(out.split())
    _, out, _ = bench('show', log_of(here), '--margin', 0.5)
    assert 'non-inferiority by 0.5 points not shown' in ' '.join(out.split())
    status, _, err = bench('show', log_of(here), '--reference', 'x')
    assert status == 2 and 'there are fake, fake fake.skill=93' in err


@pytest.mark.parametrize('args', [['none'], ['.'], ['fake.py'], []])
def test_show_of_what_is_no_log_is_one_line(args, here, bench):
    status, out, err = bench('show', *args)
    assert status == 2 and err.count('\n') == 1 and not out


def test_diverged_runs_are_named_and_stay_in_the_mean(here, bench):
    found = lines(log_of(here))[:6]
    for i, run in enumerate(found):
        run |= {'arm': 'fake', 'run': i + 1, 'seed': i, 'hyp': {}, 'tta_acc': 0.94 if i else 0.51}
    found[1]['epochs'][-1]['train_loss'] = None
    (here / 'bad.jsonl').write_text('\n'.join(json.dumps(run) for run in found) + '\n')
    out = bench('show', 'bad.jsonl')[1]
    assert 'Diverged: fake, run 1, 51.00%' in out and 'Diverged: fake, run 2, 94.00%' in out
    assert '2/6' in out and '86.83%' in out


def test_reference_is_the_first_arm_in_any_form_of_the_log(here):
    found = sorted(lines(log_of(here)), key=lambda run: run['arm'] == 'fake')  # it comes last
    (here / 'late.jsonl').write_text('\n'.join(json.dumps(run) for run in found) + '\n')
    for logs in (['late.jsonl'], ['late.jsonl', str(log_of(here))]):
        assert list(records.by_arm(records.read(logs).runs)) == ['fake', 'fake fake.skill=93']


def test_runs_of_several_machines_are_said_to_be(here, bench):
    text = (log_of(here) / 'runs.jsonl').read_text()
    (here / 'two.jsonl').write_text(text.replace('"device": "', '"device": "other ', 3))
    assert 'come from several devices' in bench('show', 'two.jsonl')[1]
    assert 'come from several devices' not in bench('show', log_of(here))[1]


# ---------------------------------------- Figures ----------------------------------------


@pytest.mark.parametrize('curves', [False, True])
def test_figure_has_no_empty_panel_and_draws_every_run(curves, made):
    found = records.by_arm(lines(log_of(made)))
    for run in [run for runs in found.values() for run in runs]:
        for row in run['epochs'] if curves else []:
            row['test_acc'] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        axes = plot.figure(found).axes
    labels = [panel.get_ylabel() for panel in axes]
    kinds = ['training loss', 'test accuracy (%)'] if curves else ['training loss']
    assert labels == [*kinds * 3, ''] and axes[-1].get_xlabel() == 'TTA accuracy (%)'
    names = [' '.join(label.get_text().split()) for label in axes[-1].get_yticklabels()]
    assert names == [f'{name}, n = {len(runs)}' for name, runs in found.items()]
    assert all(panel.has_data() for panel in axes)
    assert len(axes[0].lines) == 6


def test_figure_of_one_run_and_of_many_arms(made):
    run = lines(log_of(made))[0]
    assert plot.figure({'one': [run]})._repr_png_().startswith(b'\x89PNG')  # in a notebook
    assert plot.figure({f'arm {i} ' + 'x' * 60: [run, run] for i in range(9)}).axes
    assert plot.figure({'bare': [{**run, 'epochs': []}]}).axes


def test_plot_writes_the_kind_of_its_suffix(here, bench):
    assert bench('show', log_of(here), '--plot', 'a.png')[0] == 0
    assert matplotlib.image.imread('a.png').shape[1] >= 600
    status, _, err = bench('show', log_of(here), '--plot', 'a.xyz')
    assert status == 2 and 'suffix' in err and err.count('\n') == 1
    status, _, err = bench('show', log_of(here), '--plot', 'none/a.png')
    assert 'cannot write none/a.png' in err and err.count('\n') == 1


# ---------------------------------------- Resume ----------------------------------------


def test_resume_makes_the_missing_runs_with_the_same_seeds(here, bench):
    log, whole = log_of(here), outcomes(log_of(here))
    file = log / 'runs.jsonl'
    cut = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b''.join(cut[:3] + cut[5:9]) + cut[9][:40])
    status, out, _ = bench('run', '--resume', log)
    assert status == 0 and outcomes(log) == whole
    assert report_of(out) == report_of(bench('show', log)[1])


def test_complete_log_is_resumed_without_a_warm_up(here, bench):
    status, out, _ = bench('run', '--resume', log_of(here))
    assert status == 0 and 'Warm-up 1' not in out and 'is worse than' in out


def test_options_given_again_win(here, bench):
    log = log_of(here)
    assert bench('run', '--resume', log, '--runs', 8, '--margin', 2, '--device', 'cpu')[0] == 0
    assert len(outcomes(log)) == 16
    assert 'by more than 2 points' in ' '.join(bench('show', log)[1].split())  # it is kept


@pytest.mark.parametrize(
    'args, message',
    [
        (['--hyp', 'opt.lr=3'], 'hyp of the log'),
        (['fake.py'], 'scripts of the log'),
        (['--seed', '6'], 'seed of the log: 5'),
        (['--data-dir', 'other'], 'test: 128 in the log, 64 now'),
    ],
)
def test_resume_refuses_another_experiment(args, message, here, bench):
    before = outcomes(log_of(here))
    status, _, err = bench('run', '--resume', log_of(here), *args)
    assert status == 2 and message in err and 'new experiment' in err
    assert outcomes(log_of(here)) == before


def test_resume_refuses_other_code_with_a_short_diff(here, bench):
    script = here / 'fake.py'
    script.write_text(script.read_text().replace('rng.gauss(3, 0.01)', 'rng.gauss(2, 0.01)'))
    status, _, err = bench('run', '--resume', log_of(here))
    changed = [line for line in err.splitlines() if 'rng.gauss' in line]
    assert status == 2 and len(changed) == 2 and 'put back the code in' in err
    script.write_text('\n\n' + '# x\n' * 100 + script.read_text())
    assert bench('run', '--resume', log_of(here))[2].count('\n') < 20


def test_script_alone_is_not_resumed(here, bench):
    status, _, err = bench('run', '--resume', 'none')
    assert status == 2 and 'no log folder' in err and err.count('\n') == 1


def test_durations_are_short():
    assert report.duration(59.6) == '1m 00s' and report.duration(7500) == '2h 05m'
