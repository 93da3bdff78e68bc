"""Coverage of the speed-up's interval, and of the bootstrap that it replaced, in simulated studies: docs/statistics.md.

    python benchmarks/coverage.py                     # docs/statistics.csv and its table; about an hour on a core
    python benchmarks/coverage.py --studies 100 --docs /tmp

A simulated student runs through a curve `factor` times faster than its baseline. The noise of both is drawn with the
covariance that the curves of our own seeds have, over snapshots and between the two students.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from consistency.base.progress import track
from consistency.evaluation.analysis import Curves, curves_of, iterations_to
from consistency.theory.comparison import Estimate, mean_ratio, speed_up

Array = np.ndarray
RESULTS = Path("docs/results")
#: score against the share of the training
SHAPES: dict[str, Callable[[Array], Array]] = {
    "power law": lambda t: t**-0.8,
    "flat end": lambda t: 0.1 + np.exp(-6 * t),
    "falls and rises": lambda t: 1.1 * np.exp(-5 * t) + 0.8 + 0.4 * t**1.5,
    "late fall": lambda t: 0.05 + 1 / (1 + (3 * t) ** 2),
}
#: name: study, baseline, student, measure, NFE of the curves whose noise is drawn
NOISES = {
    "alignment": ("digits", "ctm", "analytic", "alignment", 2),
    "FD": ("digits", "ctm", "analytic", "fd", 3),
    "FD of couplings": ("digits-gc", "ic", "gc", "fd", 1),
}
FACTORS, SEEDS = (1.0, 1.3, 2.0), (2, 3, 5, 10)


class Noise:
    """Noise of a pair of students: steps [P] of the snapshots, deviations [seeds, 2, P] from the mean curves."""

    def __init__(self, baseline: Curves, student: Curves) -> None:
        self.steps, first = baseline.trained
        logs = np.stack([first, student.trained[1]], 1)
        self.deviations = (logs - logs.mean(0)) / np.sqrt(len(logs) - 1)

    def draw(self, draws: np.random.Generator, seeds: int) -> Array:
        """Draw logarithms [seeds, 2, P] with the covariance of the deviations."""
        return np.tensordot(draws.normal(size=(seeds, len(self.deviations))), self.deviations, 1)


def committed(study: str, baseline: str, student: str, measure: str, nfe: int) -> Noise:
    """Read the curves of a published study."""
    scores = pd.read_csv(RESULTS / study / "scores.csv")
    first, second = (curves_of(scores, run, nfe, measure) for run in (baseline, student))
    assert first is not None and second is not None
    return Noise(first, second)


def studies(noise: Noise, shape: str, factor: float, seeds: int, count: int) -> Iterator[tuple[Array, Array, Array]]:
    """Draw studies: steps [P], and the curves' logarithms [seeds, P] of the baseline and of the student."""
    draws, share = np.random.default_rng(0), noise.steps / noise.steps[-1]
    first, second = (np.log(SHAPES[shape](pace * share)) for pace in (1, factor))
    for _ in range(count):
        drawn = noise.draw(draws, seeds)
        yield noise.steps, first + drawn[:, 0], second + drawn[:, 1]


def chosen(steps: Array, baseline: Array, student: Array) -> Estimate:
    """The statistic of the report."""
    return speed_up((steps, steps), baseline, student)


def bootstrapped(steps: Array, baseline: Array, student: Array, resamples: int = 200) -> Estimate:
    """The statistic that it replaced: iterations to the baseline's final score, 95 % percentiles over resampled seeds.
    A score that is never reached counts from 0, one that is there before training to infinity."""
    draws, count = np.random.default_rng(0), len(baseline)

    def ratio(picked: Array) -> tuple[float, float, float]:
        first, second = (np.exp(logs[picked]).mean(0) for logs in (baseline, student))
        own, other = (iterations_to(steps, curve, first[-1]) for curve in (first, second))
        value = own.steps / other.steps if not own.bound else np.nan
        return (
            value,
            0.0 if own.bound or other.bound == ">" else value,
            np.inf if own.bound or other.bound == "<" else value,
        )

    _, lows, highs = np.array([ratio(draws.integers(count, size=count)) for _ in range(resamples)]).T
    low, high = np.percentile(lows, 2.5, method="lower"), np.percentile(highs, 97.5, method="higher")
    return Estimate(ratio(np.arange(count))[0], float(low), float(high), float("nan"))


