"""Consistency training: a consistency function learnt from the data alone, without a teacher (iCT, ECT, GC)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consistency.config import objectives
from consistency.config.dataset import Noise
from consistency.nets.denoiser import Denoiser
from consistency.theory.coupling import assignment, generated, generator_mask
from consistency.theory.curriculum import DoublingCurriculum, Schedule, ShrinkingCurriculum
from consistency.theory.distance import Distance
from consistency.theory.noise import ctm_dsm_sigma
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import expand
from consistency.training.objective import Basis, Draws, Shape, Term, normal, weighted_denoising_error


@dataclass(frozen=True)
class CoupledPairs(Draws):
    """Draws of consistency training. t, u, weight [N]: the two levels and the weight of their comparison; z: the noise
    of both; generated [N]: True for images to replace by generated ones; sigma, z_dsm: of the DSM term, if there is
    one."""

    t: Tensor
    u: Tensor
    weight: Tensor
    z: Tensor
    generated: Tensor
    sigma: Tensor | None
    z_dsm: Tensor | None


@dataclass(frozen=True)
class ConsistencyTraining:
    """weight d(f_theta(x_t, t, eps), sg f_theta(x_u, u, eps)) with x_t = x + t z, x_u = x + u z and t > u.

    x is the image (ic) or, with probability mu, gc's endpoint f_predictor(x* + u z, u, eps); mu = 0 needs no predictor.
    Both sides use the student's own weights (iCT: no EMA in the target) and the same dropout masks. predictor: the
    average of the student, or any other frozen network of its kind. ends: eps and T. iCT is a DoublingCurriculum with
    the pseudo-Huber distance, ECT a ShrinkingCurriculum with the Euclidean one and a student made from a teacher.
    dsm_weight: of a DSM term on D_theta(x_t, t, t), from which coefficients can be fitted without a teacher (ours;
    needs a second time).
    """

    student: Denoiser
    predictor: Denoiser | None
    preconditioning: Preconditioning
    distance: Distance
    schedule: Schedule
    ends: tuple[float, float] = (0.002, 80.0)
    mu: float = 0.0
    dsm_weight: float = 0.0

    @classmethod
    def build(cls, settings: objectives.Consistency, basis: Basis) -> "ConsistencyTraining":
        """Build the loss of a student, `TransportTraining` for the coupling ot."""
        return (TransportTraining if settings.coupling == "ot" else cls)(
            student=basis.models.student,
            predictor=basis.models.predictor,
            preconditioning=basis.preconditioning,
            distance=basis.distance,
            schedule=schedule_of(settings, basis.noise),
            ends=(basis.noise.sigma_min, basis.noise.sigma_max),
            mu=settings.mu if settings.coupling == "gc" else 0.0,
            dsm_weight=settings.dsm_weight,
        )

    def endpoint(self, model: Denoiser, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return f(x, t, eps) of the given weights. x: [N, C, H, W]; t: [N]."""
        end = torch.full_like(t, self.ends[0])
        return self.preconditioning.jump(model, x, t, end, labels)

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> CoupledPairs:
        """Draw levels of the step's stage, noise, and the images to replace: the same draws whatever mu."""
        t, u, weight = self.schedule.levels(step, shape[0], device)
        z, mask = normal(shape, device), generator_mask(shape[0], self.mu, device)
        if not self.dsm_weight:
            return CoupledPairs(t, u, weight, z, mask, None, None)
        sigma = ctm_dsm_sigma(shape[0], *self.ends, device)
        return CoupledPairs(t, u, weight, z, mask, sigma, normal(shape, device))

    def terms(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> Iterator[Term]:
        """Yield the consistency term, then the DSM term if it has a weight."""
        evaluations = 3 + 1 + (1 if self.mu else 0)
        yield Term("consistency", self.consistency(images, labels, draws), 1.0, evaluations * len(images))
        if draws.sigma is not None and draws.z_dsm is not None:
            value = weighted_denoising_error(
                lambda x, t: self.student(x, t, t, labels), images, draws.sigma, self.student.sigma_data, draws.z_dsm
            )
            yield Term("dsm", value, self.dsm_weight, 3 * len(images))

    def consistency(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> Tensor:
        """Return the weighted distance of the two sides, a mean over images."""
        data = self.coupled(images, labels, draws)
        # Leaving fork_rng restores the random state, so that the student's pass has the target's dropout masks.
        with torch.no_grad(), torch.random.fork_rng([images.get_device()] if images.is_cuda else []):
            x_u = data + expand(draws.u, data) * draws.z
            target = self.endpoint(self.student, x_u, draws.u, labels)
        x_t = data + expand(draws.t, data) * draws.z
        estimate = self.endpoint(self.student, x_t, draws.t, labels)
        return (draws.weight.to(estimate.dtype) * self.distance(estimate, target)).mean()

    def coupled(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> Tensor:
        """Return the images, with the drawn ones replaced by gc's endpoints."""
        if self.predictor is None or not self.mu:
            return images
        predictor = self.predictor
        return generated(lambda x, u: self.endpoint(predictor, x, u, labels), images, draws.z, draws.u, draws.generated)


@dataclass(frozen=True)
class TransportTraining(ConsistencyTraining):
    """Consistency training with ot: images and noise of the whole batch, whatever its parts and processes, are paired
    by exact assignment (`assignment`; within classes if the model is conditional)."""

    def pair(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> CoupledPairs:
        """Return the draws with their noise exchanged among the images of the batch."""
        return replace(draws, z=draws.z[assignment(images, draws.z, labels)])


def schedule_of(settings: objectives.Consistency, noise: Noise) -> Schedule:
    """Return the schedule of the levels of consistency training."""
    levels = settings.curriculum
    given = levels.model_dump(exclude={"kind", "p_mean", "p_std"})
    given |= {"sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max, "mean": levels.p_mean, "std": levels.p_std}
    if isinstance(levels, objectives.Shrinking):
        return ShrinkingCurriculum(**given)
    return DoublingCurriculum(steps=settings.steps, rho=noise.rho, **given)
