"""Statistics of accuracies and clocks: pure functions of numbers, on scipy.stats.

Accuracies are in percent, differences in percentage points, clocks in seconds.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
ALPHA = 0.05  # false alarms among comparisons of arms that are equal
NO_VARIANCE = 1e-20  # what rounding leaves of the variance of equal numbers
FIRST_LOOK = 5
DEAD = 1e-5  # a network that gives every class the same probability has a loss of ln(classes)
FALLEN = 10.0  # points under the median of its arm: a run that diverged and came back


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
    """A difference of two means, with the two-sided p of Welch's test."""

    p: float


@dataclass(frozen=True)
class Decision:
    """What a sequential comparison found after n runs: better, worse, equal or undecided."""

    verdict: str
    n: int
    look: int  # 1 is the first
    difference: Difference  # its interval holds at all looks together


def mean(values, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of a sample with Student's interval."""
    values = np.asarray(values, dtype=float)
    middle = float(values.mean())
    if len(values) < 2:
        return Estimate(middle, math.nan, math.nan)
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = float(error * scipy_stats.t.isf((1 - confidence) / 2, len(values) - 1))
    return Estimate(middle, middle - half, middle + half)


def std(values) -> float:
    """The sample's standard deviation (n - 1); nan for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _welch(value: float, variances, sizes, confidence: float) -> Difference:
    """The difference `value` of two means whose squared standard errors are `variances`."""
    total = sum(variances)
    if total < NO_VARIANCE:
        return Difference(value, value, value, 1.0 if abs(value) < 1e-9 else 0.0)
    freedom = total**2 / sum(v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True))
    error = math.sqrt(total)
    half = float(error * scipy_stats.t.isf((1 - confidence) / 2, freedom))
    p = float(2 * scipy_stats.t.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, p)


def welch(sample, reference, confidence: float = CONFIDENCE) -> Difference:
    """mean(sample) - mean(reference) by Welch's test, as scipy.stats.ttest_ind(equal_var=False).

    Written out because scipy warns, or gives nan, where a sample has no variance. One value in
    either sample: interval and p are nan.
    """
    pair = [np.asarray(values, dtype=float) for values in (sample, reference)]
    value = float(pair[0].mean() - pair[1].mean())
    sizes = [len(values) for values in pair]
    if min(sizes) < 2:
        return Difference(value, math.nan, math.nan, math.nan)
    return _welch(value, [float(x.var(ddof=1)) / len(x) for x in pair], sizes, confidence)


def ratio(sample, reference, confidence: float = CONFIDENCE) -> Estimate:
    """mean(sample) / mean(reference), positive; Welch's interval of the logarithm (delta)."""
    pair = [np.asarray(values, dtype=float) for values in (sample, reference)]
    value = float(pair[0].mean() / pair[1].mean())
    sizes = [len(values) for values in pair]
    if min(sizes) < 2:
        return Estimate(value, math.nan, math.nan)
    variances = [float(x.var(ddof=1)) / len(x) / float(x.mean()) ** 2 for x in pair]
    logs = _welch(math.log(value), variances, sizes, confidence)
    return Estimate(value, math.exp(logs.low), math.exp(logs.high))


def holm(p_values) -> list[float]:
    """p-values adjusted for their number (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def diverged(accuracies, losses, classes) -> list[bool]:
    """Which runs diverged (never dropped, but counted).

    accuracies: percent, one per run; losses: of each run a list of epoch losses, None where not
    finite; classes: of each run the number of classes.
    """
    floor = float(np.median(accuracies)) - FALLEN - 1e-9 if len(accuracies) >= 3 else -math.inf
    found = []
    for accuracy, run_losses, n_classes in zip(accuracies, losses, classes, strict=True):
        finite = all(loss is not None and math.isfinite(loss) for loss in run_losses)
        dead = bool(run_losses) and finite and abs(run_losses[-1] - math.log(n_classes)) < DEAD
        found.append(not finite or dead or accuracy < floor)
    return found


# ---------------------------------------- Looks ----------------------------------------


def planned_looks(runs: int) -> list[int]:
    """The runs per arm after which --until-sure looks: 5, 8, 12, 18, 27, ... and at last `runs`."""
    looks, n = [], FIRST_LOOK
    while n * 1.2 < runs:  # a look just before the last one would only cost power
        looks.append(n)
        n = n * 3 // 2 + n % 2
    return [*looks, runs]


def _crossing(boundary: float, looks: list[int]) -> float:
    """P(|Z| > boundary at one look or more) for a random walk seen after looks[k] steps."""
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
    """The p below which a look stops, the same at each (Pocock 1977), so that alpha holds over all.

    Constant and not rising (O'Brien and Fleming 1979) because a run costs the same early or late,
    and a clear difference should end after five. From the normal random walk; the t-tests are
    simulated in tests/test_bench_stats.py.
    """
    if len(looks) == 1:
        return alpha
    low, high = scipy_stats.norm.isf(alpha / 2), scipy_stats.norm.isf(alpha / 2 / len(looks))
    boundary = optimize.brentq(lambda c: _crossing(c, looks) - alpha, low, high, xtol=1e-6)
    return float(2 * scipy_stats.norm.sf(boundary))


def sequential(sample, reference, looks: list[int], p: float, points: float) -> Decision:
    """The decision of the first look that made one, else of the last look that both samples reach.

    At each look the first looks[k] runs of both are compared, with the interval of confidence 1 - p
    (p of `nominal_p`): 'better' or 'worse' where it excludes 0, else 'equal' where it lies within
    +-points.
    """
    decision = Decision(
        'undecided', min(len(sample), len(reference)), 0, welch(sample, reference, 1 - p)
    )
    for look, n in enumerate(looks, start=1):
        if n < 2 or min(len(sample), len(reference)) < n:
            break
        difference = welch(sample[:n], reference[:n], 1 - p)
        verdict = 'undecided'
        if difference.p < p:
            verdict = 'better' if difference.value > 0 else 'worse'
        elif -points < difference.low and difference.high < points:
            verdict = 'equal'
        decision = Decision(verdict, n, look, difference)
        if verdict != 'undecided':
            break
    return decision
