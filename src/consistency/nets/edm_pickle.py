"""Official EDM checkpoints, read as data: nothing that the file carries is imported, called or executed.

The file is a pickle, a program for a stack machine. `pickletools` of the standard library takes it apart; the machine
here knows only the instructions that build plain data. A name that the program asks for never becomes the object of
that name: it is looked up in a table of constructors written here, which return plain values and records of this
module, and a name that is not in the table refuses the file. Python's own unpickler, even with a restricted
`find_class`, can be made to allocate memory at will and to overflow the C stack; here the memory is bounded by the size
of the file and the number of instructions.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistency.errors import UserError
from consistency.nets.denoiser import Denoiser, build_denoiser
from consistency.nets.layers import Conv2d

#: ten times what an imitation of the largest official file takes (51,000): stops one of nothing but instructions
_MAX_INSTRUCTIONS = 500_000
_MAX_INSTRUCTIONS_STORAGE = 200
#: EDMPrecond, U-Net, encoder, block and convolution are five
_MAX_DEPTH = 8
_MAX_NAME = 64
_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "adm"}
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# What senseless instructions raise.
_DAMAGED = (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, struct.error)


class _Refused(Exception):
    """Why the file is not taken, in a few words."""


def read_edm_pickle(path: Path) -> Denoiser:
    """Read an official EDM checkpoint (edm-*.pkl): the denoiser of its EMA weights, in eval mode, frozen, float32.

    Networks: SongUNet (DDPM++ in the -vp files, NCSN++ in -ve) and DhariwalUNet (-adm), inside an EDMPrecond, whose
    sigma_data becomes the architecture's. Raises UserError for a file that is missing, damaged, hostile or another.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = _Machine(file, size, _MAX_INSTRUCTIONS).run()
        return _denoiser(content, size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download an official EDM checkpoint (edm-*.pkl) to it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it a readable file") from None
    except _Refused as error:
        reason = str(error)
    except _DAMAGED as error:
        reason = f"it makes no sense: {type(error).__name__} {ascii(str(error))[:120]}"
    raise UserError(f"{path} is not an official EDM checkpoint ({reason}): download it again, or use another edm-*.pkl")


# --- from the file's content to a denoiser ---------------------------------------------------------------


def _denoiser(content: object, size: int) -> Denoiser:
    precond = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(precond, _Object):
        raise _Refused("it holds no 'ema' network")
    if precond.class_name != "EDMPrecond":
        raise _Refused(
            f"its network is of class {_shown(precond.class_name)}, not EDMPrecond; baselines are not supported"
        )
    tensors = dict(_tensors(precond, "", 1, set()))
    if 4 * sum(math.prod(tensor.shape) for tensor in tensors.values()) > size:
        raise _Refused("its tensors are larger than the file")
    denoiser = _empty(_architecture(precond, len(tensors)))
    _require_equal_shapes(denoiser, tensors)
    denoiser.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, assign=True)
    _check_values(denoiser)
    return denoiser.eval().requires_grad_(False)


def _tensors(module: object, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, _Tensor]]:
    """The parameters and buffers of a module and of those inside, under the names of its state_dict."""
    if not isinstance(module, _Object) or depth > _MAX_DEPTH or id(module) in seen:
        raise _Refused("its modules are no tree of modules")
    seen.add(id(module))
    for section in ("_parameters", "_buffers"):
        for name, tensor in _entries(module, section):
            if not isinstance(tensor, _Tensor):
                raise _Refused(f"{_shown(prefix + name)} is no tensor")
            yield prefix + name, tensor
    for name, child in _entries(module, "_modules"):
        yield from _tensors(child, f"{prefix}{name}.", depth + 1, seen)


def _entries(module: _Object, section: str) -> list[tuple[str, Any]]:
    entries = module.state.get(section)
    if not isinstance(entries, dict) or not all(isinstance(n, str) and len(n) <= _MAX_NAME for n in entries):
        raise _Refused(f"a module without proper {section}")
    return [(name, value) for name, value in entries.items() if value is not None]


