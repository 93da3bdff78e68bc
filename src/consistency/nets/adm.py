"""The U-Net ADM of Dhariwal and Nichol (2021), in the form and with the parameter names of EDM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.nets.layers import (
    ZERO_INIT,
    ConditionedNetwork,
    Conv2d,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from consistency.nets.songunet import decoder, encoder, levels_of, skip_widths

_INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
_CHANNELS_PER_HEAD = 64


class DhariwalUNet(ConditionedNetwork):
    """U-Net F(x, c_noise[, c_noise_s]) of EDM's ImageNet-64 model (Karras et al. 2022): ADM.

    Every block at the levels listed in attn_resolutions, and the first block of the decoder, has attention with
    one head per 64 channels, rounded down: below 64 channels there is none. label_dropout and second_time work as
    in SongUNet, except that the label's embedding is added after the two layers. noise_scale multiplies the noise
    labels before their sinusoidal embedding: 1 in EDM's network, 1000 in OpenAI's.

    Shapes: x [N,in_channels,R,R] -> [N,out_channels,R,R]; noise_labels and second_noise_labels [N] or [1],
    ln(t)/4 and ln(s)/4; class_labels [N or 1, label_dim], one-hot; augment_labels [N or 1, augment_dim].
    Raises ValueError for a resolution that cannot be halved often enough, and channels that group normalisation or
    the attention heads cannot split.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        noise_scale: float = 1.0,
        second_time: bool = False,
    ) -> None:
        super().__init__(label_dim, augment_dim, label_dropout, second_time)
        self.noise_scale = noise_scale
        geometry = img_resolution, model_channels, channel_mult, attn_resolutions
        levels = levels_of(*geometry, num_blocks, dropout, _CHANNELS_PER_HEAD)
        emb_channels = model_channels * channel_mult_emb
        self._build_mapping(model_channels, emb_channels)

        block = partial(UNetBlock, emb_channels=emb_channels, init=_INIT, second_time=second_time)
        first = levels[0].width
        self.enc = encoder(levels, block, partial(Conv2d, init=_INIT), in_channels, first)
        skips = skip_widths(self.enc)
        self.dec = decoder(levels, block, skips, in_heads=skips[-1] // _CHANNELS_PER_HEAD)
        self.out_norm = GroupNorm(first)
        self.out_conv = Conv2d(first, out_channels, 3, init=ZERO_INIT)

    def _build_mapping(self, noise_channels: int, emb_channels: int) -> None:
        self.map_noise = PositionalEmbedding(noise_channels)
        if self.augment_dim:
            self.map_augment = Linear(self.augment_dim, noise_channels, bias=False, init=ZERO_INIT)
        self.map_layer0 = Linear(noise_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)
        if self.label_dim:
            init = Init("kaiming_normal", weight=math.sqrt(self.label_dim))
            self.map_label = Linear(self.label_dim, emb_channels, bias=False, init=init)
        if self.second_time:
            self.map_layer0_s = Linear(noise_channels, emb_channels, init=_INIT)
            self.map_layer1_s = Linear(emb_channels, emb_channels, init=_INIT)

    def embed(
        self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, layer0: nn.Module, layer1: nn.Module
    ) -> Tensor:
        emb = self.map_noise(noise * self.noise_scale)
        if augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = layer1(F.silu(layer0(emb)))
        return F.silu(emb if labels is None else emb + labels)

    def body(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb, emb_s) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if layer.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb, emb_s)
        return self.out_conv(F.silu(self.out_norm(x)))
