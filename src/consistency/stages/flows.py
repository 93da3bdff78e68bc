"""Stage flows: what a coupling does to the flow, on the study's images, in the plane and in closed form (GC)."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from consistency.files import write_with
from consistency.layout import Layout
from consistency.nets.denoiser import two_times
from consistency.progress import Progress
from consistency.provenance import write_card
from consistency.seeding import generator
from consistency.stages.discrepancy import Discrepancy, by_teacher, discrepancy_of
from consistency.stages.inputs import read_dataset, read_preconditioning, read_student, read_teacher, time_grid
from consistency.stages.publish import forget_state
from consistency.stages.samples import prepared
from consistency.stages.trainer import Machine
from consistency.study import Flows, Study
from consistency.theory.coupling import assignment
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
from consistency.training.data import ImageData
from consistency.training.toy import SIGMA_MAX, SIGMA_MIN, TWO_GAUSSIANS, train_toy

FILES = ("transport.csv", "discrepancy.csv", "toy.npz", "plane.csv", "limit.csv")
TRANSPORT = ["kind", "run", "seed", "t", "cost", "cost_se"]
DISCREPANCY = ["run", "seed", "t", "discrepancy", "discrepancy_se"]
PLANE = ["coupling", "t", "discrepancy", "discrepancy_se", "cost", "cost_se"]
LIMIT = ["intervals", "ct", "cd", "ct_limit", "cd_limit"]
#: the toy's couplings, and what of each is kept, with the seeds as first axis
TOYS: tuple[Coupling, ...] = ("ic", "gc")
_KEPT = ("paths", "samples", "cost", "cost_se")
#: times of plane.csv, and the images among which its ot assigns
PLANE_TIMES, PLANE_BATCH = 16, 256
Row = dict[str, Any]
# (x [K, C, H, W], t, labels) -> f(x, t, eps), on the CPU
Endpoint = Callable[[Tensor, float, Tensor | None], Tensor]


def make_flows(study: Study, layout: Layout, machine: Machine) -> None:
    """Write FILES and card.json; tables without rows if the study asks for no flows.

    transport.csv: E ||f(x + t z, t, eps) - z||^2 of every student's average (kind student), and E ||x - z||^2 of the
    pairs themselves, the same at all t (kind pairs); discrepancy.csv: R_t of the couplings that the study names, each
    as its student's training met it at its end, and of independent noise by the teacher; toy.npz: `train_toy` for each
    of TOYS; plane.csv: R_t and E ||x - z||^2 of each coupling on the toy's data, with the exact endpoint as gc's
    generator; limit.csv: L_CT and L_CD of the mixture on grids, and the limits of N^2 L. Raises UserError when a
    student is missing or has other settings, Interrupted when asked to stop while a denoiser is trained.
    """
    started, settings = time.time(), study.flows
    transport: list[Row] = []
    discrepancy: list[Row] = []
    plane: list[Row] = []
    limits: list[Row] = []
    toys: dict[str, np.ndarray] = {}
    inputs: list[Path] = []
    digests: dict[Path, str] = {}
    states: list[Path] = []
    if settings is not None:
        data = read_dataset(study, layout)
        digests = {layout.dataset / "images.npy": data.facts["sha256"]}
        pairs = _pairs(study, settings, data)
        transport, inputs = _transport(study, settings, layout, pairs, machine.device)
        if settings.discrepancy and study.taught:
            discrepancy += _by_teacher(study, settings, layout, pairs, machine.device)
            inputs.append(layout.teacher / "teacher.safetensors")
        for run in settings.discrepancy:
            measure = discrepancy_of(study, settings, layout, run, data, machine)
            discrepancy += _discrepancy(study, settings, pairs, run, measure)
            inputs += [path for path in measure.inputs if path not in inputs]
            states.append(measure.state)
        toys, plane, limits = _toys(study, settings), _plane(settings), _limits(settings)
    outputs = [layout.flows / name for name in FILES]
    _write_table(outputs[0], transport, TRANSPORT)
    _write_table(outputs[1], discrepancy, DISCREPANCY)
    write_with(outputs[2], lambda temporary: _save(temporary, toys))
    _write_table(outputs[3], plane, PLANE)
    _write_table(outputs[4], limits, LIMIT)
    write_card(study, layout, "flows", started=started, inputs=inputs, outputs=outputs, known=digests)
    for state in states:
        forget_state(state)


# --- transport cost on the images


def _pairs(study: Study, settings: Flows, data: ImageData) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images [K, C, H, W], their labels if students are conditional, and independent noise."""
    draws = generator(settings.seed, "flows")
    images, classes = data.take(torch.randperm(len(data), generator=draws)[: settings.images])
    return images, classes if study.teacher.conditional else None, torch.randn(images.shape, generator=draws)


def _times(study: Study, settings: Flows) -> list[float]:
    return time_grid(study, settings.times, torch.device("cpu")).flip(0).tolist()


def _transport(
    study: Study, settings: Flows, layout: Layout, pairs: tuple[Tensor, Tensor | None, Tensor], device: torch.device
) -> tuple[list[Row], list[Path]]:
    """The rows of transport.csv, and the files they were made from."""
    images, labels, noise = pairs
    rows = [_row("pairs", "ic", None, None, _costs(images, noise))]
    for run, student in study.coupled.items():
        if student.coupling == "ot":
            moved = _transported(images, noise, labels, student.batch)
            rows.append(_row("pairs", run, None, None, _costs(images[: len(moved)], moved)))
    times = _times(study, settings)
    inputs = [layout.dataset / "images.npy", *([layout.dataset / "labels.npy"] if labels is not None else [])]
    if any(student.needs_coefficients for student in study.coupled.values()):
        inputs.append(layout.coefficients / "coefficients.npz")
    progress = Progress(f"flows {study.name}", len(study.coupled) * len(study.seeds) * len(times) * len(images))
    for run in study.coupled:
        for seed in study.seeds:
            endpoint = _endpoint(study, layout, run, seed, device)
            inputs.append(layout.student_file(run, seed))
            for t in times:
                costs = _costs(endpoint(images + t * noise, t, labels), noise)
                rows.append(_row("student", run, seed, t, costs))
                progress.advance(len(images))
    progress.close()
    return rows, inputs


