"""Stage teacher: the EDM denoiser that will be distilled, trained here or converted from an official checkpoint."""

import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch

from consistency.errors import UserError
from consistency.files import write_bytes
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.nets.edm_pickle import read_edm_pickle
from consistency.provenance import digest_of, git_state, write_card
from consistency.resources import forget, known_sha256, open_resource
from consistency.stages.inputs import read_dataset, sigma_data
from consistency.stages.publish import publish_training
from consistency.stages.trainer import Machine, build_optimizer, build_update, compile_networks, place
from consistency.study import NoTeacher, OfficialTeacher, SongUNet, Study, Teacher
from consistency.tracking.live import followed
from consistency.training.checkpoint import save_denoiser
from consistency.training.data import ImageData
from consistency.training.ema import Ema, half_life_rate
from consistency.training.folder import read_identity
from consistency.training.loop import Training, train
from consistency.training.objectives import Denoising


def make_teacher(study: Study, layout: Layout, machine: Machine) -> None:
    """Write teacher.safetensors (EMA weights), history.jsonl and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges, or when an
    official checkpoint is missing, damaged or not the one that the study describes.
    """
    if isinstance(study.teacher, OfficialTeacher):
        if machine.ranks.first:
            _convert(study, study.teacher, layout)
    elif isinstance(study.teacher, NoTeacher):
        if machine.ranks.first:
            _describe(study, study.teacher, layout)
    else:
        _train(study, study.teacher, layout, machine)


def _convert(study: Study, settings: OfficialTeacher, layout: Layout) -> None:
    """An official EDM checkpoint to our form."""
    started = time.time()
    source = open_resource(settings.checkpoint)
    try:
        teacher = read_edm_pickle(source)
    except UserError:
        forget(settings.checkpoint)
        raise
    _require_described(study, settings, teacher)
    _write(study, layout, started, teacher, downloads=[settings.checkpoint])


def _describe(study: Study, settings: NoTeacher, layout: Layout) -> None:
    """Without a teacher: the network of the students, its weights at zero, so that nobody takes them for anything."""
    started, data = time.time(), read_dataset(study, layout)
    network = init_denoiser(architecture(study, settings, data), 0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    _write(study, layout, started, network)


def _require_described(study: Study, settings: OfficialTeacher, teacher: Denoiser) -> None:
    """Raises UserError when the file is not what the study says."""
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


def _train(study: Study, settings: Teacher, layout: Layout, machine: Machine) -> None:
    started = time.time()
    data = read_dataset(study, layout)
    job = _training(study, settings, layout, data, machine)
    with followed(study, layout, job.folder) as job.on_start:
        measured = train(job)
        if machine.ranks.first:
            _write(study, layout, started, job.averages[0].model, job, measured)
            shutil.rmtree(job.folder)


def _write(
    study: Study,
    layout: Layout,
    started: float,
    teacher: Denoiser,
    job: Training | None = None,
    measured: dict[str, float] | None = None,
    downloads: Sequence[str] = (),
) -> None:
    """The teacher, its history, empty if it was not trained here, and their card. downloads: what it is made from; the
    data, if nothing."""
    path, history = layout.teacher / "teacher.safetensors", layout.teacher / "history.jsonl"
    inputs = [] if downloads else [layout.dataset / name for name in ("images.npy", "labels.npy", "dataset.json")]
    parents = {name: known_sha256(name) for name in downloads} or {"images.npy": digest_of(inputs[0], layout)}
    metadata = {"study": study.name, "stage": "teacher", "key": study.key("teacher"), "git": git_state()}
    save_denoiser(path, teacher, metadata | {"parents": parents} | ({"step": job.steps} if job else {}))
    if job:
        publish_training(job.folder, layout.teacher)
    else:
        write_bytes(history, b"")
    write_card(
        study,
        layout,
        "teacher",
        started=started,
        inputs=inputs,
        downloads=downloads,
        outputs=[path, history],
        measured=(measured or {}) | {"parameters": sum(p.numel() for p in teacher.parameters())},
        training=read_identity(job.folder) if job else None,
    )


def _training(study: Study, settings: Teacher, layout: Layout, data: ImageData, machine: Machine) -> Training:
    model = init_denoiser(architecture(study, settings, data), settings.seed)
    model = place(study, model, machine.device).train()
    average = Ema(
        model,
        lambda step: half_life_rate(
            settings.batch, step * settings.batch, settings.ema_half_life, settings.ema_ramp_up
        ),
    )
    compile_networks(study, model)
    update = build_update(
        study,
        data,
        machine,
        Denoising(model, settings.p_mean, settings.p_std),
        model,
        batch=settings.batch,
        seed=settings.seed,
        purpose="teacher",
        optimizer=build_optimizer("adam", model, settings.learning_rate),
    )
    return Training(
        label=f"teacher {study.name}",
        key=study.key("teacher"),
        update=update,
        averages=[average],
        learning_rate=lambda step: _ramped(settings, step),
        steps=settings.steps,
        log_every=settings.log_every,
        folder=layout.training_state("teacher", settings.seed),
    )


def _ramped(settings: Teacher, step: int) -> float:
    """The learning rate of a step: a linear ramp over the first learning_rate_ramp images."""
    seen = (step + 1) * settings.batch
    return settings.learning_rate * min(seen / max(settings.learning_rate_ramp, 1), 1)


def architecture(study: Study, settings: Teacher | NoTeacher, data: ImageData) -> dict[str, Any]:
    """The denoiser's description, as build_denoiser takes it."""
    return architecture_of(study, settings, data.classes, sigma_data(study, data))


def architecture_of(study: Study, settings: Teacher | NoTeacher, classes: int, data_std: float) -> dict[str, Any]:
    """The same from what is known of the data: its classes and its standard deviation."""
    network = settings.network
    common = {
        "img_resolution": study.dataset.resolution,
        "img_channels": study.dataset.channels,
        "label_dim": classes if settings.conditional else 0,
        "sigma_data": data_std,
        "second_time": False,
    }
    if not isinstance(network, SongUNet):
        return {"network": "mlp", **common, **network.model_dump(exclude={"kind"})}
    variants: dict[str, dict[str, Any]] = {
        "ddpmpp": {
            "embedding_type": "positional",
            "encoder_type": "standard",
            "channel_mult_noise": 1,
            "resample_filter": [1, 1],
        },
        "ncsnpp": {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": [1, 3, 3, 1],
        },
    }
    options = network.model_dump(exclude={"kind", "variant"})
    return {"network": "songunet", **common, **options, **variants[network.variant], "decoder_type": "standard"}
