"""The report's figures: one function each, from arrays to a matplotlib figure. The stage report writes the files."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from torchvision.utils import make_grid

from consistency.config.measures import HEUN, OWN_SAMPLERS
from consistency.evaluation.analysis import SpeedUp, curves_of
from consistency.report.lines import line_of
from consistency.theory.generalized_ode import GeneralizedODE

if matplotlib.get_backend(auto_select=False) is None:  # a notebook has chosen its own
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Array = np.ndarray
Coefficients = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_STYLE: dict[str, Any] = {"axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "grid.alpha": 0.25}
_STYLE |= {"figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 10, "legend.frameon": False}
_STYLE |= {"svg.hashsalt": "consistency"}  # the same figure gives the same file
#: decorator of what draws: matplotlib's defaults and this style, whatever the user's matplotlibrc says
styled = style.context(_STYLE, after_reset=True)


def drawn(figure: Figure, suffix: str) -> bytes:
    """Render a figure as a png or svg file, without a date, so that equal results give equal files."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    figure.savefig(buffer, format=suffix, metadata=metadata, dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def close(figure: Figure) -> None:
    """Free a figure's memory."""
    plt.close(figure)


def measure_label(measure: str, extractor: str) -> str:
    """Return the axis label of a measure; FD is called FID only if the features are Inception's."""
    if measure == "fd":
        return "FID" if extractor.startswith("inception") else "FD, classifier features (not FID)"
    return {"alignment": "alignment error (mean squared, per pixel)", "kid": "KID"}[measure]


def sample_grid(rows: Sequence[tuple[str, Array]], columns: int = 16) -> Figure:
    """Draw a grid of images. rows: (label, uint8 [N, H, W, C]); each column shares one noise."""
    figure, axis = plt.subplots(figsize=(0.55 * columns + 2.2, 0.58 * len(rows) + 0.2))
    columns = min(columns, *(len(images) for _, images in rows))
    shown = torch.from_numpy(np.concatenate([images[:columns] for _, images in rows])).permute(0, 3, 1, 2)
    axis.imshow(make_grid(shown, columns, padding=1, pad_value=255).permute(1, 2, 0), interpolation="nearest")
    middles = [(shown.shape[2] + 1) * (i + 0.5) for i in range(len(rows))]
    axis.set_yticks(middles, [label for label, _ in rows])
    axis.set_xticks([])
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def coefficients(fit: dict[str, Array], centred: bool) -> Figure:
    """Plot l_t and s_t against t with +-2 standard errors, and s_t of the centred fit; hollow points are times that do
    not determine s_t."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    _fit(axes, fit, centred)
    return figure


def _fit(axes: Sequence[Axes], fit: Mapping[str, Array], centred: bool) -> None:
    """Draw `coefficients` on two axes."""
    times, known = fit["times"], fit["determined"].astype(bool)
    for axis, letter, ctm in zip(axes, "ls", (0.0, -1.0), strict=True):
        value, error = fit[letter], 2 * fit[f"{letter}_se"]
        axis.fill_between(times, value - error, value + error, where=known, color="#D55E00", alpha=0.3, lw=0)
        axis.plot(times, value, color="#D55E00", marker=".", ms=3, lw=1, label=f"fitted ${letter}_t$")
        if letter == "s" and not known.all():
            axis.plot(times[~known], value[~known], "o", mfc="none", color="#D55E00", label="undetermined")
        if letter == "s" and centred:
            axis.plot(times, fit["s_centred"], color="#0072B2", lw=1, ls="-.", label="centred $s_t$")
        axis.axhline(ctm, color="#444444", lw=1, ls="--", label=f"ctm: {ctm:g}")
        axis.set(xscale="log", xlabel="time t (noise level)", ylabel=f"${letter}_t$")
        axis.legend()


def preconditioning(forms: Mapping[str, Coefficients], sigma_min: float, sigma_max: float) -> Figure:
    """Plot f and g minus ctm's against s/t, for jumps from several t; forms: f and g of (t, s), by name."""
    figure, axes = plt.subplots(len(forms), 2, figsize=(10, 3.4 * len(forms)), squeeze=False)
    _forms(axes, forms, sigma_min, sigma_max)
    return figure


