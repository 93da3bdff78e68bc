"""Stage teacher: train the EDM denoiser that will be distilled."""

import time
from typing import Any

import torch

from consistency.layout import Layout
from consistency.nets.denoiser import init_denoiser
from consistency.provenance import git_state, write_card
from consistency.seeding import generator
from consistency.stages.inputs import read_dataset, sigma_data
from consistency.stages.publish import forget_state, publish_training
from consistency.study import SongUNet, Study, Teacher
from consistency.training.checkpoint import save_denoiser
from consistency.training.data import ImageData
from consistency.training.ema import Ema, half_life_rate
from consistency.training.loop import Training, train
from consistency.training.objectives import Denoising, Losses


def make_teacher(study: Study, layout: Layout, device: torch.device) -> None:
    """Write teacher.safetensors (EMA weights), history.jsonl and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges.
    """
    started = time.time()
    data, folder = read_dataset(study, layout), layout.teacher
    job = _training(study, layout, data, device)
    measured = train(job)
    metadata = {"study": study.name, "stage": "teacher", "key": job.key, "step": job.steps}
    parents = {"images.npy": data.facts["sha256"]}
    save_denoiser(
        folder / "teacher.safetensors", job.average.model, {**metadata, "git": git_state(), "parents": parents}
    )
    outputs = publish_training(job.folder, folder, "teacher.safetensors")
    write_card(
        folder,
        study,
        "teacher",
        started=started,
        inputs=[layout.dataset / "images.npy", layout.dataset / "labels.npy"],
        outputs=outputs,
        measured=measured | {"parameters": sum(p.numel() for p in job.model.parameters())},
    )
    forget_state(job.folder)


def _training(study: Study, layout: Layout, data: ImageData, device: torch.device) -> Training:
    settings = study.teacher
    model = init_denoiser(architecture(study, data), settings.seed).to(device).train()
    objective = Denoising(model, settings.p_mean, settings.p_std)

    def loss(step: int) -> Losses:
        draws = generator(settings.seed, "teacher", step)
        images, labels = data.batch(settings.batch, draws, study.dataset.horizontal_flip)
        return objective(images.to(device), labels.to(device) if settings.conditional else None, draws)

    return Training(
        label=f"teacher {study.name}",
        key=study.key("teacher"),
        model=model,
        average=Ema(model),
        optimizer=torch.optim.Adam(model.parameters(), lr=settings.learning_rate),
        loss=loss,
        ema_rate=lambda step: half_life_rate(
            settings.batch, step * settings.batch, settings.ema_half_life, settings.ema_ramp_up
        ),
        learning_rate=lambda step: _ramped(settings, step),
        steps=settings.steps,
        batch=settings.batch,
        log_every=settings.log_every,
        seed=settings.seed,
        folder=layout.training_state("teacher", settings.seed),
    )


def _ramped(settings: Teacher, step: int) -> float:
    """The learning rate of a step: a linear ramp over the first learning_rate_ramp images."""
    seen = (step + 1) * settings.batch
    return settings.learning_rate * min(seen / max(settings.learning_rate_ramp, 1), 1)


def architecture(study: Study, data: ImageData) -> dict[str, Any]:
    """The denoiser's description, as build_denoiser takes it."""
    channels, resolution, _ = data.shape
    network = study.teacher.network
    common = {
        "img_resolution": resolution,
        "img_channels": channels,
        "label_dim": data.classes if study.teacher.conditional else 0,
        "sigma_data": sigma_data(study, data),
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
