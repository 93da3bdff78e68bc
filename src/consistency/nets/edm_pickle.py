"""Reader of official EDM checkpoints as data: nothing in the file is imported, called or executed.

A table of stand-ins replaces the names in the file, which is refused if it has any other name. The unpickler is the
standard library's Python one. The C version cannot be kept from allocating a memo as large as an index says, or from
hashing nested tuples until the stack overflows.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from consistency.base.errors import UserError, user_error
from consistency.nets.denoiser import Denoiser, build_denoiser
from consistency.nets.layers import Conv2d

#: ten times those of an imitation of the largest official file; bounds the memory of empty lists and marks
_MAX_INSTRUCTIONS = 500_000
#: true files have five: EDMPrecond, U-Net, encoder, block, convolution
_MAX_DEPTH = 8
_MAX_NAME = 64
_MAX_ARGUMENTS = 8  # a tensor has 6
_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "adm"}

# raised by malformed streams and impossible networks
_DAMAGED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)


class _Refused(Exception):
    """Refusal of the file. The message is a short reason."""


def read_edm_pickle(path: Path) -> Denoiser:
    """Read an official EDM checkpoint (edm-*.pkl). Returns its EMA denoiser in float32, in eval mode, frozen.

    The network is a SongUNet (DDPM++ in the -vp files, NCSN++ in -ve) or DhariwalUNet (-adm) inside an EDMPrecond.
    Raises UserError for a file that is missing, damaged, hostile or foreign.
    """
    try:
        # A file's read allocates as many bytes as asked for; a memory map's at most those that are there.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _denoiser(_Unpickler(content).load(), len(content))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download an official EDM checkpoint (edm-*.pkl) to it") from None
    except OSError as error:
        raise user_error(error, f"{path} cannot be read ({error.strerror}): make it a readable file") from None
    except _Refused as error:
        reason = str(error)
    except EOFError:
        reason = "it is truncated"
    except _DAMAGED as error:
        reason = f"it is malformed: {type(error).__name__} {ascii(str(error))[:120]}"
    raise UserError(f"{path} is not an official EDM checkpoint ({reason}): download it again, or use another edm-*.pkl")


# --- the unpickler and its stand-ins ---------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Object:
    """Stand-in for an object: the name of its class and its attributes."""

    class_name: object
    state: dict[Any, Any]


def _persistent(meta: object) -> _Object:
    # meta["module_src"], the source that the official reader executes, is ignored.
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise _Refused("a persistent object without a state")
    return _Object(meta.get("class_name"), meta["state"])


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """Tensor as described by the file. stream: torch's stream of its storage; offset, strides: in elements."""

    stream: bytes | str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> Tensor:
        """Return a float32 copy of the values."""
        values = _read_storage(self.stream)
        if math.prod(self.shape) > len(values):
            raise _Refused("a tensor larger than its storage")
        # Raises RuntimeError for strides and an offset that lead out of the storage.
        view = values.as_strided(self.shape, self.strides, self.offset)
        return view.clone(memory_format=torch.contiguous_format)


def _tensor(stream: object, offset: object, shape: object, strides: object, *_: object) -> _Tensor:
    if not isinstance(stream, bytes | str):
        raise _Refused("a tensor without a storage")
    return _Tensor(stream, _counts((offset,))[0], _counts(shape), _counts(strides))


def _counts(values: object) -> tuple[int, ...]:
    """Check that sizes, strides or an offset are a few integers."""
    if not isinstance(values, tuple) or len(values) > 8 or any(type(v) is not int or v >> 48 for v in values):
        raise _Refused("a tensor with an impossible shape, stride or offset")
    return values


def _empty_dict() -> dict[Any, Any]:
    # dict itself would convert any argument.
    return {}


#: stand-ins by name. None may copy its argument: the file could ask for a million copies of one value.
_STAND_INS: Mapping[str, Callable[..., object]] = {
    **dict.fromkeys(("collections.OrderedDict", "dnnlib.util.EasyDict"), _empty_dict),
    "torch.nn.modules.container.ModuleDict": lambda: _Object("ModuleDict", {}),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage._load_from_bytes": lambda stream: stream,
    "_codecs.encode": lambda text, _: text,  # bytes, in protocol 2
    # Sets, and the numbers of NumPy 1 and 2, do not matter for a network.
    **dict.fromkeys(("__builtin__.set", "builtins.set", "numpy.dtype"), lambda *_: None),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), lambda *_: None),
}
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS EMPTY_SET MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE
    NEWOBJ BUILD