@styled
def fitted(fit: Mapping[str, Array], forms: Mapping[str, Coefficients], sigma_min: float, sigma_max: float) -> Figure:
    """Draw `coefficients` above `preconditioning`."""
    figure, axes = plt.subplots(1 + len(forms), 2, figsize=(10, 3.5 * (1 + len(forms))))
    _fit(axes[0], fit, centred=False)
    _forms(axes[1:], forms, sigma_min, sigma_max)
    return figure


def _forms(axes: Any, forms: Mapping[str, Coefficients], sigma_min: float, sigma_max: float) -> None:
    """Draw `preconditioning` on axes [forms, 2]."""
    starts = [sigma_max, *(t for t in (10.0, 2.5, 0.5, 0.1) if sigma_min < t < sigma_max)]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(starts)))
    for (name, form), pair in zip(forms.items(), axes, strict=True):
        for start, colour in zip(starts, colours, strict=True):
            s = torch.logspace(np.log10(sigma_min), np.log10(start), 200, dtype=torch.float64)
            s = s.clamp(sigma_min, start)
            t = torch.full_like(s, start)
            f, g = form(t, s)
            pair[0].plot(s / t, f - s / t, color=colour, label=f"t = {start:g}")
            pair[1].plot(s / t, g - (1 - s / t), color=colour, label=f"t = {start:g}")
        for axis, letter, ctm in zip(pair, "fg", ("s/t", "(1 - s/t)"), strict=True):
            axis.axhline(0, color="#444444", lw=1, ls="--")
            axis.set(xscale="log", xlabel="s / t", ylabel=f"{letter}(t,s) - {ctm}", title=f"{name}: {letter} - ctm's")
        if max(np.ptp(line.get_ydata()) for line in pair[1].get_lines()) > 2:
            pair[1].set_yscale("symlog", linthresh=0.1)  # the forward form's g may reach 1e3 and hide all else
        pair[0].legend()


def own_fits(fits: Mapping[str, Mapping[int, Array]], teacher: Array | None) -> Figure:
    """Plot l_t, s_t and g(t, eps) minus ctm's against t, one row per student. fits: student -> step -> [3, N] (times,
    l_t, s_t); teacher: the teacher's fit, if there is one."""
    titles = ("$l_t$", "$s_t$", r"g(t, $\epsilon$) - (1 - $\epsilon$/t)")
    figure, axes = plt.subplots(len(fits), 3, figsize=(11, 3.1 * len(fits)), squeeze=False)
    for row, (run, by_step) in zip(axes, fits.items(), strict=True):
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(by_step)))
        for (step, fit), colour in zip(by_step.items(), colours, strict=True):
            for axis, values in zip(row, _to_the_end(fit), strict=True):
                axis.plot(fit[0], values, color=colour, lw=1.2, label=f"step {step:,}")
        for axis, values in zip(row, () if teacher is None else _to_the_end(teacher), strict=False):
            axis.plot(teacher[0], values, color="black", ls=":", label="the teacher's")  # type: ignore[index]
        for axis, title, ctm in zip(row, titles, (0.0, -1.0, 0.0), strict=True):
            axis.axhline(ctm, color="#444444", lw=1, ls="--", label="ctm")
            axis.set(xscale="log", xlabel="time t (noise level)", ylabel=title, title=run)
        row[0].legend(fontsize=8)
    return figure


def _to_the_end(fit: Array) -> tuple[Array, Array, Array]:
    """Return l_t, s_t and g(t, eps) minus ctm's at the times of a fit [3, N]."""
    times, l, s = (torch.from_numpy(row) for row in fit)
    end = times.min().expand(len(times))
    g = GeneralizedODE(times, l, s).backward(times, end)[1]
    return fit[1], fit[2], (g - (1 - end / times)).numpy()


