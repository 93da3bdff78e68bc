"""Speed of the method's path: one distillation step, the coefficient fit, sampling. Prints a table.

    python benchmarks/speed.py [--study config/studies/digits.yaml] [--threads 1] [--device cpu] [--repeat 20]

Untrained networks of the study's shape serve: speed does not depend on the weights. Each figure is the median of
--repeat runs after two warm-up runs.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.provenance import hardware
from consistency.seeding import ImageNoise
from consistency.stages.samples import heun_sampler, jump_sampler
from consistency.stages.teacher import architecture
from consistency.study import Study, load_study
from consistency.theory.distance import DISTANCES
from consistency.theory.estimators import image_moments
from consistency.theory.noise import rho_grid
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.data import ImageData
from consistency.training.ema import Ema
from consistency.training.objectives import Losses, Trajectory, with_labels


def seconds(work: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Median wall time of work()."""
    times = []
    for run in range(repeat + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if run >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def network(study: Study, device: torch.device) -> Denoiser:
    """An untrained teacher of the study's shape, without its dataset."""
    import numpy as np

    size, channels = study.dataset.resolution, study.dataset.channels
    facts = {"classes": ["0"] * 10, "sigma_data": 0.5}
    data = ImageData(np.zeros((1, size, size, channels), np.uint8), np.zeros(1, np.int64), facts)
    return init_denoiser(architecture(study, data), seed=0).to(device).eval().requires_grad_(False)


def distillation_step(study: Study, teacher: Denoiser, steps: int, device: torch.device) -> Callable[[], Losses]:
    """One optimiser step of trajectory distillation with at most so many teacher steps (exactly, on average below)."""
    settings = study.resolved(next(iter(study.students)))
    student = student_from_teacher(teacher, dropout=0.0, seed=0).to(device).train().requires_grad_(True)
    average = Ema(student)
    grid = rho_grid(settings.nodes, study.noise.sigma_min, study.noise.sigma_max).to(device)
    preconditioning = build_preconditioning("ctm", teacher.sigma_data)
    distance = DISTANCES[settings.distance]
    objective = Trajectory(student, average.model, teacher, preconditioning, distance, grid, "online", steps, 1.0)
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-4)
    shape = (settings.batch, teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    images = torch.randn(shape, device=device).clamp(-1, 1)
    labels = torch.zeros(settings.batch, dtype=torch.int64, device=device) if teacher.label_dim else None
    draws = torch.Generator().manual_seed(0)

    def step() -> Losses:
        losses = objective(images, labels, draws)
        optimizer.zero_grad(set_to_none=True)
        losses.terms["loss"].backward()
        optimizer.step()
        average.update(settings.ema_rate)
        return losses

    return step


def main() -> None:
    """Print the table for one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="config/studies/digits.yaml")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, study = torch.device(args.device), load_study(args.study)
    teacher = network(study, device)
    settings = study.resolved(next(iter(study.students)))
    max_steps = settings.max_heun_steps or settings.nodes - 1
    batch = settings.batch
    rows: list[tuple[str, int, float]] = []

    step = distillation_step(study, teacher, max_steps, device)
    # The number of teacher steps is drawn, so the mean over many draws is what a training sees.
    count = max(args.repeat, 40)
    start = time.perf_counter()
    for _ in range(count):
        step()
    rows.append(
        (f"distillation step (mean of {count} draws of n <= {max_steps})", batch, (time.perf_counter() - start) / count)
    )

    x = torch.randn(batch, teacher.img_channels, teacher.img_resolution, teacher.img_resolution, device=device)
    times = torch.ones(batch, device=device)
    with torch.inference_mode():
        rows.append(("one evaluation of the teacher", batch, seconds(lambda: teacher(x, times), args.repeat, device)))
    probes = torch.randint(0, 2, (1, *x.shape)).to(x) * 2 - 1
    fit = seconds(lambda: image_moments(with_labels(teacher, None), x, 1.0, probes), args.repeat, device)
    rows.append(("coefficient fit, one time, one probe (2 JVPs, 1 evaluation)", batch, fit))

    student = student_from_teacher(teacher, dropout=0.0, seed=0).to(device).eval().requires_grad_(False)
    name = next(run for run in study.students if study.resolved(run).objective == "trajectory")
    noise = ImageNoise(range(batch), tuple(x.shape[1:]), teacher.label_dim)
    preconditioning = build_preconditioning("ctm", teacher.sigma_data)
    with torch.inference_mode():
        for nfe in (1, 2, 5):
            sampler = jump_sampler(study, name, student, preconditioning, nfe)
            rows.append(
                (f"sampling, student, NFE {nfe}", batch, seconds(lambda s=sampler: s(noise), args.repeat, device))
            )
        heun = heun_sampler(study, teacher)
        nfe = 2 * study.sampling.teacher_steps - 1
        rows.append((f"sampling, teacher, Heun NFE {nfe}", batch, seconds(lambda: heun(noise), args.repeat, device)))

    machine = hardware()
    parameters = sum(p.numel() for p in teacher.parameters())
    print(f"study {study.name}: {study.teacher.network.kind}, {parameters:,} parameters, batch {batch}")
    print(
        f"{machine['processor']}, {machine['gpus'] or 'no GPU'}, {args.threads} thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    print("| what | ms | images/s |\n| --- | ---: | ---: |")
    for what, images, duration in rows:
        print(f"| {what} | {duration * 1e3:.2f} | {images / duration:,.0f} |")


if __name__ == "__main__":
    main()
