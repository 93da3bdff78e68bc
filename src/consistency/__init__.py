"""Consistency distillation with analytically fitted preconditioning: a reproducibility workflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consistency.api import FittedODE, fit_preconditioning
    from consistency.nets.adapters import from_diffusers, from_edm, from_flow, from_k_diffusion

__all__ = ["FittedODE", "fit_preconditioning", "from_diffusers", "from_edm", "from_flow", "from_k_diffusion"]
__version__ = "0.1.0"

#: the package's rooms in order: a module imports from its own room and from those before it; __main__ has the verbs,
#: api the Python interface
ROOMS = (
    *("base", "theory", "config", "nets", "data", "runtime"),
    *("provenance", "training", "evaluation", "report", "tracking", "stages"),
)


def __getattr__(name: str) -> Any:
    """Import a name of __all__ when it is first used: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'nets.adapters' if name.startswith('from_') else 'api'}"), name)
