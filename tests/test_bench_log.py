"""Logs and what is said of them: reading, pooling, report, display, refusals on --resume."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from bench import compare, display, plot, records, report
from bench.errors import UserError
from bench.records import Run
from bench_helpers import command, outcomes, result_of, tool, write_fake
from rich.console import Console

CHECKSUMS = dict.fromkeys(records.CHECKSUMS, 1)
DATA = {'name': 'cifar10', 'train': 256, 'test': 128, 'classes': 10, **CHECKSUMS}
TWELVE = [94.1, 93.9, 94.0, 94.2, 93.8, 94.0, 94.1, 93.9, 94.0, 94.1, 94.0, 93.9]


def make_runs(arm: str, accuracies: list, index: int | None = 0, **fields) -> list[Run]:
    """Runs of an arm in turns 1, 2, ..., of base seed 5."""
    defaults = {'script': 'script.py', 'sha256': 'abc', 'hyp': {'opt.lr': 10.0}, 'data': DATA}
    defaults |= {'base_seed': 5, 'device': 'cpu', 'torch': '2.9', 'dtype': 'float32', 'flop': 100}
    runs = []
    for turn, accuracy in enumerate(accuracies, start=1):
        run = Run(
            arm,
            accuracy / 100,
            clock_seconds=3 + 0.01 * turn,
            arm_index=index,
            turn=turn,
            seed=1000 + turn,
            epochs=[{'epoch': 1, 'train_loss': 1.5, 'train_acc': 0.5, 'test_acc': None}],
            **{**defaults, **fields},
        )
        runs.append(run)
    return runs


def write(path: Path, runs: list[Run], without: tuple = ()) -> Path:
    """A file of runs, or a log folder where the path has no suffix."""
    if not path.suffix:
        path.mkdir(exist_ok=True)
        path = path / 'runs.jsonl'
    lines = []
    for run in runs:
        line = {key: value for key, value in run.to_json().items() if key not in without}
        lines.append(records.to_json(line) + '\n')
    path.write_text(''.join(lines))
    return path


def arms_of(*paths: Path) -> dict:
    """The arms of some logs, and how many runs each has."""
    arms = records.by_arm(records.read([str(path) for path in paths]).runs)
    return {name: len(runs) for name, runs in arms.items()}


def show(*paths: Path, width: int = 100, **given) -> str:
    """What `show` prints."""
    results = report.results_of([str(path) for path in paths], given)
    return '\n'.join(report.report_lines(results, width))


def joined(text: str) -> str:
    return ' '.join(text.split())


@pytest.fixture
def two_arms(tmp_path) -> Path:
    """A log folder of two arms x 6 runs."""
    runs = make_runs('base', TWELVE[:6])
    runs += make_runs('mine', [x - 0.5 for x in TWELVE[:6]], 1, hyp={'opt.lr': 9.0})
    return write(tmp_path / 'log', runs).parent


# ---------------------------------------- A run ----------------------------------------
def test_a_run_is_read_as_it_was_written():
    (run,) = make_runs('base', [94.0], extra={'driver': '580', 'keep': [1]}, compile=True)
    line = json.loads(records.to_json(run.to_json()))
    assert line['run'] == 1 and line['driver'] == '580' and 'turn' not in line
    assert Run.from_json(line) == run
    line['extra'] = 'of the script'
    assert Run.from_json(line).extra['extra'] == 'of the script'


def test_a_line_of_an_older_log_is_a_run():
    line = {'script': 'a/airbench94_own.py', 'tta_acc': 0.9, 'clock_seconds': 1.0, 'run': 2}
    line |= {'data': 'cifar10', 'train_images': 500, 'test_images': 100, 'classes': list('ab')}
    run = Run.from_json(line)
    assert (run.arm, run.turn, run.classes, run.base_seed) == ('own', 2, 2, None)
    assert run.data == {'name': 'cifar10', 'train': 500, 'test': 100, 'classes': 2}


def test_hyp_of_a_script_is_flat():
    line = {'script': 'own.py', 'tta_acc': 0.9, 'clock_seconds': 1.0, 'hyp': {'opt': {'lr': 9.0}}}
    assert Run.from_json(line).hyp == {'opt.lr': 9.0}


def test_a_number_that_is_not_finite_is_null(tmp_path):
    (run,) = make_runs('base', [94.0], wall_seconds=math.nan, peak_bytes=math.inf)
    back = records.append_run(str(tmp_path), 0, run)
    assert back.wall_seconds is None and back.peak_bytes is None
    assert 'NaN' not in (tmp_path / 'runs.jsonl').read_text()  # it is no JSON


# ---------------------------------------- Writing ----------------------------------------
def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    first, second = make_runs('base', [94.0, 93.0])
    records.append_run(str(tmp_path), 0, first)
    whole = (tmp_path / 'runs.jsonl').read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write .*runs.jsonl: No space left'):
        records.append_run(str(tmp_path), 0, second)
    assert (tmp_path / 'runs.jsonl').read_bytes() == whole


def test_a_cut_last_line_is_dropped_before_the_next_one(tmp_path, two_arms):
    file = two_arms / 'runs.jsonl'
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    records.mend_last_lines(str(two_arms))
    assert file.read_bytes() == b''.join(whole.splitlines(keepends=True)[:-1])


def test_a_whole_last_line_counts_and_is_ended_before_the_next_one(two_arms):
    file = two_arms / 'runs.jsonl'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert sum(arms_of(file).values()) == 12
    records.mend_last_lines(str(two_arms))
    assert file.read_bytes() == whole


def test_a_follower_reads_what_other_processes_add(tmp_path):
    follower = records.Follower(str(tmp_path), 0)
    for rank, run in enumerate(make_runs('base', [94.0, 93.0, 92.0])):
        records.append_run(str(tmp_path), rank, run)
    assert sorted(run.turn for run in follower.new_runs()) == [2, 3]
    with open(tmp_path / 'runs-1.jsonl', 'a') as file:
        file.write('\nno run\n{"arm": "half')
    assert list(follower.new_runs()) == []


# ---------------------------------------- Reading ----------------------------------------
def test_lines_that_are_no_runs_are_noted_but_a_last_one_that_a_kill_cut_off(two_arms):
    file = two_arms / 'runs.jsonl'
    bare = b'{"arm": "a", "tta_acc": 1, "clock_seconds": 1, "epochs": [{}]}'
    still = b'{"arm": "a", "tta_acc": 1, "clock_seconds": 0}'
    junk = [b'{"tta_acc": 1', b'null', b'[' * 10**5, bare, still, b'\xff']
    file.write_bytes(b'\n'.join([*junk, file.read_bytes()[:-5]]))
    assert sum(arms_of(file).values()) == 11
    noted = re.findall(r'line (\d+) is not a finished run', show(file))
    assert noted == ['1', '2', '3', '4', '5', '6']


def test_copies_count_once_and_logs_can_be_concatenated(two_arms, tmp_path):
    text = (two_arms / 'runs.jsonl').read_text()
    another = text.replace('"seed": ', '"seed": 1')
    (tmp_path / 'cat.jsonl').write_text(text + text + another)
    assert arms_of(tmp_path / 'cat.jsonl', two_arms) == {'base': 12, 'mine': 12}


def test_a_run_that_repeats_another_with_another_result_is_noted(two_arms, tmp_path):
    other = tmp_path / 'other.jsonl'
    text = (two_arms / 'runs.jsonl').read_text()
    other.write_text(text.replace('"tta_acc": 0.9', '"tta_acc": 0.8'))
    assert 'Note: 12 runs repeat others' in show(two_arms, other)
    assert 'repeat others' not in show(two_arms, two_arms)


def test_another_reference_of_a_sequential_experiment_is_noted(two_arms):
    options = {'until_sure': 0.1, 'runs': 6, 'hyp': []}
    content = {'schema': records.SCHEMA, 'options': options}
    (two_arms / records.EXPERIMENT).write_text(json.dumps(content))
    assert 'do not allow for its looks' in joined(show(two_arms, reference='mine'))
    assert 'do not allow for its looks' not in joined(show(two_arms))
    assert show(two_arms, reference='base') == show(two_arms)
    assert 'planned turns' not in show(two_arms, reference='mine')
    assert 'do not allow for its looks' in joined(show(two_arms / 'runs.jsonl'))
    assert 'do not allow for its looks' in joined(show(two_arms, two_arms))


def test_the_figure_of_until_sure_shows_what_it_decided_on(two_arms, tmp_path, monkeypatch):
    options = {'until_sure': 0.1, 'runs': 6, 'hyp': []}
    content = {'schema': records.SCHEMA, 'options': options}
    (two_arms / records.EXPERIMENT).write_text(json.dumps(content))
    drawn = []
    figure = plot.figure
    monkeypatch.setattr(plot, 'figure', lambda *args: drawn.append(args) or figure(*args))
    status, out, _ = tool('show', two_arms, '--plot', tmp_path / 'a.png')
    judged = drawn[0][3]
    assert status == 0 and list(judged) == ['mine']
    assert report.points_text(judged['mine']) in joined(out)


@pytest.mark.parametrize('key', ['"sha256": "', '"train": ', '"test_labels_crc32": '])
def test_other_code_and_other_data_are_not_pooled_under_one_name(key, two_arms, tmp_path):
    other = tmp_path / 'other.jsonl'
    other.write_text((two_arms / 'runs.jsonl').read_text().replace(key, key + '1'))
    names = ('base', 'mine', 'base #2', 'mine #2')
    assert arms_of(two_arms, other) == dict.fromkeys(names, 6)


def test_one_data_set_in_two_folders_is_pooled(two_arms, tmp_path):
    other = tmp_path / 'other.jsonl'
    text = (two_arms / 'runs.jsonl').read_text()
    other.write_text(text.replace('"name": "', '"name": "elsewhere/'))
    assert arms_of(other, two_arms) == {'base': 6, 'mine': 6}


def test_two_data_sets_of_scripts_are_told_apart_by_their_checksums(tmp_path):
    own = ('arm', 'arm_index', 'base_seed')
    files = []
    for checksum in (1, 2):
        data = {**DATA, 'train_images_crc32': checksum}
        runs = make_runs('script', TWELVE[:4], None, data=data, trial=1)
        files.append(write(tmp_path / f'{checksum}.jsonl', runs, without=own))
    assert arms_of(*files) == {'script': 4, 'script #2': 4}
    assert 'The data differ' in show(*files)


def test_data_without_checksums_are_told_apart_by_name_and_sizes(tmp_path):
    files = []
    for name in ('a', 'b'):
        data = {'name': name, 'train': 256, 'test': 128}
        files.append(write(tmp_path / f'{name}.jsonl', make_runs('base', [94.0], data=data)))
    assert arms_of(*files) == {'base': 1, 'base #2': 1}


def test_a_scripts_log_has_arms_by_its_name_and_differing_hyp(tmp_path):
    runs = make_runs('', [94.0] * 2, None, script='airbench94_mine.py')
    runs += make_runs('', [94.0] * 3, None, script='airbench94_mine.py', hyp={'opt.lr': 9.0})
    file = write(tmp_path / 'own.jsonl', runs, without=('arm', 'arm_index'))
    assert arms_of(file) == {'mine opt.lr=10.0': 2, 'mine opt.lr=9.0': 3}
    other = make_runs('', [94.0], None, script='other.py', hyp={'opt.lr': 8.0})
    both = write(file.with_name('both.jsonl'), other, without=('arm', 'arm_index'))
    assert arms_of(file, both) == {**arms_of(file), 'other': 1}


def test_the_trials_of_a_scripts_log_are_all_there(tmp_path):
    runs = []
    for trial in (1, 2):
        for run in make_runs('', [94.0, 93.0], None, trial=trial):
            runs.append(dataclasses.replace(run, seed=run.seed + 10 * trial))
    assert arms_of(write(tmp_path / 'own.jsonl', runs, without=('arm',))) == {'script': 4}


def test_an_experiment_is_the_reference_of_what_scripts_logged_by_themselves(two_arms, tmp_path):
    runs = make_runs('', TWELVE[:3], None, script='own.py')
    own = write(tmp_path / 'own.jsonl', runs, without=('arm', 'arm_index'))
    assert list(arms_of(own, two_arms)) == ['base', 'own', 'mine']


def test_one_process_of_torchrun_names_the_files_of_the_others(tmp_path):
    folder = tmp_path / 'log'
    file = write(folder, make_runs('base', TWELVE[:3]))
    write(folder / 'runs-1.jsonl', make_runs('base', TWELVE))
    assert 'runs.jsonl has the runs of one process; not read: runs-1.jsonl' in show(file)
    assert 'not read' not in show(folder)


@pytest.mark.parametrize('name', ['none', '.', 'empty', 'file.py'])
def test_what_is_no_log_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('file.py').write_text('x = 1\n')
    with pytest.raises(UserError) as error:
        show(Path(name))
    assert '\n' not in str(error.value)


def test_a_folder_of_logs_says_that_its_subfolders_are_logs(two_arms):
    with pytest.raises(UserError, match='its subfolders are logs: show .*log'):
        show(two_arms.parent)


# ---------------------------------------- The report ----------------------------------------
def test_runs_with_partners_are_compared_in_pairs(two_arms):
    text = joined(show(two_arms))
    assert 'mine is worse than base by 0.50 points (6 pairs, p < 0.001)' in text
    assert '-0.50 points (-0.50 to -0.50), time x 1.000 (1.000 to 1.000), cost x 1.000' in text
    assert 'Compared turn by turn (paired t-test, 95% intervals)' in text


@pytest.mark.parametrize('change', [{'seed': 7}, {'turn': 7}, {'base_seed': 7}])
def test_a_run_without_a_partner_makes_it_welchs_test(change, tmp_path):
    runs = make_runs('base', TWELVE[:6])
    mine = make_runs('mine', [x - 0.5 for x in TWELVE[:6]], 1)
    mine[-1] = dataclasses.replace(mine[-1], **change)
    text = joined(show(write(tmp_path / 'a.jsonl', runs + mine)))
    assert 'mine is worse than base by 0.50 points (n = 6 and 6, p < 0.001)' in text
    assert "Difference of means (Welch's t-test, 95% intervals)" in text


def test_a_report_of_both_kinds_says_which_is_which(tmp_path):
    runs = make_runs('base', TWELVE[:6]) + make_runs('pairs', TWELVE[6:], 1)
    runs += make_runs('fewer', TWELVE[:4], 2)
    text = joined(show(write(tmp_path / 'a.jsonl', runs)))
    assert 'pairs: no difference from base shown (6 pairs, p = ' in text
    assert 'fewer: no difference from base shown (n = 4 and 6, p = ' in text
    assert (
        "Pairs: compared turn by turn (paired t-test). Others: difference of means (Welch's" in text
    )
    assert 'p is adjusted for 2 comparisons (Holm)' in text


def test_times_are_compared_in_pairs(tmp_path):
    runs = make_runs('base', TWELVE[:6]) + make_runs('mine', TWELVE[:6], 1)
    slow = [1, 1, 5, 1, 2, 1]  # the machine was busy in some turns
    changed = []
    for run in runs:
        seconds = slow[run.turn - 1] * (2.0 if run.arm == 'base' else 1.0)
        changed.append(dataclasses.replace(run, clock_seconds=seconds))
    assert 'time x 0.500 (0.500 to 0.500)' in show(write(tmp_path / 'a.jsonl', changed))


def test_times_of_two_devices_are_not_compared(tmp_path):
    runs = make_runs('base', TWELVE) + make_runs('mine', TWELVE, 1, device='H200')
    text = show(write(tmp_path / 'a.jsonl', runs))
    assert 'come from several devices' in text and 'time x' not in text


def test_a_diverged_run_is_said_to_make_the_interval(tmp_path):
    fallen = [x + 0.01 for x in TWELVE]
    fallen[3] = 50.7
    runs = make_runs('base', TWELVE) + make_runs('mine', fallen, 1)
    text = joined(show(write(tmp_path / 'a.jsonl', runs)))
    assert '(12 pairs, p = 0.340); 1 diverged run makes this interval' in text
    assert 'without it: +0.01 points (+0.01 to +0.01) (95%), 11 pairs' in text
    assert 'Diverged: mine, run 4, 50.70 %' in text
    assert re.search(r'mine 12 90\.\d\d \+- \d\.\d\d % 12\.\d\d 7/12 1/12', text)  # it counts


def test_a_run_at_chance_is_named_with_advice(tmp_path):
    text = show(write(tmp_path / 'a.jsonl', make_runs('base', [94.0, 10.9, 11.1, 9.1])))
    named = re.findall(r'At chance: base, run (\d), .* %; try a lower opt.lr', text)
    assert named == ['2', '4']


def test_margin_asks_for_non_inferiority(two_arms):
    text = joined(show(two_arms, margin=0.6))
    assert 'not inferior by more than 0.6 points (one-sided 95% bound -0.50)' in text
    assert 'non-inferiority by 0.4 points not shown' in joined(show(two_arms, margin=0.4))


def test_reference_and_labels(two_arms):
    text = show(two_arms, reference='mine', label=['base=the old one', 'mine=the new one'])
    assert 'the old one is better than the new one by 0.50 points' in joined(text)
    with pytest.raises(UserError, match='--reference x: there are base, mine'):
        show(two_arms, reference='x')
    with pytest.raises(UserError, match='--label x=y: there are base, mine'):
        show(two_arms, label=['x=y'])
    with pytest.raises(UserError, match='two arms would be called mine'):
        show(two_arms, label=['base=mine'])


def test_arms_on_other_data_get_no_verdict(tmp_path):
    mine = [x - 1 for x in TWELVE]
    runs = make_runs('base', TWELVE) + make_runs('mine', mine, 1, data={**DATA, 'train': 255})
    text = joined(show(write(tmp_path / 'a.jsonl', runs), margin=0.1))
    assert 'mine: no verdict, as its data are not shown to be those of base (n = 12 and 12)' in text
    assert 'worse' not in text and 'inferior' not in text and '-1.00 points' in text
    assert 'p is adjusted' not in text
    assert 'not every run has a partner of the same turn, seed and data' in text


def test_fewer_turns_than_planned_are_noted(two_arms):
    content = {'schema': records.SCHEMA, 'options': {'runs': 7, 'hyp': []}}
    (two_arms / records.EXPERIMENT).write_text(json.dumps(content))
    assert '6 of 7 planned turns: p and intervals hold only if' in joined(show(two_arms))
    content['options']['runs'] = 6
    (two_arms / records.EXPERIMENT).write_text(json.dumps(content))
    assert 'planned turns' not in show(two_arms)


def test_what_all_arms_were_given_does_not_depend_on_labels(two_arms):
    text = (two_arms / 'runs.jsonl').read_text().replace('"arm": "mine"', '"arm": "mine opt.lr=9"')
    (two_arms / 'runs.jsonl').write_text(text)
    content = {'schema': records.SCHEMA, 'options': {'runs': 6, 'hyp': ['opt.lr=4']}}
    (two_arms / records.EXPERIMENT).write_text(json.dumps(content))
    expected = 'All arms, unless named otherwise: opt.lr=4'
    assert expected in show(two_arms, label=['mine opt.lr=9=nine'])


@pytest.mark.parametrize('p, text', [(0.0498, '0.0498'), (0.0502, '0.0502'), (0.0513, '0.051')])
def test_p_near_5_percent_shows_on_which_side_it_is(p, text):
    assert report.p_text(p) == f'p = {text}'


def test_a_label_of_an_arm_with_equals_signs_in_its_name(tmp_path):
    runs = make_runs('a', [94.0]) + make_runs('a opt.lr=9', [93.0], 1)
    results = report.results_of(
        [str(write(tmp_path / 'a.jsonl', runs))], {'label': ['a opt.lr=9=lr 9', 'a=old']}
    )
    assert list(results.arms) == ['old', 'lr 9']


LONG = 'baseline opt.train_epochs=8 opt.batch_size=1536 opt.lr=17.25 net.widths.block1=128 x=1'


@pytest.mark.parametrize('width', [72, 80, 100])
def test_no_name_is_broken_in_two(width, tmp_path):
    runs = make_runs('baseline', TWELVE) + make_runs('baseline compile=true', TWELVE, 1)
    runs += make_runs(LONG, [x - 1 for x in TWELVE], 2)
    lines = show(write(tmp_path / 'a.jsonl', runs), width=width).splitlines()
    assert LONG in lines  # alone in its line
    assert any(line.startswith(f'{LONG} is worse') or line == LONG for line in lines[6:])
    for line in lines:
        if LONG not in line and not line.startswith('Log: '):
            assert len(line) <= width, line
    assert sum('baseline compile=true' in line for line in lines) == 2


def test_columns_that_say_nothing_are_left_out(tmp_path):
    low = show(write(tmp_path / 'low.jsonl', make_runs('base', [50.0, 51.0])))
    assert '>=94%' not in low and 'No run reached 94%.' in joined(low)
    assert 'Diverged' not in low.splitlines()[0] and 'No run diverged.' in joined(low)
    high = show(write(tmp_path / 'high.jsonl', make_runs('base', [94.0, 93.0])))
    assert '>=94%' in high.splitlines()[0] and '1/2' in high


def test_show_leaves_the_times_out(two_arms):
    words = 'Time/run', 'time x', 'Warm-up'
    assert all(word in show(two_arms) for word in words)
    assert not any(word in show(two_arms, no_time=True) for word in words)


def test_one_thread_is_not_1_threads(tmp_path):
    runs = make_runs('base', TWELVE, device='AMD EPYC, 1 threads')
    text = show(write(tmp_path / 'a.jsonl', runs))
    assert 'AMD EPYC, 1 thread, torch 2.9, float32' in text


def test_data_are_called_by_their_name_not_their_path(tmp_path):
    data = {**DATA, 'name': '/home/me/holdout/'}
    text = show(write(tmp_path / 'a.jsonl', make_runs('base', TWELVE, data=data)))
    assert 'Data: holdout (256 to train on, 128 to test)' in text


def test_durations_have_two_units():
    seconds = (-1, 59.4, 59.5, 7500)
    assert [*map(report.duration, seconds)] == ['0s', '59s', '1m 00s', '2h 05m']


def test_what_all_arms_were_given():
    lines = report.common_lines
    assert lines([], ['a']) == []
    assert lines(['opt.lr=9'], ['a']) == ['All arms: opt.lr=9']
    assert lines(['opt.lr=9'], ['a opt.lr=8']) == ['All arms, unless named otherwise: opt.lr=9']


# ---------------------------------------- --until-sure ----------------------------------------
def sequential(runs: list[Run], planned: int = 8) -> str:
    """The report of runs with --until-sure 0.1."""
    arms = records.by_arm(runs)
    results = report.Results(arms, until_sure=0.1, planned=planned)
    return joined('\n'.join(report.report_lines(results, 100)))


def test_a_look_decides_on_the_pairs_that_it_saw():
    mine = [x + 0.5 + 0.01 * i for i, x in enumerate(TWELVE[:5])]
    text = sequential(make_runs('base', TWELVE[:8]) + make_runs('mine', mine, 1))
    assert 'mine is better than base by 0.52 points (5 pairs, look 1)' in text
    assert 'Looks after 5, 8 turns' in text


@pytest.mark.parametrize('lost, facts', [(3, 'first look (2 pairs)'), (7, '(5 pairs, look 1)')])
def test_a_look_sees_no_turn_behind_a_lost_one(lost, facts):
    mine = [x + (-1) ** i for i, x in enumerate(TWELVE[:8])]
    runs = make_runs('base', TWELVE[:8]) + make_runs('mine', mine, 1)
    text = sequential([run for run in runs if (run.arm, run.turn) != ('mine', lost)])
    assert facts in text and 'nan' not in text


def test_a_first_turn_that_is_lost_leaves_nothing_to_look_at():
    runs = make_runs('base', TWELVE[:8]) + make_runs('mine', TWELVE[:8], 1)
    text = sequential([run for run in runs if (run.arm, run.turn) != ('mine', 1)])
    assert 'mine: fewer than two runs, no comparison' in text


# ---------------------------------------- The display ----------------------------------------
def rows_of(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_rows_compare_finished_turns_from_three_on(capsys):
    arms = ['base', 'mine']
    shown = display.make_display(report.QuietConsole(), arms, 8, [])
    shown.begin()
    runs = make_runs('base', TWELVE[:4]) + make_runs('mine', TWELVE[:4], 1)
    for run in sorted(runs, key=lambda run: run.turn):  # base goes first in each turn
        shown.finished(run)
    assert shown.count == 8
    differences = [row[4:-2] for row in rows_of(capsys)[1:]]
    assert [''.join(words) for words in differences] == [
        *[''] * 5,
        '+0.00+-0.00',
        '',
        '+0.00+-0.00',
    ]


def test_rows_say_how_long_slow_runs_will_take(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, 'monotonic', lambda: now[0])
    shown = display.make_display(report.QuietConsole(), ['base'], 3, [])
    shown.begin()
    for epoch in (1, 2):
        now[0] += 60
        shown.epoch('base', {'epoch': epoch}, 10.0)
    assert capsys.readouterr().out == 'An epoch took 1m 00s; about 29m 00s left\n'


def test_the_share_of_a_run_grows_within_an_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, 'monotonic', lambda: now[0])
    shown = display.Display(['base'], 2, [])
    shown.begin()
    now[0] = 60
    shown.epoch('base', {'epoch': 1}, 4.0)
    shares = []
    for seconds in (60, 90, 200):
        now[0] = seconds
        shares.append(shown.share())
    assert shares == pytest.approx([0.25, 0.375, 0.4875])  # a slow epoch does not count as done
    now[0] = 240
    shown.finished(make_runs('base', [94.0])[0])
    assert shown.share() == 0 and shown.left() == pytest.approx(240)


def test_a_terminal_has_a_board_and_a_pipe_rows(monkeypatch):
    for name in ('JPY_PARENT_PID', 'MPLBACKEND'):
        monkeypatch.delenv(name, raising=False)

    class Terminal:
        def isatty(self):
            return True

        def write(self, text):
            return len(text)

        def flush(self):
            pass

    assert report.QuietConsole(Terminal()).is_terminal
    monkeypatch.setenv('FORCE_COLOR', '1')  # as a notebook's kernel sets it
    monkeypatch.setenv('JPY_PARENT_PID', '1')
    console = report.QuietConsole(Terminal())
    assert not console.is_terminal
    assert isinstance(display.make_display(console, ['a'], 1, []), display.Rows)
    assert type(display.make_display(None, ['a'], 1, [])) is display.Display


def test_the_board_shows_each_arm_and_the_time_left():
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    board = display.make_display(console, ['base', 'mine'], 4, make_runs('base', TWELVE[:1]))
    board.begin()
    board.epoch('mine', {'epoch': 1}, 2.0)
    board.finished(make_runs('mine', TWELVE[:1], 1)[0])
    with console.capture() as capture:
        console.print(board.picture())
    board.close()
    text = joined(capture.get())
    assert 'base 1 94.10 % 3.010 s mine 1 94.10 % 3.010 s' in text and '2/4' in text


# ---------------------------------------- Refusals ----------------------------------------
def test_other_code_is_refused_with_a_short_diff(tmp_path):
    (tmp_path / 'code.py').write_text('a = 1\nb = 2\n')
    arm = {'code': 'code.py', 'script': 'fake.py'}
    with pytest.raises(UserError) as error:
        records.refuse_other_code(str(tmp_path), arm, 'a = 1\nb = 3\n')
    assert '-b = 2' in str(error.value) and '+b = 3' in str(error.value)
    assert 'put back the code in' in str(error.value)
    with pytest.raises(UserError) as error:
        records.refuse_other_code(str(tmp_path), arm, '# x\n' * 100)
    assert str(error.value).count('\n') < 20


def test_code_with_other_line_ends_is_the_same_code(tmp_path):
    (tmp_path / 'code.py').write_bytes(b'a = 1\r\nb = 2\r\n')
    source = records.decode(b'a = 1\nb = 2\n')
    assert records.decode(b'a = 1\r\nb = 2\r\n') == source
    records.refuse_other_code(str(tmp_path), {'code': 'code.py', 'script': 'fake.py'}, source)


def test_other_values_are_refused_by_name():
    records.refuse_other_values('the data', {'train': 1}, {'train': 1})
    with pytest.raises(UserError, match='train: 1 in the log, 2 now'):
        records.refuse_other_values('the data', {'train': 1}, {'train': 2})


def test_a_folder_without_experiment_is_refused(tmp_path):
    with pytest.raises(UserError, match='is no log folder of `bench run`'):
        records.read_experiment(str(tmp_path))


def test_pairs_need_the_same_data():
    base = make_runs('base', TWELVE)
    other = make_runs('mine', TWELVE, data={**DATA, 'train_images_crc32': 2})
    assert compare.compare(make_runs('mine', TWELVE), base).pairs
    assert not compare.compare(other, base).pairs


# ---------------------------------------- Commands ----------------------------------------
@pytest.fixture(scope='module')
def experiment(tmp_path_factory) -> Path:
    """A folder with fake.py, and in log/ the log of an experiment of two arms x 6 runs."""
    folder = tmp_path_factory.mktemp('experiment')
    write_fake(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ['fake.py', 'fake.py:fake.skill=93', '--runs', 6, '--seed', 5]
        assert tool('run', *words)[0] == 0
        (log,) = Path('logs').iterdir()
        log.rename('log')
    return folder


@pytest.fixture
def log(experiment, tmp_path, monkeypatch) -> Path:
    """A copy of the log of `experiment`, beside fake.py in the current folder."""
    shutil.copytree(experiment, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path('log')


def test_a_line_of_the_tool_is_complete_in_itself(log):
    line = json.loads((log / 'runs.jsonl').read_text().splitlines()[0])
    wanted = 'arm script sha256 hyp compile run base_seed seed data device torch dtype epochs'
    wanted += ' tta_acc clock_seconds wall_seconds warmup_seconds peak_bytes flop'
    assert set(wanted.split()) <= line.keys()
    assert set(records.CHECKSUMS) <= line['data'].keys()
    assert records.decode((log / 'code-0-fake.py').read_bytes()) == Path('fake.py').read_text()


def test_show_prints_a_report_and_draws_a_figure(log):
    label = 'fake fake.skill=93=mine'
    status, out, err = tool(
        'show', log, '--plot', 'a.png', '--label', label, '--panels', 'accuracy', '--no-time'
    )
    assert (status, err) == (0, '')
    assert 'mine is worse than fake by' in out and 'Time/run' not in out
    assert Path('a.png').stat().st_size > 1000


@pytest.mark.parametrize(
    'words, message',
    [
        ('--plot a.xyz', 'its suffix must be one of'),
        ('--plot none/a.png', 'cannot write none/a.png'),
        ('--plot a.png --panels x', '--panels x: there are'),
        ('--plot a.png --panels cost', 'the cost of an arm is not known'),
        ('--reference x', '--reference x: there are fake'),
    ],
)
def test_a_mistake_in_show_is_one_line(words, message, log):
    status, _, err = tool('show', log, *words.split())
    assert status == 2 and message in err and err.count('\n') == 1


def test_a_figure_is_written_though_nobody_reads_the_report(log):
    words = shlex.join(command('show', log, '--plot', 'a.png'))
    process = subprocess.run(f'{words} | true', shell=True, capture_output=True, text=True)
    assert process.stderr == '' and Path('a.png').stat().st_size > 1000


def test_resume_makes_the_missing_runs_with_the_same_seeds(log):
    file = log / 'runs.jsonl'
    whole = result_of(tool('show', log)[1])
    cut = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b''.join(cut[:3] + cut[5:9]) + cut[9][:40])
    status, out, _ = tool('run', '--resume', log)
    assert status == 0 and result_of(out) == whole
    again = tool('run', '--resume', log)[1]  # nothing is missing
    assert result_of(again) == whole and 'Warm-up 1' not in again


def test_options_given_again_win_and_are_kept(log):
    assert tool('run', '--resume', log, '--runs', 7, '--margin', 2, '--device', 'cpu')[0] == 0
    assert len(outcomes(log)) == 14
    assert 'by more than 2 points' in joined(tool('show', log)[1])


@pytest.mark.parametrize('words', ['--hyp opt.lr=3', '--seed 0', '--data-dir other'])
def test_resume_refuses_another_experiment(words, log):
    before = outcomes(log)
    status, _, err = tool('run', '--resume', log, *words.split())
    assert status == 2 and 'in the log' in err and 'new experiment' in err
    assert outcomes(log) == before


def test_resume_refuses_other_code_but_not_other_line_ends(log):
    script = Path('fake.py')
    script.write_bytes(script.read_bytes().replace(b'\n', b'\r\n'))
    assert tool('run', '--resume', log)[0] == 0
    script.write_text(script.read_text().replace('rng.gauss(3, 0.01)', 'rng.gauss(2, 0.01)'))
    status, _, err = tool('run', '--resume', log)
    changed = [line for line in err.splitlines() if 'rng.gauss' in line]
    assert status == 2 and len(changed) == 2 and 'put back the code in' in err
