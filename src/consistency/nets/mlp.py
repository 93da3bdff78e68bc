"""A residual multi-layer perceptron for small or low-dimensional data."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.nets.layers import ZERO_INIT, ConditionedNetwork, Init, Linear, half_channels

_INIT = Init("xavier_uniform")
_INIT_SMALL = Init("xavier_uniform", weight=1e-5)
# Radians per unit of ln(t)/4, whose range over [0.002, 80] is 2.65: fine enough to tell neighbouring grid
# times apart, smooth enough for the time derivatives of the coefficient fit.
_LOWEST_FREQUENCY, _HIGHEST_FREQUENCY = 0.5, 16.0


class MLP(ConditionedNetwork):
    """Residual perceptron F(x, c_noise[, c_noise_s]) on flattened images, for up to a few hundred dimensions.

    Each of `depth` blocks normalises the hidden vector, scales and shifts it by a projection of the time
    embedding, and adds two linear layers of `width` units. All blocks' scales and shifts come from one
    projection, map_modulation; with second_time, map_modulation_s adds that of s and starts at exactly zero.

    Shapes: x [N,in_channels,R,R] -> [N,out_channels,R,R]; noise_labels and second_noise_labels [N] or [1], ln(t)/4
    and ln(s)/4; class_labels [N or 1, label_dim], one-hot; it takes no augmentation labels.
    Raises ValueError for an odd embedding.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        width: int = 256,
        depth: int = 4,
        embedding: int = 64,
        label_dim: int = 0,
        dropout: float = 0.0,
        second_time: bool = False,
    ) -> None:
        super().__init__(label_dim, 0, 0.0, second_time, math.sqrt(label_dim))
        pixels, emb_channels = img_resolution**2, 2 * embedding
        self.depth, self.num_freqs = depth, half_channels(embedding)

        if label_dim:
            self.map_label = Linear(label_dim, embedding, init=_INIT)
        self.map_layer0 = Linear(embedding, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)
        self.map_modulation = Linear(emb_channels, 2 * depth * width, init=_INIT)
        if second_time:
            self.map_layer0_s = Linear(embedding, emb_channels, init=_INIT)
            self.map_layer1_s = Linear(emb_channels, emb_channels, init=_INIT)
            self.map_modulation_s = Linear(emb_channels, 2 * depth * width, init=ZERO_INIT)

        self.linear_in = Linear(in_channels * pixels, width, init=_INIT)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.linear_out = Linear(width, out_channels * pixels, init=_INIT_SMALL)

    def embed(
        self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, layer0: nn.Module, layer1: nn.Module
    ) -> Tensor:
        index = torch.arange(self.num_freqs, device=noise.device, dtype=noise.dtype)
        freqs = _LOWEST_FREQUENCY * (_HIGHEST_FREQUENCY / _LOWEST_FREQUENCY) ** (index / (self.num_freqs - 1))
        phase = torch.outer(noise, freqs)
        emb = torch.cat([phase.sin(), phase.cos()], dim=1)
        emb = emb if labels is None else emb + labels
        return F.silu(layer1(F.silu(layer0(emb))))

    def body(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        modulation = self.map_modulation(emb)
        if emb_s is not None:
            modulation = modulation + self.map_modulation_s(emb_s)
        parts = modulation.chunk(2 * self.depth, dim=1)
        h = self.linear_in(x.flatten(1))
        for i, block in enumerate(self.blocks):
            h = block(h, parts[2 * i], parts[2 * i + 1])
        return self.linear_out(h).view(len(x), -1, *x.shape[2:])


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.linear0 = Linear(width, width, init=_INIT)
        self.linear1 = Linear(width, width, init=_INIT)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = F.layer_norm(x, (self.width,))
        h = F.silu(self.linear0(torch.addcmul(shift, h, scale + 1)))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return x + self.linear1(h)
