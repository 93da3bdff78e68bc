"""The device of this process, and its rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import scipy.linalg  # noqa: F401 - its BLAS is not NumPy's, and must be there to be limited
import torch
from threadpoolctl import threadpool_limits

from consistency.base.errors import UserError
from consistency.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """Machine of a training: the device of this process, and its rank among the processes."""

    device: torch.device
    ranks: Ranks = ALONE


def limit_threads(threads: int) -> threadpool_limits:
    """Limit every pool of threads: PyTorch's, OpenMP's and those of the two BLAS libraries, whatever the environment
    asks for. Returns the limits; leaving them as a context restores all but PyTorch's."""
    torch.set_num_threads(threads)
    return threadpool_limits(threads)


@contextmanager
def as_in_a_stage(threads: int = 1) -> Iterator[None]:
    """Compute in the block as a stage does: the number of threads affects a CPU's last bits, TF32 those of a GPU."""
    before, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with limit_threads(threads):
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.allow_tf32 = tf32


def pick_device(name: str, asked: str = "") -> torch.device:
    """Return the device; 'auto' is a GPU if there is one. asked: a setting, if any, that makes 'auto' a GPU. Raises
    UserError, which names the driver or the build, if the device does not exist."""
    if name == "auto" and not asked:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if name != "auto":
            raise UserError(f"--device {name} cannot be used here: {reason}") from None
        raise UserError(f"{asked} asks for a GPU: {reason}; mend that, or use --device cpu") from None
    return device


def require_device(name: str, asked: str, count: int) -> None:
    """Raise UserError as `pick_device` does, or if there are fewer GPUs than count, without starting CUDA on one: this
    process, the launcher of others, would keep some of its memory."""
    if name == "cpu" or not torch.cuda.is_available():
        pick_device(name, asked)
    elif (there := torch.cuda.device_count()) < count:
        raise UserError(f"{asked or name} needs {count} GPUs here, torch sees {there}: lower it or mend the others")


def described(device: torch.device) -> str:
    """Return a device's name, with that of the GPU."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
