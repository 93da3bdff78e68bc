"""Stage scores: first a calibration (data against data, teacher against data), then every student."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.arrays import read_array, write_array, write_table
from consistency.errors import UserError
from consistency.features import Statistics, frechet_distance, kernel_distance
from consistency.files import write_json
from consistency.job import Job
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import Card, read_card
from consistency.resources import downloads
from consistency.seeding import generator
from consistency.stages.extractor import open_extractor, read_data_statistics
from consistency.stages.inputs import preconditioning_of, read_dataset, read_ode, read_student, read_teacher
from consistency.stages.samples import StudentSampler, draw, heun_sampler, jump_sampler, prepared, student_samplers
from consistency.study import Study
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.data import to_bytes

COLUMNS = ["study", "kind", "run", "seed", "ema", "step", "sampler", "nfe"]
COLUMNS += ["fd", "kid", "alignment", "images", "extractor"]
#: columns of the calibration; the last two are empty if the study names no published FID
CALIBRATION_COLUMNS = [*COLUMNS, "published", "tolerance"]
Array = np.ndarray
Row = dict[str, Any]


def make_calibration(job: Job, device: torch.device) -> None:
    """Write calibration.csv (data halves; teacher), endpoints.npy (the teacher's ODE endpoints, none without a
    teacher), and their card.

    Raises UserError, and leaves no calibration.csv, if the teacher's FID is not the published one.
    """
    read_card(job, "samples")
    study, samples = job.study, job.samples / "heun.npy"
    images = read_array(samples, "samples")
    scorer = Scorer(job, device, f"calibration {study.name}", len(images))
    scorer.warn_of_singular(study.sampling.count)
    rows = [scorer.halves()]
    ends = np.zeros((0, study.dataset.channels, *[study.dataset.resolution] * 2), np.float32)
    if study.taught:
        teacher = prepared(study, read_teacher(job, device))
        row = scorer.row("calibration", "teacher", "heun", 2 * study.calibration.steps - 1)
        rows.append(row | scorer.against_data([images], len(images)))
        _require_published(job, rows[-1])
        ends = teacher_endpoints(study, teacher)
    write_array(endpoint_file(job), ends)
    inputs = [job.paths.teacher / "teacher.safetensors", samples]
    scorer.write(rows, CALIBRATION_COLUMNS, inputs, [endpoint_file(job)])
    job.paths.measured_calibration.unlink(missing_ok=True)


def make_scores(job: Job, device: torch.device) -> None:
    """Write the score table of one student at each of its EMA rates, and its card: the final samples and, from the
    snapshots, the learning curve."""
    read_card(job, "student")
    read_card(job, "samples")
    study, settings, scores, samplers = job.study, job.student, job.study.scores, student_samplers(job)
    curve_images = len(settings.rates) * len(settings.snapshots) * len(scores.curve_nfe) * scores.curve_count
    scorer = Scorer(job, device, f"scores {job.label}", len(samplers) * study.sampling.count + curve_images)
    endpoints, ode = read_array(endpoint_file(job), "calibration"), read_ode(job, device)
    rows, inputs = [], [endpoint_file(job)]
    for rate in settings.rates:
        student = prepared(study, read_student(job, device, rate))
        scored = StudentScorer(scorer, rate, endpoints, ode)
        own = [sampler for sampler in samplers if sampler.rate == rate]
        rows += [scored.final_row(student, sampler) for sampler in own]
        inputs += [job.weights(rate), *(job.samples / f"{sampler.name}.npy" for sampler in own)]
        for step in settings.snapshots:
            model = prepared(study, read_student(job, device, rate, step))
            rows += [scored.curve_row(model, step, nfe) for nfe in scores.curve_nfe]
            inputs.append(job.weights(rate, step))
    if settings.needs_coefficients:
        inputs.append(job.paths.coefficients / "coefficients.npz")
    scorer.write(rows, COLUMNS, inputs)


def endpoint_file(job: Job) -> Path:
    return job.of().scores.with_name("endpoints.npy")


class Scorer:
    """Maker of score rows, a student's or the calibration's: the extractor, the data's statistics and the card. label,
    total: name and images of the progress."""

    def __init__(self, job: Job, device: torch.device, label: str, total: int) -> None:
        self.job, self.study, self.card = job, job.study, Card(job, "scores")
        self.extractor = open_extractor(job, read_dataset(job), device)
        self.data = read_data_statistics(job)
        self.progress = Progress(label, total)

    def row(self, kind: str, run: str, sampler: str, nfe: int, step: int = 0, rate: float | None = None) -> Row:
        """Return the part of a row that is known before the measurement."""
        place = {"study": self.study.name, "kind": kind, "run": run, "seed": self.job.seed, "ema": rate, "step": step}
        return place | {"sampler": sampler, "nfe": nfe, "extractor": self.extractor.name}

    def distances(self, a: Statistics, b: Statistics) -> dict[str, float]:
        """Return Frechet and kernel distance."""
        scores = self.study.scores
        kid = kernel_distance(a, b, scores.kid_subsets, scores.kid_subset_size)
        return {"fd": frechet_distance(a, b), "kid": kid}

    def against_data(self, chunks: Iterable[Array], count: int) -> dict[str, float]:
        """Measure the distances of `count` uint8 images, which come in chunks [n, H, W, C], to the data."""
        pieces = self.progress.counted(self.extractor.pieces(chunks))
        images = Statistics.gather(pieces, count, self.study.scores.kid_images)
        return self.distances(images, self.data) | {"images": count}

    def halves(self) -> Row:
        """Compare one half of the data's kept features with the other."""
        features = self.data.features
        # The halves must not depend on the dataset's order.
        order = torch.randperm(len(features), generator=generator(0, "halves")).numpy()
        half = len(order) // 2
        first, second = (Statistics.of(features[part]) for part in (order[:half], order[half:]))
        row = self.row("calibration", "data", "halves", 0)
        return row | self.distances(second, first) | {"images": half}

    def warn_of_singular(self, samples: int) -> None:
        """Warn if there are too few images for the covariance of the features."""
        features, half = len(self.data.mean), len(self.data.features) // 2
        counts = {"sampling.count": samples, "scores.curve_count": self.study.scores.curve_count, "data halves": half}
        few = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count <= features)
        if few:
            print(
                f"warning: fewer images than the {features:,} features ({few}): their covariance is singular, and the "
                "Frechet distance larger than that of more images; compare it at equal numbers only",
                flush=True,
            )

    def write(self, rows: list[Row], columns: list[str], inputs: list[Path], others: Sequence[Path] = ()) -> None:
        """Write the table and its card; others: files written beside it. The extractor's files are always inputs."""
        self.progress.close()
        write_table(self.job.scores, rows, columns)
        inception = self.study.scores.extractor == "inception"
        names = ["features.npy", "statistics.npz", *([] if inception else ["classifier.safetensors"])]
        inputs = [*inputs, *(self.job.paths.extractor / name for name in names)]
        self.card.write(inputs, [self.job.scores, *others], downloads=downloads(self.job, "extractor"))


