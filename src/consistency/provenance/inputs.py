"""Readers of finished artifacts, which compare their keys first: dataset, teacher, coefficients, students."""

from typing import Any

import numpy as np
import torch

from consistency.base.arrays import read_arrays
from consistency.base.errors import UserError
from consistency.base.files import require_output
from consistency.config.job import Job
from consistency.config.student import Student
from consistency.config.study import Study
from consistency.data.prepared import ImageData, load_images
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.nets.jumps import Fit, Jumps, fitted_preconditioning
from consistency.nets.own_preconditioning import own_preconditioning
from consistency.provenance.card import read_card
from consistency.theory.preconditioning import FORMS, Preconditioning


def read_dataset(job: Job) -> ImageData:
    """Open the study's images."""
    read_card(job, "dataset")
    return load_images(job.paths.dataset)


def sigma_data(study: Study, data: ImageData) -> float:
    """Return the standard deviation of the data that the study uses."""
    value = study.noise.sigma_data
    return float(data.facts["sigma_data"]) if isinstance(value, str) else value


def read_teacher(job: Job, device: torch.device) -> Denoiser:
    """Read the study's teacher, frozen."""
    path = require_output(job.paths.teacher_weights, "teacher")
    return load_denoiser(path, job.key("teacher"))[0].to(device)


def require_enough(study: Study, images: int) -> None:
    """Raise UserError if the calibration cannot compare two halves of so many images."""
    if images < 4:
        limit = "" if study.dataset.limit is None else "raise dataset.limit, or "
        raise UserError(
            f"the dataset has {images} images, a study needs 4: the calibration compares one half with the other, and "
            f"a covariance takes two; {limit}add images"
        )


def require_classes(study: Study, data: ImageData, teacher: Denoiser) -> None:
    """Raise UserError if a conditional teacher has another number of classes than the data."""
    if study.teacher.conditional and teacher.label_dim != data.classes:
        raise UserError(
            f"the teacher is conditioned on {teacher.label_dim} classes, the dataset has {data.classes}: "
            "change dataset or teacher in the study (an unlabelled dataset needs an unconditional teacher)"
        )


def read_label_weights(job: Job, model: Denoiser) -> list[int]:
    """Read the relative frequency of each class in which the images of the study's networks are drawn
    (sampling.labels): the data's class counts, or 1 each; none if the model is unconditional.

    Raises UserError if the dataset is missing, or has another number of classes than the model.
    """
    if not model.label_dim or job.study.sampling.labels == "balanced":
        return [1] * model.label_dim
    data = read_dataset(job)
    require_classes(job.study, data, model)
    return data.class_counts


def read_student(job: Job, device: torch.device, rate: float | None = None, step: int | None = None) -> Denoiser:
    """Read a frozen student (EMA weights; rate: a further EMA rate; step: a snapshot, None for the end of training)."""
    path = require_output(job.weights(rate, step), f"student{job.options}")
    return load_denoiser(path, job.key("student"))[0].to(device)


def read_coefficients(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of coefficients.npz."""
    return read_arrays(job.paths.fit, "coefficients", "times", "l", "s", "s_centred", "centre")


def read_fit(job: Job) -> Fit | None:
    """Read the coefficients fitted from the teacher, as the student uses them; None for a student that does not."""
    if not job.settings.needs_coefficients:
        return None
    read_card(job, "coefficients")
    arrays = read_coefficients(job)
    times, l = arrays["times"].tolist(), arrays["l"].tolist()
    if not FORMS[job.settings.preconditioning].centred:
        return Fit(times=times, l=l, s=arrays["s"].tolist())
    return Fit(times=times, l=l, s=arrays["s_centred"].tolist(), centre=arrays["centre"].ravel().tolist())


def preconditioning_of(settings: Student, model: Denoiser, fit: Fit | None) -> Preconditioning:
    """Return the preconditioning of a student's network, with these coefficients or the network's own."""
    if settings.has_own_fit:
        return own_preconditioning(settings.preconditioning, model, settings.theta)
    return fitted_preconditioning(settings.preconditioning, model, fit, settings.theta)


def read_preconditioning(job: Job, model: Denoiser) -> Preconditioning:
    """Read the preconditioning of a student, given its network."""
    return preconditioning_of(job.settings, model, read_fit(job))


def jumps_of(job: Job, data: ImageData) -> Jumps:
    """Return the settings of a student's jumps, with the teacher's coefficients if it uses them, and the data's class
    counts if it is conditional."""
    settings = job.settings
    return Jumps(
        preconditioning=settings.preconditioning,
        theta=settings.theta,
        only_to_eps=settings.only_to_eps,
        noise=job.study.noise,
        fit=read_fit(job),
        class_counts=data.class_counts if job.study.teacher.conditional else [],
    )
