"""Stage scores: first a calibration (data against data, teacher against data), then every student."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from consistency.errors import UserError
from consistency.features import Extractor, Statistics, frechet_distance, kernel_distance
from consistency.files import write_with
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import read_card
from consistency.seeding import generator
from consistency.stages.extractor import open_extractor, read_data_statistics
from consistency.stages.inputs import (
    read_array,
    read_dataset,
    read_preconditioning,
    read_student,
    read_teacher,
    write_array,
)
from consistency.stages.samples import Sampler, draw, heun_sampler, jump_sampler
from consistency.study import Study
from consistency.theory.preconditioning import Preconditioning
from consistency.training.checkpoint import load_denoiser
from consistency.training.data import to_bytes

COLUMNS = ["study", "kind", "run", "seed", "step", "sampler", "nfe", "fd", "kid", "alignment", "images", "extractor"]
Array = np.ndarray


def make_calibration(study: Study, layout: Layout, device: torch.device) -> None:
    """Write calibration.csv (data halves; teacher) and endpoints.npy, the teacher's ODE endpoints."""
    scorer = _Scorer(study, layout, device)
    teacher = read_teacher(study, layout, device)
    # Which half an image falls into must not follow the dataset's order.
    order = torch.randperm(len(scorer.data.features), generator=generator(0, "halves")).numpy()
    half = len(order) // 2
    first, second = (Statistics.of(scorer.data.features[part]) for part in (order[:half], order[half:]))
    images = _read_samples(study, layout, None, None, "heun")
    nfe = 2 * study.sampling.teacher_steps - 1
    rows = [
        scorer.row("calibration", "data", None, 0, "halves", 0) | scorer.distances(second, first) | {"images": half},
        scorer.row("calibration", "teacher", None, 0, "heun", nfe) | scorer.against_data(images),
    ]
    endpoints = _endpoints(study, teacher)
    path = layout.scores(None, None)
    write_array(path.with_name("endpoints.npy"), endpoints)
    _write(path, rows)


def make_scores(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> None:
    """Write the score table of one student: its samples, and its learning curve from the snapshots."""
    scorer = _Scorer(study, layout, device)
    read_card(layout.student(run, seed), study, "student", run, seed)
    student = read_student(study, layout, run, seed, device)
    preconditioning = read_preconditioning(study, layout, run, student.sigma_data, device)
    endpoints = _read_endpoints(layout)
    snapshots = sorted((layout.student(run, seed) / "snapshots").glob("step-*.safetensors"))
    card = read_card(layout.samples(run, seed), study, "samples", run, seed)
    names = sorted(Path(name).stem for name in card["outputs"])
    progress = Progress(f"scores {run} seed {seed}", len(names) + len(snapshots) * len(study.scores.curve_nfe))
    rows = []
    for name in names:
        rows.append(_final_row(scorer, student, preconditioning, run, seed, name, endpoints))
        progress.advance()
    for path in snapshots:
        model, metadata = load_denoiser(path, study.key("student", run, seed))
        for row in _curve_rows(scorer, model.to(device), preconditioning, run, seed, metadata["step"], endpoints):
            rows.append(row)
            progress.advance()
    progress.close()
    _write(layout.scores(run, seed), rows)


class _Scorer:
    """The extractor, the data's statistics, and how a row is made of them."""

    def __init__(self, study: Study, layout: Layout, device: torch.device) -> None:
        self.study, self.layout, self.device = study, layout, device
        self.extractor: Extractor = open_extractor(study, layout, read_dataset(study, layout), device)
        self.data = read_data_statistics(study, layout)

    def row(self, kind: str, run: str, seed: int | None, step: int, sampler: str, nfe: int) -> dict[str, Any]:
        return {
            "study": self.study.name,
            "kind": kind,
            "run": run,
            "seed": seed,
            "step": step,
            "sampler": sampler,
            "nfe": nfe,
            "extractor": self.extractor.name,
        }

    def distances(self, a: Statistics, b: Statistics) -> dict[str, float]:
        scores = self.study.scores
        kid = kernel_distance(a, b, scores.kid_subsets, scores.kid_subset_size)
        return {"fd": frechet_distance(a, b), "kid": kid}

    def against_data(self, images: Array) -> dict[str, float]:
        return self.distances(Statistics.of(self.extractor(images)), self.data) | {"images": len(images)}


def _final_row(
    scorer: _Scorer,
    student: Denoiser,
    preconditioning: Preconditioning,
    run: str,
    seed: int,
    name: str,
    endpoints: Array,
) -> dict[str, Any]:
    """One sampler's samples at the end of training."""
    match = re.fullmatch(r"(?:gamma([\d.]+)-)?nfe(\d+)", name)
    if match is None:
        raise UserError(f"samples of {run} seed {seed} hold {name}.npy, which no sampler wrote: run `samples` again")
    study, nfe = scorer.study, int(match[2])
    multistep = study.resolved(run).objective == "endpoint"
    sampler = f"gamma={match[1]}" if match[1] else "multistep" if multistep else "jumps"
    row = scorer.row("final", run, seed, study.resolved(run).steps, sampler, nfe)
    row |= scorer.against_data(_read_samples(study, scorer.layout, run, seed, name))
    if match[1] is None and (nfe == 1 or not multistep):
        jumps = jump_sampler(study, run, student, preconditioning, nfe)
        row["alignment"] = _alignment(_collect(study, student, jumps, len(endpoints)), endpoints)
    return row


def _curve_rows(
    scorer: _Scorer,
    model: Denoiser,
    preconditioning: Preconditioning,
    run: str,
    seed: int,
    step: int,
    endpoints: Array,
) -> Iterator[dict[str, Any]]:
    """One snapshot at every number of jumps of the learning curves."""
    study = scorer.study
    multistep = study.resolved(run).objective == "endpoint"
    for nfe in study.scores.curve_nfe:
        jumps = jump_sampler(study, run, model, preconditioning, nfe)
        images = _collect(study, model, jumps, study.scores.curve_count)
        row = scorer.row("curve", run, seed, step, "multistep" if multistep else "jumps", nfe)
        row |= scorer.against_data(to_bytes(images))
        if nfe == 1 or not multistep:
            row["alignment"] = _alignment(images[: len(endpoints)], endpoints)
        yield row


def _collect(study: Study, model: Denoiser, sampler: Sampler, count: int) -> torch.Tensor:
    return torch.cat([batch.cpu() for _, batch in draw(study, model, sampler, count)])


def _alignment(images: torch.Tensor, endpoints: Array) -> float:
    """Mean squared error to the teacher's ODE endpoints from the same noise, per pixel in [-1, 1] units."""
    return float(np.square(images.double().numpy() - endpoints).mean())


def _endpoints(study: Study, teacher: Denoiser) -> Array:
    """The teacher's ODE endpoints at eps of the first alignment_count seeds, float32 [n, C, H, W]."""
    sampler = heun_sampler(study, teacher, study.scores.alignment_nodes)
    return _collect(study, teacher, sampler, study.scores.alignment_count).numpy()


def _read_endpoints(layout: Layout) -> Array:
    return read_array(layout.scores(None, None).with_name("endpoints.npy"), "calibration")


def _read_samples(study: Study, layout: Layout, run: str | None, seed: int | None, name: str) -> Array:
    folder = layout.samples(run, seed)
    read_card(folder, study, "samples", run, seed)
    verb = "samples" if run is None else f"samples --run {run} --seed {seed}"
    return read_array(folder / f"{name}.npy", verb)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).astype({"seed": "Int64"})
    write_with(path, lambda temporary: table.to_csv(temporary, index=False))
