"""The official networks: names and shapes of the published ones, weights and outputs of small ones."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.nets.denoiser import Denoiser, build_denoiser

GOLDEN = Path(__file__).parents[1] / "golden"
OFFICIAL = json.loads((GOLDEN / "edm_state_dict_shapes.json").read_text())
_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "adm"}


def translate(official_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The architecture for the constructor arguments stored with an official network."""
    ignored = ("model_type", "use_fp16")
    kept = {key: value for key, value in official_kwargs.items() if key not in ignored}
    return {"network": _NETWORKS[official_kwargs["model_type"]], **kept}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def golden(name: str) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """A small official network rebuilt from its stored weights, and its stored input and output."""
    file = np.load(GOLDEN / f"{name}.npz")
    denoiser = build_denoiser(translate(ast.literal_eval(str(file["kwargs"])))).eval()
    weights = {key[6:]: torch.from_numpy(file[key]) for key in file if key.startswith("param/")}
    denoiser.load_state_dict(weights, strict=True)
    return denoiser, {key: torch.from_numpy(file[key]) for key in ("x", "sigma", "denoised", "labels") if key in file}
