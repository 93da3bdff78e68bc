"""R_t on the images: for each coupling a denoiser of its own, which is trained here and then let go of (GC)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.seeding import derived_seed, generator
from consistency.stages.inputs import read_student, student_file
from consistency.stages.student import consistency_objective
from consistency.stages.trainer import Machine, build_optimizer, build_update, place
from consistency.study import Flows, Study
from consistency.training.coupled_denoising import CoupledDenoising, TransportDenoising, missed
from consistency.training.data import ImageData
from consistency.training.ema import Ema
from consistency.training.loop import Training, train


@dataclass(frozen=True)
class Discrepancy:
    """The coupling of a student, as its training met it at its end, and the denoiser of that coupling.

    inputs: the files that it depends on; state: where the training goes on if it was interrupted.
    """

    study: Study
    job: Training
    objective: CoupledDenoising
    inputs: list[Path]

    @property
    def state(self) -> Path:
        """The folder of the training, to be removed once its numbers are written."""
        return self.job.folder

    def train(self) -> None:
        """Train the denoiser. Raises Interrupted when asked to stop, UserError when it diverges."""
        train(self.job)

    def at(self, images: Tensor, labels: Tensor | None, noise: Tensor, t: float) -> np.ndarray:
        """||z - v_t(x_t)||^2 of each pair, [K], a sum over pixels."""
        denoiser = self.job.averages[0].model

        def measure(first: int, x: Tensor, own: Tensor | None, z: Tensor) -> Tensor:
            draws = generator(self.study.seeds[0], "flows mask", first, x.device)
            return self.objective.discrepancy(denoiser, x, own, z, t, draws)

        return _in_batches(self.study, measure, next(denoiser.parameters()).device, images, labels, noise)


def by_teacher(
    study: Study, teacher: Denoiser, images: Tensor, labels: Tensor | None, noise: Tensor, t: float
) -> np.ndarray:
    """The same of independent noise by the teacher, [K]; its mean is d (1 - l_t) for an exact one (AP (15))."""

    def measure(first: int, x: Tensor, own: Tensor | None, z: Tensor) -> Tensor:
        return missed(teacher, x, own, z, t)

    return _in_batches(study, measure, next(teacher.parameters()).device, images, labels, noise)


@torch.no_grad()
def _in_batches(
    study: Study,
    measure: Callable[[int, Tensor, Tensor | None, Tensor], Tensor],
    device: torch.device,
    images: Tensor,
    labels: Tensor | None,
    noise: Tensor,
) -> np.ndarray:
    """measure(first row, images, labels, noise) of all, [K], no more at once than the samplers take."""
    found = []
    for first in range(0, len(images), study.sampling.batch):
        part = slice(first, first + study.sampling.batch)
        own = None if labels is None else labels[part].to(device)
        found.append(measure(first, images[part].to(device), own, noise[part].to(device)).cpu())
    return np.asarray(torch.cat(found).numpy())


def discrepancy_of(
    study: Study, settings: Flows, layout: Layout, run: str, data: ImageData, machine: Machine
) -> Discrepancy:
    """What measures a student's coupling, for the first of the study's seeds. All couplings' denoisers begin with the
    same weights and see the same images, levels and noise. Raises UserError when the student is missing."""
    seed, student = study.seeds[0], study.students[run]
    average = place(study, read_student(study, layout, run, seed, machine.device), machine.device)
    predictor, inputs = average, [layout.student_file(run, seed)]
    if frozen := student.frozen:
        predictor = read_student(study, layout, frozen.run, seed, machine.device, step=frozen.step)
        inputs.append(student_file(layout, frozen.run, seed, step=frozen.step))
    coupling = consistency_objective(study, layout, run, (average, predictor), machine)
    architecture = {**average.architecture, "second_time": False, "dropout": 0.0}
    architecture.pop("own_fit", None)
    model = init_denoiser(architecture, derived_seed(settings.seed, "flows denoiser"))
    model = place(study, model, machine.device).train()
    kind = TransportDenoising if student.coupling == "ot" else CoupledDenoising
    objective = kind(model, coupling)  # type: ignore[arg-type]
    update = build_update(
        study,
        data,
        machine,
        objective,
        model,
        batch=settings.denoiser_batch,
        seed=settings.seed,
        purpose="flows",
        optimizer=build_optimizer("adam", model, settings.denoiser_learning_rate),
    )
    job = Training(
        label=f"flows {run}",
        key=f"{study.key('flows')} {run}",
        update=update,
        averages=[Ema(model, 0.999, warm_up=0.75)],
        steps=settings.denoiser_steps,
        log_every=100,
        folder=layout.training_state(f"flows-{run}", settings.seed),
    )
    return Discrepancy(study, job, objective, inputs)
