"""What a step of consistency training costs, by coupling: milliseconds a step and images/s on the real digits.

    python benchmarks/consistency_step.py [--device cpu] [--network mlp] [--batch 128] [--steps 200]

The networks are those of the studies `digits` (mlp) and `digits-full` (songunet), untrained: speed does not depend on
the weights. ot includes its assignment, gc the predictor's pass over all images.
"""

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from consistency.nets.denoiser import init_denoiser
from consistency.seeding import generator
from consistency.theory.curriculum import DoublingCurriculum
from consistency.theory.distance import pseudo_huber
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.ema import Ema
from consistency.training.update import Update

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "width": 128, "depth": 3},
    "songunet": {
        "network": "songunet",
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
    },
}


def seconds_a_step(coupling: str, args: argparse.Namespace) -> float:
    """The mean over args.steps steps, after a few to warm up."""
    device = torch.device(args.device)
    digits = torch.from_numpy(load_digits().images).float()[:, None].to(device) / 8 - 1
    student = init_denoiser({**NETWORKS[args.network], "img_resolution": 8, "img_channels": 1}, 0).to(device).train()
    average = Ema(student, 0.99)
    objective = (TransportTraining if coupling == "ot" else ConsistencyTraining)(
        student,
        average.model,
        build_preconditioning("cm", sigma_data=0.5),
        pseudo_huber,
        DoublingCurriculum(args.steps),
        mu=0.5 if coupling == "gc" else 0.0,
    )

    def batches(step: int) -> tuple[Tensor, None]:
        rows = torch.randint(len(digits), (args.batch,), generator=generator(0, "rows", step))
        return digits[rows.to(device)], None

    optimizer = torch.optim.RAdam(student.parameters(), lr=1e-4)
    update = Update(student, optimizer, objective, batches, args.batch, args.batch, 0, "benchmark")
    for step in range(-args.warm_up, args.steps):
        if step == 0:
            wait(device)
            started = time.perf_counter()
        update.step(max(step, 0))
        average.update(max(step, 0) + 1)
    wait(device)
    return (time.perf_counter() - started) / args.steps


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=10)
    args = parser.parse_args()
    print("| coupling | ms a step | images/s |\n| --- | --- | --- |")
    for coupling in ("ic", "ot", "gc"):
        seconds = seconds_a_step(coupling, args)
        print(f"| {coupling} | {1000 * seconds:.2f} | {args.batch / seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
