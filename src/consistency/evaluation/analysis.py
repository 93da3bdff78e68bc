"""Numbers of the report from score tables: means with intervals over seeds, and comparisons of students. No files, no
figures; the statistics are in theory/comparison.py.

A score table has the columns study, kind, run, seed, ema, step, sampler, nfe, fd, kid, alignment, images, extractor.
All comparisons use one EMA rate per student, the main one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from consistency.config.measures import MEASURES, OWN_SAMPLERS
from consistency.theory import comparison
from consistency.theory.comparison import holm, mean_interval, mean_ratio

Array = np.ndarray

#: the largest p value that shows a difference
SIGNIFICANT = 0.05


def of_main_rate(scores: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    """Return the rows of each student's main EMA rate (run -> rate) and the rows without a student."""
    return scores[scores.ema.isna() | (scores.ema == scores.run.map(rates))]


def ema_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per student, number of jumps and final EMA rate, as in `final_table`; own samplers only."""
    own = scores[scores.sampler.isin(OWN_SAMPLERS) & (scores.kind == "final")]
    tables = [final_table(rows).assign(ema=rate) for rate, rows in own.groupby("ema", sort=False)]
    order = {run: k for k, run in enumerate(dict.fromkeys(own.run))}
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values(["run", "nfe", "ema"], key=lambda c: c.map(order) if c.name == "run" else c)


def final_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per student and sampler at the end of training: mean, half-width and seed count per measure."""
    rows = []
    final = scores[scores.kind == "final"]
    for (run, sampler, nfe), group in final.groupby(["run", "sampler", "nfe"], sort=False):
        row = {
            "run": run,
            "sampler": sampler,
            "nfe": nfe,
            "seeds": len(group),
            "images": int(group.images.iloc[0]),
        }
        for measure in MEASURES:
            mean, half = mean_interval(group[measure].to_numpy())
            row |= {measure: mean, f"{measure}_half_width": half}
        rows.append(row)
    return pd.DataFrame(rows)