def each_seed(steps: Array, baseline: Array, student: Array) -> Estimate:
    """Another candidate: the same ratio seed by seed, and Student's t on its logarithm."""
    pairs = zip(np.exp(baseline), np.exp(student), strict=True)
    reached = [[iterations_to(steps, curve, first[-1]).steps for curve in (first, second)] for first, second in pairs]
    return mean_ratio(np.log([own / other for own, other in reached]))


STATISTICS = {"chosen": chosen, "bootstrap": bootstrapped, "ratio of each seed": each_seed}


def row(noise: Noise, shape: str, factor: float, seeds: int, count: int, statistic: str) -> dict[str, float]:
    """Simulate studies. held: share of intervals that hold the factor; claimed: that exclude 1; median: of the points;
    open: share of intervals without an end."""
    found = [STATISTICS[statistic](*each) for each in studies(noise, shape, factor, seeds, count)]
    return {
        "held": np.mean([each.low <= factor <= each.high for each in found]),
        "claimed": np.mean([each.low > 1 or each.high < 1 for each in found]),
        "median": np.nanmedian([each.value for each in found]),
        "open": np.mean([each.low == 0 or each.high == np.inf for each in found]),
    }


def table(rows: pd.DataFrame) -> str:
    """Return the ranges over shapes and noises as Markdown."""

    def span(values: pd.Series) -> str:
        low, high = f"{100 * values.min():.0f}", f"{100 * values.max():.0f}"
        return low if low == high else f"{low} to {high}"

    heads = [*(f"holds {factor:g}, %" for factor in FACTORS), "claims at 1, %", "bias of the median, %", "open, %"]
    lines = [["statistic", "seeds", *heads], ["---", "---:", *["---:"] * len(heads)]]
    for (statistic, seeds), group in rows.groupby(["statistic", "seeds"], sort=False):
        by_factor = {factor: group[group.factor == factor] for factor in FACTORS}
        bias = 100 * (group["median"] / group.factor - 1).abs().max()
        cells = [*(span(by_factor[factor].held) for factor in FACTORS), span(by_factor[1.0].claimed)]
        lines.append([str(statistic), str(seeds), *cells, f"up to {bias:.1f}", span(group.open)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies a row (default: 1000)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of statistics.csv and statistics.md")
    parser.add_argument("--only", choices=STATISTICS, help="simulate this one; keep the other rows of statistics.csv")
    args = parser.parse_args()
    noises = {name: committed(*place) for name, place in NOISES.items()}
    statistics = [args.only] if args.only else list(STATISTICS)
    places = [place for place in product(statistics, SEEDS, noises, SHAPES, FACTORS) if place[:2] != ("chosen", 2)]
    found = []
    for statistic, seeds, noise, shape, factor in track("coverage")(places):
        place = {"statistic": statistic, "seeds": seeds, "noise": noise, "shape": shape, "factor": factor}
        found.append(place | row(noises[noise], shape, factor, seeds, args.studies, statistic))
    rows = pd.DataFrame(found)
    if args.only:
        kept = pd.read_csv(args.docs / "statistics.csv")
        rows = pd.concat([rows, kept[kept.statistic != args.only]])
        rows = rows.sort_values("statistic", key=lambda names: names.map(list(STATISTICS).index), kind="stable")
    rows.to_csv(args.docs / "statistics.csv", index=False, float_format="%.4g")
    page = args.docs / "statistics.md"
    if page.exists():
        block = f"\\1\n\n{table(rows)}\n\n\\2"
        text = re.sub(
            r"(?s)(<!-- begin: coverage -->).*?(<!-- end -->)", block, page.read_text(encoding="utf-8"), count=1
        )
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
