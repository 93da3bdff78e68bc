"""Stage samples: images of the teacher and of each student, image i from seed i."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from consistency.files import atomic
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import write_card
from consistency.seeding import ImageNoise
from consistency.stages.inputs import read_preconditioning, read_student, read_teacher, time_grid
from consistency.study import Study
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.sampler import multistep
from consistency.theory.solver import heun_solve
from consistency.training.data import to_bytes
from consistency.training.objectives import with_labels

# From the noise of a batch of images to their endpoints, float [N, C, H, W].
Sampler = Callable[[ImageNoise], Tensor]


def make_samples(study: Study, layout: Layout, run: str | None, seed: int | None, device: torch.device) -> None:
    """Write one uint8 array [count, H, W, C] a sampler, and card.json. Without a run: the teacher's."""
    started = time.time()
    folder = layout.samples(run, seed)
    if run is None or seed is None:
        model = read_teacher(study, layout, device)
        samplers = {"heun": heun_sampler(study, model)}
        inputs = [layout.teacher / "teacher.safetensors"]
    else:
        model = read_student(study, layout, run, seed, device)
        preconditioning = read_preconditioning(study, layout, run, model.sigma_data, device)
        samplers = student_samplers(study, run, model, preconditioning)
        inputs = [layout.student(run, seed) / "student.safetensors"]
    label = "samples teacher" if run is None else f"samples {run} seed {seed}"
    progress = Progress(label, study.sampling.count * len(samplers))
    outputs = []
    for name, sampler in samplers.items():
        outputs.append(folder / f"{name}.npy")
        with atomic(outputs[-1]) as temporary:
            shape = (study.sampling.count, model.img_resolution, model.img_resolution, model.img_channels)
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            for rows, batch in draw(study, model, sampler, study.sampling.count):
                images[rows] = to_bytes(batch)
                progress.advance(len(batch))
            images.flush()
            del images
    progress.close()
    write_card(folder, study, "samples", run=run, seed=seed, started=started, inputs=inputs, outputs=outputs)


@torch.inference_mode()
def draw(study: Study, model: Denoiser, sampler: Sampler, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Images of seeds 0 to count-1 in batches: (rows, float [n, C, H, W])."""
    shape = (model.img_channels, model.img_resolution, model.img_resolution)
    for start in range(0, count, study.sampling.batch):
        rows = slice(start, min(start + study.sampling.batch, count))
        noise = ImageNoise(range(rows.start, rows.stop), shape, model.label_dim)
        yield rows, sampler(noise)


def heun_sampler(study: Study, teacher: Denoiser, nodes: int | None = None) -> Sampler:
    """EDM's deterministic sampler; with nodes, the ODE's endpoint at eps through so many nodes instead."""
    device = next(teacher.parameters()).device
    times = time_grid(study, nodes or study.sampling.teacher_steps, device)
    if nodes is None:
        times = torch.cat([times, times.new_zeros(1)])

    def sample(noise: ImageNoise) -> Tensor:
        labels = None if noise.labels is None else noise.labels.to(device)
        return heun_solve(with_labels(teacher, labels), noise.latents.to(device) * times[0].float(), list(times))

    return sample


def student_samplers(study: Study, run: str, model: Denoiser, preconditioning: Preconditioning) -> dict[str, Sampler]:
    """Every sampler of a student by file name. Endpoint students know no s between: CM's multistep only."""
    samplers = {f"nfe{n}": jump_sampler(study, run, model, preconditioning, n) for n in study.sampling.nfe}
    if study.resolved(run).objective == "trajectory":
        for gamma in study.sampling.gamma:
            for n in study.sampling.gamma_nfe:
                samplers[f"gamma{gamma}-nfe{n}"] = jump_sampler(study, run, model, preconditioning, n, gamma)
    return samplers


def jump_sampler(
    study: Study, run: str, model: Denoiser, preconditioning: Preconditioning, nfe: int, gamma: float = 0.0
) -> Sampler:
    """nfe jumps along the rho grid from sigma_max to sigma_min."""
    device = next(model.parameters()).device
    times = time_grid(study, nfe + 1, device)
    if study.resolved(run).objective == "endpoint":
        gamma = 1.0

    def sample(noise: ImageNoise) -> Tensor:
        labels = None if noise.labels is None else noise.labels.to(device)

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return preconditioning.jump(model, x, t, s, labels)

        return multistep(jump, noise.latents.to(device) * times[0].float(), times, gamma, noise.fresh)

    return sample
