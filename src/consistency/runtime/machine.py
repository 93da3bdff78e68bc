"""The device of this process, and its rank."""

from dataclasses import dataclass

import torch

from consistency.base.errors import UserError
from consistency.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """Machine of a training: the device of this process, and its rank among the processes."""

    device: torch.device
    ranks: Ranks = ALONE


def pick_device(name: str) -> torch.device:
    """Return the device; 'auto' is a GPU if there is one. Raises UserError if the device does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