def _architecture(precond: _Object, num_tensors: int) -> dict[str, Any]:
    """The architecture for the arguments that the network inside was made with, every number within reason."""
    model = precond.state["_modules"].get("model")
    if not isinstance(model, _Object) or model.class_name not in _NETWORKS:
        raise _Refused(
            f"its network is of class {_shown(getattr(model, 'class_name', model))}, not {'/'.join(_NETWORKS)}"
        )
    options = model.state.get("_init_kwargs")
    if not isinstance(options, dict) or not all(name in _OPTIONS for name in options):
        raise _Refused(f"its {model.class_name} was made with unknown arguments")
    checked = {name: _OPTIONS[name](name, value) for name, value in options.items()}
    # use_fp16 is not read: the weights are float32 all the same, and the precision of a run is the study's.
    wrapper = {name: _whole(name, precond.state.get(name)) for name in ("img_resolution", "img_channels", "label_dim")}
    for name, outer in _GEOMETRY.items():
        if checked.pop(name, wrapper[outer]) != wrapper[outer]:
            raise _Refused(f"{name} of its network is not {outer} of its EDMPrecond")
    # Building takes time by the number of blocks: at least one tensor must stand for each.
    if checked.get("num_blocks", 0) * len(checked.get("channel_mult", ())) > num_tensors:
        raise _Refused("the network it describes has more blocks than the file has tensors")
    sigma_data = _number("sigma_data", precond.state.get("sigma_data"), 1e3)
    if not sigma_data:
        raise _Refused("sigma_data is zero")
    return {"network": _NETWORKS[model.class_name], **wrapper, "sigma_data": sigma_data, **checked}


def _empty(architecture: Mapping[str, Any]) -> Denoiser:
    """The denoiser without memory for its weights, whatever the numbers in its description."""
    try:
        with torch.device("meta"):
            return build_denoiser(architecture)
    except (*_DAMAGED, RuntimeError) as error:
        raise _Refused(f"the network it describes cannot be built: {ascii(str(error))[:120]}") from None


def _require_equal_shapes(denoiser: Denoiser, tensors: Mapping[str, _Tensor]) -> None:
    described = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(described.keys() | found.keys()):
        if described.get(name) != found.get(name):
            raise _Refused(
                f"{_shown(name)} has shape {found.get(name, 'none')}, "
                f"the network that the file describes has {described.get(name, 'none')}"
            )


def _check_values(denoiser: Denoiser) -> None:
    for name, value in denoiser.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise _Refused(f"NaN or infinity in {name}")
    # The resampling filter follows from the options; where it is the box filter, the layers never look at the buffer.
    taps = denoiser.architecture.get("resample_filter", (1, 1))
    expected = Conv2d(1, 1, 0, down=True, resample_filter=taps).get_buffer("resample_filter")
    for name, value in denoiser.named_buffers():
        if name.endswith(".resample_filter") and not torch.allclose(value, expected):
            raise _Refused(f"{name} is not the filter that the file describes")


