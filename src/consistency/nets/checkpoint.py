"""Self-describing checkpoints: weights, architecture and origin in one safetensors file."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from consistency.base.errors import UserError
from consistency.base.files import write_with
from consistency.nets.denoiser import Denoiser, build_denoiser

#: format of this project's checkpoints
CHECKPOINT = "consistency-denoiser-1"


def save_denoiser(path: Path, denoiser: Denoiser, metadata: dict[str, Any]) -> None:
    """Write weights with their architecture and metadata (key, study, step, git commit, parents)."""
    described = {"format": CHECKPOINT, "architecture": denoiser.architecture, **metadata}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in described.items()}
    # Contiguous copies on the CPU: safetensors refuses views, and EMA weights may be channels-last.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in denoiser.state_dict().items()}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=texts)
        _sort_metadata(temporary)

    write_with(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the header's metadata, which safetensors orders at random, so that equal contents are equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a checkpoint's metadata. Raises UserError for a missing, damaged or foreign file."""
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage that makes it first") from None
    except (SafetensorError, OSError) as error:
        message = f"{path} is not a whole safetensors file ({error}): delete it and run its stage again"
        raise UserError(message) from None
    metadata: dict[str, Any] = {}
    with suppress(ValueError):
        metadata = {name: json.loads(text) for name, text in texts.items()}
    if metadata.get("format") != CHECKPOINT:
        raise UserError(f"{path} was not written by this project (no {CHECKPOINT} metadata): run its stage again")
    return metadata


def load_denoiser(path: Path, key: str | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """Build the denoiser of a checkpoint, in eval mode, and return it with its metadata.

    key: the settings key that the file must have. Raises UserError for a missing, damaged or foreign file, another
    key, and tensors that do not fit the architecture or are not finite.
    """
    metadata = read_metadata(path)
    if key is not None and metadata.get("key") != key:
        raise UserError(
            f"{path} was made by study {metadata.get('study')!r} with other settings: "
            "run its stage again, or give this study another --results folder"
        )
    try:
        denoiser = build_denoiser(metadata["architecture"])
        with safe_open(path, "pt") as file:
            denoiser.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit the architecture it names ({reason}): run its stage again") from None
    bad = [name for name, value in denoiser.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(f"{path} holds NaN or infinity in {bad[0]}: run its stage again")
    return denoiser.eval().requires_grad_(False), metadata
