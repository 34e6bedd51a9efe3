"""Statistics of accuracies and training times: pure functions of numbers, on scipy.stats.

Accuracies are in percent, differences in percentage points, times in seconds.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
ALPHA = 0.05  # false alarms among comparisons of equal arms
NO_VARIANCE = 1e-20  # what rounding leaves of the variance of equal numbers
FIRST_LOOK = 5
CHANCE = 1e-5  # a network that gives all classes the same probability has a loss of ln(classes)
FALLEN = 10.0  # points below the median of its arm
T_TESTS = 0.9  # see `sequential_plan`


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; nan where there is none (n = 1)."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two means, with the two-sided p of its t-test."""

    p: float


@dataclass(frozen=True)
class Decision:
    """What a sequential comparison found after n runs: better, worse, equal or undecided."""

    verdict: str
    n: int
    look: int  # 1 is the first
    difference: Difference  # its interval holds at all looks together


# ---------------------------------------- One sample ----------------------------------------


def mean(values, confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean of a sample with Student's interval."""
    values = np.asarray(values, dtype=float)
    middle = float(values.mean())
    n = len(values)
    if n < 2:
        return Estimate(middle, math.nan, math.nan)
    error = values.std(ddof=1) / math.sqrt(n)
    half = float(error * scipy_stats.t.isf((1 - confidence) / 2, n - 1))
    return Estimate(middle, middle - half, middle + half)


def std(values) -> float:
    """Return the sample's standard deviation (n - 1); nan for one value."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1))


def diverged(accuracies, losses, classes) -> list[bool]:
    """Return which runs of an arm diverged: none is dropped, all are named.

    Args:
        accuracies: percent, one for each run.
        losses: the losses of each run's epochs, None where not finite.
        classes: the number of classes of each run.
    """
    floor = -math.inf
    if len(accuracies) >= 3:
        floor = float(np.median(accuracies)) - FALLEN - 1e-9
    flags = []
    for accuracy, run_losses, n_classes in zip(accuracies, losses, classes, strict=True):
        finite = all(loss is not None and math.isfinite(loss) for loss in run_losses)
        at_chance = False
        if finite and len(run_losses):
            at_chance = abs(run_losses[-1] - math.log(n_classes)) < CHANCE
        flags.append(not finite or at_chance or accuracy < floor)
    return flags


# ---------------------------------------- Two samples ----------------------------------------


def _t_test(value: float, error: float, freedom: float, confidence: float) -> Difference:
    """Return the difference `value` of standard error `error`."""
    if error**2 < NO_VARIANCE:
        p = 1.0 if abs(value) < 1e-9 else 0.0
        return Difference(value, value, value, p)
    half = float(error * scipy_stats.t.isf((1 - confidence) / 2, freedom))
    p = float(2 * scipy_stats.t.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, p)


def paired(sample, reference, confidence: float = CONFIDENCE) -> Difference:
    """Return the mean of sample[i] - reference[i] by the paired t-test.

    Runs of one turn share their seed, and thereby initial weights and batches. One pair:
    interval and p are nan.
    """
    changes = np.asarray(sample, dtype=float) - np.asarray(reference, dtype=float)
    value = float(changes.mean())
    n = len(changes)
    if n < 2:
        return Difference(value, math.nan, math.nan, math.nan)
    error = float(changes.std(ddof=1)) / math.sqrt(n)
    return _t_test(value, error, n - 1, confidence)


def _satterthwaite(value: float, variances, sizes, confidence: float) -> Difference:
    """Return the difference of two means whose squared standard errors are `variances`."""
    total = sum(variances)
    parts = [v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True)]
    freedom = total**2 / sum(parts) if total else 1.0
    return _t_test(value, math.sqrt(total), freedom, confidence)


def welch(sample, reference, confidence: float = CONFIDENCE) -> Difference:
    """Return mean(sample) - mean(reference) by Welch's test.

    As scipy.stats.ttest_ind(equal_var=False), which warns where a sample has no variance. One
    value in either sample: interval and p are nan.
    """
    samples = [np.asarray(values, dtype=float) for values in (sample, reference)]
    value = float(samples[0].mean() - samples[1].mean())
    sizes = [len(values) for values in samples]
    if min(sizes) < 2:
        return Difference(value, math.nan, math.nan, math.nan)
    variances = [float(x.var(ddof=1)) / len(x) for x in samples]
    return _satterthwaite(value, variances, sizes, confidence)


def paired_ratio(sample, reference, confidence: float = CONFIDENCE) -> Estimate:
    """Return the geometric mean of sample[i] / reference[i], positive numbers."""
    logs = paired(np.log(sample), np.log(reference), confidence)
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


def welch_ratio(sample, reference, confidence: float = CONFIDENCE) -> Estimate:
    """Return mean(sample) / mean(reference), positive; Welch's interval of the logarithm."""
    samples = [np.asarray(values, dtype=float) for values in (sample, reference)]
    value = float(samples[0].mean() / samples[1].mean())
    sizes = [len(values) for values in samples]
    if min(sizes) < 2:
        return Estimate(value, math.nan, math.nan)
    variances = [float(x.var(ddof=1)) / len(x) / float(x.mean()) ** 2 for x in samples]
    logs = _satterthwaite(math.log(value), variances, sizes, confidence)
    return Estimate(value, math.exp(logs.low), math.exp(logs.high))


def holm(p_values) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        p = min(1.0, (len(p_values) - rank) * p_values[i])
        largest = max(largest, p)
        adjusted[i] = largest
    return adjusted


# ---------------------------------------- Looks ----------------------------------------


def planned_looks(runs: int) -> list[int]:
    """Return the turns after which --until-sure looks: 5, 8, 12, 18, 27, ... and `runs`."""
    looks = []
    n = FIRST_LOOK
    while n * 1.2 < runs:  # a look just before the last one would only cost power
        looks.append(n)
        n = n * 3 // 2 + n % 2
    return [*looks, runs]


def _crossing(boundary: float, looks: list[int]) -> float:
    """Return P(|Z| > boundary at one look or more) for a random walk of looks[k] steps."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    density = places = previous = None
    for n in looks:
        edge = boundary * math.sqrt(n)
        here = edge * nodes
        if previous is None:
            density = scipy_stats.norm.pdf(here, scale=math.sqrt(n))
        else:
            steps = here[:, None] - places[None, :]
            density = scipy_stats.norm.pdf(steps, scale=math.sqrt(n - previous)) @ density
        places, previous = here, n
        density = density * edge * weights  # from now on the mass at each node
    return 1 - float(density.sum())


def nominal_p(looks: list[int], alpha: float = ALPHA) -> float:
    """Return the p below which a look decides, the same at each (Pocock 1977).

    Over all looks together, alpha of the comparisons of equal arms are decided wrongly. The
    boundary is constant and does not fall (O'Brien and Fleming 1979) because a run costs the same
    early or late, and a clear difference should end soon. It is that of a normal random walk;
    tests/test_bench_stats.py simulates the t-tests.
    """
    if len(looks) == 1:
        return alpha
    low = scipy_stats.norm.isf(alpha / 2)
    high = scipy_stats.norm.isf(alpha / 2 / len(looks))
    boundary = optimize.brentq(lambda c: _crossing(c, looks) - alpha, low, high, xtol=1e-6)
    return float(2 * scipy_stats.norm.sf(boundary))


def sequential_plan(runs: int, comparisons: int) -> tuple[list[int], float]:
    """Return the looks, and the p below which one decides.

    5 % hold over all looks and all arms together (Bonferroni). t-tests of few pairs cross the
    boundary of a normal random walk 3 to 11 % more often than it does (simulated, for 8 to 100
    runs and 1 to 10 comparisons): so the walk gets only 0.9 of the 5 %.
    """
    looks = planned_looks(runs)
    alpha = ALPHA / max(1, comparisons)
    if len(looks) > 1:
        alpha *= T_TESTS
    return looks, nominal_p(looks, alpha)


def sequential(sample, reference, looks: list[int], p: float, points: float) -> Decision:
    """Return the decision of the first look that made one, else that of the last look.

    Look k compares the first looks[k] pairs, with an interval of confidence 1 - p (p of
    `sequential_plan`): 'better' or 'worse' where it excludes 0, else 'equal' where it lies within
    +-points. sample[i] and reference[i] are of the same turn.
    """
    reached = min(len(sample), len(reference))
    everything = paired(sample[:reached], reference[:reached], 1 - p)
    decision = Decision('undecided', reached, 0, everything)
    for look, n in enumerate(looks, start=1):
        if n < 2 or reached < n:
            break
        difference = paired(sample[:n], reference[:n], 1 - p)
        verdict = 'undecided'
        if difference.p < p:
            verdict = 'better' if difference.value > 0 else 'worse'
        elif -points < difference.low and difference.high < points:
            verdict = 'equal'
        decision = Decision(verdict, n, look, difference)
        if verdict != 'undecided':
            break
    return decision
