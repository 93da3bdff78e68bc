"""Checkpoints of the form of the official EDM ones, written from our denoisers.

The form is that of NVlabs' training loop: a pickle of protocol 4 of dict(ema, loss_fn, augment_pipe, dataset_kwargs),
whose networks reduce to torch_utils.persistence._reconstruct_persistent_obj with source text, class name and state.
"""

import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from consistency.nets.denoiser import Denoiser

SOURCE = "import torch\n\nclass EDMPrecond(torch.nn.Module):\n    pass\n"
_CLASSES = {"songunet": "SongUNet", "adm": "DhariwalUNet"}
_HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Persistent:
    """Pickled as an object of a class under torch_utils.persistence."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = SOURCE) -> None:
        self.class_name, self.state, self.source = class_name, state, source

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        reconstruct = vars(sys.modules["torch_utils.persistence"])["_reconstruct_persistent_obj"]
        return reconstruct, ({**meta, "state": self.state},)


class Scalar:
    """A NumPy float64 pickled as NumPy 1 did, or NumPy 2 does."""

    def __init__(self, value: float, numpy: int) -> None:
        self.value, self.numpy = np.float64(value), numpy

    def __reduce__(self) -> tuple[Any, ...]:
        core = "numpy.core" if self.numpy == 1 else "numpy._core"
        return vars(sys.modules[f"{core}.multiarray"])["scalar"], (self.value.dtype, self.value.tobytes())


def write_edm_pickle(path: Path, denoiser: Denoiser, **changes: Any) -> None:
    """Write what the official training would have written of this network; changes: as of `edm_pickle`."""
    path.write_bytes(edm_pickle(denoiser, **changes))


def edm_pickle(
    denoiser: Denoiser, *, entries: dict[str, Any] | None = None, protocol: int = 4, **changes: Any
) -> bytes:
    """The bytes that the official training would have written of this network.

    entries: of the outermost dictionary, replaced; protocol: of pickle; changes: fields of `_Writer`.
    """
    writer = _Writer(**changes)
    with foreign_modules() as easy_dict:
        content = {
            "ema": writer.precond(denoiser),
            "loss_fn": writer.persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}),
            "augment_pipe": writer.persistent("AugmentPipe", {"p": 0.12, "xflip": 100000000.0, "_init_args": ()}),
            "dataset_kwargs": easy_dict(class_name="training.dataset.ImageFolderDataset", resolution=32, xflip=False),
            **(entries or {}),
        }
        return pickle.dumps(content, protocol)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """A writer of files that differ from the true one in what it is given.

    source: the text under module_src; class_name: of the preconditioning; state, options: entries of the
    preconditioning's state and of the inner network's arguments that replace the true ones; tensors: a value for the
    name of a tensor; None takes an argument or a tensor out; numpy: the version 1 or 2 that wrote the scalars.
    """

    source: str = SOURCE
    class_name: str = "EDMPrecond"
    state: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    numpy: int = 2

    def persistent(self, class_name: str, state: dict[str, Any]) -> Persistent:
        return Persistent(class_name, state, self.source)

    def precond(self, denoiser: Denoiser) -> Persistent:
        given = denoiser.architecture
        names = ("img_resolution", "img_channels", "label_dim", "sigma_data")
        wrapper = {name: given[name] for name in names}
        inner = {
            name: value
            for name, value in given.items()
            if name not in (*names, "network", "second_time", "noise_scale")
        }
        made_with = {
            "img_resolution": given["img_resolution"],
            "in_channels": given["img_channels"],
            "out_channels": given["img_channels"],
            "label_dim": given["label_dim"],
            **{name: value for name, value in {**inner, **self.options}.items() if value is not None},
        }
        model_type = _CLASSES[given["network"]]
        model = self.module(denoiser.model, "model.", model_type, made_with)
        outside = {
            **_module_state(denoiser, OrderedDict(model=model), {}),
            **wrapper,
            "use_fp16": True,
            "sigma_min": 0,
            "sigma_max": float("inf"),
            "_init_args": (),
            "_init_kwargs": {**wrapper, **inner, "use_fp16": True, "model_type": model_type},
        }
        return self.persistent(self.class_name, {**outside, **self.state})

    def module(self, module: nn.Module, prefix: str, name: str, made_with: dict[str, Any]) -> Any:
        """A module as the official code pickles it: ModuleDict by itself, all others as persistent objects."""
        children = OrderedDict(
            (key, self.module(child, f"{prefix}{key}.", type(child).__name__, {}))
            for key, child in module.named_children()
        )
        own = {
            key[len(prefix) :]: value for key, value in self.tensors.items() if key.rpartition(".")[0] + "." == prefix
        }
        state = _module_state(module, children, own)
        if isinstance(module, nn.ModuleDict):
            plain = nn.ModuleDict()
            plain.__dict__.update(state)
            return plain
        # The official blocks keep scales computed by NumPy.
        attributes = {"skip_scale": Scalar(0.5**0.5, self.numpy), "_init_args": (), "_init_kwargs": made_with}
        return self.persistent(name, {**state, "in_channels": 3, "bias": None, **attributes})


def _module_state(module: nn.Module, children: OrderedDict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    parameters = OrderedDict(
        (key, own.get(key, value)) for key, value in module._parameters.items() if value is not None
    )
    buffers = OrderedDict((key, own.get(key, value)) for key, value in module._buffers.items())
    hooks: dict[str, Any] = {hook: OrderedDict() for hook in _HOOKS}
    return {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
        **hooks,
        "_is_full_backward_hook": None,
        "_modules": children,
    }


@contextmanager
def foreign_modules() -> Iterator[type[dict[str, Any]]]:
    """The official modules, for as long as their names are written; yields dnnlib.util.EasyDict."""

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
        raise AssertionError("the official reader is not for tests")

    def scalar(dtype: Any, content: bytes) -> None:
        raise AssertionError("NumPy 1 is not for tests")

    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    made = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "numpy.core.multiarray": {"scalar": scalar},
        "dnnlib.util": {"EasyDict": easy_dict},
    }
    modules = {name: ModuleType(name) for name in ("torch_utils", "dnnlib")}
    for module_name, members in made.items():
        module = ModuleType(module_name)
        for name, member in members.items():
            member.__module__, member.__qualname__ = module_name, name  # type: ignore[attr-defined]
            setattr(module, name, member)
        modules[module_name] = module
    with mock.patch.dict(sys.modules, modules):
        yield easy_dict
