"""Measurements of what a coupling does to the flow: on the study's images, in the plane and in closed form (GC)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.base.progress import Progress
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.measures import Flows
from consistency.config.study import Study
from consistency.data.prepared import ImageData
from consistency.evaluation.samplers import prepared
from consistency.provenance.inputs import read_preconditioning, read_student, read_teacher
from consistency.theory.flows import (
    ConsistencyLosses,
    Coupling,
    exact_predictor,
    flow_curves,
    pf_ode_velocity,
    quadrature_pairs,
)
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MIXTURE_1D, MixtureTeacher
from consistency.theory.solver import every, expand
from consistency.training.coupled_denoising import TransportDenoising
from consistency.training.discrepancy import Discrepancy, ImagePairs, by_teacher
from consistency.training.fits import time_grid
from consistency.training.loop import train
from consistency.training.toy import SIGMA_MAX, SIGMA_MIN, TWO_GAUSSIANS, train_toy

#: the tables
COLUMNS = {
    "transport.csv": ["kind", "run", "seed", "t", "cost", "cost_se"],
    "discrepancy.csv": ["run", "seed", "t", "discrepancy", "discrepancy_se"],
    "plane.csv": ["coupling", "t", "discrepancy", "discrepancy_se", "cost", "cost_se"],
    "limit.csv": ["intervals", "ct", "cd", "ct_limit", "cd_limit"],
}
#: the toy's couplings, and the arrays kept of each, with the seeds as first axis
TOYS: tuple[Coupling, ...] = ("ic", "gc")
_KEPT = ("paths", "samples", "cost", "cost_se")
#: times of plane.csv, and the images among which its ot assigns
PLANE_TIMES, PLANE_BATCH = 16, 256
Row = dict[str, Any]


# --- transport cost and discrepancy on the images


def independent_pairs(study: Study, settings: Flows, data: ImageData) -> ImagePairs:
    """Return images with independent noise."""
    draws = generator(settings.seed, "flows")
    images, classes = data.take(torch.randperm(len(data), generator=draws)[: settings.images])
    noise = torch.randn(images.shape, generator=draws)
    return ImagePairs(images, classes if study.teacher.conditional else None, noise, study.sampling.batch)


@dataclass(frozen=True)
class ImageMeasurements:
    """Measurements on the study's images. pairs: of independent noise."""

    job: Job
    settings: Flows
    device: torch.device
    pairs: ImagePairs

    @property
    def times(self) -> list[float]:
        """Times of the measurements, ascending."""
        return time_grid(self.job.study.noise, self.settings.times).flip(0).tolist()

    def transport(self) -> list[Row]:
        """Return the rows of transport.csv."""
        study, pairs = self.job.study, self.pairs
        rows = [_row("pairs", "ic", None, None, _costs(pairs.images, pairs.noise))]
        for name, student in study.coupled.items():
            if student.coupling == "ot":
                moved = pairs.transported(student.batch)
                rows.append(_row("pairs", name, None, None, _costs(moved.images, moved.noise)))
        students = [job for job in self.job.trainings if job.student in study.coupled]
        progress = Progress(f"flows {study.name}", len(students) * len(self.times) * len(pairs.images))
        for job in students:
            ends = self._endpoint(job)
            for t in self.times:
                rows.append(_row("student", str(job.student), job.seed, t, _costs(ends(t), pairs.noise)))
                progress.update(len(pairs.images))
        progress.close()
        return rows

    def _endpoint(self, job: Job) -> Callable[[float], Tensor]:
        """Return f(x + t z, t, eps) of a student's EMA, as a function of t."""
        pairs, eps = self.pairs, job.study.noise.sigma_min
        model = prepared(job.study, read_student(job, self.device))
        preconditioning = read_preconditioning(job, model)

        @torch.inference_mode()
        def ends(t: float) -> Tensor:
            def jump(_: int, x: Tensor, labels: Tensor | None, z: Tensor) -> Tensor:
                return preconditioning.jump(model, x, every(t, x), every(eps, x), labels)

            return replace(pairs, images=pairs.images + t * pairs.noise).each(self.device, jump)

        return ends

    def by_teacher(self) -> list[Row]:
        """Return discrepancy.csv's rows of the teacher on independent noise, a check of ic's denoiser's training."""
        teacher = prepared(self.job.study, read_teacher(self.job, self.device))
        return self._discrepancies("teacher", None, lambda t: by_teacher(teacher, self.pairs, t))

    def discrepancy(self, job: Job, measure: Discrepancy) -> list[Row]:
        """Return the rows of discrepancy.csv for one coupling; train its denoiser if needed."""
        transported = isinstance(measure.objective, TransportDenoising)
        pairs = self.pairs.transported(job.settings.batch) if transported else self.pairs
        train(measure.training)
        return self._discrepancies(str(job.student), job.seed, lambda t: measure.at(pairs, t))

    def _discrepancies(self, name: str, seed: int | None, measured: Callable[[float], np.ndarray]) -> list[Row]:
        rows = []
        for t in self.times:
            mean, error = _mean(measured(t))
            rows.append({"run": name, "seed": seed, "t": t, "discrepancy": mean, "discrepancy_se": error})
        return rows


