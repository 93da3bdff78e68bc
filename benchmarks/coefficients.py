"""The coefficients of a study under changes of its teacher, and a fit by parts of an image: two tables.

    python benchmarks/coefficients.py --study config/studies/digits.yaml [--out results/coefficients]    # ten minutes

Trains the study's teacher and variants of it (one key changed) in a temporary folder and fits each on the same images
and noise. Then it fits l_t and s_t for parts of the image apart (channels, bands of frequencies, principal components),
each part with an ODE of its own, and measures, for the forward form, the gap between the optimal student's denoiser and
the teacher's, and the teacher's own jumps without any training.
"""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from scipy.fft import dctn
from torch import Tensor
from torch.func import jvp, vmap

from consistency.base.arrays import write_table
from consistency.base.progress import track
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.nets.denoiser import Denoiser
from consistency.provenance.inputs import read_dataset, read_teacher
from consistency.runtime.machine import Machine
from consistency.stages.dataset import make_dataset
from consistency.stages.teacher import make_teacher
from consistency.theory.estimators import CoefficientFit, fit_coefficients, solve_moments
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid, rho_grid
from consistency.theory.solver import DenoiserFn, every, heun_solve

CPU = torch.device("cpu")
TIMES, IMAGES, NODES, SUBSTEPS = 40, 512, 18, 4
NFE = (1, 2, 3, 5, 8)
Fit = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the study with one key set to another value."""
    content = copy.deepcopy(content)
    section, name = key.split(".")
    content[section][name] = value
    return content


def variants(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name the studies of the variants."""
    steps, life = content["teacher"]["steps"], content["teacher"]["ema_half_life"]
    found = {
        "the study's teacher": content,
        "another seed": changed(content, "teacher.seed", 1),
        "half of the steps": changed(content, "teacher.steps", steps // 2),
        "an eighth of the steps": changed(content, "teacher.steps", steps // 8),
        "EMA half-life a tenth": changed(content, "teacher.ema_half_life", life // 10),
        "EMA half-life five times": changed(content, "teacher.ema_half_life", life * 5),
        "a quarter of the images": changed(content, "dataset.limit", content["quarter"]),
        "conditional": changed(content, "teacher.conditional", True),
    }
    if content["dataset"].get("horizontal_flip"):
        found["not mirrored"] = changed(content, "dataset.horizontal_flip", False)
    return found


def trained(content: dict[str, Any], folder: Path) -> Job:
    """Prepare the data and train the teacher of a study in a folder."""
    file = folder / f"{content['name']}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if key != "quarter"}), encoding="utf-8"
    )
    study = load_study(file)
    job = Job(study, StudyPaths(study.name, folder / "results", folder / "state"))
    make_dataset(job, 1)
    make_teacher(job, Machine(CPU))
    return job


def fitted(denoiser: Callable[[slice], DenoiserFn], images: Tensor, noise: Tensor, centre: Tensor) -> CoefficientFit:
    """Fit on all images at the study's times."""
    times = log_grid(TIMES, 0.002, 80.0)
    return fit_coefficients(denoiser, images, noise, times, 1, generator(0, "probes"), len(images), centre=centre)


def jumps(fit: CoefficientFit) -> Fit:
    """Return l, s (where determined) and f, g of the backward form at the jumps between the nodes."""
    grid = rho_grid(NODES, 0.002, 80.0, 7.0)
    first, last = torch.triu_indices(NODES, NODES, 1)
    f, g = GeneralizedODE(*fit.nodes).backward(grid[first], grid[last])
    return fit.l, np.where(fit.determined, fit.s, np.nan), f.numpy(), g.numpy()


def sensitivity(name: str, fit: CoefficientFit, base: CoefficientFit) -> dict[str, Any]:
    """Return a row: how far the numbers of a fit are from those of another, and g below ctm's."""
    moved = [float(np.nanmax(np.abs(a - b))) for a, b in zip(jumps(fit), jumps(base), strict=True)]
    ode = GeneralizedODE(*fit.nodes)
    below = {f"g below ctm, NFE {n}": ode.shortfall(rho_grid(n + 1, 0.002, 80.0, 7.0)) for n in NFE}
    return {"fit": name, **dict(zip(("l", "s", "f", "g"), moved, strict=True)), **below}


def bases(data: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return orthonormal bases [d, d] (columns) of the pixels of data [N, C, H, W], and the part of each column [d]."""
    channels, height, width = data.shape[1:]
    count, one = channels * height * width, torch.zeros
    eye = torch.eye(count, dtype=torch.float64)
    found = {"whole": (eye, one(count, dtype=torch.long))}
    if channels > 1:
        found["channels"] = (eye, torch.arange(channels).repeat_interleave(height * width))
    waves = dctn(eye.reshape(count, channels, height, width).numpy(), axes=(2, 3), norm="ortho").reshape(count, count)
    frequency = np.hypot(*np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    band = torch.from_numpy(np.digitize(frequency, (0.5, 1.5, 3.0, 5.0))).flatten().repeat(channels)
    found["bands of frequencies"] = (torch.from_numpy(waves), band)
    centred = (data - data.mean(0)).flatten(1).double()
    vectors = torch.linalg.eigh(centred.T @ centred / len(centred))[1].flip(1)
    found["principal components, 8 groups"] = (vectors, torch.arange(count) * 8 // count)
    found["principal components, each"] = (vectors, torch.arange(count))
    return found


def moments_in(
    denoiser: DenoiserFn, x: Tensor, time: float, basis: Tensor, centre: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return r, x, y and J, [K, d] each in the basis, and the diagonal [K, d] of the denoiser's Jacobian in it."""
    t = torch.full((len(x),), time)
    with torch.no_grad():
        residual = denoiser(x, t) - x
    along = jvp(denoiser, (x, t), (residual, -t))[1]
    columns = basis.T.reshape(-1, *x.shape[1:]).to(x.dtype)

    def diagonal(column: Tensor) -> Tensor:
        product = jvp(lambda point: denoiser(point, t), (x,), (column.expand_as(x).contiguous(),))[1]
        return (product.flatten(1).double() * column.flatten().double()).sum(1)

    parts = [(each.flatten(1).double() @ basis) for each in (residual, x, x - centre, along)]
    return parts, vmap(diagonal, chunk_size=16)(columns).T


def fits_in(
    denoiser: DenoiserFn, images: Tensor, noise: Tensor, centre: Tensor, spaces: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, list[CoefficientFit]]:
    """Fit every part of every basis apart, around the mean image."""
    times = log_grid(TIMES, 0.002, 80.0)
    rows: dict[str, list[list[np.ndarray]]] = {name: [] for name in spaces}
    for time in track("parts")(times.tolist()):
        x = images + time * noise
        cached: dict[int, tuple[list[Tensor], Tensor]] = {}
        for name, (basis, part) in spaces.items():
            if id(basis) not in cached:
                cached[id(basis)] = moments_in(denoiser, x, time, basis, centre)
            (r, at, y, along), diagonal = cached[id(basis)]
            pairs = [(r, r), (r, at), (at, at), (r, along), (at, along), (r, y), (y, y), (y, along)]
            products = [diagonal, *(a * b for a, b in pairs)]
            parts = [torch.stack([p[:, part == k].sum(1) for p in products]) for k in part.unique()]
            rows[name].append([each.numpy() for each in parts])
    found = {}
    for name, (_, part) in spaces.items():
        sizes = [int((part == k).sum()) for k in part.unique()]
        stacked = [np.stack([row[k] for row in rows[name]]) for k in range(len(sizes))]
        solved = [solve_moments(times.numpy(), m, d, torch.float32) for m, d in zip(stacked, sizes, strict=True)]
        found[name] = [fit.centred for fit in solved if fit.centred is not None]
    return found


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def steps_of(fits: list[CoefficientFit], part: Tensor) -> Step:
    """Return f and g of the forward form for each column of a basis: (t, s) [] -> [d] each."""
    odes = [GeneralizedODE(*fit.nodes) for fit in fits]

    def step(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        each = [ode.forward(t[None], s[None]) for ode in odes]
        return torch.cat([f for f, _ in each])[part], torch.cat([g for _, g in each])[part]

    return step


def measured(
    denoiser: DenoiserFn, x: Tensor, centre: Tensor, basis: Tensor, step: Step, paths: dict[tuple[int, int], Tensor]
) -> dict[str, float]:
    """Return the mean gap of the optimal student to the teacher over the paths, the largest g, and the mean squared
    error of jumps with the teacher in the student's place, at each NFE. paths[i, j]: x at node j from node i."""
    grid = rho_grid(NODES, 0.002, 80.0, 7.0)

    def inside(each: Tensor) -> Tensor:
        return (each - centre).flatten(1).double() @ basis

    gaps, largest = [], 0.0
    for i in range(NODES - 1):
        here = paths[i, i]
        with torch.no_grad():
            denoised = inside(denoiser(here, every(grid[i].item(), here).to(here.dtype)))
        for j in range(i + 1, NODES):
            f, g = step(grid[i], grid[j])
            gaps.append(((inside(paths[i, j]) - f * inside(here)) / g - denoised).square().mean().item())
            largest = max(largest, g.abs().max().item())
    errors = {}
    for nfe in NFE:
        times, at = rho_grid(nfe + 1, 0.002, 80.0, 7.0), x
        for t, s in itertools.pairwise(times):
            f, g = step(t, s)
            with torch.no_grad():
                denoised = denoiser(at, every(t.item(), at).to(at.dtype))
            moved = (f * inside(at) + g * inside(denoised)) @ basis.T
            at = centre + moved.reshape(at.shape).to(at.dtype)
        errors[f"error, NFE {nfe}"] = (at - paths[0, NODES - 1]).square().mean().item()
    return {"gap": float(np.mean(gaps)), "largest g": largest, **errors}


def solved(denoiser: DenoiserFn, images: Tensor, noise: Tensor) -> dict[tuple[int, int], Tensor]:
    """Return the teacher's paths from every node of the grid to every later one, for x_t = x_0 + t z there."""
    fine = rho_grid((NODES - 1) * SUBSTEPS + 1, 0.002, 80.0, 7.0).tolist()
    found = {}
    for i in track("paths")(range(NODES)):
        at = images + fine[i * SUBSTEPS] * noise if i else fine[0] * noise
        found[i, i] = at
        for j in range(i + 1, NODES):
            with torch.no_grad():
                at = heun_solve(denoiser, at, fine[(j - 1) * SUBSTEPS : j * SUBSTEPS + 1])
            found[i, j] = at
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("config/studies/digits.yaml"), help="default: digits")
    parser.add_argument("--out", type=Path, default=Path("results/coefficients"), help="of the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    content = yaml.safe_load(args.study.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        job = trained(content, Path(folder) / "base")
        data = read_dataset(job)
        content["quarter"] = len(data) // data.classes // 4
        rows = torch.randperm(len(data), generator=generator(0, "coefficients"))[:IMAGES]
        images, labels = data.take(rows)
        noise = torch.randn(images.shape, generator=generator(1, "coefficients"))
        centre = torch.from_numpy(data.mean()).float()
        teachers: dict[str, Denoiser] = {"the study's teacher": read_teacher(job, CPU)}
        for k, (name, study) in enumerate(variants(content).items()):
            if name not in teachers:
                teachers[name] = read_teacher(trained(study, Path(folder) / str(k)), CPU)
        plain, conditional = teachers["the study's teacher"], teachers["conditional"]

        def guided(part: slice) -> DenoiserFn:
            return lambda x, t: 2 * conditional(x, t, labels=labels[part]) - plain(x, t)

        found = {
            name: fitted(
                lambda part, teacher=teacher: (
                    (lambda x, t: teacher(x, t, labels=labels[part]))  # type: ignore[misc]
                    if teacher.label_dim
                    else teacher
                ),
                images,
                noise,
                centre,
            )
            for name, teacher in teachers.items()
        }
        found["guided by its class, weight 2"] = fitted(guided, images, noise, centre)
        half = slice(0, len(images) // 2)
        found["half of the fit's images"] = fitted(lambda part: plain, images[half], noise[half], centre)
    table = []
    for name, fit in found.items():
        assert fit.centred is not None
        for around, each in (("0", fit), ("mean", fit.centred)):
            base = found["the study's teacher"]
            other = base.centred if around == "mean" else base
            assert other is not None
            table.append({"study": job.study.name, "around": around, **sensitivity(name, each, other)})
    name = job.study.name
    write_table(args.out / f"{name}-moves.csv", table, list(table[0]))
    print(pd.DataFrame(table).to_string(float_format="%.3f"))

    spaces = bases(data.take(torch.arange(len(data)))[0])
    fits = fits_in(plain, images, noise, centre, spaces)
    paths = solved(plain, images, noise)
    whole, zero = spaces["whole"], torch.zeros_like(centre)
    still = found["the study's teacher"]
    ones = torch.ones(images[0].numel(), dtype=torch.float64)
    ctm: Step = lambda t, s: (s / t * ones, (1 - s / t) * ones)  # noqa: E731
    parts = [{"fit": "ctm", "parts": 0, **measured(plain, paths[0, 0], zero, whole[0], ctm, paths)}]
    parts.append(
        {"fit": "whole, around 0", "parts": 1}
        | measured(plain, paths[0, 0], zero, whole[0], steps_of([still], whole[1]), paths)
    )
    for kind, (basis, part) in spaces.items():
        step = steps_of(fits[kind], torch.unique(part, return_inverse=True)[1])
        row = {"fit": kind, "parts": len(part.unique())}
        parts.append(row | measured(plain, paths[0, 0], centre, basis, step, paths))
    parts = [{"study": name, **row} for row in parts]
    write_table(args.out / f"{name}-parts.csv", parts, list(parts[0]))
    print(pd.DataFrame(parts).to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
