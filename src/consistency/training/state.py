"""The saved state of a training (torch, weights only)."""

from pathlib import Path
from typing import Any

import torch

from consistency.base.errors import UserError, user_error
from consistency.base.files import write_with
from consistency.nets.checkpoint import DAMAGED


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically: the old one survives a full disk or a kill."""
    write_with(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a training state, or None where there is none. Raises UserError for a damaged one."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        # The first sentence only: PyTorch goes on to advise loading the file unsafely.
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise user_error(error, f"the training state {path} is damaged ({reason}): delete it to start over") from None
    if not isinstance(state, dict):
        raise UserError(f"the training state {path} is damaged (it holds no state): delete it to start over")
    return state