def _whole(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= 2**16:
        raise _Refused(f"{name} is no whole number from 0 to {2**16}")
    return value


def _number(name: str, value: object, highest: float = 1.0) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= highest:
        raise _Refused(f"{name} is no number from 0 to {highest:g}")
    return float(value)


def _wholes(name: str, value: object) -> list[int]:
    if not isinstance(value, list | tuple) or len(value) > 16:
        raise _Refused(f"{name} is no short list")
    return [_whole(name, item) for item in value]


def _word(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise _Refused(f"{name} is no word")
    return value


#: the U-Net's arguments that the wrapper has too, under the wrapper's names
_GEOMETRY = {
    "img_resolution": "img_resolution",
    "in_channels": "img_channels",
    "out_channels": "img_channels",
    "label_dim": "label_dim",
}
_OPTIONS: Mapping[str, Callable[[str, object], Any]] = {
    **dict.fromkeys(_GEOMETRY, _whole),
    **dict.fromkeys(("augment_dim", "model_channels", "channel_mult_emb", "num_blocks", "channel_mult_noise"), _whole),
    **dict.fromkeys(("channel_mult", "attn_resolutions", "resample_filter"), _wholes),
    **dict.fromkeys(("dropout", "label_dropout"), _number),
    **dict.fromkeys(("embedding_type", "encoder_type", "decoder_type"), _word),
}


# --- what the instructions build -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Name:
    """A global name that the file asks for, such as collections.OrderedDict; never the object of that name."""

    text: str


@dataclass(slots=True, eq=False)
class _Object:
    """What stands for an object of a class: the name of the class and the attributes."""

    class_name: str
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Dtype:
    """A scalar type of NumPy, as a format of `struct`."""

    format: str


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """The bytes of a torch storage, a stream of its own that is read only once the tensor is known to fit."""

    content: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A tensor as the file describes it; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> Tensor:
        """The values, float32, in memory of their own."""
        values = _read_storage(self.storage.content)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if last >= len(values) or math.prod(self.shape) > len(values):
            raise _Refused("a tensor larger than its storage")
        strides = [4 * stride for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)
        return torch.from_numpy(np.array(view, dtype=np.float32, order="C"))


def _persistent(meta: object) -> _Object:
    # meta["module_src"], the source that the official reader would execute, stays a string that nobody reads.
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise _Refused("a persistent object without a state")
    return _Object(_word("a class name", meta.get("class_name")), meta["state"])


def _dtype(code: object, align: object, copy: object) -> _Dtype:
    formats = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}
    if not isinstance(code, str) or code not in formats:
        raise _Refused(f"a NumPy value of dtype {_shown(code)}")
    return _Dtype(formats[code])


def _scalar(dtype: object, content: object) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise _Refused("a NumPy value that is no number")
    return struct.unpack(dtype.format, content)[0]


def _latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("bytes in an encoding other than latin1")
    return text.encode("latin1")


def _storage(content: object) -> _Storage:
    if not isinstance(content, bytes):
        raise _Refused("a tensor storage that is not bytes")
    return _Storage(content)


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> _Tensor:
    sizes, steps = _counts(shape), _counts(strides)
    if not isinstance(storage, _Storage) or len(sizes) != len(steps) or 0 in sizes:
        raise _Refused("a tensor without a storage, with strides that do not fit its shape, or of nothing")
    if any(n > 1 and step == 0 for n, step in zip(sizes, steps, strict=True)):
        raise _Refused("a tensor that repeats its storage")
    return _Tensor(storage, _counts((offset,))[0], sizes, steps)


def _counts(values: object) -> tuple[int, ...]:
    """Sizes, strides or an offset: few whole numbers."""
    if not isinstance(values, tuple) or len(values) > 8 or any(type(v) is not int or v < 0 for v in values):
        raise _Refused("a tensor with an impossible shape, stride or offset")
    return values


def _parameter(data: object, requires_grad: object, hooks: object) -> object:
    return data


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _module_dict() -> _Object:
    return _Object("ModuleDict")


_CALLS: Mapping[str, Callable[..., Any]] = {
    "_codecs.encode": _latin1,
    "collections.OrderedDict": _ordered_dict,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,  # as NumPy 1 wrote it
    "numpy.dtype": _dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
_CLASSES: Mapping[str, Callable[[], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "dnnlib.util.EasyDict": _ordered_dict,
    "torch.nn.modules.container.ModuleDict": _module_dict,
}
_FLOAT_STORAGE = "torch.FloatStorage"
_NAMES = frozenset({*_CALLS, *_CLASSES, _FLOAT_STORAGE})


def _read_storage(content: bytes) -> NDArray[np.float32]:
    """The elements of a storage from torch's own stream of before zip files: five small pickles, then the bytes."""
    if content.startswith(b"PK"):
        raise _Refused("a tensor storage in a zip file")
    stream = io.BytesIO(content)
    magic, version, system, storage, keys = (
        _Machine(stream, len(content), _MAX_INSTRUCTIONS_STORAGE, _storage_length).run() for _ in range(5)
    )
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION) or not isinstance(system, dict):
        raise _Refused("a tensor storage that is no plain torch stream")
    if system.get("little_endian") is not True or not isinstance(keys, list) or len(keys) != 1:
        raise _Refused("a tensor storage of another machine, or of several parts")
    (length,) = struct.unpack("<q", stream.read(8))
    if length != storage or len(content) - stream.tell() != 4 * length:
        raise _Refused("a tensor storage that is cut short")
    return np.frombuffer(content, np.dtype("<f4"), length, stream.tell())


def _storage_length(reference: object) -> int:
    if not isinstance(reference, tuple) or len(reference) != 6 or reference[0] != "storage":
        raise _Refused("a tensor storage that refers to something else")
    _, kind, _, _, length, view = reference
    if kind != _Name(_FLOAT_STORAGE) or type(length) is not int or view is not None:
        raise _Refused("a tensor storage of other than float32 values")
    return length


def _shown(value: object) -> str:
    """A short form, on one line, of whatever the file holds."""
    return ascii(value[:_MAX_NAME]) if isinstance(value, str) else f"of type {type(value).__name__}"


# --- the machine -----------------------------------------------------------------------------------------


class _Bounded:
    """A stream that is asked for no more than it has, before memory for it is taken."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size
        self.readline, self.tell = stream.readline, stream.tell

    def read(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise _Refused("it is cut short")
        return self._stream.read(count)


#: instructions whose value stands in the file
_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_INTEGERS, "BINFLOAT", *_TEXTS, *_BYTES))
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_IGNORED = frozenset(("PROTO", "FRAME"))


class _Machine:
    """The stack machine of a pickle, without the instructions that no EDM checkpoint has.

    stream: at the first byte of the pickle, `size` bytes in all; limit: of instructions; persistent: gives the value of
    a persistent id, refused where there is none. `run` raises _Refused for what is not allowed and one of _DAMAGED for
    what makes no sense.
    """

    def __init__(
        self, stream: IO[bytes], size: int, limit: int, persistent: Callable[[object], object] | None = None
    ) -> None:
        self._stream, self._limit, self._persistent = _Bounded(stream, size), limit, persistent
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the value of the pickle, leaving the stream at its end."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._stream)):  # type: ignore[arg-type]
            if count > self._limit:
                raise _Refused("it has too many instructions")
            if opcode.name != "STOP":
                self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            self._stack.append(_CONTAINERS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in _IGNORED:
            raise _Refused(f"it has the pickle instruction {name}")

    def mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def make_tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def short_tuple(self, length: int) -> None:
        items = [self._stack.pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def append(self, _: Any) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def appends(self, _: Any) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def additems(self, _: Any) -> None:
        items = self._since_mark()
        self._top(set).update(map(_key, items))

    def setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._top(dict)[_key(key)] = value

    def setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._top(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise _Refused(f"it fills what is no {kind.__name__}")
        return self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(_name(module, name))

    def stack_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_name(module, name))

    def reduce(self, _: Any) -> None:
        self._call(_CALLS)

    def newobj(self, _: Any) -> None:
        self._call(_CLASSES)

    def _call(self, table: Mapping[str, Callable[..., Any]]) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Name) or function.text not in table or not isinstance(arguments, tuple):
            raise _Refused("it calls what cannot be called")
        self._stack.append(table[function.text](*arguments))

    def build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _Object) and target.class_name == "ModuleDict" and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, _Dtype) or not isinstance(state, tuple) or state[1] not in ("<", "|"):
            # A dtype's state is its byte order, which _Dtype implies; nothing else has a state.
            raise _Refused("it gives a state to what has none")

    def persistent_id(self, _: Any) -> None:
        if self._persistent is None:
            raise _Refused("it refers to something outside the file")
        self._stack.append(self._persistent(self._stack.pop()))


_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.short_tuple(1),
    "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.additems,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "MEMOIZE": _Machine.memoize,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}


def _name(module: object, name: object) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Refused("it asks for a name that is no text")
    text = f"{module}.{name}"
    if text not in _NAMES:
        raise _Refused(f"it asks for {_shown(text)}, which no such file needs; nothing was run")
    return _Name(text)


def _key(key: object) -> object:
    # Hashing a tuple nested a million deep would overflow the C stack.
    if type(key) not in (str, int):
        raise _Refused(f"it uses a value {_shown(key)} as a key")
    return key
