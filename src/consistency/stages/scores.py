"""Stage scores: first a calibration (data against data, teacher against data), then every student."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.errors import UserError
from consistency.features import Statistics, frechet_distance, kernel_distance
from consistency.files import write_json
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import read_card, write_card
from consistency.resources import downloads
from consistency.seeding import generator
from consistency.stages.extractor import open_extractor, read_data_statistics
from consistency.stages.inputs import (
    preconditioning_of,
    read_array,
    read_dataset,
    read_ode,
    read_student,
    read_teacher,
    write_array,
    write_table,
)
from consistency.stages.samples import StudentSampler, draw, heun_sampler, jump_sampler, prepared, student_samplers
from consistency.study import Study
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.data import to_bytes

COLUMNS = ["study", "kind", "run", "seed", "ema", "step", "sampler", "nfe"]
COLUMNS += ["fd", "kid", "alignment", "images", "extractor"]
#: the calibration's; the last two are empty where the study names no published FID
CALIBRATION_COLUMNS = [*COLUMNS, "published", "tolerance"]
Array = np.ndarray
Row = dict[str, Any]


def make_calibration(study: Study, layout: Layout, device: torch.device) -> None:
    """Write calibration.csv (data halves; teacher), endpoints.npy, the teacher's ODE endpoints, none without a teacher,
    and their card.

    Raises UserError, and leaves no calibration.csv, when the teacher's FID is not the published one.
    """
    read_card(layout.samples(None, None), study, "samples")
    images = read_array(layout.samples(None, None) / "heun.npy", "samples")
    scorer = _Scorer(study, layout, device, None, None, len(images))
    scorer.warn_of_singular(study.sampling.count)
    rows = [scorer.halves()]
    ends = np.zeros((0, study.dataset.channels, *[study.dataset.resolution] * 2), np.float32)
    if study.taught:
        teacher = prepared(study, read_teacher(study, layout, device))
        row = scorer.row("calibration", "teacher", "heun", 2 * study.calibration.steps - 1)
        rows.append(row | scorer.against_data([images], len(images)))
        _require_published(study, layout, rows[-1])
        ends = _endpoints(study, teacher)
    endpoints = layout.scores(None, None).with_name("endpoints.npy")
    write_array(endpoints, ends)
    inputs = [layout.teacher / "teacher.safetensors", layout.samples(None, None) / "heun.npy"]
    scorer.write(rows, CALIBRATION_COLUMNS, inputs, [endpoints])
    layout.measured_calibration.unlink(missing_ok=True)


def make_scores(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> None:
    """Write the score table of one student, for each of its EMA rates, and its card: its samples, and its learning
    curve from the snapshots."""
    read_card(layout.student(run, seed), study, "student", run, seed)
    read_card(layout.samples(run, seed), study, "samples", run, seed)
    settings, scores = study.students[run], study.scores
    samplers, rates = student_samplers(study, run), (None, *settings.evaluation_ema)
    steps = range(0, settings.steps + 1, settings.snapshot_every)
    curve_images = len(rates) * len(steps) * len(scores.curve_nfe) * scores.curve_count
    scorer = _Scorer(study, layout, device, run, seed, len(samplers) * study.sampling.count + curve_images)
    of_teacher = layout.scores(None, None).with_name("endpoints.npy")
    endpoints, ode = read_array(of_teacher, "calibration"), read_ode(study, layout, run, device)
    rows, inputs = [], [of_teacher]
    for rate in rates:
        student = prepared(study, read_student(study, layout, run, seed, device, rate))
        scored = _Student(scorer, run, rate, endpoints, ode)
        own = [sampler for sampler in samplers if sampler.rate == rate]
        rows += [scored.final_row(student, sampler) for sampler in own]
        inputs += [layout.student_file(run, seed, rate)]
        inputs += [layout.samples(run, seed) / f"{sampler.name}.npy" for sampler in own]
        for step in steps:
            model = read_student(study, layout, run, seed, device, rate, step)
            rows += [scored.curve_row(prepared(study, model), step, nfe) for nfe in scores.curve_nfe]
            inputs.append(layout.student_file(run, seed, rate, step))
    if settings.needs_coefficients:
        inputs.append(layout.coefficients / "coefficients.npz")
    scorer.write(rows, COLUMNS, inputs)


class _Scorer:
    """The extractor, the data's statistics, and how rows are made of them: a student's, or without a run the
    calibration's. total: images of the progress."""

    def __init__(
        self, study: Study, layout: Layout, device: torch.device, run: str | None, seed: int | None, total: int
    ) -> None:
        self.study, self.layout, self.run, self.seed, self.started = study, layout, run, seed, time.time()
        self.extractor = open_extractor(study, layout, read_dataset(study, layout), device)
        self.data = read_data_statistics(study, layout)
        label = f"calibration {study.name}" if run is None else f"scores {run} seed {seed}"
        self.progress = Progress(label, total)

    def row(self, kind: str, run: str, sampler: str, nfe: int, step: int = 0, rate: float | None = None) -> Row:
        """What a row says before anything is measured."""
        place = {"study": self.study.name, "kind": kind, "run": run, "seed": self.seed, "ema": rate, "step": step}
        return place | {"sampler": sampler, "nfe": nfe, "extractor": self.extractor.name}

    def distances(self, a: Statistics, b: Statistics) -> dict[str, float]:
        """Frechet and kernel distance."""
        scores = self.study.scores
        kid = kernel_distance(a, b, scores.kid_subsets, scores.kid_subset_size)
        return {"fd": frechet_distance(a, b), "kid": kid}

    def against_data(self, chunks: Iterable[Array], count: int) -> dict[str, float]:
        """The distances of `count` uint8 images, which come in chunks [n, H, W, C], to the data."""
        pieces = self._counted(self.extractor.pieces(chunks))
        images = Statistics.gather(pieces, count, self.study.scores.kid_images)
        return self.distances(images, self.data) | {"images": count}

    def _counted(self, pieces: Iterable[Array]) -> Iterator[Array]:
        for piece in pieces:
            yield piece
            self.progress.update(len(piece))

    def halves(self) -> Row:
        """One half of the data's kept features against the other."""
        features = self.data.features
        # Which half an image falls into must not follow the dataset's order.
        order = torch.randperm(len(features), generator=generator(0, "halves")).numpy()
        half = len(order) // 2
        first, second = (Statistics.of(features[part]) for part in (order[:half], order[half:]))
        row = self.row("calibration", "data", "halves", 0)
        return row | self.distances(second, first) | {"images": half}

    def warn_of_singular(self, samples: int) -> None:
        """Say so where there are too few images for the covariance of the features."""
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
        """The table, and its card; others: what was written beside it. All are measured with the extractor's files."""
        self.progress.close()
        path = self.layout.scores(self.run, self.seed)
        write_table(path, rows, columns)
        inception = self.study.scores.extractor == "inception"
        names = ["features.npy", "statistics.npz", *([] if inception else ["classifier.safetensors"])]
        write_card(
            self.study,
            self.layout,
            "scores",
            self.run,
            self.seed,
            started=self.started,
            inputs=[*inputs, *(self.layout.extractor / name for name in names)],
            outputs=[path, *others],
            downloads=downloads(self.study, "extractor"),
        )