def learning_curves(
    scores: pd.DataFrame, runs: Sequence[str], nfes: Sequence[int], measure: str, extractor: str
) -> Figure:
    """Plot a measure against iterations, one panel per number of jumps: mean over seeds, and their range as a band."""
    figure, axes = plt.subplots(1, len(nfes), figsize=(3.6 * len(nfes) + 0.4, 3.8), squeeze=False)
    for axis, nfe in zip(axes[0], nfes, strict=True):
        for run in runs:
            curves = curves_of(scores, run, nfe, measure)
            if curves is None:
                continue
            shown = curves.steps > 0  # scores before training are off the scale of all later ones
            _mean_and_range(axis, curves.steps[shown], curves.values[:, shown], run, line_of(runs, run))
        if measure == "fd":
            # Not the calibration's other rows, which are of fewer images.
            for row in scores[scores.sampler == HEUN].itertuples():
                axis.axhline(row.fd, color="#888888", lw=1, ls=":", label=f"teacher (Heun), N = {row.images:,}")
        axis.set(title=f"NFE {nfe}", xlabel="training iterations")
        _logarithmic(axis)
    axes[0, 0].set_ylabel(measure_label(measure, extractor))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if len(labels) > 6 else len(labels))
    return figure


def _mean_and_range(axis: Axes, x: Array, values: Array, label: str, style: Any) -> None:
    """Draw the mean over seeds of values [seeds, N] as a line, and their range as a band."""
    axis.plot(x, values.mean(0), label=label, **style)
    axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.18, lw=0)


def _logarithmic(axis: Axes) -> None:
    """Set a logarithmic y axis labelled with plain numbers; it stays linear for a range below a factor of 2."""
    low, high = axis.dataLim.intervaly
    if not 0 < 2 * low < high:
        return
    axis.set_yscale("log")
    subs = (1, 2, 5) if high / low > 6 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def training_losses(histories: dict[str, list[pd.DataFrame]], runs: Sequence[str], titles: Mapping[str, str]) -> Figure:
    """Plot the terms of the loss against iterations, mean over seeds. titles: of the terms."""
    terms = [term for term in titles if any(term in table for run in runs for table in histories[run])]
    figure, axes = plt.subplots(1, len(terms), figsize=(5 * len(terms), 3.6), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        for run in runs:
            tables = [table.set_index("step")[term] for table in histories[run] if term in table]
            if tables:
                mean = pd.concat(tables, axis=1).mean(axis=1)
                axis.plot(mean.index, mean, label=run, lw=1, **line_of(runs, run))
        axis.set(xlabel="training iterations", ylabel=titles[term])
        _logarithmic(axis)
        axis.legend()
    return figure


def speed_up_bars(found: Sequence[SpeedUp], runs: Sequence[str], measure: str, extractor: str) -> Figure:
    """Speed-up over the baseline at each number of jumps, with its interval; 1 is the baseline. Wall time is left
    out."""
    rows = [item for item in found if item.measure == measure and item.unit != "seconds"]
    nfes = sorted({item.nfe for item in rows})
    shown = [run for run in runs if any(item.run == run for item in rows)]
    figure, axis = plt.subplots(figsize=(1.6 * max(len(nfes), 2) + 3, 3.6))
    axis.set_yscale("log", base=2)
    ends = [y for item in rows for y in (item.value, item.low, item.high, 0.8, 1.25) if 0 < y < np.inf]
    bottom, top = min(ends) / 1.25, max(ends) * 1.25
    axis.set_ylim(bottom, top)
    for k, run in enumerate(shown):
        for item in (item for item in rows if item.run == run):
            x = nfes.index(item.nfe) + (k - (len(shown) - 1) / 2) * 0.8 / len(shown)
            colour = line_of(runs, run)["color"]
            if not np.isnan(item.value):
                marker = {0.0: "v", np.inf: "^"}.get(item.value, "o")
                axis.plot([x], np.clip([item.value], bottom, top), marker, color=colour, clip_on=False)
            if not np.isnan(item.low):
                axis.vlines(x, max(item.low, bottom), min(item.high, top), color=colour, lw=2, alpha=0.6)
    axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5) if top / bottom > 3 else (1, 1.25, 1.5, 1.75)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.axhline(1, color="#444444", lw=1, ls="--")
    axis.set_xticks(range(len(nfes)), [f"NFE {nfe}" for nfe in nfes])
    axis.set_ylabel("speed-up over the baseline")
    axis.set_title(f"for the same {_short(measure, extractor)}")
    dots = [Line2D([], [], marker="o", ls="", color=line_of(runs, run)["color"], label=run) for run in shown]
    figure.legend(handles=dots, loc="outside right upper")
    return figure


