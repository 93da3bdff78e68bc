"""The denoiser D(x, t) of EDM and its student D(x, t, s), built from and described by a plain dictionary."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from consistency.base.errors import suggestion
from consistency.nets.adm import DhariwalUNet
from consistency.nets.mlp import MLP
from consistency.nets.songunet import SongUNet


def edm_coefficients(t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in, c_noise) of the EDM preconditioning, each with the shape and dtype of t.

    t: noise level, > 0, in the units of the data; sigma_data: standard deviation of the data.
    c_skip = sd^2/(sd^2+t^2), c_out = sd t/sqrt(sd^2+t^2), c_in = 1/sqrt(sd^2+t^2), c_noise = ln(t)/4
    (Karras et al. 2022, table 1).
    """
    variance = t.square() + sigma_data**2
    c_in = variance.rsqrt()
    return sigma_data**2 / variance, sigma_data * t * c_in, c_in, t.log() / 4


class Denoiser(nn.Module):
    """EDM-preconditioned denoiser D(x,t) = c_skip(t) x + c_out(t) F(c_in(t) x, ln(t)/4), F being `model`.

    A student (`second_time`) is D(x,t,s) with F(c_in(t) x, ln(t)/4, ln(s)/4). `architecture` is a JSON-able
    dictionary from which `build_denoiser` makes the same network again; it also gives the attributes
    `sigma_data`, `label_dim`, `img_channels` and `img_resolution`. own_fit: N where the network
    has l_t and s_t [N] of its own (`set_own_fit`); other architectures lack that key.

    x: [N,C,H,W]; t, s: number, scalar tensor or [N], > 0; labels: None (on a conditional network, a label of
    all zeros), class indices int64 [N], or one-hot float [N,label_dim]; augment_labels: [N,augment_dim].
    Coefficients, and the results, are float64 if x is, otherwise float32; the network runs in the same
    precision whatever the dtype of its parameters. A student given no s uses s = t; a network without a second
    time is the same function of x and t for every s.
    Raises ValueError if labels of either kind are given to a network that takes none or do not fit it, or if t or s
    has neither 1 nor N values.
    """

    def __init__(self, model: nn.Module, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self.fit: Tensor
        self.model = model
        self.architecture: dict[str, Any] = json.loads(json.dumps(architecture))
        self.sigma_data = float(self.architecture["sigma_data"])
        self.label_dim = int(self.architecture["label_dim"])
        self.img_channels = int(self.architecture["img_channels"])
        self.img_resolution = int(self.architecture["img_resolution"])
        #: autocast precision of the network; None: the precision of x
        self.precision: torch.dtype | None = None
        if "own_fit" in self.architecture:
            self.set_own_fit(torch.zeros(3, self.architecture["own_fit"], dtype=torch.float64))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.img_channels, self.img_resolution, self.img_resolution

    @property
    def takes_s(self) -> bool:
        """True for a student's denoiser D(x,t,s)."""
        return bool(self.architecture["second_time"])

    def set_own_fit(self, fit: Tensor) -> None:
        """Store times, l_t and s_t, float64 [3, N], in the buffer `fit`, which is saved with the weights."""
        if "fit" not in self._buffers:
            self.architecture["own_fit"] = fit.shape[1]
            self.register_buffer("fit", fit.clone())
        self.fit.copy_(fit)

    def compute_in(self, precision: str) -> Denoiser:
        """Run the network, but not the preconditioning around it, in bfloat16 or float16 by autocast.

        precision: float32 (that of x), bfloat16 or float16. Returns self. Raises KeyError for any other value.
        """
        self.precision = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        s: Tensor | float | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Return D(x,t[,s]), with the shape of x."""
        x = self._cast(x)
        t = self._as_times(t, x, "t")
        c_skip, c_out, _, _ = edm_coefficients(t[:, None, None, None], self.sigma_data)
        return torch.addcmul(c_skip * x, c_out, self.raw(x, t, s, labels, augment_labels))

    def raw(
        self,
        x: Tensor,
        t: Tensor | float,
        s: Tensor | float | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the network's own output F(c_in(t) x, ln(t)/4[, ln(s)/4]), with the shape of x."""
        if augment_labels is not None and not self.architecture.get("augment_dim"):
            raise ValueError("augmentation labels given to a network without augment_dim: pass none")
        x = self._cast(x)
        t = self._as_times(t, x, "t")
        c_in, c_noise = edm_coefficients(t, self.sigma_data)[2:]
        c_noise_s = None if s is None or not self.takes_s else self._as_times(s, x, "s").log() / 4
        scaled, one_hot = c_in[:, None, None, None] * x, self._one_hot(labels, x)
        # Only the network runs in the lower precision: the preconditioning around it stays in that of x.
        with torch.autocast(x.device.type, self.precision) if self.precision else contextlib.nullcontext():
            output = self.model(scaled, c_noise, one_hot, augment_labels, c_noise_s)
        return output.to(x.dtype)

    @staticmethod
    def _cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(torch.float32)

    @staticmethod
    def _as_times(t: Tensor | float, x: Tensor, name: str) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1)
        if len(times) not in (1, len(x)):
            raise ValueError(f"{name} must have 1 or {len(x)} values, one per image; it has {len(times)}")
        return times

    def _one_hot(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if not self.label_dim:
            if labels is not None and labels.numel():
                raise ValueError("labels given to an unconditional denoiser (label_dim 0): pass labels=None")
            return None
        if labels is None:
            return x.new_zeros(1, self.label_dim)
        if labels.ndim == 1 and not labels.is_floating_point():
            # On a GPU the check would stall the queue; there one_hot fails in the kernel.
            if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < self.label_dim)).all()):
                raise ValueError(f"class indices go from 0 to {self.label_dim - 1}; got {labels.tolist()}")
            labels = F.one_hot(labels.long(), self.label_dim)
        if labels.ndim != 2 or labels.shape[1] != self.label_dim or len(labels) not in (1, len(x)):
            raise ValueError(
                f"labels must be class indices [{len(x)}] (int64) or one-hot [{len(x)}, {self.label_dim}]; "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        return labels.to(x.dtype)


NETWORKS: dict[str, type[nn.Module]] = {"songunet": SongUNet, "adm": DhariwalUNet, "mlp": MLP}


def _options(network: str) -> dict[str, Any]:
    """Return the keyword arguments of a network that the architecture may set, with their defaults."""
    parameters = inspect.signature(NETWORKS[network]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def build_denoiser(architecture: Mapping[str, Any]) -> Denoiser:
    """Build the denoiser that `architecture` describes, with weights drawn from the global generator.

    architecture: network ("songunet", "adm" or "mlp"), img_resolution (pixels), img_channels, optionally label_dim
    (0), sigma_data (0.5), second_time (False), and any keyword argument of the network. The result's own
    `architecture` has every default written out. d numbers without image structure are img_channels = d,
    img_resolution = 1.
    Raises ValueError for a missing or unknown key, naming the nearest valid one, and for an unknown network.
    """
    full = _with_defaults(architecture)
    network, channels = full["network"], full["img_channels"]
    options = {name: full[name] for name in _options(network)}
    return Denoiser(NETWORKS[network](full["img_resolution"], channels, channels, **options), full)


def forward_operations(architecture: Mapping[str, Any]) -> float:
    """Count the operations of one evaluation of one image, additions and multiplications as one each, without data."""
    with torch.device("meta"):
        denoiser = build_denoiser(architecture).eval()
        x = torch.zeros(1, *denoiser.shape)
        with FlopCounterMode(display=False) as counter:
            denoiser(x, torch.ones(1))
    return float(counter.get_total_flops())


def init_denoiser(architecture: Mapping[str, Any], seed: int) -> Denoiser:
    """Build a denoiser whose weights depend on `seed` alone, leaving the global generators as they were.

    Raises ValueError as `build_denoiser` does.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the GPUs.
        torch.default_generator.manual_seed(seed)
        return build_denoiser(architecture)


def student_from_teacher(teacher: Denoiser, dropout: float | Sequence[float] | None = None, seed: int = 0) -> Denoiser:
    """Make a student D_theta(x,t,s) that equals the teacher's D(x,t) exactly until its first update.

    The teacher's weights are copied by name, to the same device and dtype; the parameters of the second time
    are drawn from `seed`, and those that project it into the blocks are zero. The student takes no
    augmentation labels, so the teacher's map_augment is left out. dropout: the student's, in [0,1), of a
    songunet also one for each level; None keeps the teacher's. Exact equality holds without active dropout.
    Raises ValueError if the teacher already has a second time.
    """
    if teacher.takes_s:
        raise ValueError("the teacher already has a second time: make a student from a plain D(x, t)")
    architecture = {**teacher.architecture, "second_time": True}
    if "augment_dim" in architecture:
        architecture["augment_dim"] = 0
    if dropout is not None:
        architecture["dropout"] = dropout
    like = next(teacher.parameters())
    student = init_denoiser(architecture, seed).to(device=like.device, dtype=like.dtype)
    shared = student.state_dict().keys()
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in shared}, strict=False)
    return student


def _with_defaults(architecture: Mapping[str, Any]) -> dict[str, Any]:
    required = ("network", "img_resolution", "img_channels")
    missing = [key for key in required if key not in architecture]
    if missing:
        raise ValueError(f"the architecture lacks {', '.join(missing)}")
    network = architecture["network"]
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}{suggestion(network, NETWORKS)}")
    defaults = {**{key: architecture[key] for key in required}, "sigma_data": 0.5, **_options(network)}
    for key in architecture:
        if key not in defaults and key != "own_fit":
            raise ValueError(f"unknown key {key!r} in a {network} architecture{suggestion(key, defaults)}")
    return {**defaults, **architecture}
