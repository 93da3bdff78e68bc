"""Stage teacher: the EDM denoiser that will be distilled, trained here or converted from an official checkpoint."""

import shutil
from typing import Any

import torch

from consistency.base.errors import UserError
from consistency.base.files import write_bytes
from consistency.config.job import Job
from consistency.config.networks import OfficialTeacher, Teacher
from consistency.config.study import Study
from consistency.data.resources import forget, known_sha256, open_resource
from consistency.nets.checkpoint import save_denoiser
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.nets.edm_pickle import read_edm_pickle
from consistency.provenance.card import Card, digest_of
from consistency.provenance.environment import git_state
from consistency.provenance.graph import downloads
from consistency.provenance.inputs import read_dataset
from consistency.runtime.machine import Machine
from consistency.tracking.live import followed
from consistency.training.folder import publish_training, read_identity
from consistency.training.loop import Training, train
from consistency.training.teachers import architecture, teacher_training


def make_teacher(job: Job, machine: Machine) -> None:
    """Write teacher.safetensors (EMA weights), history.jsonl and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges, or if an
    official checkpoint is missing, damaged or not the one that the study describes.
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
        _write(card, _converted(job.study, settings))
    else:
        # A placeholder: the students' network with all weights zero.
        network = init_denoiser(architecture(job.study, settings, read_dataset(job)), 0)
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
        _write(card, network)


def _converted(study: Study, settings: OfficialTeacher) -> Denoiser:
    """Read an official EDM checkpoint."""
    source = open_resource(settings.checkpoint)
    try:
        teacher = read_edm_pickle(source)
    except UserError:
        forget(settings.checkpoint)
        raise
    _require_described(study, settings, teacher)
    return teacher


def _require_described(study: Study, settings: OfficialTeacher, teacher: Denoiser) -> None:
    """Raise UserError if the checkpoint does not match the study."""
    described: list[tuple[str, Any, Any]] = [
        ("teacher.conditional", settings.conditional, teacher.label_dim > 0),
        ("dataset.resolution", study.dataset.resolution, teacher.img_resolution),
        ("dataset.channels", study.dataset.channels, teacher.img_channels),
        ("noise.sigma_data", study.noise.sigma_data, teacher.sigma_data),
    ]
    for key, said, found in described:
        if said != found:
            raise UserError(
                f"{settings.checkpoint} does not fit the study: {key} is {said!r}, the checkpoint's is {found!r}; "
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
