"""Architectures of the official checkpoints without the files, for estimates and benchmarks."""

import re
from typing import Any

from consistency.base.errors import UserError

# Karras et al. 2022, table 7 and appendix F. The networks' defaults are the options of FFHQ's vp network and of ADM.
_SONGUNET = {"network": "songunet", "augment_dim": 9}
_DATASETS: dict[str, dict[str, Any]] = {
    "cifar10-32x32": {**_SONGUNET, "img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13, "label_dim": 10},
    "ffhq-64x64": {**_SONGUNET, "img_resolution": 64, "dropout": 0.05},
    "imagenet-64x64": {"network": "adm", "img_resolution": 64, "label_dim": 1000},
}
_NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
_VARIANTS: dict[str, dict[str, Any]] = {"vp": {}, "ve": {**_NCSN, "channel_mult_noise": 2}, "adm": {}}

#: OpenAI's teacher of Consistency Models: EDM's ADM in all but the noise level's embedding, that of 250 ln(t)
OPENAI = "edm_imagenet64_ema.pt"


def official_architecture(checkpoint: str) -> dict[str, Any]:
    """Return the `build_denoiser` architecture of edm-<dataset>-<resolution>-<condition>-<variant>.pkl, or of OPENAI.

    Raises UserError for an unknown name.
    """
    if checkpoint == OPENAI:
        return official_architecture("edm-imagenet-64x64-cond-adm.pkl") | {"noise_scale": 1000.0}
    match = re.fullmatch(r"edm-(cifar10-32x32|ffhq-64x64|imagenet-64x64)-(uncond|cond)-(vp|ve|adm)\.pkl", checkpoint)
    if match is None:
        raise UserError(
            f"{checkpoint} is not the name of an official EDM checkpoint: use one such as edm-ffhq-64x64-uncond-vp.pkl"
        )
    dataset, condition, variant = match.groups()
    architecture = {"img_channels": 3, "sigma_data": 0.5, **_DATASETS[dataset], **_VARIANTS[variant]}
    if condition == "uncond":
        architecture.pop("label_dim", None)
    return architecture
