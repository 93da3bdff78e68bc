"""What each optimisation of the CTM step gives: images/s, sustained TFLOP/s and peak memory, one rung after the other.

    python benchmarks/distill_step.py [--device cuda] [--batch 64] [--heun-steps 12] [--steps 5] [--distance lpips]

The network is EDM's official CIFAR-10 one (DDPM++, 55.7 million parameters), untrained: speed does not depend on the
weights. Every rung is a process of its own, so that its memory is its own, with the same images, times and noise.
--heun-steps fixes the number n of teacher steps, which is drawn in a training: its mean is 11.67 for 18 nodes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from consistency.base.seeding import generator
from consistency.config.distances import DISTANCES
from consistency.nets.denoiser import Denoiser, forward_operations, init_denoiser, student_from_teacher
from consistency.nets.official import official_architecture
from consistency.provenance.environment import hardware
from consistency.theory.distance import Distance
from consistency.theory.noise import rho_grid
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.build import build_distance
from consistency.training.ema import Ema
from consistency.training.objective import Shape
from consistency.training.stopwatch import Stopwatch
from consistency.training.trajectory import Jumps, Trajectory
from consistency.training.update import Stream, Update

RUNGS = {
    "plain": "float32, eager; loops over the parameters; every term and gradient read back; images from the host",
    "foreach": "+ optimiser and EMA in one call for all parameters, one check of the gradient norm",
    "async": "+ nothing read back, the dataset in the device's memory",
    "channels_last": "+ memory layout NHWC",
    "bfloat16": "+ networks in bfloat16 by autocast, preconditioning in float32",
    "compile": "+ torch.compile",
}


class FixedSteps(Trajectory):
    """CTM's objective with always the same number of teacher steps, max_steps."""

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Jumps:
        host = torch.Generator()
        while True:
            drawn = super().draw(shape, step, host, device)
            if drawn.steps == self.max_steps:
                return drawn


def plain_ema(average: Denoiser, model: Denoiser, rate: float) -> None:
    """The update of the average, parameter by parameter."""
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.mul_(rate).add_(weight, alpha=1 - rate)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One rung: seconds a step, by part, and peak memory."""
    level = list(RUNGS).index(args.rung)
    device = torch.device(args.device)
    teacher = init_denoiser(official_architecture(args.checkpoint), 0).to(device).eval().requires_grad_(False)
    if level >= 3:
        teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student = student_from_teacher(teacher, dropout=0.0).train().requires_grad_(True)
    if level >= 3:
        student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Ema(student, 0.999)
    networks = (student, average.model, teacher)
    for network in networks:
        network.compute_in("bfloat16" if level >= 4 else "float32")
        if level >= 5:
            network.model.compile()
    stopwatch = Stopwatch(device)
    grid = rho_grid(18, 0.002, 80.0).to(device)
    ctm = build_preconditioning("ctm", 0.5)
    objective = FixedSteps(
        *networks, ctm, distance(args, device), grid, "online", args.heun_steps, 1.0, stopwatch=stopwatch
    )
    images = batches(args, teacher, device, resident=level >= 2, channels_last=level >= 3)
    update = Update(
        model=student,
        optimizer=torch.optim.RAdam(student.parameters(), lr=1e-5, foreach=level >= 1),
        objective=objective,
        stream=Stream(images, args.batch, args.batch, 0, "benchmark"),
        adaptive=True,
        stopwatch=stopwatch,
    )

    def step(k: int) -> None:
        terms, _ = update.step(k)
        if level == 0:
            plain_ema(average.model, student, 0.999)
            for value in terms.values():
                value.item()
            for weight in student.parameters():
                assert weight.grad is None or bool(torch.isfinite(weight.grad).all())
        else:
            average.update(k + 1)
        if level == 1:
            assert bool(torch.isfinite(terms["grad_norm"]))

    for k in range(args.warm_up):
        step(k)
    stopwatch.read()
    start = time.perf_counter()
    for k in range(args.warm_up, args.warm_up + args.steps):
        step(k)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    parts = {name: value / args.steps for name, value in stopwatch.read().items()}
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_gib": peak / 2**30, **parts}


def batches(
    args: argparse.Namespace, like: Denoiser, device: torch.device, *, resident: bool, channels_last: bool
) -> Callable[[int], tuple[Tensor, None]]:
    """Random bytes as a dataset of 2,000 images, on the device or gathered and converted on the host."""
    shape = (2000, like.img_channels, like.img_resolution, like.img_resolution)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0, "data"))
    data = data.to(device) if resident else data

    def at(step: int) -> tuple[Tensor, None]:
        rows = torch.randint(len(data), (args.batch,), generator=generator(0, "rows", step))
        images = data[rows.to(data.device)].float() / 127.5 - 1
        images = images.to(device)
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images, None

    return at


def distance(args: argparse.Namespace, device: torch.device) -> Distance:
    """The distance; LPIPS with untrained VGG16 weights."""
    if args.distance != "lpips":
        return build_distance(args.distance, device)
    import torchvision

    from consistency.nets.perceptual import PerceptualDistance

    with tempfile.TemporaryDirectory() as folder:
        weights = torchvision.models.vgg16(weights=None).state_dict()
        torch.save({name: value for name, value in weights.items() if name.startswith("features")}, f"{folder}/vgg.pth")
        return PerceptualDistance(Path(folder) / "vgg.pth").to(device)


def rung(args: argparse.Namespace, name: str) -> dict[str, float]:
    """The figures of one rung, measured in a process of its own."""
    command = [sys.executable, __file__, "--rung", name]
    for key in ("device", "batch", "heun_steps", "steps", "warm_up", "distance", "threads", "checkpoint"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    found: dict[str, float] = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout
    )
    return found


def main() -> None:
    """Measure one rung, or print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heun-steps", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--distance", default="pseudo_huber", choices=list(DISTANCES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", default="edm-cifar10-32x32-uncond-vp.pkl")
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--rung", choices=list(RUNGS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # As the verb `student` sets it: with float32 networks all is float32, else LPIPS may use TF32.
    torch.backends.cudnn.allow_tf32 = args.rung in ("bfloat16", "compile")
    if args.rung:
        print(json.dumps(measure(args)))
        return
    machine = hardware()
    architecture = {**official_architecture(args.checkpoint), "augment_dim": 0, "second_time": True}
    evaluations = 2 * args.heun_steps + 3 + 3 + 2 + 3
    operations = evaluations * forward_operations(architecture) + DISTANCES[args.distance].operations
    print(f"CTM step of {args.checkpoint}, batch {args.batch}, n = {args.heun_steps}, {args.distance}")
    print(f"{machine['gpus'] or machine['processor']}, {args.threads} thread(s), torch {torch.__version__}\n")
    print("| rung | images/s | ratio | TFLOP/s | peak GiB | teacher | forward | backward | optimiser, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    first: float | None = None
    for name in args.rungs:
        found = rung(args, name)
        speed = args.batch / found["seconds"]
        first = first or speed
        parts = " | ".join(f"{found.get(part, 0):.3g}" for part in ("teacher", "forward", "backward", "optimizer"))
        tflops = speed * operations / 1e12
        figures = f"{speed:.3g} | {speed / first:.2f} | {tflops:.3g} | {found['peak_gib']:.2f} | {parts}"
        print(f"| {name}: {RUNGS[name]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
