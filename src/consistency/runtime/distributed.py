"""Communication of the processes of one training, which torchrun starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among the `world` processes that train one model together."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that writes files and shows progress."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over all processes; dtypes, shapes and order must agree.

        One flat all-reduce. DDP would overlap it with the backward pass, a small part of a step beside the teacher's
        Heun steps.
        """
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes in rank order; every process must have equally many."""
        if self.world == 1:
            return tensor
        here = tensor.contiguous()
        rows = [torch.empty_like(here) for _ in range(self.world)]
        dist.all_gather(rows, here)
        return torch.cat(rows)

    def largest(self, value: int) -> int:
        """Return the maximum over all processes, reduced on the CPU so that no GPU queue is waited for."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def wait(self) -> None:
        """Wait for all processes."""
        self.largest(0)


#: a single process
ALONE = Ranks()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the processes that torchrun started, if it did.

    Returns the ranks and this process's device (cuda:<local rank> for cuda).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave() -> None:
    """Leave the group once all processes do. Does nothing without a group."""
    if dist.is_initialized():
        dist.destroy_process_group()
