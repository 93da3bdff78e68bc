"""Builders that the trainings of teacher and students share: the optimiser step, the optimiser, the memory layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from consistency.config.study import Study
from consistency.data.batches import Batches
from consistency.data.prepared import ImageData
from consistency.nets.denoiser import Denoiser
from consistency.runtime.machine import Machine
from consistency.training.objective import Objective
from consistency.training.stopwatch import Stopwatch
from consistency.training.update import Update, share_of

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Stream:
    """Images per step, and the seed and purpose of a step's draws."""

    batch: int
    seed: int
    purpose: str


def build_update(
    study: Study,
    data: ImageData,
    machine: Machine,
    objective: Objective,
    model: Denoiser,
    optimizer: tuple[str, float],
    stream: Stream,
    *,
    precision: str = "float32",
    adaptive: bool = False,
    stopwatch: Stopwatch | None = None,
) -> Update:
    """Build the optimiser step of a training. optimizer: its name and learning rate. Raises UserError if the batch
    cannot be divided over the devices."""
    batch, seed, purpose = stream.batch, stream.seed, stream.purpose
    share, part = share_of(batch, study.compute.batch_per_device, machine.ranks)
    flip, on_device = study.dataset.horizontal_flip, study.compute.data_on_device
    batches = Batches(
        data, batch, share, seed=seed, purpose=purpose, flip=flip, device=machine.device, on_device=on_device
    )
    memory_format = torch.channels_last if study.compute.channels_last else torch.contiguous_format

    def laid_out(step: int) -> tuple[Tensor, Tensor | None]:
        images, labels = batches(step)
        return images.contiguous(memory_format=memory_format), labels if study.teacher.conditional else None

    return Update(
        model=model,
        optimizer=build_optimizer(*optimizer, model),
        objective=objective,
        batches=laid_out,
        batch=batch,
        part=part,
        seed=seed,
        purpose=purpose,
        adaptive=adaptive,
        ranks=machine.ranks,
        stopwatch=stopwatch or Stopwatch(machine.device),
        scaler=torch.amp.GradScaler(machine.device.type, enabled=precision == "float16"),
    )


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


def place(study: Study, model: Denoiser, device: torch.device) -> Denoiser:
    """Move the model to its device, in the memory layout of the study's compute settings."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if study.compute.channels_last else model  # type: ignore[call-overload]


def compile_networks(study: Study, *models: Denoiser) -> None:
    """Compile the networks inside, in place, if the study asks for it: names in checkpoints stay as they are."""
    if study.compute.compile:
        for model in models:
            model.model.compile()
