"""A student read from its file, ready to jump and to sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.base.seeding import ImageNoise
from consistency.config.dataset import Noise
from consistency.config.measures import Sampling
from consistency.data.prepared import to_bytes
from consistency.evaluation.samplers import Sampler, draw, jumps_along
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.nets.jumps import read_jumps
from consistency.runtime.machine import as_in_a_stage
from consistency.theory.preconditioning import Preconditioning

#: images an evaluation, where no study says it
BATCH: int = Sampling.model_fields["batch"].default


@dataclass(frozen=True)
class TrainedStudent:
    """A student: its network D(x,t,s), its f and g, and its range of times.

    only_to_eps: it jumps to noise.sigma_min alone; batch: images an evaluation; class_counts: of a conditional
    student's data; metadata: of its file, such as study, run, seed, step, ema, git and parents.
    """

    model: Denoiser
    preconditioning: Preconditioning
    noise: Noise
    only_to_eps: bool
    batch: int = BATCH
    class_counts: Sequence[int] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: Tensor | float, s: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Jump: the consistency function f(x,t,s) = f(t,s) x + g(t,s) D(x,t,s).

        x: float [N, C, H, W], images in [-1, 1] units with noise of standard deviation t; t, s: a number or [N], with
        noise.sigma_min <= s <= t <= noise.sigma_max; labels: of a conditional student, class indices int64 [N] (None:
        no class). Returns [N, C, H, W]. Raises UserError for times out of range, and for s above sigma_min if the
        student jumps only there.
        """
        t, s = (torch.as_tensor(time, dtype=torch.float64, device=x.device).expand(len(x)) for time in (t, s))
        low, high = self.noise.sigma_min, self.noise.sigma_max
        slack = 1e-6  # for times that went through float32
        if not bool(((low * (1 - slack) <= s) & (s <= t) & (t <= high * (1 + slack))).all()):
            raise UserError(f"a jump needs {low:g} <= s <= t <= {high:g}, the student's range of times")
        if self.only_to_eps and bool((s > low * (1 + slack)).any()):
            raise UserError(f"this student jumps only to s = {low:g}")
        return self.preconditioning.jump(self.model, x, t, s, labels)

    def sample(
        self,
        count: int,
        nfe: int,
        seed: int = 0,
        label: int | None = None,
        gamma: float = 0.0,
        threads: int = 1,
        labels: Literal["data", "balanced"] = "data",
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Sample uint8 images [count, H, W, C]: image i comes from seed + i, through nfe jumps.

        The same seeds give the images of the stage samples, bit for bit where precision, batch and labels are the
        study's and the machine is the same. label: the class of all images of a conditional student; by default each
        seed draws its own, in the proportions of the student's data or (labels="balanced") uniformly. gamma: in [0, 1],
        the share of fresh noise between jumps; a student that jumps only to eps always takes 1. threads: CPU threads.
        Raises UserError for values out of range, and if a file of an earlier version does not say the proportions.
        """
        classes = self.model.label_dim
        if count < 1 or nfe < 1 or seed < 0:
            raise UserError(f"count and nfe must be 1 or more, seed 0 or more; got {count}, {nfe} and {seed}")
        if not 0 <= gamma <= 1:
            raise UserError(f"gamma must be from 0 to 1, got {gamma:g}")
        if label is not None and not 0 <= label < classes:
            allowed = f"0 to {classes - 1}" if classes else "none, since it is not conditional"
            raise UserError(f"label {label} is not one of the student's: {allowed}")
        if labels not in ("data", "balanced"):
            raise UserError(f"labels are drawn as data or balanced, got {labels!r}")
        weights = self.class_counts if labels == "data" and label is None else [1] * classes
        if len(weights) != classes:
            raise UserError(
                "the student's file, of an earlier version, does not say how frequent each class is in its data: draw "
                "them uniformly (labels balanced), give one label, or train the student again"
            )
        gamma = 1.0 if self.only_to_eps else gamma
        sampler = jumps_along(self.noise, self.model, self.preconditioning, nfe, gamma)
        sampler = sampler if label is None else _labelled(sampler, label)
        with as_in_a_stage(threads):
            batches = draw(self.batch, self.model, sampler, count, weights, seed)
            return np.concatenate([to_bytes(images) for _, images in batches])


def open_student(path: Path, device: torch.device, precision: str, batch: int) -> TrainedStudent:
    """Open the file of a student, final or a snapshot. Raises UserError for a missing, damaged or foreign file, and for
    one that does not say how it jumps."""
    model, metadata = load_denoiser(path)
    model, jumps = model.to(device).compute_in(precision), read_jumps(path, metadata)
    try:
        preconditioning = jumps.of(model)
    except ValueError as error:
        raise UserError(f"{path} holds no usable coefficients ({error}): train it again") from None
    return TrainedStudent(model, preconditioning, jumps.noise, jumps.only_to_eps, batch, jumps.class_counts, metadata)


def _labelled(sampler: Sampler, label: int) -> Sampler:
    def sample(noise: ImageNoise) -> Tensor:
        # Labels are drawn, then replaced, so that the noise after them stays the same.
        assert noise.labels is not None
        noise.labels = torch.full_like(noise.labels, label)
        return sampler(noise)

    return sample
