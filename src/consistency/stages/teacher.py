"""Stage teacher: the EDM denoiser that will be distilled, trained here, official or a person's own file."""

import shutil
from pathlib import Path
from typing import Any

import torch

from consistency.base.errors import UserError
from consistency.base.files import write_bytes
from consistency.config.job import Job
from consistency.config.networks import GivenTeacher, OfficialTeacher, Teacher
from consistency.config.study import Study
from consistency.data.resources import forget, known_sha256, open_resource
from consistency.nets.checkpoint import load_given, save_denoiser
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.nets.edm_pickle import read_edm_pickle
from consistency.nets.jumps import JUMPS
from consistency.nets.official import OPENAI
from consistency.nets.openai import read_openai
from consistency.provenance.card import Card, digest_of
from consistency.provenance.environment import git_state
from consistency.provenance.graph import downloads
from consistency.provenance.inputs import read_dataset, require_classes, sigma_data
from consistency.runtime.machine import Machine
from consistency.tracking.live import followed
from consistency.training.folder import publish_training, read_identity
from consistency.training.loop import Training, train
from consistency.training.teachers import architecture, teacher_training


def make_teacher(job: Job, machine: Machine) -> None:
    """Write teacher.safetensors (EMA weights), history.jsonl and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges, or if an
    official checkpoint or given file is missing, damaged or not the one that the study describes.
    """
    card, settings = Card(job, "teacher"), job.study.teacher
    if isinstance(settings, Teacher):
        training = teacher_training(job, settings, read_dataset(job), machine)
        with followed(job, training.folder) as start:
            measured = train(training, start)
            if machine.ranks.first:
                _write(card, training.emas[0].model, training, measured)
                shutil.rmtree(training.folder)
    elif not machine.ranks.first:
        return
    elif isinstance(settings, OfficialTeacher):
        _write(card, _converted(job, settings))
    elif isinstance(settings, GivenTeacher):
        _write(card, _given(card, settings))
    else:
        # A placeholder: the students' network with all weights zero.
        network = init_denoiser(architecture(job.study, settings, read_dataset(job)), 0)
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
        _write(card, network)


def _converted(job: Job, settings: OfficialTeacher) -> Denoiser:
    """Read an official checkpoint."""
    study = job.study
    source = open_resource(settings.checkpoint)
    try:
        teacher = (read_openai if settings.checkpoint == OPENAI else read_edm_pickle)(source)
    except UserError:
        forget(settings.checkpoint)
        raise
    _require_described(study, settings.checkpoint, teacher, study.noise.sigma_data)
    if job.paths.facts.exists():  # the stage dataset, which may come later, knows an official network by its name
        require_classes(study, read_dataset(job), teacher)
    return teacher


def _given(card: Card, settings: GivenTeacher) -> Denoiser:
    """Read a teacher from a person's own file."""
    job, path = card.job, Path(settings.path)
    study, data = job.study, read_dataset(job)
    if settings.sha256 and path.is_file() and (found := card.given[path]) != settings.sha256:
        raise UserError(f"{path} has sha256 {found}, not teacher.sha256: get the right file, or correct the study")
    teacher, metadata = load_given(path, architecture(study, settings, data) if settings.network else None)
    if teacher.takes_s or JUMPS in metadata:
        raise UserError(f"{path} is a student, which no other can be distilled from: name a teacher as teacher.path")
    _require_described(study, str(path), teacher, sigma_data(study, data))
    require_classes(study, data, teacher)
    return teacher


def _require_described(study: Study, name: str, teacher: Denoiser, data_std: float | str) -> None:
    """Raise UserError if the checkpoint does not match the study."""
    described: list[tuple[str, Any, Any]] = [
        ("teacher.conditional", study.teacher.conditional, teacher.label_dim > 0),
        ("dataset.resolution", study.dataset.resolution, teacher.img_resolution),
        ("dataset.channels", study.dataset.channels, teacher.img_channels),
        ("noise.sigma_data", data_std, teacher.sigma_data),
    ]
    for key, said, found in described:
        if said != found:
            raise UserError(
                f"{name} does not fit the study: {key} is {said!r}, the checkpoint's is {found!r}; "
                "change the study or name another checkpoint"
            )


def _write(
    card: Card,
    teacher: Denoiser,
    training: Training | None = None,
    measured: dict[str, float] | None = None,
) -> None:
    """Write the teacher, its history (empty if it was not trained here) and their card."""
    study, paths = card.job.study, card.job.paths
    path, history = paths.teacher_weights, paths.teacher / "history.jsonl"
    parents = {name: known_sha256(name) for name in downloads(card.job, "teacher")}
    parents |= {file.name: digest for file, digest in card.given.items()}
    parents = parents or {"images.npy": digest_of(paths.images, paths)}
    metadata = {"study": study.name, "stage": "teacher", "key": card.job.key("teacher"), "git": git_state()}
    save_denoiser(path, teacher, metadata | {"parents": parents} | ({"step": training.steps} if training else {}))
    if training:
        publish_training(training.folder, paths.teacher)
    else:
        write_bytes(history, b"")
    card.write(
        measured=(measured or {}) | {"parameters": sum(p.numel() for p in teacher.parameters())},
        training=read_identity(training.folder) if training else None,
    )
