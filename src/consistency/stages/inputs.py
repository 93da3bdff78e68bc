"""Inputs of several stages, checked against the study: dataset, teacher, coefficients and students."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.arrays import read_arrays
from consistency.errors import UserError
from consistency.files import made
from consistency.job import Job
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
    """Return the device; 'auto' is the GPU if there is one. Raises UserError if the device does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def read_dataset(job: Job) -> ImageData:
    """Open the study's images."""
    read_card(job, "dataset")
    return load_images(job.paths.dataset)


def data_files(job: Job) -> list[Path]:
    """Return the files a network learns from: the images, and their labels if it is conditional."""
    names = ["images", *(["labels"] if job.study.teacher.conditional else [])]
    return [job.paths.dataset / f"{name}.npy" for name in names]


def sigma_data(study: Study, data: ImageData) -> float:
    """Return the standard deviation of the data that the study uses."""
    value = study.noise.sigma_data
    return float(data.facts["sigma_data"]) if isinstance(value, str) else value


def read_teacher(job: Job, device: torch.device) -> Denoiser:
    """Read the study's teacher, frozen."""
    path = made(job.paths.teacher / "teacher.safetensors", "teacher")
    return load_denoiser(path, job.key("teacher"))[0].to(device)


def require_classes(study: Study, data: ImageData, teacher: Denoiser) -> None:
    """Raise UserError if a conditional teacher has another number of classes than the data."""
    if study.teacher.conditional and teacher.label_dim != data.classes:
        raise UserError(
            f"the teacher is conditioned on {teacher.label_dim} classes, the dataset has {data.classes}: "
            "change dataset or teacher in the study (an unlabelled dataset needs an unconditional teacher)"
        )


def read_student(job: Job, device: torch.device, rate: float | None = None, step: int | None = None) -> Denoiser:
    """Read a frozen student (EMA weights; rate: a further EMA rate; step: a snapshot, None for the end of training)."""
    path = made(job.weights(rate, step), f"student{job.options}")
    return load_denoiser(path, job.key("student"))[0].to(device)


def read_coefficients(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of coefficients.npz."""
    return read_arrays(job.paths.coefficients / "coefficients.npz", "coefficients", "times", "l", "s")


def read_ode(job: Job, device: torch.device) -> GeneralizedODE | None:
    """Read the ODE of the coefficients fitted from the teacher, for a student that uses them."""
    if not job.student.needs_coefficients:
        return None
    read_card(job, "coefficients")
    arrays = read_coefficients(job)
    times, l, s = (torch.from_numpy(arrays[letter]) for letter in ("times", "l", "s"))
    return GeneralizedODE(times, l, s, device)


def preconditioning_of(settings: Student, model: Denoiser, ode: GeneralizedODE | None) -> Preconditioning:
    """Return the preconditioning of a student's network, with these coefficients or the network's own."""
    if settings.carries_fit:
        return own_preconditioning(settings.preconditioning, model)
    return build_preconditioning(settings.preconditioning, model.sigma_data, ode)


def read_preconditioning(job: Job, model: Denoiser) -> Preconditioning:
    """Read the preconditioning of a student, given its network."""
    return preconditioning_of(job.student, model, read_ode(job, next(model.parameters()).device))


def time_grid(study: Study, nodes: int, device: torch.device) -> torch.Tensor:
    """Return the study's rho grid of that many nodes, descending, float64."""
    noise = study.noise
    return rho_grid(nodes, noise.sigma_min, noise.sigma_max, noise.rho).to(device)
