"""R_t on the images: each coupling has a denoiser of its own, which is trained here and then discarded (GC)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consistency.base.seeding import derived_seed, generator
from consistency.config.job import Job
from consistency.config.measures import Flows
from consistency.data.prepared import ImageData
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.provenance.inputs import read_student
from consistency.runtime.machine import Machine
from consistency.theory.coupling import assignment
from consistency.training.build import build_optimizer, open_stream, place
from consistency.training.consistency_training import TransportTraining
from consistency.training.coupled_denoising import CoupledDenoising, TransportDenoising, velocity_error
from consistency.training.ema import Ema
from consistency.training.loop import Training
from consistency.training.objective import Models
from consistency.training.stopwatch import Stopwatch
from consistency.training.students import build_objective, predictor_of
from consistency.training.update import Update


@dataclass(frozen=True)
class ImagePairs:
    """Images [K, C, H, W], their labels if students are conditional, and noise. batch: most images in an evaluation."""

    images: Tensor
    labels: Tensor | None
    noise: Tensor
    batch: int

    def transported(self, size: int) -> "ImagePairs":
        """Return the pairs of ot as in training, size images at a time; an incomplete last batch is left out."""
        size = min(size, len(self.images))
        parts = [slice(first, first + size) for first in range(0, len(self.images) - size + 1, size)]
        moved = [self.noise[p][assignment(self.images[p], self.noise[p], _part(self.labels, p))] for p in parts]
        kept = slice(size * len(parts))
        return ImagePairs(self.images[kept], _part(self.labels, kept), torch.cat(moved), self.batch)

    def each(self, device: torch.device, measure: Callable[[int, Tensor, Tensor | None, Tensor], Tensor]) -> Tensor:
        """Return measure(first row, images, labels, noise) of all images, on the CPU, evaluated batch by batch."""
        found = []
        for first in range(0, len(self.images), self.batch):
            part = slice(first, first + self.batch)
            own = None if self.labels is None else self.labels[part].to(device)
            found.append(measure(first, self.images[part].to(device), own, self.noise[part].to(device)).cpu())
        return torch.cat(found)


def _part(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


@dataclass(frozen=True)
class Discrepancy:
    """The coupling of a student, as at the end of its training, and the denoiser of that coupling.

    training: the denoiser's; seed: of the generated images.
    """

    training: Training
    objective: CoupledDenoising
    seed: int

    def at(self, pairs: ImagePairs, t: float) -> np.ndarray:
        """Return ||z - v_t(x_t)||^2 of each pair, [K], a sum over pixels."""
        denoiser = self.training.emas[0].model
        device = next(denoiser.parameters()).device

        def measure(first: int, x: Tensor, labels: Tensor | None, z: Tensor) -> Tensor:
            draws = generator(self.seed, "flows mask", first, device)
            return self.objective.discrepancy(denoiser, x, labels, z, t, draws)

        return np.asarray(pairs.each(device, measure))


@torch.no_grad()
def by_teacher(teacher: Denoiser, pairs: ImagePairs, t: float) -> np.ndarray:
    """Return the same of independent noise by the teacher, [K]; its mean is d (1 - l_t) for an exact one (AP (15))."""
    device = next(teacher.parameters()).device
    return np.asarray(pairs.each(device, lambda _, x, labels, z: velocity_error(teacher, x, labels, z, t)))


def discrepancy_of(job: Job, settings: Flows, data: ImageData, machine: Machine) -> Discrepancy:
    """Build the Discrepancy of a student's coupling. All couplings' denoisers begin with the same weights and see the
    same images, levels and noise. Raises UserError if the student is missing."""
    study = job.study
    ema = place(study.compute, read_student(job, machine.device), machine.device)
    coupling = build_objective(job, Models(ema, ema, ema, predictor_of(job, ema, machine.device)), machine.device)
    architecture = {**ema.architecture, "second_time": False, "dropout": 0.0}
    architecture.pop("own_fit", None)
    model = init_denoiser(architecture, derived_seed(settings.seed, "flows denoiser"))
    model = place(study.compute, model, machine.device).train()
    transported = isinstance(coupling, TransportTraining)
    objective = TransportDenoising(model, coupling) if transported else CoupledDenoising(model, coupling)
    update = Update(
        model,
        build_optimizer("adam", settings.denoiser_learning_rate, model),
        objective,
        open_stream(study, data, machine, settings.denoiser_batch, settings.seed, "flows"),
        ranks=machine.ranks,
        stopwatch=Stopwatch(machine.device),
    )
    training = Training(
        label=f"flows {job.student}",
        key=f"{job.key('flows')} {job.student}",
        update=update,
        emas=[Ema(model, 0.999, warm_up=0.75)],
        steps=settings.denoiser_steps,
        log_every=100,
        folder=job.paths.training_state(f"flows/{job.student}", settings.seed),
    )
    return Discrepancy(training, objective, study.seeds[0])
