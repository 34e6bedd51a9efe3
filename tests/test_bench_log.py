"""Logs: how they are read, what `show` says and draws of them, what a resumed one refuses."""

import json
import math
import re
import shlex
import subprocess
import warnings
from pathlib import Path

import matplotlib.image
import pytest
from bench import plot, records, report
from bench.report import duration
from bench_helpers import command, lines, log_of, outcomes, result_of, tool, write_fake


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The log folder of an experiment of two arms x 6 runs, in ./logs."""
    monkeypatch.chdir(tmp_path)
    write_fake(tmp_path)
    assert tool('run', 'fake.py', 'fake.py:fake.skill=93', '--runs', 6, '--seed', 5)[0] == 0
    return log_of()


def write_runs(name, runs):
    """A runs.jsonl with another name."""
    Path(name).write_text(''.join(records.to_json(run) + '\n' for run in runs))


def arms_of(*logs):
    """The arms of some logs, and how many runs each has."""
    arms = records.by_arm(records.read([str(log) for log in logs]).runs)
    return {name: len(runs) for name, runs in arms.items()}


def test_line_of_a_run_is_complete_in_itself(log):
    record = lines(log)[0]
    wanted = 'arm script sha256 hyp recipe compile run base_seed seed data device torch dtype'
    wanted += ' epochs tta_acc clock_seconds wall_seconds warmup_seconds peak_bytes flop'
    assert set(wanted.split()) <= record.keys()
    assert record['hyp']['opt.lr'] == 10.0 and record['data']['classes'] == 10
    assert (log / 'code-0-fake.py').read_bytes() == Path('fake.py').read_bytes()
    experiment = json.loads((log / 'experiment.json').read_text())
    assert experiment['arms'][0]['sha256'] == record['sha256']
    assert experiment['base_seed'] == record['base_seed'] == 5


# ---------------------------------------- show ----------------------------------------
def test_lines_that_are_no_runs_are_noted_but_a_last_one_that_a_kill_cut_off(log):
    file = log / 'runs.jsonl'
    bare = b'{"arm": "a", "tta_acc": 1, "clock_seconds": 1, "epochs": [{}]}'
    junk = [b'{"tta_acc": 1', b'null', b'[' * 10**5, bare, b'\xff']
    file.write_bytes(b'\n'.join([*junk, file.read_bytes()[:-5]]))
    status, out, _ = tool('show', file)
    assert status == 0 and sum(arms_of(file).values()) == 11
    noted = re.findall(r'line (\d+) is not a finished run', ' '.join(out.split()))
    assert noted == ['1', '2', '3', '4', '5']


def test_copies_count_once_and_cat_makes_a_log(log):
    text = (log / 'runs.jsonl').read_text()
    another = text.replace('"seed": ', '"seed": 1')
    Path('cat.jsonl').write_text(text + text + another)
    assert sum(arms_of('cat.jsonl', log).values()) == 24
    assert tool('show', 'cat.jsonl')[0] == 0


def test_other_code_and_other_data_are_not_pooled_under_one_name(log):
    names = ('fake', 'fake fake.skill=93', 'fake #2', 'fake fake.skill=93 #2')
    for key in ('"sha256": "', '"train": ', '"test_labels_crc32": '):
        Path('other.jsonl').write_text((log / 'runs.jsonl').read_text().replace(key, key + '1'))
        assert arms_of(log, 'other.jsonl') == dict.fromkeys(names, 6)


def test_several_data_sets_are_not_compared_without_a_word(log):
    text = (log / 'runs.jsonl').read_text()
    Path('other.jsonl').write_text(text.replace('"train": ', '"train": 1'))
    warning = 'The data differ, or'
    assert warning in tool('show', log, 'other.jsonl')[1] and warning not in tool('show', log)[1]


def test_an_experiment_is_the_reference_of_what_scripts_logged_by_themselves(log):
    own = [
        {k: v for k, v in run.items() if 'arm' not in k} | {'script': 'own'} for run in lines(log)
    ]
    write_runs('own.jsonl', own)
    assert [*arms_of('own.jsonl', log)][0] == 'fake'


def test_show_says_what_all_arms_were_given(log):
    assert 'All arms' not in tool('show', log)[1]
    given = ['--hyp', 'opt.lr=9', '--runs', 2, '--log-dir', 'given']
    assert 'All arms: opt.lr=9\n' in tool('run', 'fake.py', *given)[1]
    assert 'All arms: opt.lr=9\n' in tool('show', log_of('given'))[1]
    out = tool('run', 'fake.py', 'fake.py:opt.lr=8', *given)[1]
    assert 'All arms, unless named otherwise: opt.lr=9\n' in out


def test_one_data_set_in_two_folders_is_pooled(log):
    text = (log / 'runs.jsonl').read_text()
    Path('other.jsonl').write_text(text.replace('"name": "', '"name": "other/'))
    assert arms_of('other.jsonl', log) == arms_of(log)


def test_log_of_a_script_has_arms_by_its_name_and_differing_hyp(log):
    write_runs('own.jsonl', [{k: v for k, v in run.items() if k != 'arm'} for run in lines(log)])
    assert arms_of('own.jsonl') == {'fake fake.skill=94.0': 6, 'fake fake.skill=93.0': 6}


def test_reference_target_and_margin_of_show(log):
    name = 'fake fake.skill=93'
    _, out, _ = tool('show', log, '--reference', name, '--target', 93, '--margin', 0.5)
    assert f'fake is better than {name}' in out and '>=93%' in out
    assert 'not inferior by more than 0.5 points' in ' '.join(out.split())
    _, out, _ = tool('show', log, '--margin', 0.5)
    assert f'{name} is worse than fake by' in out and '(p < 0.001)' in out
    assert 'non-inferiority by 0.5 points not shown' in ' '.join(out.split())
    status, _, err = tool('show', log, '--reference', 'x')
    assert status == 2 and 'there are fake, fake fake.skill=93' in err


@pytest.mark.parametrize('lost, seen', [(3, 2), (1, 7)])
def test_a_look_sees_no_turn_behind_a_lost_one_but_shows_what_there_is(lost, seen, log):
    until_sure = ['--until-sure', 0.001, '--runs', 8, '--seed', 5, '--log-dir', 'sure']
    assert tool('run', 'fake.py', 'fake.py', *until_sure)[0] == 0
    sure = log_of('sure')
    write_runs(sure / 'runs.jsonl', [run for run in lines(sure) if run['run'] != lost])
    status, out, _ = tool('show', sure)
    assert status == 0 and f'n = {seen} (look 0)' in ' '.join(out.split()) and 'nan' not in out


def test_durations_have_two_units():
    assert [*map(duration, (-1, 59.4, 59.5, 7500))] == ['0s', '59s', '1m 00s', '2h 05m']


def test_show_leaves_the_clocks_out(log):
    words = 'Clock/run', 'clock x', 'Warm-up'
    assert all(word in tool('show', log)[1] for word in words)
    assert not any(word in tool('show', log, '--no-clock')[1] for word in words)


@pytest.mark.parametrize('args', ['show none', 'show .', 'show fake.py', 'run --resume none'])
def test_what_is_no_log_is_one_line(args, log):
    status, out, err = tool(*args.split())
    assert status == 2 and err.count('\n') == 1 and not out


def test_diverged_runs_are_named_and_stay_in_the_mean(log):
    found = lines(log)[:6]
    for i, run in enumerate(found):
        run |= {'arm': 'fake', 'run': i + 1, 'seed': i, 'hyp': {}, 'tta_acc': 0.94 if i else 0.51}
    found[1]['epochs'][-1]['train_loss'] = math.nan
    write_runs('bad.jsonl', found)
    assert 'NaN' not in Path('bad.jsonl').read_text()  # it is no JSON
    out = tool('show', 'bad.jsonl')[1]
    assert 'Diverged: fake, run 1, 51.00%' in out and 'Diverged: fake, run 2, 94.00%' in out
    assert '2/6' in out and '86.83%' in out


def test_reference_is_the_first_arm_in_any_form_of_the_log(log):
    write_runs('late.jsonl', sorted(lines(log), key=lambda run: run['arm'] == 'fake'))
    for logs in (['late.jsonl'], ['late.jsonl', log]):
        assert list(arms_of(*logs)) == ['fake', 'fake fake.skill=93']


def test_runs_of_several_machines_are_said_to_be(log):
    text = (log / 'runs.jsonl').read_text()
    Path('two.jsonl').write_text(text.replace('"device": "', '"device": "other ', 3))
    assert 'come from several devices' in tool('show', 'two.jsonl')[1]
    assert 'come from several devices' not in tool('show', log)[1]


# ---------------------------------------- Figures ----------------------------------------
@pytest.mark.parametrize('curves', [False, True])
def test_figure_has_no_empty_panel_and_draws_every_run(curves, log):
    found = records.by_arm(lines(log))
    for run in [run for runs in found.values() for run in runs]:
        for row in run['epochs'] if curves else []:
            row['test_acc'] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        axes = plot.figure(found).axes
    kinds = ['loss of the last batch', 'test accuracy (%)'][: 1 + curves]
    assert [panel.get_ylabel() for panel in axes] == [*kinds * 3, '']
    assert axes[-1].get_xlabel() == 'TTA accuracy (%)'
    names = [' '.join(label.get_text().split()) for label in axes[-1].get_yticklabels()]
    assert names == [f'{name}, n = {len(runs)}' for name, runs in found.items()]
    assert all(panel.has_data() for panel in axes) and len(axes[0].lines) == 6


def test_a_panel_for_which_an_arm_has_no_values_is_left_out(log):
    found = records.by_arm(lines(log))
    for run in found['fake']:
        for row in run['epochs']:
            row['test_acc'] = 0.9
    panels = plot.figure(found).axes
    assert [panel.get_visible() for panel in panels] == [True, True, True, False, *[True] * 3]


def test_figure_of_one_run_and_of_many_arms(log):
    run = lines(log)[0]
    assert plot.figure({'one': [run]})._repr_png_().startswith(b'\x89PNG')  # in a notebook
    assert plot.figure({f'arm {i} ' + 'x' * 60: [run, run] for i in range(9)}).axes
    assert plot.figure({'bare': [{**run, 'epochs': []}]}).axes


def test_figure_draws_accuracy_against_cost_where_arms_differ_in_it(log):
    found = records.by_arm(lines(log))
    for i, runs in enumerate(found.values()):
        for run in runs:
            run['flop'] = 200 - 50 * i
    *_, dots, costs = plot.figure(found).axes
    names = [' '.join(label.get_text().split()) for label in dots.get_yticklabels()]
    assert names == [f'{i}. {name}, n = 6' for i, name in enumerate(found, start=1)]
    assert [note.get_text() for note in costs.texts] == ['1', '2']
    means = [report.percent(runs).mean() for runs in found.values()]
    assert [note.xy for note in costs.texts] == [(1, means[0]), (0.75, means[1])]


def test_plot_writes_the_kind_of_its_suffix(log):
    assert tool('show', log, '--plot', 'a.png')[0] == 0
    assert matplotlib.image.imread('a.png').shape[1] >= 600
    for name, message in ('a.xyz', 'suffix'), ('none/a.png', 'cannot write none/a.png'):
        status, _, err = tool('show', log, '--plot', name)
        assert status == 2 and message in err and err.count('\n') == 1


def test_plot_is_written_though_nobody_reads_the_report(log):
    words = shlex.join(command('show', log, '--plot', 'a.png'))
    process = subprocess.run(f'{words} | true', shell=True, capture_output=True, text=True)
    assert process.stderr == '' and matplotlib.image.imread('a.png').size


# ---------------------------------------- Resume ----------------------------------------
def test_resume_makes_the_missing_runs_with_the_same_seeds(log):
    file, whole = log / 'runs.jsonl', result_of(tool('show', log)[1])
    cut = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b''.join(cut[:3] + cut[5:9]) + cut[9][:40])
    status, out, _ = tool('run', '--resume', log)
    assert status == 0 and result_of(out) == whole
    again = tool('run', '--resume', log)[1]  # nothing is missing
    assert result_of(again) == whole and 'Warm-up 1' not in again


def test_options_given_again_win_and_are_kept(log):
    assert tool('run', '--resume', log, '--runs', 8, '--margin', 2, '--device', 'cpu')[0] == 0
    assert len(outcomes(log)) == 16
    assert 'by more than 2 points' in ' '.join(tool('show', log)[1].split())


OTHER = [('--hyp opt.lr=3', 'hyp of the log'), ('--seed 0', 'seed of the log')]
OTHER += [('--data-dir other', '128 in the log, 64 now')]


@pytest.mark.parametrize('args, message', OTHER)
def test_resume_refuses_another_experiment(args, message, log):
    before = outcomes(log)
    status, _, err = tool('run', '--resume', log, *args.split())
    assert status == 2 and message in err and 'new experiment' in err
    assert outcomes(log) == before


def test_resume_refuses_other_code_with_a_short_diff(log):
    script = Path('fake.py')
    script.write_text(script.read_text().replace('rng.gauss(3, 0.01)', 'rng.gauss(2, 0.01)'))
    status, _, err = tool('run', '--resume', log)
    changed = [line for line in err.splitlines() if 'rng.gauss' in line]
    assert status == 2 and len(changed) == 2 and 'put back the code in' in err
    script.write_text('\n\n' + '# x\n' * 100 + script.read_text())
    assert tool('run', '--resume', log)[2].count('\n') < 20
