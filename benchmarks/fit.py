"""Cost of the coefficient fit, in evaluations of the same network on the same images, by mode and probes: a table.

    python benchmarks/fit.py [--device cpu] [--threads 1] [--repeat 5]

Untrained networks serve: speed does not depend on the weights. Each figure is a ratio of medians of --repeat runs,
one of each kind in turn, after a warm-up.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from consistency.nets.denoiser import init_denoiser
from consistency.nets.official import official_architecture
from consistency.provenance.environment import hardware
from consistency.theory.estimators import image_moments
from consistency.training.objective import with_labels

_SMALL = {"img_resolution": 8, "img_channels": 1, "sigma_data": 0.5, "label_dim": 0}
NETWORKS = {
    "MLP of `digits`": (_SMALL | {"network": "mlp", "width": 128, "depth": 3}, 512),
    "DDPM++ of `digits-full`": (
        _SMALL
        | {"network": "songunet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
        | {"attn_resolutions": [4], "dropout": 0.0},
        64,
    ),
    "DDPM++, EDM's for CIFAR-10": (official_architecture("edm-cifar10-32x32-uncond-vp.pkl"), 4),
}
KINDS = [(mode, probes) for mode in ("reverse", "forward") for probes in (1, 4)]


def medians(works: list[Callable[[], object]], repeat: int, device: torch.device) -> list[float]:
    """Median seconds of each, taken in turns."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeat + 1):
        for work, found in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{hardware()}, {args.threads} thread(s), torch {torch.__version__}\n")
    print("| network, images | one evaluation, ms | " + " | ".join(f"{m}, {p} probes" for m, p in KINDS) + " |")
    print("| --- |" + " ---: |" * (len(KINDS) + 1))
    for name, (architecture, batch) in NETWORKS.items():
        teacher = init_denoiser(architecture, seed=0).to(device).eval().requires_grad_(False)
        x = torch.randn(batch, *teacher.shape, device=device)
        probes, centre = torch.randint(0, 2, (4, *x.shape)).to(x) * 2 - 1, torch.zeros(teacher.shape, device=device)
        denoiser, t = with_labels(teacher, None), torch.ones(batch, device=device)

        def evaluate(teacher=teacher, x=x, t=t) -> None:  # type: ignore[no-untyped-def]
            with torch.inference_mode():
                teacher(x, t)

        fits = [
            lambda mode=mode, some=probes[:count], x=x, denoiser=denoiser, centre=centre: image_moments(
                denoiser, x, 1.0, some, centre, mode
            )
            for mode, count in KINDS
        ]
        one, *each = medians([evaluate, *fits], args.repeat, device)
        print(f"| {name}, {batch} | {1000 * one:.1f} | " + " | ".join(f"{found / one:.1f}" for found in each) + " |")


if __name__ == "__main__":
    main()
