"""The figures of a report and their captions, which state N and the seeds."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from consistency.base.arrays import read_array, read_arrays, read_table
from consistency.base.files import require_output
from consistency.config.job import Job
from consistency.config.measures import Flows
from consistency.config.paths import sampler_name
from consistency.config.student import Student
from consistency.config.study import Study
from consistency.evaluation.flows import PLANE_BATCH, TOYS
from consistency.evaluation.forecast import forecast
from consistency.nets.checkpoint import load_denoiser
from consistency.provenance.card import read_card
from consistency.provenance.graph import shown_fits
from consistency.provenance.inputs import read_coefficients, read_dataset, read_fit
from consistency.report import figures
from consistency.report.results import TEXT, Results
from consistency.report.wording import varied, what_of
from consistency.theory.preconditioning import FORMS, build_preconditioning


@dataclass(frozen=True)
class Picture:
    """A figure of the report: name, chapter, caption and the content of its two files."""

    name: str
    chapter: str
    caption: str
    png: bytes
    svg: bytes

    @classmethod
    def of(cls, name: str, chapter: str, caption: str, figure: Figure) -> "Picture":
        """Render a figure and free it."""
        png, svg = figures.drawn(figure, "png"), figures.drawn(figure, "svg")
        figures.close(figure)
        return cls(name, chapter, caption, png, svg)


@figures.styled
def draw_pictures(job: Job, results: Results, histories: dict[str, list[pd.DataFrame]]) -> list[Picture]:
    """Draw every figure of the report; captions state N and the seeds."""
    study, extractor, scores, found = job.study, results.extractor, results.main, results.found
    runs = list(study.students)
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''} ({', '.join(map(str, study.seeds))})"
    count = study.scores.curve_count
    pictures = [_samples_picture(job)]
    if study.needs_coefficients:
        pictures += _coefficient_pictures(job)
    if study.with_own_fit:
        pictures.append(_own_fits_picture(job))
    # The paper on flows gives KID beside FID.
    for measure in ("fd", *(["kid"] if study.coupled else []), "alignment"):
        nfes = [nfe for nfe in study.scores.curve_nfe if scores[scores.nfe == nfe][measure].notna().any()]
        if not nfes:
            continue
        images = study.scores.alignment_count if measure == "alignment" else count
        caption = (
            f"{figures.measure_label(measure, extractor)} against training iterations: mean over {seeds}, band from "
            f"the lowest to the highest seed, N = {images} images a point. Step 0 is left out."
        )
        figure = figures.learning_curves(scores, runs, nfes, measure, extractor)
        pictures.append(Picture.of(f"curves_{measure}", "curves", caption, figure))
    for measure in dict.fromkeys(item.measure for item in found):
        images = count if measure == "fd" else study.scores.alignment_count
        caption = (
            f"Speed-up over the baseline for the same {what_of(measure, extractor)}, {seeds}, N = {images}. "
            f"{varied(study)} A bar that leaves the picture has no end; triangles lie outside what the curves cover."
        )
        bars = figures.speed_up_bars(found, runs, measure, extractor)
        pictures.append(Picture.of(f"speedup_{measure}", "speedup", caption, bars))
    if study.mu_sweep:
        pictures.append(_mu_picture(study, results, seeds))
    if study.flows:
        pictures += _flow_pictures(job, study.flows, seeds)
    titles = {term: title for student in study.students.values() for term, title in student.terms.items()}
    caption = f"The terms of the training loss, mean over {seeds} and over the steps between two lines of the history."
    pictures.append(Picture.of("losses", "curves", caption, figures.training_losses(histories, runs, titles)))
    return pictures


def read_own_fits(job: Job) -> dict[str, dict[int, np.ndarray]]:
    """Read the coefficients that students fitted themselves, by the first snapshot that has them: student -> step ->
    [3, N] (times, l_t, s_t). Raises UserError if a snapshot is missing."""
    fits: dict[str, dict[int, np.ndarray]] = {}
    for name, paths in shown_fits(job).items():
        kept = fits.setdefault(name, {})
        for step, path in paths.items():
            model, _ = load_denoiser(require_output(path, f"student{job.of(name, job.study.seeds[0]).options}"))
            fit = model.fit.numpy()
            if not kept or not np.array_equal(fit, list(kept.values())[-1]):
                kept[step] = fit
    return fits


def _own_fits_picture(job: Job) -> Picture:
    study, teacher = job.study, None
    if study.needs_coefficients:
        arrays = read_coefficients(job)
        teacher = np.stack([arrays[name] for name in ("times", "l", "s")])
    caption = (
        "l_t and s_t that students carry themselves, and what follows for g in jumps to the end, by the first snapshot "
        f"that has them (seed {study.seeds[0]}). Step 0: of the Gaussian with the data's mean and covariance; later: "
        f"of the student's own average, N = {study.coefficients.samples} noised images at "
        f"{study.coefficients.times} times."
    )
    return Picture.of("own_fits", "coefficients", caption, figures.own_fits(read_own_fits(job), teacher))


def _samples_picture(job: Job) -> Picture:
    study, seed, data = job.study, job.study.seeds[0], read_dataset(job)
    picks = np.linspace(0, len(data) - 1, 16).astype(int)
    rows = [("data", data.images[picks])]
    if study.taught:
        rows.append(("teacher", read_array(job.samples / "heun.npy", "samples")))
    for nfe in study.report.grid_nfe:
        for name in study.students:
            student = job.of(name, seed)
            images = read_array(student.samples / f"{sampler_name(nfe)}.npy", f"samples{student.options}")
            rows.append((f"{name}, NFE {nfe}", images))
    teacher = f"Heun{' with churn' if study.calibration.churn else ''}, NFE {2 * study.calibration.steps - 1}"
    first = study.sampling.first_seed
    reference = f"the teacher ({teacher}) and " if study.taught else ""
    caption = (
        f"Images of seeds {first} to {first + 15}, below the first row one noise a column: {reference}"
        f"every student (training seed {seed}). First row: 16 training images, for comparison."
    )
    return Picture.of("samples", "samples", caption, figures.sample_grid(rows))


def _mu_picture(study: Study, results: Results, seeds: str) -> Picture:
    runs = list(study.students)
    transported = [name for name in runs if study.coupled[name].coupling == "ot"]
    dashed = f" Dashed: {', '.join(transported)}, mean." if transported else ""
    caption = (
        "Scores at the end of training against mu, the probability that gc replaces an image by a generated one; mu 0 "
        f"is ic. A point a seed, line: the mean over {seeds}, N = {study.sampling.count} images.{dashed}"
    )
    figure = figures.mu_sweep(results.main, study.mu_sweep, transported, runs, study.report.grid_nfe, results.extractor)
    return Picture.of("mu_sweep", "mu", caption, figure)


def _flow_pictures(job: Job, settings: Flows, seeds: str) -> list[Picture]:
    study, folder = job.study, job.paths.flows
    tables = [read_table(folder / f"{name}.csv", "flows", TEXT) for name in ("transport", "plane", "limit")]
    (transports, planes, limits), toys = tables, read_arrays(folder / "toy.npz", "flows")
    count = min(settings.images, len(read_dataset(job)))
    transport = (
        "Transport cost of each student's average: squared distance, summed over pixels, between the noise z and "
        f"where the student goes from x + t z; mean over {seeds}, band from the lowest to the highest, N = {count} "
        "images with independent noise for all. Grey: the pairs of a coupling themselves, which know no t."
    )
    own = ", ".join(map(str, settings.toy_seeds))
    toy = (
        f"Two Gaussians in the plane, learnt with {settings.toy_steps:,} steps: paths x_t of N = 64 pairs up to t = 1, "
        "straight with ic and bent by the generator with gc (mu 1), and samples in one jump (seed "
        f"{settings.toy_seeds[0]}); right: transport cost of the pairs that training meets, N = 2,048, mean and range "
        f"over seed{'s' if len(settings.toy_seeds) > 1 else ''} {own}."
    )
    measured = (
        "Velocity discrepancy and transport cost of the couplings on the same two Gaussians; gc (mu 1) with the exact "
        f"endpoint, ot in batches of {PLANE_BATCH}. 4 times N = {settings.pairs:,} pairs, seed {settings.seed}; bars: "
        "two standard errors. In so few dimensions ot is nearly optimal; on images it is not."
    )
    limit = (
        "The theorem on the closed-form mixture, alpha = 2: losses of consistency training and distillation on grids "
        "of N intervals, times N^2, and (dashed) the limits. The difference does not vanish. By quadrature: "
        f"no seed, N = 10 to {int(limits.intervals.max())}."
    )
    figure = figures.transport_cost(transports, list(study.coupled))
    pictures = [Picture.of("transport_cost", "flows", transport, figure)]
    if settings.discrepancy:
        found = read_table(folder / "discrepancy.csv", "flows", TEXT)
        trained = (
            f"Velocity discrepancy of the couplings that students (seed {study.seeds[0]}) met at the end of their "
            f"training, by a denoiser each of {settings.denoiser_steps:,} steps, N = {count} of the images that it was "
            f"trained on; bars: two standard errors. A denoiser trained too briefly overstates R_t"
            f"{': compare ic with the teacher (dotted)' if study.taught else ''}."
        )
        pictures.append(Picture.of("discrepancy", "flows", trained, figures.discrepancy(found, list(study.students))))
    return [
        *pictures,
        Picture.of("toy", "flows", toy, figures.toy(toys, TOYS)),
        Picture.of("plane", "flows", measured, figures.plane(planes)),
        Picture.of("loss_limits", "flows", limit, figures.loss_limits(limits)),
    ]


def _coefficient_pictures(job: Job) -> list[Picture]:
    fit, study, settings = read_coefficients(job), job.study, job.study.coefficients
    forms, centred = {}, False
    for name, student in study.students.items():
        if student.needs_coefficients and (label := _form(student)) not in forms:
            centred |= FORMS[student.preconditioning].centred
            used = read_fit(job.of(name, study.seeds[0]))
            assert used is not None
            shape = (study.dataset.channels, *[study.dataset.resolution] * 2)
            ode = used.ode(shape, "cpu")
            forms[label] = build_preconditioning(student.preconditioning, 1.0, ode, student.theta).coefficients
    measured = read_card(job, "coefficients")["measured"]
    unknown = int((~fit["determined"].astype(bool)).sum())
    note = f"; {unknown} times do not determine s_t" if unknown else ""
    caption = (
        f"l_t and s_t fitted from the teacher at {settings.times} times, N = {measured['images']} noised images each, "
        f"{settings.probes} probes, fit seed {settings.seed}; band: two standard errors{note}. "
        "Dashed: the values that are ctm."
    )
    expected = forecast(fit, read_dataset(job).facts["sigma_data"], study.noise, study.sampling.nfe)
    pair = (
        "f and g of the fitted preconditioning minus ctm's, for jumps from t to s. "
        f"From the fit above (N = {measured['images']}, seed {settings.seed}); standard error of f and g at all jumps "
        f"of the students, at most {measured['error']:.1e} (relative where they are above 1). "
        f"A rule of thumb, known before any training: {' '.join(expected)}"
    )
    figure = figures.preconditioning(forms, study.noise.sigma_min, study.noise.sigma_max)
    return [
        Picture.of("coefficients", "coefficients", caption, figures.coefficients(fit, centred)),
        Picture.of("preconditioning", "coefficients", pair, figure),
    ]


def _form(student: Student) -> str:
    """Name a student's fitted preconditioning, with its theta if that is a setting."""
    midpoint = FORMS[student.preconditioning].theta is None
    return f"{student.preconditioning}, theta {student.theta:g}" if midpoint else student.preconditioning
