"""Statistics over training seeds: t intervals, the speed-up of one set of learning curves over another, their paired
ratio, and Holm's correction. docs/statistics.md derives them and shows their coverage in simulated studies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.interpolate import CubicSpline

Array = np.ndarray

#: confidence of every interval
LEVEL = 0.95
# Curves are read every 1/16 of a halving of the iterations, in the last halving of the common fall.
_PER_HALVING = 16
_STEP = np.log(2) / _PER_HALVING
_FINER = 32
# A fall of fewer points than a quarter of a halving carries no slope.
_FEWEST = _PER_HALVING // 4


@dataclass(frozen=True)
class Estimate:
    """A ratio. low, high: its 95 % interval over seeds, from the lowest to the highest seed if there are two, NaN with
    one; p: two-sided p value of the ratio 1, NaN with fewer than three seeds. A speed-up outside what the curves cover
    is infinite or 0, one that they do not determine NaN."""

    value: float
    low: float
    high: float
    p: float


def mean_interval(values: Array) -> tuple[float, float]:
    """Mean and half-width of Student's t interval over seeds; the half-width of a single value is NaN."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * spread)


def mean_ratio(logs: Array) -> Estimate:
    """Return the geometric mean of ratios, given their logarithms [seeds]."""
    if len(logs) < 3:
        return _of_few(np.exp(logs))
    mean, half = mean_interval(logs)
    spread = logs.std(ddof=1)
    p = 2 * stats.t.sf(np.sqrt(len(logs)) * abs(mean) / spread, len(logs) - 1) if spread else float(mean == 0)
    return Estimate(float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half)), float(p))


def speed_up(steps: tuple[Array, Array], baseline: Array, student: Array) -> Estimate:
    """Return the factor by which a student is faster than its baseline.

    steps: the positive, increasing iterations of the baseline's snapshots and of the student's; baseline, student:
    logarithms of their scores [seeds, P], row by row of the same seeds.

    It is the factor F that makes the student's curve at t / F and the baseline's at t equal, on average over the last
    halving of t before the lower end of both (over log t). For each F the differences are one number a seed, which is
    linear in the scores, so Student's t tests F; the interval is the hull of all F that it does not reject. One F that
    fits the ends alone would be lost where curves are flat.
    """
    first, second = (_lattice(*curve) for curve in zip(steps, (baseline, student), strict=True))
    offset = np.log(steps[0][-1] / steps[1][-1])
    count = len(baseline)
    if count > 2:
        return _of_shifts(first, second, offset)
    each = [_of_shifts(first[k : k + 1], second[k : k + 1], offset).value for k in range(count)]
    return _of_few(np.array(each))


def holm(p: Sequence[float]) -> Array:
    """Return p values adjusted for their number by Holm's method; NaN counts for nothing and stays."""
    values = np.array(p, float)
    known = np.flatnonzero(~np.isnan(values))
    order = known[values[known].argsort()]
    values[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1)
    return values


def _of_few(each: Array) -> Estimate:
    """Return the geometric mean of one or two seeds, and the range of two, which is no interval."""
    low, high = (each.min(), each.max()) if len(each) > 1 else (np.nan, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(float(np.exp(np.log(each).mean())), float(low), float(high), float("nan"))


def _lattice(steps: Array, logs: Array) -> Array:
    """Read curves [seeds, P] at equal distances of log t, back from the last snapshot: a cubic spline through them."""
    times = np.log(steps)
    if len(times) < 3:
        return np.empty((len(logs), 0))
    count = int((times[-1] - times[0]) / _STEP + 1e-9)
    return np.asarray(CubicSpline(times, logs, axis=1)(times[-1] - _STEP * np.arange(count, -1, -1)))


def _of_shifts(baseline: Array, student: Array, offset: float) -> Estimate:
    """Try every shift of two lattices [seeds, K], whose ends are `offset` apart in log t."""
    shifts, coarse, distance = _differences(baseline, student)
    if not len(shifts):
        return Estimate(*[float("nan")] * 4)
    # Differences of nearly equal curves and their spread both vanish at F = 1: look closely.
    fine = np.arange(shifts[0], shifts[-1] + 0.5 / _FINER, 1 / _FINER)
    differences = np.stack([np.interp(fine, shifts, each) for each in coarse])
    logs, count, mean = fine * _STEP + offset, len(baseline), differences.mean(0)
    distance = np.interp(fine, shifts, distance)
    # The student at t / F is worse the larger F is: the mean difference rises through 0.
    roots = np.flatnonzero((mean[:-1] <= 0) & (mean[1:] > 0))
    if len(roots):
        k = roots[distance[roots].argmin()]
        value = np.exp(logs[k] - mean[k] * (logs[k + 1] - logs[k]) / (mean[k + 1] - mean[k]))
    else:
        value = np.inf if (mean <= 0).all() else 0.0 if (mean > 0).all() else np.nan
    if count < 3:
        return Estimate(float(value), *[float("nan")] * 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(mean / (differences.std(0, ddof=1) / np.sqrt(count)), posinf=1e9, neginf=-1e9)
    critical = stats.t.ppf(0.5 + LEVEL / 2, count - 1)
    crossed = np.concatenate([_crossings(logs, t, critical), _crossings(logs, t, -critical)])
    kept = abs(t) <= critical
    low = 0.0 if kept[0] or value == 0 else np.exp(crossed.min() if len(crossed) else logs[-1])
    high = np.inf if kept[-1] or value == np.inf else np.exp(crossed.max() if len(crossed) else logs[0])
    p = 2 * stats.t.sf(abs(np.interp(0, logs, t)), count - 1) if logs[0] <= 0 <= logs[-1] else np.nan
    return Estimate(float(value), float(low), float(high), float(p))


def _differences(baseline: Array, student: Array) -> tuple[Array, Array, Array]:
    """Compare two lattices at every shift that leaves a common halving. Returns the shifts [S]; the mean differences
    student - baseline in that halving [seeds, S]; and the mean squared distance of the mean curves [S]."""
    shifts, means, distances = [], [], []
    for shift in range(_PER_HALVING + 1 - baseline.shape[1], student.shape[1] - _PER_HALVING):
        a, b = baseline[:, : baseline.shape[1] + min(shift, 0)], student[:, : student.shape[1] - max(shift, 0)]
        size = min(a.shape[1], b.shape[1])
        a, b = a[:, -size:], b[:, -size:]
        # The sum of both curves has another noise than their difference, so its minimum favours neither.
        end = int((a.mean(0) + b.mean(0)).argmin())
        start = max(0, end - _PER_HALVING)
        if size > _PER_HALVING and end - start >= _FEWEST:
            shifts.append(shift)
            means.append((b - a)[:, start : end + 1].mean(1))
            distances.append(((b - a).mean(0) ** 2).mean())
    return np.array(shifts), np.array(means).T, np.array(distances)


def _crossings(x: Array, y: Array, level: float) -> Array:
    """Return where the line through the points crosses a level."""
    k = np.flatnonzero((y[:-1] - level) * (y[1:] - level) < 0)
    return x[k] + (x[k + 1] - x[k]) * (level - y[k]) / (y[k + 1] - y[k])