@dataclass
class StudentScorer:
    """A student's rows at one EMA rate (None: the main one)."""

    scorer: Scorer
    rate: float | None
    endpoints: Array
    ode: GeneralizedODE | None

    def __post_init__(self) -> None:
        self.job, self.settings = self.scorer.job, self.scorer.job.student

    def final_row(self, model: Denoiser, sampler: StudentSampler) -> Row:
        """Score one sampler's samples at the end of training."""
        images = read_array(self.job.samples / f"{sampler.name}.npy", f"samples{self.job.options}")
        row = self._row("final", self.settings.steps, sampler.nfe, sampler.gamma)
        row |= self.scorer.against_data([images], len(images))
        if sampler.gamma is None and self._aligned(sampler.nfe):
            error = _AlignmentError(self.endpoints)
            for rows, batch in self._drawn(model, sampler.nfe, len(self.endpoints)):
                error.add(rows, batch)
            row["alignment"] = error.mean
        return row

    def curve_row(self, model: Denoiser, step: int, nfe: int) -> Row:
        """Score one snapshot at one number of jumps; images are discarded once they are measured."""
        error, count = _AlignmentError(self.endpoints), self.job.study.scores.curve_count

        def chunks() -> Iterator[Array]:
            for rows, batch in self._drawn(model, nfe, count):
                error.add(rows, batch)
                yield to_bytes(batch)

        row = self._row("curve", step, nfe, None) | self.scorer.against_data(chunks(), count)
        return row | {"alignment": error.mean} if self._aligned(nfe) else row

    def _row(self, kind: str, step: int, nfe: int, gamma: float | None) -> Row:
        sampler = "multistep" if self.settings.to_the_end else "jumps" if gamma is None else f"gamma={gamma}"
        rate = self.settings.ema_rate if self.rate is None else self.rate
        return self.scorer.row(kind, str(self.job.run), sampler, nfe, step, rate)

    def _aligned(self, nfe: int) -> bool:
        """Tell whether the samples depend on their first noise alone, as do the teacher's endpoints, if any."""
        return len(self.endpoints) > 0 and (nfe == 1 or not self.settings.to_the_end)

    def _drawn(self, model: Denoiser, nfe: int, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
        jumps = jump_sampler(self.job, model, preconditioning_of(self.settings, model, self.ode), nfe)
        return draw(self.job.study, model, jumps, count)


class _AlignmentError:
    """Mean squared error to the teacher's ODE endpoints from the same noise, per pixel in [-1, 1] units."""

    def __init__(self, endpoints: Array) -> None:
        self.teacher_endpoints, self._sum = endpoints, 0.0

    def add(self, rows: slice, images: torch.Tensor) -> None:
        """Add the images of those rows, as far as there are endpoints."""
        there = self.teacher_endpoints[rows.start : rows.stop]
        if len(there):
            self._sum += float(np.square(images[: len(there)].double().cpu().numpy() - there).sum())

    @property
    def mean(self) -> float:
        """The error, once all images have been added."""
        return self._sum / self.teacher_endpoints.size


def _require_published(job: Job, row: Row) -> None:
    """Add the published FID and its tolerance to the row. Raises UserError if the teacher's FID is not within it."""
    published, tolerance = job.study.calibration.published_fid, job.study.calibration.tolerance
    if published is None:
        return
    row |= {"published": published, "tolerance": tolerance}
    if abs(row["fd"] - published) <= tolerance:
        return
    measured = job.paths.measured_calibration
    write_json(measured, row)
    job.scores.unlink(missing_ok=True)
    job.card("scores").unlink(missing_ok=True)
    raise UserError(
        f"the teacher's FID is {row['fd']:.4g}, not the published {published:g} within {tolerance:g} "
        f"(calibration.published_fid, calibration.tolerance), from {row['images']:,} images in clean-fid's mode "
        f"{job.study.scores.mode}. Usual causes: data prepared in another way, another scores.mode, sampling.count "
        f"below 50,000, another sampler. The samples are kept and {measured} says what was measured: mend the cause or "
        "raise the tolerance, and run the same command again"
    )


def teacher_endpoints(study: Study, teacher: Denoiser) -> Array:
    """Draw the teacher's ODE endpoints at eps of the first alignment_count seeds, float32 [n, C, H, W]."""
    sampler = heun_sampler(study, teacher, study.scores.alignment_nodes)
    batches = draw(study, teacher, sampler, study.scores.alignment_count)
    return torch.cat([batch.cpu() for _, batch in batches]).numpy()
