"""Layers shared by the U-Nets; every operation supports forward-mode differentiation (torch.func.jvp)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn


def _centred_uniform(shape: Sequence[int]) -> Tensor:
    return torch.rand(shape) * 2 - 1


_INIT_RULES: dict[str, tuple[Callable[[int, int], float], Callable[[Sequence[int]], Tensor]]] = {
    "xavier_uniform": (lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out)), _centred_uniform),
    "kaiming_uniform": (lambda fan_in, fan_out: math.sqrt(3 / fan_in), _centred_uniform),
    "kaiming_normal": (lambda fan_in, fan_out: math.sqrt(1 / fan_in), torch.randn),
}


@dataclass(frozen=True)
class Init:
    """Initial values of a layer's parameters. mode: xavier_uniform, kaiming_uniform or kaiming_normal; weight, bias:
    gains of the weight and of the bias. A gain of 0 gives exact zeros."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def sample(self, shape: Sequence[int], fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
        """Draw a parameter of the given shape from the global generator, scaled by `gain`."""
        if gain == 0:
            return nn.Parameter(torch.zeros(*shape))
        scale, draw = _INIT_RULES[self.mode]
        return nn.Parameter(draw(shape) * (scale(fan_in, fan_out) * gain))


ZERO_INIT = Init(weight=0.0)


