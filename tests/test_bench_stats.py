"""The tool's statistics, against scipy, published numbers and simulation."""

import math

import numpy as np
import pytest
from bench import stats
from scipy import stats as scipy_stats

pytestmark = pytest.mark.filterwarnings('error')


def binomial_limit(rate: float, n: int) -> float:
    """What a rate exceeds in 1 of 700 samples of n."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / n)


# ---------------------------------------- Two samples ----------------------------------------
@pytest.mark.parametrize('sizes', [(2, 2), (2, 9), (40, 7), (125, 1000)])
def test_mean_and_welch_have_scipys_test_and_intervals(sizes):
    rng = np.random.default_rng(sizes)
    for shift, scale in ((0, 1), (0.7, 3), (2.5, 0.2)):
        a = rng.normal(90 + shift, scale, sizes[0])
        b = rng.normal(90, 1, sizes[1])
        expected = scipy_stats.ttest_ind(a, b, equal_var=False)
        found = stats.welch(a, b, 0.9)
        assert found.value == pytest.approx(a.mean() - b.mean())
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))
        expected = scipy_stats.ttest_1samp(a, 0).confidence_interval(0.9)
        assert (stats.mean(a, 0.9).low, stats.mean(a, 0.9).high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize('n', [2, 5, 40])
def test_paired_has_scipys_test_and_interval(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(90, 1, (2, n))
    expected = scipy_stats.ttest_rel(a, b)
    found = stats.paired(a, b, 0.9)
    assert found.value == pytest.approx((a - b).mean())
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_pairs_leave_out_what_the_runs_of_a_turn_have_in_common():
    rng = np.random.default_rng(0)
    common = rng.normal(50, 2, 25)
    a = common + 0.5 + rng.normal(0, 0.2, 25)
    b = common + rng.normal(0, 0.2, 25)
    assert stats.paired(a, b).p < 0.001
    assert stats.welch(a, b).p > 0.05


@pytest.mark.parametrize('test', [stats.paired, stats.welch])
@pytest.mark.parametrize('level, p', [(94.0, 1), (93.5, 0)])
def test_samples_without_variance_are_certain(test, level, p):
    found = test([level] * 4, [94.0] * 4)
    assert (found.value, found.half, found.p) == (level - 94, 0, p)


@pytest.mark.parametrize('ratio', [stats.paired_ratio, stats.welch_ratio])
def test_ratio_of_samples_without_variance_is_certain(ratio):
    found = ratio([93.0] * 4, [94.0] * 4)
    assert found.low == pytest.approx(93 / 94) == found.high


def test_one_run_has_no_interval():
    assert math.isnan(stats.welch([94.0], [93.0, 94.0]).p)
    assert math.isnan(stats.paired([94.0], [93.0]).p)
    assert math.isnan(stats.mean([94.0]).low)
    assert math.isnan(stats.std([3.0]))
    for ratio in (stats.paired_ratio, stats.welch_ratio):
        found = ratio([3.0], [2.0])
        assert found.value == pytest.approx(1.5) and math.isnan(found.low)


@pytest.mark.parametrize('pairs', [False, True])
def test_interval_of_a_ratio_of_times_covers_it_95_times_in_100(pairs):
    rng = np.random.default_rng(1)
    n = 2000
    hits = 0
    for _ in range(n):
        if pairs:
            slow = rng.uniform(1, 1.5, 8)  # a turn in which the machine was busy
            sample = slow * rng.normal(2.8, 0.1, 8)
            found = stats.paired_ratio(sample, slow * rng.normal(3.5, 0.05, 8))
        else:
            found = stats.welch_ratio(rng.normal(2.8, 0.1, 8), rng.normal(3.5, 0.05, 12))
        hits += found.low < 0.8 < found.high
    assert hits / n == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / n))


def test_holm_adjusts_in_order():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1, 1]
    assert stats.holm([0.02]) == [0.02]


def test_runs_diverge_by_loss_or_by_accuracy():
    losses = [[2.0, 1.0], [2.0, None], [2.0, math.log(5)], [1.0, math.nan], [1.0], []]
    accuracies = [94, 94, 94, 94, 83.9, 94]
    assert stats.diverged(accuracies, losses, [5] * 6) == [False, True, True, True, True, False]
    assert stats.diverged([94, 10], [[1.0], [1.0]], [10, 10]) == [False, False]  # no median of two
    assert stats.diverged([94, 94], [[math.log(5)]] * 2, [10, 10]) == [False, False]


# ---------------------------------------- Looks ----------------------------------------
def test_looks_rise_to_the_last_run():
    assert stats.planned_looks(100) == [5, 8, 12, 18, 27, 41, 62, 100]
    for runs in range(1, 200):
        looks = stats.planned_looks(runs)
        assert looks[-1] == runs
        assert looks == sorted(set(looks))


@pytest.mark.parametrize('looks, boundary', [(1, 1.960), (2, 2.178), (5, 2.413), (10, 2.555)])
def test_boundary_is_pococks(looks, boundary):
    p = stats.nominal_p([10 * k for k in range(1, looks + 1)])
    assert scipy_stats.norm.isf(p / 2) == pytest.approx(boundary, abs=1e-3)


def smallest_p(changes: np.ndarray, looks: list[int]) -> np.ndarray:
    """The smallest p of the looks at each row of differences."""
    smallest = np.ones(len(changes))
    for n in looks:
        p = scipy_stats.ttest_1samp(changes[:, :n], 0, axis=1).pvalue
        smallest = np.minimum(smallest, p)
    return smallest


@pytest.mark.parametrize('correlation', [0.0, 0.9])
@pytest.mark.parametrize('runs', [8, 12, 25, 100])
def test_false_alarms_over_all_looks_stay_at_5_percent(runs, correlation):
    looks, p = stats.sequential_plan(runs, 1)
    n = 40000 if runs < 100 else 10000
    rng = np.random.default_rng(runs)
    own = math.sqrt(1 - correlation)
    common = math.sqrt(correlation) * rng.standard_normal((n, runs))
    a = common + own * rng.standard_normal((n, runs))
    b = common + own * rng.standard_normal((n, runs))
    rate = float(np.mean(smallest_p(a - b, looks) < p))
    print(f'{runs} runs, correlation {correlation}: {rate:.2%} false alarms')  # -rP shows it
    assert 0.035 < rate <= binomial_limit(0.05, n)


def test_false_alarms_of_several_arms_together_stay_at_5_percent():
    runs, arms, n = 25, 3, 20000
    looks, p = stats.sequential_plan(runs, arms)
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((n, runs))
    alarm = np.zeros(n, dtype=bool)
    for _ in range(arms):
        alarm |= smallest_p(rng.standard_normal((n, runs)) - reference, looks) < p
    assert np.mean(alarm) <= binomial_limit(0.05, n)


# Difference, correlation, expected verdict, how often at least, and runs at most on average.
POWER = [
    (0.3, 0.0, 'better', 0.97, 9),
    (-0.2, 0.0, 'worse', 0.97, 15),
    (0.1, 0.0, 'better', 0.93, 40),
    (0.0, 0.0, 'equal', 0.90, 60),
    (0.1, 0.9, 'better', 0.93, 9),
    (0.0, 0.9, 'equal', 0.90, 12),
]


@pytest.mark.parametrize('difference, correlation, verdict, share, most', POWER)
def test_looking_saves_runs(difference, correlation, verdict, share, most):
    looks, p = stats.sequential_plan(100, 1)
    rng = np.random.default_rng(0)
    common_std = 0.13 * math.sqrt(correlation)
    own_std = 0.13 * math.sqrt(1 - correlation)
    decisions = []
    for _ in range(150):
        common = rng.normal(94, common_std, 100)
        reference = common + rng.normal(0, own_std, 100)
        sample = common + rng.normal(difference, own_std, 100)
        decisions.append(stats.sequential(sample, reference, looks, p, 0.1))
    found = np.mean([decision.verdict == verdict for decision in decisions])
    made = np.mean([decision.n for decision in decisions])
    print(f'{difference:+.1f}, correlation {correlation}: {made:.1f} of 100, {verdict} {found:.0%}')
    assert found >= share
    assert made < most


def test_a_decision_is_of_the_first_look_that_made_one():
    sample = [94.5, 94.6, 94.4, 94.5, 94.6, 90.0, 90.0, 90.0]
    reference = [94.0, 94.0, 94.1, 94.0, 94.0, 94.0, 94.0, 94.0]
    decision = stats.sequential(sample, reference, [5, 8], 0.02, 0.1)
    assert (decision.verdict, decision.n, decision.look) == ('better', 5, 1)
    assert decision.difference == stats.paired(sample[:5], reference[:5], 0.98)


def test_before_the_first_look_nothing_is_decided():
    decision = stats.sequential([95.0] * 4, [90.0] * 4, [5, 8], 0.02, 0.1)
    assert (decision.verdict, decision.n, decision.look) == ('undecided', 4, 0)
