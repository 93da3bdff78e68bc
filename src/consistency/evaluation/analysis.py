"""Numbers of the report from score tables: means with intervals over seeds, and speed-ups. No files, no figures.

A score table has the columns study, kind, run, seed, ema, step, sampler, nfe, fd, kid, alignment, images, extractor.
All comparisons use one EMA rate per student, the main one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from consistency.config.measures import MEASURES, OWN_SAMPLERS

Array = np.ndarray


def mean_interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's t interval over seeds; the half-width of a single value is NaN."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * spread)


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
            values = group[measure].dropna().to_numpy()
            mean, half = mean_interval(values) if len(values) else (float("nan"), float("nan"))
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
    """Learning curves of one student: steps [P] and values [seeds, P], seeds in the order of `seeds`."""

    steps: Array
    values: Array
    seeds: list[int]


def curves_of(scores: pd.DataFrame, run: str, nfe: int, measure: str) -> Curves | None:
    """Return the curves of a student at a number of jumps, or None if the measure was not taken."""
    rows = scores[(scores.kind == "curve") & (scores.run == run) & (scores.nfe == nfe)]
    wide = rows.pivot(index="seed", columns="step", values=measure).dropna()
    if wide.empty:
        return None
    return Curves(wide.columns.to_numpy(int), wide.to_numpy(float), list(wide.index.to_numpy(int)))


@dataclass(frozen=True)
class Reached:
    """Iterations to a score. bound: '' if they are known, '<' before the first snapshot, '>' never."""

    steps: float
    bound: str


def iterations_to(steps: Array, values: Array, target: float) -> Reached:
    """Return the first iteration at which the best value so far is at most target, linear between snapshots.

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


@dataclass(frozen=True)
class SpeedUp:
    """Baseline's iterations over the student's. bound: '' known, '>' at least, '<' at most, '?' undefined.

    low, high: 95 % bootstrap interval over seeds; NaN with one seed. low is 0 if a resample does not reach the target,
    high is infinite if one has reached it before training.
    """

    run: str
    baseline: str
    measure: str
    nfe: int
    target: float
    baseline_steps: float
    steps: float
    value: float
    bound: str
    low: float
    high: float
    seeds: int


def speed_up(baseline: Curves, student: Curves) -> tuple[float, str, float, float, float]:
    """Return (speed-up, bound, target, the baseline's iterations, the student's).

    The target is the last point of the baseline's mean curve over seeds. The minimum would be the luckiest of many
    noisy points, which an equal student would miss more often than not. Iterations are counted on the best-so-far of
    the mean curves, so an improving baseline has exactly 1 against itself.
    """
    mean_baseline, mean_student = baseline.values.mean(0), student.values.mean(0)
    target = float(mean_baseline[-1])
    own = iterations_to(baseline.steps, mean_baseline, target)
    other = iterations_to(student.steps, mean_student, target)
    # A baseline that has its final score before training did not improve: the speed-up is undefined.
    bound = "?" if own.bound else {"": "", "<": ">", ">": "<"}[other.bound]
    value = float("nan") if bound == "?" else own.steps / other.steps
    return value, bound, target, own.steps, other.steps


def _of_shared_seeds(baseline: Curves, student: Curves) -> tuple[Curves, Curves]:
    """Restrict both to their shared seeds, in the order of the baseline's."""
    shared = [seed for seed in baseline.seeds if seed in student.seeds]
    first, second = (Curves(c.steps, c.values[[c.seeds.index(s) for s in shared]], shared) for c in (baseline, student))
    return first, second


def bootstrap(baseline: Curves, student: Curves, resamples: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the speed-up over resampled seeds; NaN with one seed.

    Seeds are paired, because students of one seed see the same images, noise and times. A resample with a bound counts
    with its whole range: from 0 if the target is not reached, to infinity if it is reached before training.
    """
    first, second = _of_shared_seeds(baseline, student)
    count = len(first.seeds)
    if count < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(0)
    lows, highs = [], []
    for _ in range(resamples):
        picked = generator.integers(count, size=count)
        value, bound, *_ = speed_up(*(replace(curves, values=curves.values[picked]) for curves in (first, second)))
        lows.append(value if bound in ("", ">") else 0.0)
        highs.append(value if bound in ("", "<") else float("inf"))
    # No interpolation between resamples: half-way to infinity is undefined.
    low, high = np.percentile(lows, 2.5, method="lower"), np.percentile(highs, 97.5, method="higher")
    return float(low), float(high)


def speed_ups(scores: pd.DataFrame, baseline_of: dict[str, str], nfes: list[int], resamples: int) -> list[SpeedUp]:
    """Return the speed-up of every student over its baseline, as in `compared`."""
    found = []
    for place, reference, own in compared(scores, baseline_of, nfes):
        value, bound, target, reference_steps, steps = speed_up(reference, own)
        low, high = bootstrap(reference, own, resamples)
        found.append(SpeedUp(*place, target, reference_steps, steps, value, bound, low, high, len(own.seeds)))
    return found


def compared(
    scores: pd.DataFrame, baseline_of: dict[str, str], nfes: list[int]
) -> Iterator[tuple[tuple[str, str, str, int], Curves, Curves]]:
    """Yield (student, baseline, measure, jumps), the baseline's curves and the student's, for FD and, if measured, the
    alignment error. baseline_of: student -> baseline."""
    for measure in ("fd", "alignment"):
        for nfe in nfes:
            for run, baseline in baseline_of.items():
                reference, own = (curves_of(scores, name, nfe, measure) for name in (baseline, run))
                if run != baseline and reference is not None and own is not None:
                    yield (run, baseline, measure, nfe), reference, own


@dataclass(frozen=True)
class Paired:
    """Ratio of a student's score to its baseline's, seed by seed: geometric mean over the second half of training.

    ratio: below 1 is better than the baseline; low, high: its 95 % t interval over seeds, NaN with one seed.
    """

    run: str
    baseline: str
    measure: str
    nfe: int
    ratio: float
    low: float
    high: float
    seeds: int


def paired_ratio(baseline: Curves, student: Curves) -> tuple[float, float, float, int]:
    """Return (ratio, low, high, seeds) of `Paired`.

    Students of one seed see the same images, noise and times, so most of the variation is common to both curves and
    cancels in the ratio. It shows differences far below the noise of either curve.
    """
    first, second = _of_shared_seeds(baseline, student)
    late = baseline.steps > baseline.steps[-1] / 2
    logs = np.log(second.values.compress(late, axis=1) / first.values.compress(late, axis=1))
    mean, half = mean_interval(logs.mean(1))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half)), len(first.seeds)


def paired_ratios(scores: pd.DataFrame, baseline_of: dict[str, str], nfes: list[int]) -> list[Paired]:
    """Return the paired ratio of every student and its baseline, as in `compared`."""
    return [Paired(*place, *paired_ratio(first, own)) for place, first, own in compared(scores, baseline_of, nfes)]
