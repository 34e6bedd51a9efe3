"""Which recipe costs least and keeps the baseline's accuracy? Two stages, by several processes on one GPU.

Stage 1: a fractional factorial design (2^(7-2), resolution IV) of seven factors, beside runs of the
baseline. A factor gets its second level where that is better by 0.03 points or more in a
least-squares fit of the seven main effects. Stage 2: four schedules of other costs with these
levels, and the baseline with 8, 9 and 11 epochs. A line is fitted to the four schedules' differences
from the baseline over their costs; the winner is the cheapest for which it says -0.03 points or
more, and if there is none, the one for which it says most. It is then compared on new seeds.

    python search.py REPOSITORY DATA_DIR OUT_DIR SECONDS_1 SECONDS_2 PROCESSES
    python search.py REPOSITORY costs       writes costs.json, which the first command reads
"""

import itertools
import json
import queue
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import multiprocessing

HERE = Path(__file__).resolve().parent
REPOSITORY = sys.argv[1]
sys.path.insert(0, f'{REPOSITORY}/tests')

from bench import records  # noqa: E402
from bench.arms import make_arms  # noqa: E402
from bench.cost import run_flop  # noqa: E402
from bench.runner import data_facts, run_seed  # noqa: E402

SEED = {0: 301, 1: 301, 2: 302, 3: 302}  # by stage; 0 is the baseline, 3 with other epochs
RUNS = {0: 16, 1: 3, 2: 12, 3: 8}  # at most
SCRIPTS = ['airbench94_baseline.py', 'airbench94_modified.py']
EPOCHS = (8, 9, 11)
MIXED = '[16,20,20,24,24,24,24]'
SCHEDULES = [  # of about equal costs: four to seven epochs of 24 pixels; more epochs, three smaller
    [f'opt.small_sizes=[{",".join(["24"] * n)}],opt.train_epochs=9.9' for n in (4, 5, 6, 7)],
    [f'opt.small_sizes={MIXED},opt.train_epochs={e}' for e in (12, 11.5, 11, 10.5)],
]
LEVELS = {  # the factors that are plain hyperparameters
    'opt.batch_size': (1024, 768),
    'opt.momentum': (0.85, 0.9),
    'opt.lr': (11.5, 9.0),
    'net.batchnorm_momentum': (0.6, 0.75),
    'opt.weight_decay': (0.0153, 0.0115),
}
FACTORS = ['opt.batch_size', 'opt.momentum', 'opt.lr', 'net.batchnorm_momentum', 'residual groups',
           'schedule', 'opt.weight_decay']  # the last two are generated: ABCD and ABDE


def spec(levels: tuple, step: int = 2) -> str:
    """The tool's name of an arm: levels 0 or 1 of FACTORS, and which of the four schedules."""
    level = dict(zip(FACTORS, levels))
    values = {key: two[level[key]] for key, two in LEVELS.items()}
    changes = [f'{key}={value}' for key, value in values.items()]
    changes += [SCHEDULES[level['schedule']][step], 'net.tta_share=0.2']
    return f'{REPOSITORY}/{SCRIPTS[level["residual groups"]]}:{",".join(changes)}'


def design() -> list[tuple]:
    found = []
    for a, b, c, d, e in itertools.product((0, 1), repeat=5):
        found.append((a, b, c, d, e, (a + b + c + d) % 2, (a + b + d + e) % 2))
    return found


def cost_key(levels: tuple, step: int) -> str:
    return f'{levels[4]} {levels[5]} {levels[0]} {step}'


def write_costs():
    import importlib.util

    source = importlib.util.spec_from_file_location('b', f'{REPOSITORY}/{SCRIPTS[0]}')
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    data = module.synthetic_data('cpu', 64, 16)
    costs = {'baseline': run_flop(make_arms([f'{REPOSITORY}/{SCRIPTS[0]}'], [], [])[0], 40000, 10000, data)}
    for group, family, batch, step in itertools.product((0, 1), (0, 1), (0, 1), range(4)):
        levels = (batch, 0, 0, 0, group, family, 0)
        arm = make_arms([spec(levels, step)], [], [])[0]
        costs[cost_key(levels, step)] = run_flop(arm, 40000, 10000, data)
    for epochs in EPOCHS:
        arm = make_arms([f'{REPOSITORY}/{SCRIPTS[0]}:opt.train_epochs={epochs}'], [], [])[0]
        costs[f'epochs {epochs}'] = run_flop(arm, 40000, 10000, data)
    (HERE / 'costs.json').write_text(json.dumps(costs, indent=1))
    for key, flop in costs.items():
        print(key, round(flop / costs['baseline'], 4))


def work(rank: int, jobs, data_dir: str, folder: str, deadline):
    """Makes jobs (stage, spec, flop, turn) until none is left or the deadline has come."""
    from bench.arms import load_script, make_arm, parse_pairs, split_commas, split_spec

    scripts = {}
    data = facts = None
    while True:
        try:
            job = jobs.get(timeout=0.05)
        except queue.Empty:
            continue
        if job is None:
            return
        stage, text, flop, turn = job
        if time.time() > deadline.value:
            continue
        path, changes = split_spec(text)
        if path not in scripts:
            scripts[path] = load_script(path)
        arm = make_arm(scripts[path], {}, parse_pairs(split_commas(changes)))
        if data is None:
            data = arm.script.module.load_data(data_dir, 'cuda')
            facts = data_facts(data, {'synthetic': False, 'data_dir': Path(data_dir).name})
        seed = run_seed(SEED[stage], turn)
        record, _ = arm.script.module.train(data, seed, hyp=arm.nested_hyp(), quiet=True)
        record['epochs'] = record['epochs'][-1:]
        record |= {'arm': arm.name, 'arm_index': stage, 'script': Path(path).name}
        record |= {'sha256': arm.script.sha256, 'hyp': arm.hyp, 'recipe': None, 'compile': False}
        record |= {'flop': flop, 'base_seed': SEED[stage], 'run': turn, 'seed': seed, 'data': facts}
        records.append_run(folder, rank, {**record, 'stage': stage, 'spec': text})


