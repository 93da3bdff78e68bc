"""The processes of one training, started by torchrun: shared gradients, figures and stop requests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process (rank, from 0) among the world of processes that train one model together."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that writes files and shows progress."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over all processes; same dtype, shapes and order everywhere.

        One flat all-reduce. DDP would overlap it with the backward pass, which here is a small part of a step: most
        of it is the teacher's Heun steps.
        """
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in rank order; every process must have equally many."""
        if self.world == 1:
            return tensor
        here = tensor.contiguous()
        rows = [torch.empty_like(here) for _ in range(self.world)]
        dist.all_gather(rows, here)
        return torch.cat(rows)

    def largest(self, value: int) -> int:
        """Return the largest of a number over all processes, through the CPU, so that no GPU's queue is waited for."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.largest(0)


#: a single process
ALONE = Ranks()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the processes that torchrun started, and take the GPU of this one; a single process without torchrun.

    Returns the ranks and the device (cuda:<local rank> if it was cuda).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave() -> None:
    """Leave the group once all processes do; does nothing without a group."""
    if dist.is_initialized():
        dist.destroy_process_group()
