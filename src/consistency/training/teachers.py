"""The training of a teacher, and the architectures of the networks that a study describes."""

from typing import Any

from consistency.config.job import Job
from consistency.config.networks import GivenTeacher, NoTeacher, Teacher
from consistency.config.study import Study
from consistency.data.prepared import ImageData
from consistency.nets.denoiser import init_denoiser
from consistency.provenance.inputs import sigma_data
from consistency.runtime.machine import Machine
from consistency.training.build import build_optimizer, compile_networks, open_stream, place
from consistency.training.denoising import Denoising
from consistency.training.ema import Ema, half_life_rate
from consistency.training.loop import Training
from consistency.training.stopwatch import Stopwatch
from consistency.training.update import Update


def teacher_training(job: Job, settings: Teacher, data: ImageData, machine: Machine) -> Training:
    study = job.study
    model = init_denoiser(architecture(study, settings, data), settings.seed)
    model = place(study.compute, model, machine.device).train()
    ema = Ema(
        model,
        lambda step: half_life_rate(
            settings.batch, step * settings.batch, settings.ema_half_life, settings.ema_ramp_up
        ),
    )
    compile_networks(study.compute, model)

    def learning_rate(step: int) -> float:
        """Return the rate of a linear ramp over the first learning_rate_ramp images."""
        return settings.learning_rate * min((step + 1) * settings.batch / max(settings.learning_rate_ramp, 1), 1)

    update = Update(
        model,
        build_optimizer("adam", settings.learning_rate, model),
        Denoising(model, settings.p_mean, settings.p_std),
        open_stream(study, data, machine, settings.batch, settings.seed, "teacher"),
        ranks=machine.ranks,
        stopwatch=Stopwatch(machine.device),
    )
    return Training(
        label=f"teacher {study.name}",
        key=job.key("teacher"),
        update=update,
        emas=[ema],
        learning_rate=learning_rate,
        steps=settings.steps,
        log_every=settings.log_every,
        folder=job.paths.training_state("teacher", settings.seed),
    )


def architecture(study: Study, settings: Teacher | GivenTeacher | NoTeacher, data: ImageData) -> dict[str, Any]:
    """Return the denoiser's description, as build_denoiser takes it."""
    return architecture_of(study, settings, data.classes, sigma_data(study, data))


def architecture_of(
    study: Study, settings: Teacher | GivenTeacher | NoTeacher, classes: int, data_std: float
) -> dict[str, Any]:
    """Return the same from known facts about the data: its classes and its standard deviation."""
    shape = {"img_resolution": study.dataset.resolution, "img_channels": study.dataset.channels}
    labels = {"label_dim": classes if settings.conditional else 0}
    assert settings.network is not None
    return {**settings.network.architecture(), **shape, **labels, "sigma_data": data_std, "second_time": False}
