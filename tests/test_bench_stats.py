"""The tool's statistics, against scipy, published numbers and simulation."""

import math

import numpy as np
import pytest
from bench import report, stats
from scipy import stats as scipy_stats

pytestmark = pytest.mark.filterwarnings('error')


@pytest.mark.parametrize('sizes', [(2, 2), (2, 9), (40, 7), (125, 1000)])
def test_mean_and_difference_have_scipys_test_and_intervals(sizes):
    rng = np.random.default_rng(sizes)
    for shift, scale in ((0, 1), (0.7, 3), (2.5, 0.2)):
        a, b = rng.normal(90 + shift, scale, sizes[0]), rng.normal(90, 1, sizes[1])
        expected, found = scipy_stats.ttest_ind(a, b, equal_var=False), stats.welch(a, b, 0.9)
        assert found.value == pytest.approx(a.mean() - b.mean())
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))
        expected = scipy_stats.ttest_1samp(a, 0).confidence_interval(0.9)
        assert (stats.mean(a, 0.9).low, stats.mean(a, 0.9).high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize('level, p', [(94.0, 1), (93.5, 0)])
def test_samples_without_variance_are_certain(level, p):
    found = stats.welch([level] * 3, [94.0] * 4)
    assert (found.value, found.half, found.p) == (level - 94, 0, p)
    ratio = stats.ratio([level] * 3, [94.0] * 4)
    assert ratio.low == pytest.approx(level / 94) == ratio.high


def test_one_run_has_no_interval():
    assert math.isnan(stats.welch([94.0], [93.0, 94.0]).p) and math.isnan(stats.mean([94.0]).low)
    assert math.isnan(stats.ratio([3.0], [3.0]).low) and math.isnan(stats.std([3.0]))


def test_interval_of_a_ratio_of_clocks_covers_it_95_times_in_100():
    rng, n, hits = np.random.default_rng(1), 2000, 0
    for _ in range(n):
        found = stats.ratio(rng.normal(2.8, 0.1, 8), rng.normal(3.5, 0.05, 12))
        hits += found.low < 0.8 < found.high
    assert hits / n == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / n))


def test_holm_adjusts_in_order():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1, 1] and stats.holm([0.02]) == [0.02]


def test_runs_diverge_by_loss_dead_or_fallen():
    losses = [[2.0, 1.0], [2.0, None], [2.0, math.log(5)], [1.0, math.nan], [1.0], []]
    accuracies = [94, 94, 94, 94, 83.9, 94]
    assert stats.diverged(accuracies, losses, [5] * 6) == [False, True, True, True, True, False]
    assert stats.diverged([94, 10], [[1.0], [1.0]], [10, 10]) == [False, False]  # no median of two
    assert stats.diverged([94, 94], [[math.log(5)]] * 2, [10, 10]) == [False, False]


def test_looks_rise_to_the_last_run():
    assert stats.planned_looks(100) == [5, 8, 12, 18, 27, 41, 62, 100]
    for runs in range(1, 200):
        looks = stats.planned_looks(runs)
        assert looks[-1] == runs and looks == sorted(set(looks))


@pytest.mark.parametrize('looks, boundary', [(1, 1.960), (2, 2.178), (5, 2.413), (10, 2.555)])
def test_boundary_is_pococks(looks, boundary):
    p = stats.nominal_p([10 * k for k in range(1, looks + 1)])
    assert scipy_stats.norm.isf(p / 2) == pytest.approx(boundary, abs=1e-3)


@pytest.mark.parametrize('runs', [12, 25, 100])
def test_false_alarms_over_all_looks_stay_at_5_percent(runs):
    looks, n, alarm = stats.planned_looks(runs), 20000, False
    p = stats.nominal_p(looks)
    a, b = np.random.default_rng(runs).normal(94, 0.13, (2, n, runs))
    for look in looks:
        alarm |= scipy_stats.ttest_ind(a[:, :look], b[:, :look], axis=1, equal_var=False).pvalue < p
    rate = float(np.mean(alarm))
    print(f'at most {runs} runs: {rate:.2%} false alarms')  # -rP shows it
    assert 0.03 < rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


def simulate(differences, n, runs=100, std=0.13, points=0.1):
    """The decisions of n experiments with --until-sure, whose arms differ so much."""
    looks, p = report.sequential_plan(runs, len(differences))
    rng = np.random.default_rng(0)
    for _ in range(n):
        reference = rng.normal(94, std, runs)
        samples = [rng.normal(94 + difference, std, runs) for difference in differences]
        yield [stats.sequential(sample, reference, looks, p, points) for sample in samples]


def test_false_alarms_of_several_arms_together_stay_at_5_percent():
    n, alarms = 500, {'better', 'worse'}
    wrong = [alarms & {arm.verdict for arm in arms} != set() for arms in simulate([0.0] * 3, n)]
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


SAVED = [(0.3, 'better', 0.99, 8), (-0.2, 'worse', 0.99, 15)]
SAVED += [(0.1, 'better', 0.98, 50), (0, 'equal', 0.93, 55)]


@pytest.mark.parametrize('difference, verdict, power, most', SAVED)
def test_looking_saves_runs(difference, verdict, power, most):
    decisions = [found for (found,) in simulate([difference], 300)]
    share = np.mean([decision.verdict == verdict for decision in decisions])
    made = np.mean([decision.n for decision in decisions])
    print(f'{difference:+.1f} points: {made:.1f} of 100 runs per arm, {verdict} {share:.1%}')
    assert share >= power - 0.03 and made < most
