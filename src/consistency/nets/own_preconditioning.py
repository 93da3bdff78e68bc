"""The preconditioning of a student whose l_t and s_t lie in the buffer `fit` beside its weights."""

from torch import Tensor

from consistency.nets.denoiser import Denoiser
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.preconditioning import Preconditioning, build_preconditioning


def own_preconditioning(name: str, model: Denoiser, theta: float = 0.5) -> Preconditioning:
    """Return the preconditioning of that name with the model's own l_t and s_t at the time of use."""
    return build_preconditioning(name, model.sigma_data, _OwnODE(model), theta)


class _OwnODE:
    """The ODE of a model's buffer `fit`, rebuilt when the buffer changes."""

    def __init__(self, model: Denoiser) -> None:
        self._fit = model.fit
        self._version = -1
        self._ode: GeneralizedODE | None = None

    def __call__(self) -> GeneralizedODE:
        """Return the ODE of the buffer's present values."""
        # PyTorch counts writes to a tensor, so a loaded state is noticed too.
        if self._ode is None or self._version != self._fit._version:
            self._ode, self._version = ode_of(self._fit), self._fit._version
        return self._ode


def ode_of(fit: Tensor) -> GeneralizedODE:
    times, l, s = fit
    return GeneralizedODE(times, l, s, fit.device)
