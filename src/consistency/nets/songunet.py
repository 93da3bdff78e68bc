"""The U-Nets DDPM++ and NCSN++ of Song et al. (2021), in the form and with the parameter names of EDM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.nets.layers import (
    ConditionedNetwork,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)

Number = TypeVar("Number", int, float)

_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))
_EPS = 1e-6
_CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(ConditionedNetwork):
    """U-Net F(x, c_noise[, c_noise_s]) of EDM (Karras et al. 2022): DDPM++ by default, NCSN++ by its options.

    NCSN++ is embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
    resample_filter=(1, 3, 3, 1). Levels listed in attn_resolutions have one-head attention; the first block
    of the decoder always has it. num_blocks and dropout are one number, or a list with one per level of
    channel_mult, from full resolution down (Issenhuth et al. 2025); a level's dropout applies to all its blocks,
    resampling ones included. label_dropout is the probability of zeroing a label during training.
    With second_time the network also takes the end time s of a jump, embedded like t but through its own
    map_layer0_s and map_layer1_s, and added in every block by affine_s, which starts at zero.

    Shapes: x [N,in_channels,R,R] -> [N,out_channels,R,R]; noise_labels and second_noise_labels [N] or [1],
    ln(t)/4 and ln(s)/4; class_labels [N or 1, label_dim], one-hot; augment_labels [N or 1, augment_dim].
    Raises ValueError for unknown types, a list not as long as channel_mult, a resolution that cannot be halved
    often enough, and channels that group normalisation cannot split.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int | Sequence[int] = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float | Sequence[float] = 0.1,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        second_time: bool = False,
    ) -> None:
        super().__init__(label_dim, augment_dim, label_dropout, second_time, math.sqrt(label_dim))
        _check_choices(embedding_type=embedding_type, encoder_type=encoder_type, decoder_type=decoder_type)
        levels = levels_of(img_resolution, model_channels, channel_mult, attn_resolutions, num_blocks, dropout)
        emb_channels = model_channels * channel_mult_emb
        self._build_mapping(model_channels * channel_mult_noise, emb_channels, embedding_type)

        conv = partial(Conv2d, resample_filter=resample_filter, init=_INIT)
        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            skip_scale=math.sqrt(0.5),
            eps=_EPS,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init=_INIT,
            init_zero=_INIT_ZERO,
            init_attn=_INIT_ATTN,
            second_time=second_time,
        )
        self.enc = encoder(levels, block, conv, in_channels, model_channels, encoder_type)

        def add_image(dec: nn.ModuleDict, level: Level) -> None:
            if decoder_type == "skip" and level is not levels[-1]:
                dec[level.name("aux_up")] = conv(out_channels, out_channels, 0, up=True)
            if decoder_type == "skip" or level is levels[0]:
                dec[level.name("aux_norm")] = GroupNorm(level.width, _EPS)
                dec[level.name("aux_conv")] = conv(level.width, out_channels, 3, init=_INIT_ZERO)

        self.dec = decoder(levels, block, skip_widths(self.enc), 1, attend_last=True, finish=add_image)

    def _build_mapping(self, noise_channels: int, emb_channels: int, embedding_type: str) -> None:
        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        if self.label_dim:
            self.map_label = Linear(self.label_dim, noise_channels, init=_INIT)
        if self.augment_dim:
            self.map_augment = Linear(self.augment_dim, noise_channels, bias=False, init=_INIT)
        self.map_layer0 = Linear(noise_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)
        if self.second_time:
            self.map_layer0_s = Linear(noise_channels, emb_channels, init=_INIT)
            self.map_layer1_s = Linear(emb_channels, emb_channels, init=_INIT)

    def embed(
        self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, layer0: nn.Module, layer1: nn.Module
    ) -> Tensor:
        cos, sin = self.map_noise(noise).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # the published weights expect sines first
        emb = emb if labels is None else emb + labels
        if augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        return F.silu(layer1(F.silu(layer0(emb))))

    def body(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        x, skips = self._encode(x, emb, emb_s)
        return self._decode(x, skips, emb, emb_s)

    def _encode(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb, emb_s) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor, emb_s: Tensor | None) -> Tensor:
        image: Tensor | None = None
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                if layer.in_channels != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb, emb_s)
            elif name.endswith("aux_norm"):
                normed = layer(x)
            elif name.endswith("aux_conv"):
                detail = layer(F.silu(normed))
                image = detail if image is None else image + detail
            elif image is not None:
                image = layer(image)
        assert image is not None
        return image


