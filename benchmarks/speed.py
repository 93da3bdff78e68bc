"""Speed of the coefficient fit, of sampling and of a consistency training step by coupling, in one run. Prints a table;
a distillation step is in distill_step.py.

    python benchmarks/speed.py [--study config/studies/digits.yaml] [--threads 1] [--device cpu] [--repeat 20]

Untrained networks of the study's shape, and images of noise, serve: speed does not depend on them. Each figure is the
median of --repeat runs after two warm-up runs; ot includes its assignment, gc the predictor's pass over all images.
Compare the ratios to one evaluation of the teacher, which the machine's other work changes less than the times.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from consistency.base.seeding import ImageNoise
from consistency.config.job import Job
from consistency.config.networks import Teacher
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.config.study import Study
from consistency.evaluation.samplers import heun_sampler, jump_sampler
from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.nets.official import official_architecture
from consistency.provenance.environment import hardware
from consistency.theory.curriculum import DoublingCurriculum
from consistency.theory.distance import pseudo_huber
from consistency.theory.estimators import image_moments
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.ema import Ema
from consistency.training.objective import with_labels
from consistency.training.teachers import architecture_of
from consistency.training.update import Stream, Update


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
    if isinstance(study.teacher, Teacher):
        architecture = architecture_of(study, study.teacher, 10, 0.5)
    else:
        architecture = official_architecture(study.teacher.checkpoint)
    return init_denoiser(architecture, seed=0).to(device).eval().requires_grad_(False)


def consistency_step(coupling: str, network: Denoiser, images: Tensor) -> Callable[[], None]:
    """One update and its average, of a student of the network's shape."""
    student = init_denoiser(network.architecture, 0).to(images.device).train()
    average = Ema(student, 0.99)
    objective = (TransportTraining if coupling == "ot" else ConsistencyTraining)(
        student,
        average.model,
        build_preconditioning("cm", network.sigma_data),
        pseudo_huber,
        DoublingCurriculum(1000),
        mu=0.5 if coupling == "gc" else 0.0,
    )
    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-4)
    stream = Stream(lambda _: (images, None), len(images), len(images), 0, "benchmark")
    update = Update(student, optimizer, objective, stream)
    steps = count()

    def step() -> None:
        number = next(steps)
        update.step(number)
        average.update(number + 1)

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
    batch = next(iter(study.students.values())).batch
    rows: list[tuple[str, int, float]] = []

    x = torch.randn(batch, teacher.img_channels, teacher.img_resolution, teacher.img_resolution, device=device)
    times = torch.ones(batch, device=device)
    with torch.inference_mode():
        rows.append(("one evaluation of the teacher", batch, seconds(lambda: teacher(x, times), args.repeat, device)))
    probes = torch.randint(0, 2, (1, *x.shape)).to(x) * 2 - 1
    fit = seconds(lambda: image_moments(with_labels(teacher, None), x, 1.0, probes), args.repeat, device)
    rows.append(("coefficient fit, one time, one probe (1 evaluation, 3 products)", batch, fit))

    student = student_from_teacher(teacher, dropout=0.0, seed=0).to(device).eval().requires_grad_(False)
    name = next(run for run, student in study.students.items() if student.objective == "trajectory")
    job = Job(study, StudyPaths(study.name), name)
    noise = ImageNoise(range(batch), tuple(x.shape[1:]), [1] * teacher.label_dim)
    preconditioning = build_preconditioning("ctm", teacher.sigma_data)
    with torch.inference_mode():
        for nfe in (1, 2, 5):
            sampler = jump_sampler(job, student, preconditioning, nfe)
            rows.append(
                (f"sampling, student, NFE {nfe}", batch, seconds(lambda s=sampler: s(noise), args.repeat, device))
            )
        heun = heun_sampler(study, teacher)
        nfe = 2 * study.calibration.steps - 1
        rows.append((f"sampling, teacher, Heun NFE {nfe}", batch, seconds(lambda: heun(noise), args.repeat, device)))

    for coupling in ("ic", "ot", "gc"):
        step = consistency_step(coupling, teacher, x.clamp(-1, 1))
        rows.append((f"consistency training step, {coupling}", batch, seconds(step, args.repeat, device)))

    machine = hardware()
    parameters = sum(p.numel() for p in teacher.parameters())
    print(f"study {study.name}: {teacher.architecture['network']}, {parameters:,} parameters, batch {batch}")
    print(
        f"{machine['processor']}, {machine['gpus'] or 'no GPU'}, {args.threads} thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    print("| what | ms | images/s | evaluations of the teacher |\n| --- | ---: | ---: | ---: |")
    for what, images, duration in rows:
        print(f"| {what} | {duration * 1e3:.2f} | {images / duration:,.0f} | {duration / rows[0][2]:.1f} |")


if __name__ == "__main__":
    main()
