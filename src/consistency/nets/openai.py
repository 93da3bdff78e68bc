"""Reader of OpenAI's EDM teacher: the plain state dict of their U-Net, which is EDM's ADM under other names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency.base.errors import UserError, user_error
from consistency.nets.adm import DhariwalUNet
from consistency.nets.checkpoint import DAMAGED, misfit, not_finite
from consistency.nets.denoiser import Denoiser, build_denoiser
from consistency.nets.layers import UNetBlock
from consistency.nets.official import OPENAI, official_architecture

_OUTER = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "map_label": "label_emb"}
_OUTER |= {"out_norm": "out.0", "out_conv": "out.2"}
_BLOCK = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0"}
_BLOCK |= {"conv1": "out_layers.3", "skip": "skip_connection"}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def read_openai(path: Path, architecture: Mapping[str, Any] | None = None) -> Denoiser:
    """Read OpenAI's EDM teacher of ImageNet at 64x64. Returns its denoiser in float32, in eval mode, frozen.

    architecture: of another network of their U-Net's form, an adm. Raises UserError for a file that is damaged or holds
    anything but that network's tensors.
    """
    architecture = architecture or official_architecture(OPENAI)
    with torch.device("meta"):
        described = build_denoiser(architecture)
    advice = f"download {OPENAI} again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        # The text of torch goes on to advise loading the file unsafely.
        raise user_error(error, f"{path} is not a whole state dict ({type(error).__name__}): {advice}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds something else than a state dict of tensors: {advice}")
    names = openai_names(described)
    if wrong := misfit(state, {names[name]: _exchanged(name, value) for name, value in described.named_parameters()}):
        raise UserError(f"{path} is not OpenAI's network ({wrong}): {advice}")
    denoiser = build_denoiser(architecture)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            parameter.copy_(_converted(name, state[names[name]]))
    if bad := not_finite(denoiser):
        raise UserError(f"{path} holds NaN or infinity in {bad}: {advice}")
    return denoiser.eval().requires_grad_(False)


def openai_names(denoiser: Denoiser) -> dict[str, str]:
    """Return OpenAI's name of each parameter of an adm."""
    assert isinstance(denoiser.model, DhariwalUNet)
    modules = dict(_modules(denoiser.model))
    parts = {name: name.removeprefix("model.").rpartition(".") for name, _ in denoiser.named_parameters()}
    return {name: f"{modules[module]}.{leaf}" for name, (module, _, leaf) in parts.items()}


def _modules(net: DhariwalUNet) -> Iterator[tuple[str, str]]:
    """Yield the name of every module with parameters, and OpenAI's name of it."""
    yield from _OUTER.items()
    for i, (name, layer) in enumerate(net.enc.items()):
        yield from _parts(f"enc.{name}", layer, f"input_blocks.{i}", 0)
    # Theirs end a level of the decoder with the block that doubles the resolution, ours begin the next with it.
    count, last = 0, 0
    for name, layer in net.dec.items():
        assert isinstance(layer, UNetBlock)
        group, place = f"output_blocks.{count}", 0
        if name.endswith(("_in0", "_in1")):
            group, place = "middle_block", 2 * name.endswith("_in1")
        elif name.endswith("_up"):
            group, place = f"output_blocks.{count - 1}", last
        else:
            count, last = count + 1, 2 if layer.num_heads else 1
        yield from _parts(f"dec.{name}", layer, group, place)


def _parts(name: str, layer: nn.Module, group: str, place: int) -> Iterator[tuple[str, str]]:
    if not isinstance(layer, UNetBlock):
        yield name, f"{group}.{place}"
        return
    for ours, theirs in _BLOCK.items():
        yield f"{name}.{ours}", f"{group}.{place}.{theirs}"
    for ours, theirs in _ATTENTION.items():
        yield f"{name}.{ours}", f"{group}.{place + 1}.{theirs}"


def _exchanged(name: str, value: Tensor) -> Tensor:
    # A table with a row for each class, instead of a matrix that takes one-hot labels.
    return value.T if name.endswith("map_label.weight") else value


def _converted(name: str, value: Tensor) -> Tensor:
    """Return one of their tensors as ours. Their channels of q, k, v are [q, k, v][head][channel], ours
    [head][channel][q, k, v]."""
    if ".qkv." in name:
        return value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    return _exchanged(name, value)