class Linear(nn.Module):
    """Affine map [..., in_features] -> [..., out_features], evaluated in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init = Init()) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = init.sample([out_features, in_features], in_features, out_features, init.weight)
        self.bias = init.sample([out_features], in_features, out_features, init.bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _cast_bias(self.bias, x))


class Conv2d(nn.Module):
    """Same-size convolution, with an optional x2 resampling by a separable low-pass filter.

    Shapes: [N,C_in,H,W] -> [N,C_out,H,W], times 2 (`up`) or divided by 2 (`down`) in H and W.
    kernel 0 resamples only. `resample_filter` gives the filter's 1-D taps, which are normalised to sum 1.
    fused_resample (with `down` only) filters after the convolution instead of before it.
    Raises ValueError for both directions at once, or a fused upsampling.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init: Init = Init(),
    ) -> None:
        super().__init__()
        if (up and down) or (fused_resample and not down):
            raise ValueError("a convolution resamples up or down, not both, and only `down` can be fused")
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = init.sample(shape, fan_in, fan_out, init.weight) if kernel else None
        self.bias = init.sample([out_channels], fan_in, fan_out, init.bias) if kernel and bias else None
        self.register_buffer("resample_filter", _low_pass(resample_filter) if up or down else None)
        self._is_box = tuple(resample_filter) == (1, 1)
        self._filter_pad = (len(resample_filter) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_resample:
            return self._downsample(self._convolve(x, self.kernel // 2 + self._filter_pad), pad=0)
        if self.up:
            x = self._upsample(x)
        elif self.down:
            x = self._downsample(x, self._filter_pad)
        return self._convolve(x, self.kernel // 2)

    def _convolve(self, x: Tensor, pad: int) -> Tensor:
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), _cast_bias(self.bias, x), padding=pad)

    # Pooling and repeating apply the box filter faster than a depthwise convolution.
    def _downsample(self, x: Tensor, pad: int) -> Tensor:
        if self._is_box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._depthwise_filter(x), stride=2, padding=pad, groups=x.shape[1])

    def _upsample(self, x: Tensor) -> Tensor:
        if self._is_box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        taps = self._depthwise_filter(x) * 4
        return F.conv_transpose2d(x, taps, stride=2, padding=self._filter_pad, groups=x.shape[1])

    def _depthwise_filter(self, x: Tensor) -> Tensor:
        assert self.resample_filter is not None
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation over min(32, channels // 4) groups, shape preserving.

    Raises ValueError if the channels do not split evenly: multiples of 4 up to 128 do, of 32 above.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        num_groups = min(32, num_channels // 4)
        if num_groups == 0 or num_channels % num_groups:
            raise ValueError(
                f"group normalisation cannot split {num_channels} channels into groups: use a multiple of 4 "
                "up to 128 channels, of 32 above (change model_channels or channel_mult)"
            )
        super().__init__(num_groups, num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous() and fwAD.unpack_dual(x).tangent is not None:
            x = x.contiguous()  # the forward-mode rule takes no channels-last input
        # The kernel sums in float32 in any case; autocast would make float32 copies of the activations.
        with _no_autocast(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every query position over all key positions.

    Shapes: q, k, v and the result are [B, C, P] with P positions. The weights softmax(q.k / sqrt(C)) are computed in at
    least float32. Forward mode uses plain operations, because fused kernels lack its rules. Otherwise a GPU uses fused
    kernels, because the weights of all graphs of a step would fill its memory.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if q.is_cuda and fwAD.unpack_dual(q).tangent is None:
        return fused_attention(q, k, v)
    with _no_autocast(q):
        scores = torch.bmm(q.to(dtype).transpose(1, 2), k.to(dtype) / math.sqrt(k.shape[1]))
        weights = scores.softmax(dim=2).to(q.dtype)
    return torch.bmm(v, weights.transpose(1, 2))


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `attention` with PyTorch's fused kernels, which store no weights."""
    q, k, v = (a.transpose(1, 2).unsqueeze(1).contiguous() for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Return a context manager that turns autocast off."""
    # The meta device, used to count shapes and operations, has no autocast.
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class UNetBlock(nn.Module):
    """Residual block with noise-level conditioning, optional resampling, attention and second time.

    Shapes: x [N,C_in,H,W]; emb, emb_s [N or 1, emb_channels]; result [N,C_out,H',W'].
    num_heads 0 means no attention. adaptive_scale modulates by scale and shift, otherwise by a shift only.
    With second_time, affine_s(emb_s) is added to affine(emb); it starts at exactly zero, so that a student
    begins as its teacher while gradients already reach affine_s.
    Raises ValueError if the heads do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        num_heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = Init(),
        init_zero: Init = ZERO_INIT,
        init_attn: Init | None = None,
        second_time: bool = False,
    ) -> None:
        super().__init__()
        if num_heads and out_channels % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {out_channels} channels")
        self.in_channels, self.out_channels, self.num_heads = in_channels, out_channels, num_heads
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        modulation = out_channels * (2 if adaptive_scale else 1)

        resample = partial(
            Conv2d, in_channels, out_channels, up=up, down=down, resample_filter=resample_filter, init=init
        )

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = resample(kernel=3)
        self.affine = Linear(emb_channels, modulation, init=init)
        self.affine_s = Linear(emb_channels, modulation, init=ZERO_INIT) if second_time else None
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            self.skip = resample(kernel=1 if resample_proj or in_channels != out_channels else 0)
        if num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None = None) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self._modulate(h, emb, emb_s))
        h = self.conv1(F.dropout(h, self.dropout, self.training) if self.dropout else h)
        h = self._merge(h, x if self.skip is None else self.skip(x))
        return self._merge(self._attend(h), h) if self.num_heads else h

    def _modulate(self, h: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        params = self.affine(emb)
        if self.affine_s is not None and emb_s is not None:
            params = params + self.affine_s(emb_s)
        params = params.to(h.dtype)[:, :, None, None]
        if not self.adaptive_scale:
            return self.norm1(h + params)
        scale, shift = params.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)

    def _merge(self, h: Tensor, residual: Tensor) -> Tensor:
        total = h + residual
        return total if self.skip_scale == 1 else total * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # Channel layout of the published weights: [head][channel][q, k, v].
        qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, height * width)
        return self.proj(attention(*qkv.unbind(2)).reshape(n, c, height, width))


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding [N] -> [N, num_channels], cosines first, frequencies from 1 down to 1/10000.

    With `endpoint` the lowest frequency is exactly 1/10000. Raises ValueError for an odd number of channels.
    """

    def __init__(self, num_channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.num_freqs, self.endpoint = half_channels(num_channels), endpoint

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(self.num_freqs, device=x.device, dtype=x.dtype) / (self.num_freqs - int(self.endpoint))
        phase = torch.outer(x, torch.pow(1e-4, steps))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features [N] -> [N, num_channels]: cosines, then sines, of 2 pi f x, f ~ N(0, scale^2).

    Raises ValueError for an odd number of channels.
    """

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(half_channels(num_channels)) * scale)

    def forward(self, x: Tensor) -> Tensor:
        phase = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class ConditionedNetwork(nn.Module):
    """Base of all networks. `embed` maps the conditions to the embedding of t and, with second_time and layers of its
    own, of s; `body` maps the image. A subclass builds map_noise, map_layer0, ... and defines both."""

    map_label: nn.Module
    map_layer0: nn.Module
    map_layer1: nn.Module
    map_layer0_s: nn.Module
    map_layer1_s: nn.Module

    def __init__(
        self, label_dim: int, augment_dim: int, label_dropout: float, second_time: bool, label_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.label_dim, self.augment_dim, self.second_time = label_dim, augment_dim, second_time
        self.label_dropout, self.label_scale = label_dropout, label_scale

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        second_noise_labels: Tensor | None = None,
    ) -> Tensor:
        vectors = self._labels(class_labels, noise_labels) * self.label_scale
        labels = self.map_label(vectors) if self.label_dim else None  # once, for t and s
        emb = self.embed(noise_labels, labels, augment_labels, self.map_layer0, self.map_layer1)
        second = noise_labels if second_noise_labels is None else second_noise_labels
        emb_s = self.embed(second, labels, None, self.map_layer0_s, self.map_layer1_s) if self.second_time else None
        return self.body(x, emb, emb_s)

    def _labels(self, class_labels: Tensor | None, like: Tensor) -> Tensor:
        """Return one-hot labels [N or 1, label_dim] in the dtype of `like`, zeros for None; drop some in training."""
        labels = like.new_zeros(1, self.label_dim) if class_labels is None else class_labels.to(like.dtype)
        dropout = self.label_dropout if self.training else 0.0
        return labels * (torch.rand_like(labels[:, :1]) >= dropout) if dropout else labels

    def embed(
        self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, layer0: nn.Module, layer1: nn.Module
    ) -> Tensor:
        """Return the embedding [N or 1, emb_channels] of a time, the labels' embedding and the augmentation."""
        raise NotImplementedError

    def body(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        """Map the image, given the embeddings."""
        raise NotImplementedError


def half_channels(num_channels: int) -> int:
    """Return half the channels of a sine-cosine embedding. Raises ValueError unless they are even and at least 4."""
    if num_channels % 2 or num_channels < 4:
        raise ValueError(f"a time embedding needs an even number of channels, at least 4; got {num_channels}")
    return num_channels // 2


def _low_pass(taps: Sequence[float]) -> Tensor:
    taps_1d = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(taps_1d, taps_1d) / taps_1d.sum() ** 2)[None, None]


def _cast_bias(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)
