"""The architectures of EDM's official checkpoints, available without the files: for estimates and benchmarks."""

import re
from typing import Any

from consistency.base.errors import UserError

_SONGUNET = {"network": "songunet", "model_channels": 128, "num_blocks": 4, "attn_resolutions": [16], "augment_dim": 9}
_CIFAR10 = {**_SONGUNET, "img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13, "label_dim": 10}
_FFHQ = {**_SONGUNET, "img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
_VARIANTS: dict[str, dict[str, Any]] = {
    "vp": {"embedding_type": "positional", "encoder_type": "standard", "resample_filter": [1, 1]},
    "ve": {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
        "channel_mult_noise": 2,
    },
    "adm": {},
}
_IMAGENET = {
    "network": "adm",
    "img_resolution": 64,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
    "label_dim": 1000,
}
_DATASETS = {"cifar10-32x32": _CIFAR10, "ffhq-64x64": _FFHQ, "imagenet-64x64": _IMAGENET}


def official_architecture(checkpoint: str) -> dict[str, Any]:
    """Return the `build_denoiser` architecture of edm-<dataset>-<resolution>-<condition>-<variant>.pkl.

    Karras et al. 2022, table 7 and appendix F. Raises UserError for an unknown name.
    """
    match = re.fullmatch(r"edm-(cifar10-32x32|ffhq-64x64|imagenet-64x64)-(uncond|cond)-(vp|ve|adm)\.pkl", checkpoint)
    if match is None:
        raise UserError(
            f"{checkpoint} is not the name of an official EDM checkpoint, such as edm-ffhq-64x64-uncond-vp.pkl"
        )
    dataset, condition, variant = match.groups()
    architecture = {"img_channels": 3, "sigma_data": 0.5, **_DATASETS[dataset], **_VARIANTS[variant]}
    if condition == "uncond":
        architecture.pop("label_dim", None)
    return architecture
