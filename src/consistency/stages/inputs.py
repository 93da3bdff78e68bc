"""Inputs of several stages, checked against the study: dataset, teacher, coefficients, students; and array files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from consistency.errors import UserError
from consistency.files import atomic, made
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.provenance import read_card
from consistency.study import Student, Study
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import rho_grid
from consistency.theory.preconditioning import Preconditioning, build_preconditioning
from consistency.training.checkpoint import load_denoiser
from consistency.training.data import ImageData, load_images
from consistency.training.own_fit import own_preconditioning


def pick_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def read_dataset(study: Study, layout: Layout) -> ImageData:
    """The study's images."""
    read_card(layout.dataset, study, "dataset")
    return load_images(layout.dataset)


def data_files(study: Study, layout: Layout) -> list[Path]:
    """Name what a network learns from: the images, and their labels if it is conditional."""
    return [layout.dataset / f"{name}.npy" for name in ("images", *(["labels"] if study.teacher.conditional else []))]


def sigma_data(study: Study, data: ImageData) -> float:
    """The standard deviation of the data that the study uses."""
    value = study.noise.sigma_data
    return float(data.facts["sigma_data"]) if isinstance(value, str) else value


def read_teacher(study: Study, layout: Layout, device: torch.device) -> Denoiser:
    """The study's teacher, frozen."""
    path = made(layout.teacher / "teacher.safetensors", "teacher")
    return load_denoiser(path, study.key("teacher"))[0].to(device)


def require_classes(study: Study, data: ImageData, teacher: Denoiser) -> None:
    """Raises UserError when a conditional teacher knows another number of classes than the data has."""
    if study.teacher.conditional and teacher.label_dim != data.classes:
        raise UserError(
            f"the teacher is conditioned on {teacher.label_dim} classes, the dataset has {data.classes}: "
            "change dataset or teacher in the study (an unlabelled dataset needs an unconditional teacher)"
        )


def read_student(
    study: Study,
    layout: Layout,
    run: str,
    seed: int,
    device: torch.device,
    rate: float | None = None,
    step: int | None = None,
) -> Denoiser:
    """A student (EMA weights; rate: a further EMA rate; step: a snapshot, None for the end of training), frozen."""
    path = made(layout.student_file(run, seed, rate, step), f"student --run {run} --seed {seed}")
    return load_denoiser(path, study.key("student", run, seed))[0].to(device)


def read_array(path: Path, verb: str) -> np.ndarray[Any, Any]:
    """A memory-mapped .npy file. Raises UserError, naming the verb that makes it, when it is missing or damaged."""
    try:
        array: np.ndarray[Any, Any] = np.load(made(path, verb), mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): run `{verb}` again") from None
    return array


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write a .npy file atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:  # np.save would append .npy to a temporary name
        np.save(file, array)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write a .npz file atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_table(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write rows as CSV atomically; a value that a row has not is an empty cell."""
    import pandas as pd  # most stages write no table

    table = pd.DataFrame(rows, columns=columns)
    table = table.astype({"seed": "Int64"}) if "seed" in columns else table
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def read_coefficients(layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of coefficients.npz. Raises UserError when the file is missing or damaged."""
    path = layout.coefficients / "coefficients.npz"
    try:
        with np.load(made(path, "coefficients")) as arrays:
            found = dict(arrays)
        if not {"times", "l", "s"} <= found.keys():
            raise ValueError("it has not the arrays times, l and s")
        return found
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): run `coefficients` again") from None


def read_ode(study: Study, layout: Layout, run: str, device: torch.device) -> GeneralizedODE | None:
    """The ODE of the coefficients fitted from the teacher, for a student that reads them."""
    if not study.students[run].needs_coefficients:
        return None
    read_card(layout.coefficients, study, "coefficients")
    arrays = read_coefficients(layout)
    times, l, s = (torch.from_numpy(arrays[letter]) for letter in ("times", "l", "s"))
    return GeneralizedODE(times, l, s, device)


def preconditioning_of(settings: Student, model: Denoiser, ode: GeneralizedODE | None) -> Preconditioning:
    """The preconditioning of a student's network, with these coefficients or those that the network carries."""
    if settings.carries_fit:
        return own_preconditioning(settings.preconditioning, model)
    return build_preconditioning(settings.preconditioning, model.sigma_data, ode)


def read_preconditioning(study: Study, layout: Layout, run: str, model: Denoiser) -> Preconditioning:
    """The preconditioning of a student, given its network."""
    return preconditioning_of(study.students[run], model, read_ode(study, layout, run, next(model.parameters()).device))


def time_grid(study: Study, nodes: int, device: torch.device) -> torch.Tensor:
    """The study's rho grid of so many nodes, descending, float64."""
    noise = study.noise
    return rho_grid(nodes, noise.sigma_min, noise.sigma_max, noise.rho).to(device)
