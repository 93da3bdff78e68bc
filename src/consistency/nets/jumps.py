"""Settings of a student's jumps, which its file holds beside the weights: the file alone is enough to sample it."""

import math
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator

from consistency.base.errors import UserError, command_of
from consistency.config.dataset import Noise
from consistency.config.fields import OneOf, Section
from consistency.nets.denoiser import Denoiser
from consistency.nets.own_preconditioning import own_preconditioning
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.preconditioning import FORMS, Preconditioning, build_preconditioning

#: its name in the metadata of a checkpoint
JUMPS = "jumps"


class Fit(Section):
    """The teacher's l_t and s_t on nodes t, as `coefficients.npz` has them; centre: the mean image of a centred form,
    its pixels in order. JSON keeps every bit of a float64."""

    times: list[float]
    l: list[float]
    s: list[float]
    centre: list[float] | None = None

    @model_validator(mode="after")
    def _as_long(self) -> Self:
        if not len(self.times) == len(self.l) == len(self.s):
            raise ValueError("times, l and s are not equally long")
        return self

    def ode(self, shape: tuple[int, ...], device: torch.device | str) -> GeneralizedODE:
        """Return the generalised ODE; shape: of an image. Raises ValueError for coefficients that are not usable."""
        times, l, s = torch.tensor([self.times, self.l, self.s], dtype=torch.float64)
        if self.centre is None:
            return GeneralizedODE(times, l, s, device)
        centre = torch.tensor(self.centre, dtype=torch.float32)
        if centre.numel() != math.prod(shape):
            raise ValueError(f"the mean image has {centre.numel()} values, an image {math.prod(shape)}")
        return GeneralizedODE(times, l, s, device, centre.reshape(shape))


class Jumps(Section):
    """Settings of a student's jumps. fit: of a student that uses the teacher's l_t and s_t; a student's own lie in the
    buffer `fit` beside its weights; class_counts: images of each class in a conditional student's data, in whose
    proportions its labels are drawn (none in files of earlier versions)."""

    preconditioning: Annotated[str, OneOf(FORMS)]
    theta: Annotated[float, Field(ge=0, le=1)] = 0.5
    only_to_eps: bool
    noise: Noise
    fit: Fit | None = None
    class_counts: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)

    def of(self, model: Denoiser) -> Preconditioning:
        """Return the preconditioning of a network. Raises ValueError if the coefficients are missing or not usable."""
        if "own_fit" in model.architecture:
            return own_preconditioning(self.preconditioning, model, self.theta)
        return fitted_preconditioning(self.preconditioning, model, self.fit, self.theta)


def fitted_preconditioning(name: str, model: Denoiser, fit: Fit | None, theta: float) -> Preconditioning:
    """Return the preconditioning of that name for a network, with the teacher's coefficients if it needs them. Raises
    ValueError if they are missing or not usable."""
    ode = None if fit is None else fit.ode(model.shape, next(model.parameters()).device)
    return build_preconditioning(name, model.sigma_data, ode, theta)


def read_jumps(path: Path, metadata: dict[str, Any]) -> Jumps:
    """Read the settings of a student's jumps from its metadata. Raises UserError if it has none, or wrong ones."""
    if JUMPS not in metadata:
        raise UserError(
            f"{path} does not say how it jumps: it is a teacher, whose images {command_of('samples')} draws, or a "
            f"student of an earlier version: run {command_of('student --student NAME --seed N')} again"
        )
    try:
        return Jumps.model_validate(metadata[JUMPS])
    except ValidationError as error:
        # Without the input, which may be long.
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise UserError(f"{path} does not say rightly how it jumps ({reason}): train the student again") from None