def mu_sweep(
    scores: pd.DataFrame,
    mu: Mapping[str, float],
    others: Sequence[str],
    runs: Sequence[str],
    nfes: Sequence[int],
    extractor: str,
) -> Figure:
    """Plot final FD and KID against mu: one point per seed, a line through the means, one row per number of jumps.

    mu: run -> its mu, rising; others: runs without mu, drawn as lines at their means; runs: the study's students.
    """
    final = scores[(scores.kind == "final") & scores.sampler.isin(OWN_SAMPLERS)]
    figure, axes = plt.subplots(len(nfes), 2, figsize=(9, 3.2 * len(nfes)), squeeze=False)
    for nfe, pair in zip(nfes, axes, strict=True):
        rows = final[final.nfe == nfe]
        for axis, measure in zip(pair, ("fd", "kid"), strict=True):
            swept = rows[rows.run.isin(mu)]
            axis.plot(swept.run.map(mu), swept[measure], "o", mfc="none", color="#0072B2", label="a seed")
            means = swept.groupby(swept.run.map(mu))[measure].mean()
            axis.plot(means.index, means, color="#0072B2", lw=1, label="mean over seeds")
            for run in others:
                style = line_of(runs, run) | {"linestyle": "--"}
                axis.axhline(rows[rows.run == run][measure].mean(), lw=1, label=f"{run}, mean", **style)
            axis.set(title=f"NFE {nfe}", xlabel="$\\mu$", ylabel=measure_label(measure, extractor))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def transport_cost(table: pd.DataFrame, runs: Sequence[str]) -> Figure:
    """Plot transport.csv: cost against t, mean and range over seeds, and the cost of the couplings' pairs."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for run in runs:
        rows = table[(table.kind == "student") & (table.run == run)]
        wide = rows.pivot(index="seed", columns="t", values="cost")
        _mean_and_range(axis, wide.columns.to_numpy(float), wide.to_numpy(float), run, line_of(runs, run))
    pairs = table[table.kind == "pairs"]
    for run, cost, dashes in zip(pairs.run, pairs.cost, ("--", ":", "-.", (0, (1, 4))), strict=False):
        axis.axhline(cost, color="#888888", lw=1, ls=dashes, label=f"pairs of {run}")
    axis.set(xscale="log", xlabel="time t (noise level)", ylabel="$E||f(x_t, t) - z||^2$")
    axis.legend()
    return figure


def toy(arrays: Mapping[str, Array], couplings: Sequence[str]) -> Figure:
    """Plot the toy in the plane: the first seed's paths up to t = 1 (straight beyond), its samples, and the cost."""
    figure, axes = plt.subplots(1, len(couplings) + 1, figsize=(4 * (len(couplings) + 1), 4))
    times, shown = arrays["times"], arrays["times"] <= 1
    for axis, coupling in zip(axes, couplings, strict=False):
        paths = arrays[f"{coupling}_paths"][0][shown]  # [T, n, 2]
        for path in paths.swapaxes(0, 1):
            axis.plot(*path.T, color=line_of(couplings, coupling)["color"], lw=0.6, alpha=0.5)
        axis.plot(*paths[-1].T, "o", ms=3, mfc="none", color="#888888", label=f"t = {times[shown][-1]:.2g}")
        axis.plot(*arrays[f"{coupling}_samples"][0].T, ".", ms=4, color="#009E73", label="one-jump samples")
        axis.plot(*arrays["modes"].T, "x", color="black", label="modes")
        axis.set(title=coupling, aspect="equal")
        _mean_and_range(axes[-1], times, arrays[f"{coupling}_cost"], coupling, line_of(couplings, coupling))
    axes[-1].set(xscale="log", xlabel="time t", ylabel="transport cost $E||x - z||^2$")
    axes[-1].legend()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def discrepancy(table: pd.DataFrame, runs: Sequence[str]) -> Figure:
    """Plot discrepancy.csv: R_t of the couplings against t, +-2 standard errors; runs: the study's."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for run in dict.fromkeys(table.run):
        rows = table[table.run == run]
        if run == "teacher":
            axis.plot(rows.t, rows.discrepancy, color="#888888", ls=":", label="independent noise, by the teacher")
        else:
            _with_errors(axis, rows, "discrepancy", run, runs)
    axis.set(xscale="log", xlabel="time t (noise level)", ylabel="$R_t = E||z - v_t(x_t)||^2$")
    _logarithmic(axis)
    axis.legend()
    return figure


def _with_errors(axis: Axes, rows: pd.DataFrame, name: str, run: str, runs: Sequence[str]) -> None:
    """Plot a column against t with bars of +-2 standard errors."""
    style: Any = line_of(runs, run)
    axis.errorbar(rows.t, rows[name], 2 * rows[f"{name}_se"], label=run, **style)


def plane(table: pd.DataFrame) -> Figure:
    """Plot plane.csv: velocity discrepancy and transport cost of couplings against t, +-2 standard errors."""
    couplings = list(dict.fromkeys(table.coupling))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    labels = ("$R_t = E||z - v_t(x_t)||^2$", "transport cost $E||x - z||^2$")
    for axis, name, label in zip(axes, ("discrepancy", "cost"), labels, strict=True):
        for coupling in couplings:
            _with_errors(axis, table[table.coupling == coupling], name, coupling, couplings)
        axis.set(xscale="log", xlabel="time t", ylabel=label)
    _logarithmic(axes[0])
    axes[0].legend()
    return figure


def loss_limits(table: pd.DataFrame) -> Figure:
    """Plot limit.csv: N^2 times the two losses and their difference against N, with dashed limits."""
    figure, axis = plt.subplots(figsize=(7, 4))
    squared = table.intervals**2
    lines = {
        "$N^2 L_{CT}$": (table.ct, table.ct_limit, "#444444"),
        "$N^2 L_{CD}$": (table.cd, table.cd_limit, "#0072B2"),
        "$N^2 (L_{CT} - L_{CD})$": (table.ct - table.cd, table.ct_limit - table.cd_limit, "#D55E00"),
    }
    for label, (losses, limit, colour) in lines.items():
        axis.plot(table.intervals, squared * losses, marker="o", ms=3, color=colour, label=label)
        axis.axhline(limit.iloc[0], color=colour, lw=1, ls="--")
    axis.set(xscale="log", xlabel="intervals N of the grid", ylabel="$N^2$ times the loss")
    axis.set_xticks(table.intervals, [str(count) for count in table.intervals])
    axis.xaxis.set_minor_formatter(NullFormatter())
    _logarithmic(axis)
    axis.legend()
    return figure


def _short(measure: str, extractor: str) -> str:
    if measure == "alignment":
        return "alignment error"
    return "FID" if extractor.startswith("inception") else "FD (classifier)"
