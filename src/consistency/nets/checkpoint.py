"""Self-describing checkpoints: weights, architecture and origin in one safetensors file."""

import json
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from consistency.base.errors import UserError, user_error
from consistency.base.files import write_with
from consistency.nets.denoiser import Denoiser, build_denoiser

#: format of this project's checkpoints
CHECKPOINT = "consistency-denoiser-1"
#: errors of torch.load on files that are truncated, overwritten or foreign
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError)


_MOST_UNITS = 1 << 14  # of a layer, or layers
_MOST_HEADER = 1 << 22  # bytes; a tensor takes about 100. Parsed, a byte may take 60.


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
    metadata = _metadata(path, "run the stage that makes it first", "delete it and run its stage again")
    if not metadata:
        raise UserError(f"{path} was not written by this project (no {CHECKPOINT} metadata): run its stage again")
    return metadata


def _metadata(path: Path, absent: str, damaged: str) -> dict[str, Any]:
    """Read the metadata of a safetensors file, none if another program wrote it. absent, damaged: advice."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with path.open("rb") as start:  # safetensors says of any file that it cannot open that there is none
            if (size := int.from_bytes(start.read(8), "little")) > _MOST_HEADER:
                raise ValueError(f"its header has {size:,} bytes")
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {absent}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise user_error(error, f"{path} is not a whole safetensors file ({error}): {damaged}") from None
    metadata: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):
        metadata = {name: json.loads(text) for name, text in texts.items()}
    return metadata if metadata.get("format") == CHECKPOINT else {}


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
    return _build(path, metadata.get("architecture"), "run its stage again"), metadata


def load_given(path: Path, architecture: Mapping[str, Any] | None) -> tuple[Denoiser, dict[str, Any]]:
    """Build the teacher of a person's own safetensors file, in eval mode, and return it with its metadata.

    architecture: needed for the file of another program, whose metadata lack it. Raises UserError as load_denoiser.
    """
    metadata = _metadata(path, "correct teacher.path in the study", "name another one as teacher.path")
    if not (architecture or metadata):
        raise UserError(f"{path} does not say what its network is: describe it in teacher.network")
    advice = "name another teacher.path" + (", or correct teacher.network" if architecture else "")
    return _build(path, architecture or metadata.get("architecture"), advice), metadata


def _build(path: Path, architecture: Any, advice: str) -> Denoiser:
    try:
        if max((each for each in architecture.values() if type(each) is int), default=0) > _MOST_UNITS:
            raise ValueError("a number in it is too large for a network")
        with torch.device("meta"):  # allocates no weights, whatever the file describes
            denoiser = build_denoiser(architecture)
        wanted = denoiser.state_dict()
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if wrong := misfit(tensors, wanted):
            raise ValueError(wrong)
        # Copies, for the last bits of a product depend on where in memory its weights begin.
        copies = {name: each.to(wanted[name].dtype, copy=True) for name, each in tensors.items()}
        denoiser.load_state_dict(copies, assign=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit its architecture ({reason}): {advice}") from None
    if bad := not_finite(denoiser):
        raise UserError(f"{path} holds NaN or infinity in {bad}: {advice}")
    return denoiser.eval().requires_grad_(False)


def misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Name the first tensor that is missing, too many or of another shape, and count them; '' if there is none."""

    def shown(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(list(tensors[name].shape)) if name in tensors else "none"

    names = sorted(found.keys() | wanted.keys())
    wrong = [name for name in names if shown(found, name) != shown(wanted, name)]
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"{len(wrong)} of {len(names)} tensors differ, first {ascii(first)[:100]}: the file has {shown(found, first)}, "
        f"the network {shown(wanted, first)}"
    )


def not_finite(denoiser: Denoiser) -> str:
    """Name the first tensor with NaN or infinity; '' if there is none."""
    bad = (name for name, value in denoiser.state_dict().items() if not bool(torch.isfinite(value).all()))
    return next(bad, "")
