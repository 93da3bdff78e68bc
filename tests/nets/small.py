"""Small denoisers of every kind, with weights large enough that every part of the network acts."""

from typing import Any

import torch
from tests.draws import SEED, seeded

from consistency.nets.denoiser import Denoiser, init_denoiser

UNET = {"img_resolution": 8, "channel_mult": [1, 2], "num_blocks": 1, "model_channels": 16, "attn_resolutions": [4]}
VE = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {"network": "songunet", "img_channels": 1} | UNET,
    "ncsnpp": {"network": "songunet", "img_channels": 2} | UNET | {"attn_resolutions": []} | VE,
    "adm": {"network": "adm", "img_channels": 3} | UNET | {"model_channels": 32},
    "mlp": {"network": "mlp", "img_resolution": 4, "img_channels": 2, "width": 32, "depth": 2, "embedding": 16},
}


def make(architecture: dict[str, Any], **changes: Any) -> Denoiser:
    """Build a denoiser in evaluation mode, its near-zero output layers replaced by visible ones."""
    denoiser = init_denoiser({**architecture, **changes}, seed=SEED).eval()
    generator = seeded(1)
    for parameter in denoiser.parameters():
        if parameter.detach().abs().max() < 1e-3:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def batch(denoiser: Denoiser, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy images and log-spaced times that fit a denoiser."""
    generator = seeded()
    side = denoiser.img_resolution
    t = 10 ** (torch.rand(n, generator=generator) * 4 - 2.5)
    x = torch.randn(n, denoiser.img_channels, side, side, generator=generator)
    return x * (1 + t[:, None, None, None]), t


def make_denoiser(seed: int = 0, **architecture: Any) -> Denoiser:
    """Build a small perceptron whose output is not near zero."""
    small = {"img_resolution": 4, "img_channels": 1, "width": 16, "depth": 1, "embedding": 8}
    denoiser = init_denoiser({"network": "mlp", **small, **architecture}, SEED + seed)
    generator = seeded(seed)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "linear_out" in name or "_s." in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return denoiser