"""


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with only the instructions found in EDM checkpoints.

    `load` raises _Refused for a forbidden stream, EOFError or one of _DAMAGED for a malformed one.
    """

    stack: list[Any]

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.dispatch = _Dispatch(_LOADERS)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        text = f"{module}.{name}"
        if text not in _STAND_INS:
            raise _Refused(f"it asks for {_shown(text)}, which no such file needs; nothing was run")
        return _STAND_INS[text]

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Object) and isinstance(state, dict):
            target.state = state
        elif target is not None:  # a NumPy dtype
            raise _Refused("it sets the state of an object without one")


_KNOWN: Mapping[int, Any] = pickle._Unpickler.dispatch


def _with_plain_keys(code: int, keys: slice) -> Callable[[_Unpickler], None]:
    """Return the loader of an instruction that fills a dictionary; keys: their slice of the stack."""

    def load(self: _Unpickler) -> None:
        for key in self.stack[keys]:
            # Hashing deeply nested tuples takes for ever or overflows the C stack; large numbers collide.
            if type(key) is not str and (type(key) is not int or key >> 31):
                raise _Refused(f"it uses a value {_shown(key)} as a key")
        _KNOWN[code](self)

    return load


def _call(self: _Unpickler) -> None:
    """Call a stand-in with a short tuple of arguments; a string would become one argument per character."""
    arguments = self.stack[-1]
    if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise _Refused("it calls something without a short tuple of arguments")
    _KNOWN[pickle.REDUCE[0]](self)


_LOADERS = {code: _KNOWN[code] for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())} | {
    pickle.REDUCE[0]: _call,
    pickle.NEWOBJ[0]: _call,  # a class is a function in our table
    pickle.BUILD[0]: _Unpickler.build,
    pickle.SETITEM[0]: _with_plain_keys(pickle.SETITEM[0], slice(-2, -1)),
    pickle.SETITEMS[0]: _with_plain_keys(pickle.SETITEMS[0], slice(None, None, 2)),
}


class _Dispatch(dict[int, Any]):
    """Loaders by instruction code, for at most _MAX_INSTRUCTIONS instructions."""

    left = _MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _Refused("it has too many instructions")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> None:
        raise _Refused(f"it has the pickle instruction {bytes([code])!r}")


def _read_storage(content: bytes | str) -> Tensor:
    """Read a storage from torch's pre-zip stream: five small pickles, then the bytes."""
    content = content.encode("latin1") if isinstance(content, str) else content
    stream = io.BytesIO(content)
    for _ in range(5):  # parsed only to find the end
        deque(pickletools.genops(stream), maxlen=0)
    if b"ctorch\nFloatStorage\n" not in content[: stream.tell()]:
        raise _Refused("a tensor storage of another type than float32")
    (length,) = struct.unpack("<q", stream.read(8))
    if len(content) - stream.tell() != 4 * length:
        raise _Refused("a tensor storage of the wrong length")
    return torch.from_numpy(np.frombuffer(content, "<f4", offset=stream.tell()).astype(np.float32))


def _shown(value: object) -> str:
    """Return a short one-line form of any value in the file."""
    return ascii(value[:_MAX_NAME]) if isinstance(value, str) else f"of type {type(value).__name__}"


# --- from the file's content to a denoiser ---------------------------------------------------------------

