"""Builders that the trainings of teacher and students share: the stream of images, the optimiser, the memory layout."""

import pkgutil
from typing import Any

import torch
from torch import Tensor

from consistency.config.compute import Compute
from consistency.config.distances import DISTANCES
from consistency.config.study import Study
from consistency.data.batches import Batches
from consistency.data.prepared import ImageData
from consistency.data.resources import open_resource
from consistency.nets.denoiser import Denoiser
from consistency.runtime.machine import Machine
from consistency.theory.distance import Distance
from consistency.training.update import Stream, share_of

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}


def open_stream(study: Study, data: ImageData, machine: Machine, batch: int, seed: int, purpose: str) -> Stream:
    """Open the stream of a training: batches of so many of the study's images, mirrored and laid out as it says. Raises
    UserError if the batch cannot be divided over the devices."""
    compute = study.compute
    share, part = share_of(batch, compute.batch_per_device, machine.ranks)
    flip, device, on_device = study.dataset.horizontal_flip, machine.device, compute.data_on_device
    batches = Batches(data, batch, share, seed=seed, purpose=purpose, flip=flip, device=device, on_device=on_device)
    memory_format = torch.channels_last if compute.channels_last else torch.contiguous_format

    def laid_out(step: int) -> tuple[Tensor, Tensor | None]:
        images, labels = batches(step)
        return images.contiguous(memory_format=memory_format), labels if study.teacher.conditional else None

    return Stream(laid_out, batch, part, seed, purpose)


def build_optimizer(name: str, learning_rate: float, model: Denoiser) -> torch.optim.Optimizer:
    """Build RAdam, Adam or Lion in the fastest form of the device and PyTorch: fused Adam on a GPU, else foreach."""
    parameters = list(model.parameters())
    if name == "lion":
        from lion_pytorch import Lion

        return Lion(parameters, lr=learning_rate)
    on_gpu = parameters[0].device.type == "cuda"
    if name == "adam" and on_gpu:
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    # PyTorch has no fused RAdam. Without foreach, a GPU would run one small kernel per parameter.
    return _OPTIMIZERS[name](parameters, lr=learning_rate, foreach=on_gpu or None)  # type: ignore[call-arg]


def build_distance(name: str, device: torch.device) -> Distance:
    """Build the distance of that name in DISTANCES, with its weights if it has any."""
    known = DISTANCES[name]
    found: Any = pkgutil.resolve_name(f"consistency.{known.function}")
    return found(open_resource(known.weights)).to(device) if known.weights else found


def place(compute: Compute, model: Denoiser, device: torch.device) -> Denoiser:
    """Move the model to its device, in the memory layout of the compute settings."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if compute.channels_last else model  # type: ignore[call-overload]


def compile_networks(compute: Compute, *models: Denoiser) -> None:
    """Compile the networks inside, in place, if the study asks for it: names in checkpoints stay as they are."""
    if compute.compile:
        for model in models:
            model.model.compile()