def _costs(ends: Tensor, noise: Tensor) -> np.ndarray:
    """||x - z||^2 of each pair, [K]: a sum over the pixels."""
    difference = (ends.double() - noise.double()).square().flatten(1).sum(1)
    return np.asarray(difference.numpy())


def _row(kind: str, name: str, seed: int | None, t: float | None, costs: np.ndarray) -> Row:
    mean, error = _mean(costs)
    return {"kind": kind, "run": name, "seed": seed, "t": t, "cost": mean, "cost_se": error}


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean over the images and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


# --- the toy, and the theorem on the mixture


def train_toys(study: Study, settings: Flows) -> dict[str, np.ndarray]:
    """Return the toys' arrays `<coupling>_<name>` [seeds, ...], their times [T] and the modes' centres [2, 2]."""
    progress = Progress(f"flows {study.name}, toys", len(TOYS) * len(settings.toy_seeds))
    arrays: dict[str, np.ndarray] = {}
    for coupling in TOYS:
        found = []
        for seed in settings.toy_seeds:
            found.append(train_toy(coupling, seed, steps=settings.toy_steps))
            progress.update()
        arrays |= {f"{coupling}_{name}": np.stack([getattr(toy, name) for toy in found]) for name in _KEPT}
        arrays["times"] = found[0].times
    progress.close()
    return arrays | {"modes": TWO_GAUSSIANS.means.numpy()}


def plane_rows(settings: Flows) -> list[Row]:
    """Compute R_t and transport cost of ic, ot and gc (mu 1) on the toy's two Gaussians, without training."""
    data = TWO_GAUSSIANS
    exact = MixtureTeacher(data.weights.double(), data.means.double(), data.variances.double())
    rows: list[Row] = []
    couplings: tuple[Coupling, ...] = ("ic", "ot", "gc")
    for coupling in couplings:
        curves = flow_curves(
            coupling,
            exact.sample,
            log_grid(PLANE_TIMES, 0.01, SIGMA_MAX),
            settings.seed,
            predictor=exact_predictor(exact, SIGMA_MIN),
            batch=PLANE_BATCH,
            count=settings.pairs,
        )
        points = zip(*(values.tolist() for values in vars(curves).values()), strict=True)
        rows += [dict(zip(COLUMNS["plane.csv"], (coupling, *point), strict=True)) for point in points]
    return rows


def limit_rows(settings: Flows) -> list[Row]:
    """Compute L_CT and L_CD, alpha = 2, of the mixture's ctm jump with the exact denoiser, on doubling grids."""
    pairs, eps = quadrature_pairs(MIXTURE_1D, 40), 0.002

    def jump(x: Tensor, t: Tensor) -> Tensor:
        kept = eps / expand(t, x)
        return kept * x + (1 - kept) * MIXTURE_1D(x, t)

    losses = ConsistencyLosses(jump, pf_ode_velocity(MIXTURE_1D), lambda t: pairs, sigma_min=eps)
    ct_limit, cd_limit = losses.limits()
    rows = []
    intervals = 10
    while intervals <= settings.intervals:
        ct, cd = losses.on_grid(intervals)
        rows.append({"intervals": intervals, "ct": ct, "cd": cd, "ct_limit": ct_limit, "cd_limit": cd_limit})
        intervals *= 2
    return rows