_Whole = Annotated[int, Field(ge=0, le=2**16)]
_Wholes = Annotated[list[_Whole], Field(max_length=16)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Word = Annotated[str, Field(max_length=_MAX_NAME)]


class _Precond(BaseModel, strict=True):
    """Attributes of an EDMPrecond; use_fp16 is ignored, because the weights are float32."""

    img_resolution: _Whole
    img_channels: _Whole
    label_dim: _Whole
    sigma_data: Annotated[float, Field(gt=0, le=1e3)]


class _UNet(BaseModel, strict=True, extra="forbid"):
    """Constructor arguments of a U-Net. A missing one has the official default."""

    # These four follow from the EDMPrecond.
    img_resolution: object = Field(None, exclude=True)
    in_channels: object = Field(None, exclude=True)
    out_channels: object = Field(None, exclude=True)
    label_dim: object = Field(None, exclude=True)
    augment_dim: _Whole = 0
    model_channels: _Whole = 0
    channel_mult: _Wholes = []
    channel_mult_emb: _Whole = 0
    channel_mult_noise: _Whole = 0
    num_blocks: Annotated[int, Field(ge=0, le=16)] = 0  # bounds the time to build the network
    attn_resolutions: _Wholes = []
    dropout: _Probability = 0
    label_dropout: _Probability = 0
    embedding_type: _Word = ""
    encoder_type: _Word = ""
    decoder_type: _Word = ""
    resample_filter: _Wholes = []


def _denoiser(content: object, size: int) -> Denoiser:
    precond = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(precond, _Object):
        raise _Refused("it holds no 'ema' network")
    if precond.class_name != "EDMPrecond":
        kind = _shown(precond.class_name)
        raise _Refused(f"its network is of class {kind}, not EDMPrecond; baselines are not supported")
    tensors = dict(_tensors(precond, "", 1, set()))
    # The tensors of a true file do not share storages.
    if sum(len(tensor.stream) for tensor in tensors.values()) > size:
        raise _Refused("its tensors are larger than the file")
    with torch.device("meta"):  # allocates no weights, whatever the file describes
        denoiser = build_denoiser(_architecture(precond))
    _check_shapes(denoiser, tensors)
    denoiser.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, assign=True)
    _check_values(denoiser)
    return denoiser.eval().requires_grad_(False)


def _tensors(module: object, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, _Tensor]]:
    """Yield the parameters and buffers of a module and its submodules under their state_dict names."""
    if not isinstance(module, _Object) or depth > _MAX_DEPTH:
        raise _Refused("its modules do not form a tree")
    for section in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(section)
        if not isinstance(entries, dict) or not all(isinstance(n, str) and len(n) <= _MAX_NAME for n in entries):
            raise _Refused(f"a module without proper {section}")
        if id(entries) in seen:
            raise _Refused("its modules do not form a tree")
        seen.add(id(entries))
        for name, value in entries.items():
            if value is None:
                continue
            if section == "_modules":
                yield from _tensors(value, f"{prefix}{name}.", depth + 1, seen)
            elif isinstance(value, _Tensor):
                yield prefix + name, value
            else:
                raise _Refused(f"{_shown(prefix + name)} is not a tensor")


def _architecture(precond: _Object) -> dict[str, Any]:
    """Return the architecture that the inner network's constructor arguments describe, every number within bounds."""
    unet = precond.state["_modules"].get("model")
    kind = unet.class_name if isinstance(unet, _Object) else unet
    if not isinstance(kind, str) or kind not in _NETWORKS:
        raise _Refused(f"its network is of class {_shown(kind)}, not {'/'.join(_NETWORKS)}")
    wrapper, arguments = _checked(_Precond, precond.state), _checked(_UNet, unet.state.get("_init_kwargs"))
    return {"network": _NETWORKS[kind], **wrapper, **arguments}


def _checked(kind: type[BaseModel], values: object) -> dict[str, Any]:
    try:
        return kind.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        # The text of the error itself would quote every value.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _Refused(f"{_shown(first['loc'][0]) if first['loc'] else 'network'}: {first['msg']}") from None


def _check_shapes(denoiser: Denoiser, tensors: Mapping[str, _Tensor]) -> None:
    described = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(described.keys() | found.keys()):
        shape, wanted = found.get(name, "none"), described.get(name, "none")
        if shape != wanted:
            raise _Refused(f"{_shown(name)} has shape {shape}, the network that the file describes has {wanted}")


def _check_values(denoiser: Denoiser) -> None:
    for name, value in denoiser.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise _Refused(f"NaN or infinity in {name}")
    # The options define the resampling filter; for the box filter the layers ignore the buffer.
    taps = denoiser.architecture.get("resample_filter", (1, 1))
    expected = Conv2d(1, 1, 0, down=True, resample_filter=taps).get_buffer("resample_filter")
    for name, value in denoiser.named_buffers():
        if name.endswith(".resample_filter") and not torch.allclose(value, expected):
            raise _Refused(f"{name} is not the filter that the file describes")