def _by_teacher(
    study: Study, settings: Flows, layout: Layout, pairs: tuple[Tensor, Tensor | None, Tensor], device: torch.device
) -> list[Row]:
    """The rows of discrepancy.csv that hold the teacher against independent noise: how far ic's denoiser is trained."""
    teacher, rows = prepared(study, read_teacher(study, layout, device)), []
    for t in _times(study, settings):
        mean, error = _mean(by_teacher(study, teacher, *pairs, t))
        rows.append({"run": "teacher", "seed": None, "t": t, "discrepancy": mean, "discrepancy_se": error})
    return rows


def _discrepancy(
    study: Study,
    settings: Flows,
    pairs: tuple[Tensor, Tensor | None, Tensor],
    run: str,
    measure: Discrepancy,
) -> list[Row]:
    """The rows of discrepancy.csv of one coupling: its denoiser is trained, if it is not yet."""
    images, labels, noise = pairs
    student = study.students[run]
    if student.coupling == "ot":
        noise = _transported(images, noise, labels, student.batch)
        images, labels = images[: len(noise)], None if labels is None else labels[: len(noise)]
    measure.train()
    rows = []
    for t in _times(study, settings):
        mean, error = _mean(measure.at(images, labels, noise, t))
        place = {"run": run, "seed": study.seeds[0], "t": t}
        rows.append(place | {"discrepancy": mean, "discrepancy_se": error})
    return rows


def _endpoint(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> Endpoint:
    """f of a student's average; its evaluations are no larger than the samplers'."""
    model = prepared(study, read_student(study, layout, run, seed, device))
    student, eps = two_times(model), study.noise.sigma_min
    preconditioning = read_preconditioning(study, layout, run, model)

    @torch.inference_mode()
    def ends(x: Tensor, t: float, labels: Tensor | None) -> Tensor:
        found = []
        for first in range(0, len(x), study.sampling.batch):
            part = slice(first, first + study.sampling.batch)
            here = x[part].to(device)
            own = None if labels is None else labels[part].to(device)
            found.append(preconditioning.jump(student, here, every(t, here), every(eps, here), own).cpu())
        return torch.cat(found)

    return ends


def _transported(images: Tensor, noise: Tensor, labels: Tensor | None, batch: int) -> Tensor:
    """The noise as ot pairs it in training, batch by batch; fewer images than the last batch needs are left out."""
    size = min(batch, len(images))
    rows = [slice(first, first + size) for first in range(0, len(images) - size + 1, size)]
    return torch.cat([noise[r][assignment(images[r], noise[r], None if labels is None else labels[r])] for r in rows])


def _costs(ends: Tensor, noise: Tensor) -> np.ndarray:
    """||x - z||^2 of each pair, [K]: a sum over the pixels."""
    difference = (ends.double() - noise.double()).square().flatten(1).sum(1)
    return np.asarray(difference.numpy())


def _row(kind: str, run: str, seed: int | None, t: float | None, costs: np.ndarray) -> Row:
    mean, error = _mean(costs)
    return {"kind": kind, "run": run, "seed": seed, "t": t, "cost": mean, "cost_se": error}


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean over the images and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


# --- the toy, and the theorem on the mixture


def _toys(study: Study, settings: Flows) -> dict[str, np.ndarray]:
    """What is kept of the toys as `<coupling>_<name>` [seeds, ...], their times [T] and the modes' centres [2, 2]."""
    progress = Progress(f"flows {study.name}, toys", len(TOYS) * len(settings.toy_seeds))
    arrays: dict[str, np.ndarray] = {}
    for coupling in TOYS:
        found = []
        for seed in settings.toy_seeds:
            found.append(train_toy(coupling, seed, steps=settings.toy_steps))
            progress.advance()
        arrays |= {f"{coupling}_{name}": np.stack([getattr(toy, name) for toy in found]) for name in _KEPT}
        arrays["times"] = found[0].times
    progress.close()
    return arrays | {"modes": TWO_GAUSSIANS.means.numpy()}


def _plane(settings: Flows) -> list[Row]:
    """R_t and transport cost of ic, ot and gc (mu 1) on the toy's two Gaussians: nothing is trained."""
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
        found = {"t": curves.times} | {name: getattr(curves, name) for name in PLANE[2:]}
        rows += [
            {"coupling": coupling} | {name: float(values[k]) for name, values in found.items()}
            for k in range(PLANE_TIMES)
        ]
    return rows


def _limits(settings: Flows) -> list[Row]:
    """L_CT and L_CD, alpha = 2, of the mixture's ctm jump with the exact denoiser, on grids of doubling intervals."""
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


def _write_table(path: Path, rows: list[Row], columns: list[str]) -> None:
    table = pd.DataFrame(rows, columns=columns)
    if "seed" in columns:
        table = table.astype({"seed": "Int64"})
    write_with(path, lambda temporary: table.to_csv(temporary, index=False))


def _save(temporary: Path, arrays: dict[str, np.ndarray]) -> None:
    with temporary.open("wb") as file:  # np.savez would append .npz to a temporary name
        np.savez(file, **arrays)  # type: ignore[arg-type]