def make(jobs, todo: list, deadline, seconds: float, folder: str, n_before: int) -> list[dict]:
    """All runs so far, when todo is done or the time is over."""
    deadline.value = time.time() + seconds
    for job in todo:
        jobs.put(job)
    while True:
        time.sleep(0.25)
        runs = records.read([folder]).runs if any(Path(folder).glob('runs*.jsonl')) else []
        if len(runs) >= n_before + len(todo) or time.time() > deadline.value + 5:
            return runs


def percent(runs: list[dict], text: str) -> np.ndarray:
    return np.array([100 * run['tta_acc'] for run in runs if run['spec'] == text])


def main():
    data_dir, folder, seconds_1, seconds_2, processes = sys.argv[2:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    costs = json.loads((HERE / 'costs.json').read_text())
    context = multiprocessing.get_context('spawn')
    jobs, deadline = context.Queue(), context.Value('d', time.time() + 600)
    workers = []
    for rank in range(int(processes)):
        arguments = rank, jobs, data_dir, folder, deadline
        workers.append(context.Process(target=work, args=arguments, daemon=True))
        workers[-1].start()
    rng, reference = np.random.default_rng(SEED[1]), f'{REPOSITORY}/{SCRIPTS[0]}'
    todo, combinations = [], design()
    for turn in range(1, RUNS[1] + 1):  # replicate by replicate, so that an early end is balanced
        few = [(1, spec(levels), costs[cost_key(levels, 2)], turn) for levels in combinations]
        few += [(0, reference, costs['baseline'], k) for k in range(5 * turn - 4, 5 * turn + 1)]
        todo += [few[i] for i in rng.permutation(len(few))]
    runs = make(jobs, todo, deadline, float(seconds_1), folder, 0)

    by_spec = {spec(levels): levels for levels in combinations}
    factorial = [run for run in runs if run['stage'] == 1]
    x = np.array([[1, *(2 * np.array(by_spec[run['spec']]) - 1)] for run in factorial])
    y = np.array([100 * run['tta_acc'] for run in factorial])
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    std = (y - x @ fit).std(ddof=x.shape[1])
    effects = 2 * fit[1:]
    print(f'Stage 1: {len(y)} runs, residual std {std:.3f}, s.e. of an effect {2 * std / len(y) ** 0.5:.3f}')
    for name, effect in zip(FACTORS, effects):
        print(f'  {name:24} {effect:+.3f}')
    best = tuple(int(effect >= 0.03) for effect in effects)
    print('Levels:', dict(zip(FACTORS, best)), flush=True)

    candidates = [(spec(best, step), costs[cost_key(best, step)]) for step in range(4)]
    curves = [(f'{reference}:opt.train_epochs={n}', costs[f'epochs {n}']) for n in EPOCHS]
    todo = [(0, reference, costs['baseline'], 16)]
    for turn in range(1, RUNS[2] + 1):
        few = [(2, text, flop, turn) for text, flop in candidates]
        few += [(3, *curve, turn) for curve in curves if turn <= RUNS[3]]
        todo += [few[i] for i in rng.permutation(len(few))]
    runs = make(jobs, todo, deadline, float(seconds_2), folder, len(runs))
    for _ in workers:
        jobs.put(None)
    base = percent(runs, reference)
    print(f'Baseline {base.mean():.3f}, n = {len(base)}, std {base.std(ddof=1):.3f}')
    for stage, some in (2, candidates), (3, curves):
        for text, flop in some:
            found = percent([run for run in runs if run['stage'] == stage], text)
            error = (found.var(ddof=1) / len(found) + base.var(ddof=1) / len(base)) ** 0.5
            difference = f'{found.mean() - base.mean():+.3f} +- {error:.3f} (s.e.)'
            print(f'  {difference}, n = {len(found)}, cost {flop / costs["baseline"]:.3f}')
    second = [run for run in runs if run['stage'] == 2]
    line = np.polyfit([run['flop'] for run in second], [100 * run['tta_acc'] for run in second], 1)
    table = [(flop, np.polyval(line, flop) - base.mean(), text) for text, flop in candidates]
    print('  fitted:', *(f'{row[1]:+.3f}' for row in table))
    good = [row for row in table if row[1] >= -0.03]
    winner = min(good) if good else max(table, key=lambda row: row[1])
    changes = []
    for change in winner[2].rpartition('.py:')[2].split(',opt.small_sizes')[0].split(','):
        key, _, value = change.partition('=')
        if float(value) != LEVELS[key][0] or SCRIPTS[1] in winner[2]:
            changes.append(change)
    changes = [*changes, 'opt.small_sizes' + winner[2].partition('opt.small_sizes')[2]]
    script = winner[2].rpartition('.py:')[0].rpartition('/')[2]
    print('Winner:', winner[0] / costs['baseline'], flush=True)
    Path(folder, 'winner.txt').write_text(f'{script}.py:{",".join(changes)}')
    for worker in workers:
        worker.join(3)


if __name__ == '__main__':
    if sys.argv[2] == 'costs':
        write_costs()
    else:
        main()