@dataclass
class _Student:
    """A student's rows at one EMA rate (None: the main one)."""

    scorer: _Scorer
    run: str
    rate: float | None
    endpoints: Array
    ode: GeneralizedODE | None

    def __post_init__(self) -> None:
        self.study = self.scorer.study
        self.settings = self.study.students[self.run]
        self.multistep = self.settings.to_the_end

    def final_row(self, model: Denoiser, sampler: StudentSampler) -> Row:
        """One sampler's samples at the end of training."""
        path = self.scorer.layout.samples(self.run, self.scorer.seed) / f"{sampler.name}.npy"
        images = read_array(path, f"samples --run {self.run} --seed {self.scorer.seed}")
        row = self._row("final", self.settings.steps, sampler.nfe, sampler.gamma)
        row |= self.scorer.against_data([images], len(images))
        if sampler.gamma is None and self._aligned(sampler.nfe):
            error = _AlignmentError(self.endpoints)
            for rows, batch in self._drawn(model, sampler.nfe, len(self.endpoints)):
                error.add(rows, batch)
            row["alignment"] = error.mean
        return row

    def curve_row(self, model: Denoiser, step: int, nfe: int) -> Row:
        """One snapshot at one number of jumps; every image is let go of once it is measured."""
        error, count = _AlignmentError(self.endpoints), self.study.scores.curve_count

        def chunks() -> Iterator[Array]:
            for rows, batch in self._drawn(model, nfe, count):
                error.add(rows, batch)
                yield to_bytes(batch)

        row = self._row("curve", step, nfe, None) | self.scorer.against_data(chunks(), count)
        return row | {"alignment": error.mean} if self._aligned(nfe) else row

    def _row(self, kind: str, step: int, nfe: int, gamma: float | None) -> Row:
        sampler = "multistep" if self.multistep else "jumps" if gamma is None else f"gamma={gamma}"
        rate = self.settings.ema_rate if self.rate is None else self.rate
        return self.scorer.row(kind, self.run, sampler, nfe, step, rate)

    def _aligned(self, nfe: int) -> bool:
        """Whether the samples come from their first noise alone, as the teacher's endpoints do, if there are any."""
        return len(self.endpoints) > 0 and (nfe == 1 or not self.multistep)

    def _drawn(self, model: Denoiser, nfe: int, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
        preconditioning = preconditioning_of(self.settings, model, self.ode)
        jumps = jump_sampler(self.study, self.run, model, preconditioning, nfe)
        return draw(self.study, model, jumps, count)


class _AlignmentError:
    """Mean squared error to the teacher's ODE endpoints from the same noise, per pixel in [-1, 1] units."""

    def __init__(self, endpoints: Array) -> None:
        self._endpoints, self._sum = endpoints, 0.0

    def add(self, rows: slice, images: torch.Tensor) -> None:
        """Count the images of those rows, as far as there are endpoints."""
        there = self._endpoints[rows.start : rows.stop]
        if len(there):
            self._sum += float(np.square(images[: len(there)].double().cpu().numpy() - there).sum())

    @property
    def mean(self) -> float:
        """The error, once all have been added."""
        return self._sum / self._endpoints.size


def _require_published(study: Study, layout: Layout, row: Row) -> None:
    """Note in the row what the study says was published. Raises UserError if the teacher's FID is not that."""
    published, tolerance = study.calibration.published_fid, study.calibration.tolerance
    if published is None:
        return
    row |= {"published": published, "tolerance": tolerance}
    if abs(row["fd"] - published) <= tolerance:
        return
    measured = layout.measured_calibration
    write_json(measured, row)
    layout.scores(None, None).unlink(missing_ok=True)
    layout.card("scores").unlink(missing_ok=True)
    raise UserError(
        f"the teacher's FID is {row['fd']:.4g}, not the published {published:g} within {tolerance:g} "
        f"(calibration.published_fid, calibration.tolerance), from {row['images']:,} images in clean-fid's mode "
        f"{study.scores.mode}. Usual causes: data prepared in another way, another scores.mode, sampling.count below "
        f"50,000, another sampler. The samples are kept and {measured} says what was measured: mend the cause or "
        "raise the tolerance, and run the same command again"
    )


def _endpoints(study: Study, teacher: Denoiser) -> Array:
    """The teacher's ODE endpoints at eps of the first alignment_count seeds, float32 [n, C, H, W]."""
    sampler = heun_sampler(study, teacher, study.scores.alignment_nodes)
    batches = draw(study, teacher, sampler, study.scores.alignment_count)
    return torch.cat([batch.cpu() for _, batch in batches]).numpy()