class Level(NamedTuple):
    """One resolution of a U-Net. size: side in pixels; width: channels; num_heads: attention heads (0: none);
    num_blocks: blocks in the encoder (the decoder has one more); dropout: that of all of them."""

    size: int
    width: int
    num_heads: int
    num_blocks: int
    dropout: float

    def name(self, part: str) -> str:
        """Return the published name of a part of this level, such as 32x32_block0."""
        return f"{self.size}x{self.size}_{part}"


def _per_level(name: str, value: Number | Sequence[Number], levels: int) -> list[Number]:
    """Return a value per level: those of a list, or the one number. Raises ValueError for a wrong length."""
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name} lists {len(values)} levels and channel_mult {levels}: give one per level, or one")
    return values


def levels_of(
    img_resolution: int,
    model_channels: int,
    channel_mult: Sequence[int],
    attn_resolutions: Sequence[int],
    num_blocks: int | Sequence[int],
    dropout: float | Sequence[float],
    channels_per_head: int | None = None,
) -> list[Level]:
    """Return the levels from full resolution down. channels_per_head: None for one attention head.

    Raises ValueError if the resolution cannot be halved between all levels, or a list is not as long as channel_mult.
    """
    count = len(channel_mult)
    if img_resolution % 2 ** (count - 1):
        raise ValueError(
            f"img_resolution {img_resolution} cannot be halved {count - 1} times: "
            "shorten channel_mult or pad the images"
        )
    levels = []
    parts = channel_mult, _per_level("num_blocks", num_blocks, count), _per_level("dropout", dropout, count)
    for depth, (mult, blocks, drop) in enumerate(zip(*parts, strict=True)):
        size, width = img_resolution >> depth, model_channels * mult
        heads = width // channels_per_head if channels_per_head else 1
        levels.append(Level(size, width, heads if size in attn_resolutions else 0, blocks, drop))
    return levels


def encoder(
    levels: Sequence[Level],
    block: Callable[..., UNetBlock],
    conv: Callable[..., Conv2d],
    in_channels: int,
    model_channels: int,
    encoder_type: str = "standard",
) -> nn.ModuleDict:
    """Build the encoder under its published names, `model_channels` wide after the first convolution."""
    enc = nn.ModuleDict({levels[0].name("conv"): conv(in_channels, model_channels, 3)})
    channels, aux_channels = model_channels, in_channels
    for depth, level in enumerate(levels):
        here = partial(block, dropout=level.dropout)
        if depth:
            enc[level.name("down")] = here(channels, channels, down=True)
        if depth and encoder_type == "skip":
            enc[level.name("aux_down")] = conv(aux_channels, aux_channels, 0, down=True)
            enc[level.name("aux_skip")] = conv(aux_channels, channels, 1)
        if depth and encoder_type == "residual":
            enc[level.name("aux_residual")] = conv(aux_channels, channels, 3, down=True, fused_resample=True)
            aux_channels = channels
        for i in range(level.num_blocks):
            enc[level.name(f"block{i}")] = here(channels, level.width, num_heads=level.num_heads)
            channels = level.width
    return enc


def skip_widths(enc: nn.ModuleDict) -> list[int]:
    """Return the channels of every activation that the encoder passes to the decoder, in order."""
    layers = [layer for name, layer in enc.items() if "aux" not in name]
    return [layer.out_channels for layer in layers if isinstance(layer, Conv2d | UNetBlock)]


def decoder(
    levels: Sequence[Level],
    block: Callable[..., UNetBlock],
    skips: list[int],
    in_heads: int,
    attend_last: bool = False,
    finish: Callable[[nn.ModuleDict, Level], None] | None = None,
) -> nn.ModuleDict:
    """Build the decoder under its published names. in_heads: attention heads of its first block; attend_last: only the
    last block of a level has attention; finish: adds layers after a level's blocks."""
    dec = nn.ModuleDict()
    channels = skips[-1]
    for level in reversed(levels):
        here = partial(block, dropout=level.dropout)
        if level is levels[-1]:
            dec[level.name("in0")] = here(channels, channels, num_heads=in_heads)
            dec[level.name("in1")] = here(channels, channels)
        else:
            dec[level.name("up")] = here(channels, channels, up=True)
        for i in range(level.num_blocks + 1):
            num_heads = level.num_heads if i == level.num_blocks or not attend_last else 0
            dec[level.name(f"block{i}")] = here(channels + skips.pop(), level.width, num_heads=num_heads)
            channels = level.width
        if finish:
            finish(dec, level)
    return dec


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"unknown {name} {value!r}; choose one of {_CHOICES[name]}")