def step_costs(histories: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """Return one row per student: seconds per step in each timed part, mean over its trainings, and largest peak MiB.

    Empty if no training was timed.
    """
    rows = []
    for run, tables in histories.items():
        lines = pd.concat(tables, ignore_index=True)
        names = [str(name) for name in lines if str(name).startswith("time_")]
        timed = {name.removeprefix("time_"): lines[name].mean() for name in names}
        if timed:
            peak = {"peak_memory_mib": lines["peak_memory_mib"].max()} if "peak_memory_mib" in lines else {}
            rows.append({"run": run} | timed | peak)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Curves:
    """Learning curves of one student: steps [P] and values [seeds, P], seeds in the order of `seeds`. Steps are
    iterations, or what they cost: network evaluations, seconds."""

    steps: Array
    values: Array
    seeds: list[int]

    def of(self, seeds: list[int], cost: float) -> "Curves":
        """Return the curves of those seeds, with steps of another unit."""
        return Curves(self.steps * cost, self.values[[self.seeds.index(seed) for seed in seeds]], seeds)

    @property
    def trained(self) -> tuple[Array, Array]:
        """The positive steps and the logarithms of their values."""
        later = self.steps > 0
        # The Frechet distance of equal sets is 0 to rounding, of either sign.
        return self.steps[later], np.log(np.maximum(self.values[:, later], 1e-12))


def curves_of(scores: pd.DataFrame, run: str, nfe: int, measure: str) -> Curves | None:
    """Return the curves of a student at a number of jumps, or None if the measure was not taken."""
    rows = scores[(scores.kind == "curve") & (scores.run == run) & (scores.nfe == nfe)]
    wide = rows.pivot(index="seed", columns="step", values=measure)
    if wide.isna().all(axis=None):
        return None
    return Curves(wide.columns.to_numpy(int), wide.to_numpy(float), list(wide.index.to_numpy(int)))


@dataclass(frozen=True)
class Reached:
    """Steps to a score. bound: '' if they are known, '<' before the first snapshot, '>' never."""

    steps: float
    bound: str


def iterations_to(steps: Array, values: Array, target: float) -> Reached:
    """Return the first step at which the best value so far is at most target, linear between snapshots.

    steps, values: [P]. A target reached before training counts as reached at the next snapshot, bound '<'.
    """
    best = np.minimum.accumulate(values)
    there = np.flatnonzero(best <= target)
    if not len(there):
        return Reached(float(steps[-1]), ">")
    k = int(there[0])
    if k == 0:
        return Reached(float(steps[min(1, len(steps) - 1)]), "<")
    share = (best[k - 1] - target) / (best[k - 1] - best[k])
    return Reached(float(steps[k - 1] + share * (steps[k] - steps[k - 1])), "")


class Pair(NamedTuple):
    """A student and its baseline. costs: unit -> cost of an iteration of the baseline and of the student, such as
    {"iterations": (1, 1)}, in which they are compared."""

    run: str
    baseline: str
    costs: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student against its baseline, by a measure at a number of jumps; unit: of training's length.

    value, low, high: a ratio and its interval, as in `comparison.Estimate`; p: that of no difference, adjusted by Holm
    for all comparisons of its kind in the study.
    """

    run: str
    baseline: str
    measure: str
    nfe: int
    unit: str
    value: float
    low: float
    high: float
    p: float
    seeds: int

    #: a ratio closer to 1 is no difference: rounding, which training amplifies, separates students of equal mathematics
    tolerance: ClassVar[float]

    @property
    def shown(self) -> bool:
        """True if a difference is shown."""
        return self.p < SIGNIFICANT and (self.low > 1 + self.tolerance or self.high < 1 - self.tolerance)

    @property
    def equal(self) -> bool:
        """True if the interval has no difference in it."""
        return self.low >= 1 - self.tolerance and self.high <= 1 + self.tolerance


@dataclass(frozen=True, kw_only=True)
class SpeedUp(Comparison):
    """The factor by which a student trains faster than its baseline.

    Papers count to the baseline's final score instead: target is the last point of its mean curve over seeds;
    baseline_steps, steps: where the best so far of the mean curves reach it; reached: '' if both are known, '<' never
    (the ratio is below 1), '>' before training, '?' the baseline has it before training.
    """

    target: float
    baseline_steps: float
    steps: float
    reached: str

    tolerance: ClassVar[float] = 0.01


@dataclass(frozen=True, kw_only=True)
class Paired(Comparison):
    """Ratio of a student's score to its baseline's, seed by seed: geometric mean over the second half of training;
    below 1 is better than the baseline."""

    tolerance: ClassVar[float] = 0.001


Found = TypeVar("Found", SpeedUp, Paired)


def to_final_score(baseline: Curves, student: Curves) -> dict[str, Any]:
    """Return the fields target, baseline_steps, steps and reached of `SpeedUp`.

    The minimum of the baseline's curve would be the luckiest of many noisy points, which an equal student would miss
    more often than not. The last point is missed by every second one, so this is no statistic to judge by.
    """
    mean_baseline, mean_student = baseline.values.mean(0), student.values.mean(0)
    target = float(mean_baseline[-1])
    own = iterations_to(baseline.steps, mean_baseline, target)
    other = iterations_to(student.steps, mean_student, target)
    # A baseline that has its final score before training did not improve: the ratio is undefined.
    reached = "?" if own.bound else {"": "", "<": ">", ">": "<"}[other.bound]
    return {"target": target, "baseline_steps": own.steps, "steps": other.steps, "reached": reached}


def speed_up(baseline: Curves, student: Curves) -> comparison.Estimate:
    """Return the speed-up of a student over its baseline; both have the same seeds."""
    (steps, values), (own_steps, own_values) = baseline.trained, student.trained
    return comparison.speed_up((steps, own_steps), values, own_values)


def paired_ratio(baseline: Curves, student: Curves) -> comparison.Estimate:
    """Return the estimate of `Paired`, at the student's snapshots in the second half of what both were trained for;
    without one that lies within the baseline's, NaN.

    Students of one seed see the same images, noise and times, so most of the variation is common to both curves and
    cancels in the ratio. It shows differences far below the noise of either curve.
    """
    (steps, values), (own_steps, own_values) = baseline.trained, student.trained
    end = min(steps[-1], own_steps[-1])
    late = (own_steps > end / 2) & (own_steps <= end) & (own_steps >= steps[0])
    if not late.any():  # by evaluations or seconds, where one ends before the other's first snapshot
        return comparison.Estimate(*[float("nan")] * 4)
    there = np.stack([np.interp(own_steps[late], steps, each) for each in values])
    return mean_ratio((own_values[:, late] - there).mean(1))


def speed_ups(scores: pd.DataFrame, pairs: Sequence[Pair], nfes: Sequence[int]) -> list[SpeedUp]:
    """Return the speed-up of every student over its baseline, as in `compared`."""
    return _adjusted(
        SpeedUp(**place, **vars(speed_up(*curves)), **to_final_score(*curves))
        for place, curves in compared(scores, pairs, nfes)
    )


def paired_ratios(scores: pd.DataFrame, pairs: Sequence[Pair], nfes: Sequence[int]) -> list[Paired]:
    """Return the paired ratio of every student and its baseline, as in `compared`."""
    return _adjusted(Paired(**place, **vars(paired_ratio(*curves))) for place, curves in compared(scores, pairs, nfes))


def _adjusted(each: Iterable[Found]) -> list[Found]:
    """Adjust the p values for their number."""
    found = list(each)
    return [replace(item, p=float(p)) for item, p in zip(found, holm([item.p for item in found]), strict=True)]


def compared(
    scores: pd.DataFrame, pairs: Sequence[Pair], nfes: Sequence[int]
) -> Iterator[tuple[dict[str, Any], tuple[Curves, Curves]]]:
    """Yield where a student is compared, as fields of `Comparison`, and the baseline's curves and the student's of
    their shared seeds, for FD and, if measured, the alignment error."""
    for measure in ("fd", "alignment"):
        for nfe in nfes:
            for run, baseline, costs in pairs:
                reference, own = (curves_of(scores, name, nfe, measure) for name in (baseline, run))
                if reference is None or own is None:
                    continue
                shared = [seed for seed in reference.seeds if seed in own.seeds]
                place = {"run": run, "baseline": baseline, "measure": measure, "nfe": nfe, "seeds": len(shared)}
                for unit, (cost, own_cost) in costs.items():
                    yield place | {"unit": unit}, (reference.of(shared, cost), own.of(shared, own_cost))
