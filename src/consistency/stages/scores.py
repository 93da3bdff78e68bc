"""Stage scores: first a calibration (data against data, teacher against data), then every student."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from consistency.errors import UserError
from consistency.features import INCEPTION, Statistics, frechet_distance, kernel_distance
from consistency.files import write_json, write_with
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import read_card, write_card
from consistency.seeding import generator
from consistency.stages.extractor import open_extractor, read_data_statistics
from consistency.stages.inputs import (
    preconditioning_of,
    read_array,
    read_dataset,
    read_ode,
    read_student,
    read_teacher,
    student_file,
    write_array,
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
    started = time.time()
    read_card(layout.samples(None, None), study, "samples")
    images = read_array(layout.samples(None, None) / "heun.npy", "samples")
    scorer = _Scorer(study, layout, device, f"calibration {study.name}", len(images))
    scorer.warn_of_singular(study.sampling.count)
    rows = [scorer.halves()]
    ends = np.zeros((0, study.dataset.channels, *[study.dataset.resolution] * 2), np.float32)
    if study.taught:
        teacher = prepared(study, read_teacher(study, layout, device))
        nfe = 2 * study.calibration.steps - 1
        row = scorer.row("calibration", "teacher", None, None, 0, "heun", nfe)
        rows.append(row | scorer.against_data([images], len(images)))
        _require_published(study, layout, rows[-1])
        ends = _endpoints(study, teacher)
    scorer.progress.close()
    path = layout.scores(None, None)
    endpoints = path.with_name("endpoints.npy")
    write_array(endpoints, ends)
    _write(path, rows, CALIBRATION_COLUMNS)
    inputs = [layout.teacher / "teacher.safetensors", layout.samples(None, None) / "heun.npy"]
    _write_card(study, layout, None, None, started, inputs, [path, endpoints])
    layout.measured_calibration.unlink(missing_ok=True)


def make_scores(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> None:
    """Write the score table of one student, for each of its EMA rates, and its card: its samples, and its learning
    curve from the snapshots."""
    started = time.time()
    read_card(layout.student(run, seed), study, "student", run, seed)
    read_card(layout.samples(run, seed), study, "samples", run, seed)
    settings, scores = study.students[run], study.scores
    samplers, rates = student_samplers(study, run), (None, *settings.evaluation_ema)
    steps = range(0, settings.steps + 1, settings.snapshot_every)
    curve_images = len(rates) * len(steps) * len(scores.curve_nfe) * scores.curve_count
    total = len(samplers) * study.sampling.count + curve_images
    scorer = _Scorer(study, layout, device, f"scores {run} seed {seed}", total)
    of_teacher = layout.scores(None, None).with_name("endpoints.npy")
    endpoints, ode = read_array(of_teacher, "calibration"), read_ode(study, layout, run, device)
    rows, inputs = [], [of_teacher]
    for rate in rates:
        student = prepared(study, read_student(study, layout, run, seed, device, rate))
        scored = _Student(scorer, run, seed, rate, endpoints, ode)
        own = [sampler for sampler in samplers if sampler.rate == rate]
        rows += [scored.final_row(student, sampler) for sampler in own]
        inputs += [layout.student_file(run, seed, rate)]
        inputs += [layout.samples(run, seed) / f"{sampler.name}.npy" for sampler in own]
        for step in steps:
            model = read_student(study, layout, run, seed, device, rate, step)
            rows += [scored.curve_row(prepared(study, model), step, nfe) for nfe in scores.curve_nfe]
            inputs.append(student_file(layout, run, seed, rate, step))
    scorer.progress.close()
    if settings.needs_coefficients:
        inputs.append(layout.coefficients / "coefficients.npz")
    table = layout.scores(run, seed)
    _write(table, rows, COLUMNS)
    _write_card(study, layout, run, seed, started, inputs, [table])


def _write_card(
    study: Study,
    layout: Layout,
    run: str | None,
    seed: int | None,
    started: float,
    inputs: list[Path],
    outputs: list[Path],
) -> None:
    """The card of scores; every one is measured with the extractor's files too."""
    inception = study.scores.extractor == "inception"
    names = ["features.npy", "statistics.npz", *([] if inception else ["classifier.safetensors"])]
    write_card(
        study,
        layout,
        "scores",
        run=run,
        seed=seed,
        started=started,
        inputs=[*inputs, *(layout.extractor / name for name in names)],
        outputs=outputs,
        downloads=[INCEPTION] if inception else [],
    )


class _Scorer:
    """The extractor, the data's statistics, and how a row is made of them. total: images of the progress."""

    def __init__(self, study: Study, layout: Layout, device: torch.device, label: str, total: int) -> None:
        self.study, self.layout = study, layout
        self.extractor = open_extractor(study, layout, read_dataset(study, layout), device)
        self.data = read_data_statistics(study, layout)
        self.progress = Progress(label, total)

    def row(self, kind: str, run: str, seed: int | None, rate: float | None, step: int, sampler: str, nfe: int) -> Row:
        """What a row says before anything is measured."""
        place = {"study": self.study.name, "kind": kind, "run": run, "seed": seed, "ema": rate, "step": step}
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
            self.progress.advance(len(piece))

    def halves(self) -> Row:
        """One half of the data's kept features against the other."""
        features = self.data.features
        # Which half an image falls into must not follow the dataset's order.
        order = torch.randperm(len(features), generator=generator(0, "halves")).numpy()
        half = len(order) // 2
        first, second = (Statistics.of(features[part]) for part in (order[:half], order[half:]))
        row = self.row("calibration", "data", None, None, 0, "halves", 0)
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


@dataclass
class _Student:
    """A student's rows at one EMA rate (None: the main one)."""

    scorer: _Scorer
    run: str
    seed: int
    rate: float | None
    endpoints: Array
    ode: GeneralizedODE | None

    def __post_init__(self) -> None:
        self.study = self.scorer.study
        self.settings = self.study.students[self.run]
        self.multistep = self.settings.to_the_end

    def final_row(self, model: Denoiser, sampler: StudentSampler) -> Row:
        """One sampler's samples at the end of training."""
        path = self.scorer.layout.samples(self.run, self.seed) / f"{sampler.name}.npy"
        images = read_array(path, f"samples --run {self.run} --seed {self.seed}")
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
        return self.scorer.row(kind, self.run, self.seed, rate, step, sampler, nfe)

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


def _write(path: Path, rows: list[Row], columns: list[str]) -> None:
    table = pd.DataFrame(rows).reindex(columns=columns).astype({"seed": "Int64"})
    write_with(path, lambda temporary: table.to_csv(temporary, index=False))
