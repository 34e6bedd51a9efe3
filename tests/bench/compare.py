"""Comparison of two arms: in pairs where every run has its partner, else of means."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from bench import records, stats
from bench.records import Run

# ---------------------------------------- An arm ----------------------------------------


def accuracies(runs: list[Run]) -> np.ndarray:
    """Return TTA accuracies in percent."""
    return np.array([run.accuracy for run in runs])


def times(runs: list[Run]) -> np.ndarray:
    """Return training times in seconds."""
    return np.array([run.clock_seconds for run in runs])


def flop(runs: list[Run]) -> int | None:
    """Return the FLOP of a run of the arm, where they were counted."""
    return runs[0].flop


def diverged(runs: list[Run]) -> list[Run]:
    """Return the runs of an arm that diverged."""
    losses = [run.losses for run in runs]
    classes = [run.classes for run in runs]
    flags = stats.diverged(accuracies(runs), losses, classes)
    return [run for run, bad in zip(runs, flags, strict=True) if bad]


# ---------------------------------------- Two arms ----------------------------------------


def counted(n: int, noun: str) -> str:
    """Return '1 run' or '2 runs'."""
    return f'{n} {noun}' if n == 1 else f'{n} {noun}s'


def turn_key(run: Run) -> tuple:
    """Return what a run has in common with its partner of another arm."""
    return run.base_seed, run.trial, run.turn, run.seed, records.data_key(run)


@dataclass(frozen=True)
class Comparison:
    """Two arms. Where `pairs` is true, sample[i] and reference[i] are of the same turn."""

    sample: list[Run]
    reference: list[Run]
    pairs: bool

    def difference(self, confidence: float = stats.CONFIDENCE) -> stats.Difference:
        """Return the difference of the accuracies in points."""
        test = stats.paired if self.pairs else stats.welch
        return test(accuracies(self.sample), accuracies(self.reference), confidence)

    def time_ratio(self) -> stats.Estimate:
        """Return the ratio of the training times."""
        test = stats.paired_ratio if self.pairs else stats.welch_ratio
        return test(times(self.sample), times(self.reference))

    @property
    def same_device(self) -> bool:
        """Whether the times can be compared."""
        return len({run.device for run in [*self.sample, *self.reference]}) == 1

    @property
    def same_data(self) -> bool:
        """Whether all runs had the same data, as far as their logs tell."""
        return len({records.data_key(run) for run in [*self.sample, *self.reference]}) == 1

    @property
    def cost_ratio(self) -> float | None:
        """Ratio of the FLOP, where both were counted."""
        if flop(self.sample) and flop(self.reference):
            return flop(self.sample) / flop(self.reference)
        return None

    @property
    def n_text(self) -> str:
        """'25 pairs', or 'n = 6 and 13' without pairs."""
        if self.pairs:
            return counted(len(self.sample), 'pair')
        return f'n = {len(self.sample)} and {len(self.reference)}'


def compare(sample: list[Run], reference: list[Run]) -> Comparison:
    """Return the comparison of two arms: in pairs where every run has its partner."""
    partners = {turn_key(run): run for run in reference}
    keys = [turn_key(run) for run in sample]
    alone = partners.keys() ^ set(keys)
    twice = len(keys) > len(set(keys)) or len(reference) > len(partners)
    seeded = all(run.seed is not None for run in sample)
    if alone or twice or not seeded:
        return Comparison(sample, reference, False)
    return Comparison(sample, [partners[key] for key in keys], True)


def without_diverged(comparison: Comparison) -> Comparison:
    """Return the comparison without the diverged runs, and without their partners."""
    bad = [*diverged(comparison.sample), *diverged(comparison.reference)]
    dropped = {id(run) for run in bad}
    if comparison.pairs:
        dropped_turns = {turn_key(run) for run in bad}
        both = [*comparison.sample, *comparison.reference]
        dropped = {id(run) for run in both if turn_key(run) in dropped_turns}
    return dataclasses.replace(
        comparison,
        sample=[run for run in comparison.sample if id(run) not in dropped],
        reference=[run for run in comparison.reference if id(run) not in dropped],
    )


def without_gap(runs: list[Run]) -> list[Run]:
    """Return the runs up to the first turn that is missing: those that a look may have seen."""
    return [run for turn, run in enumerate(runs, start=1) if (run.turn or turn) == turn]
