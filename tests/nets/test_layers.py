"""Layers against their definitions."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from consistency.nets.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    attention,
    fused_attention,
)
from consistency.nets.mlp import MLP


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("mode", "variance"),
    [("xavier_uniform", 2 / (300 + 200)), ("kaiming_uniform", 1 / 300), ("kaiming_normal", 1 / 300)],
)
def test_initial_variance_is_the_rule_s(mode: str, variance: float) -> None:
    weight = Linear(300, 200, init=Init(mode, weight=2.0)).weight
    assert weight.var().item() == pytest.approx(4 * variance, rel=0.03)


def test_resampling_with_two_equal_taps_is_a_convolution_of_each_channel_with_them() -> None:
    x, taps = torch.randn(2, 5, 8, 8), torch.full((5, 1, 2, 2), 0.25)
    torch.testing.assert_close(Conv2d(5, 5, 0, down=True)(x), F.conv2d(x, taps, stride=2, groups=5))
    torch.testing.assert_close(Conv2d(5, 5, 0, up=True)(x), F.conv_transpose2d(x, 4 * taps, stride=2, groups=5))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_a_constant_image(taps: tuple[int, ...]) -> None:
    x = torch.ones(1, 4, 16, 16)
    up = Conv2d(4, 4, 0, up=True, resample_filter=taps)(x)
    down = Conv2d(4, 4, 0, down=True, resample_filter=taps)(x)
    assert up.shape[-1] == 32 and down.shape[-1] == 8
    torch.testing.assert_close(up[..., 2:-2, 2:-2], torch.ones(1, 4, 28, 28))
    torch.testing.assert_close(down[..., 1:-1, 1:-1], torch.ones(1, 4, 6, 6))


def test_fused_downsampling_is_the_convolution_then_the_filter() -> None:
    fused = Conv2d(3, 4, 3, down=True, resample_filter=(1, 3, 3, 1), fused_resample=True)
    assert fused.weight is not None and fused.resample_filter is not None
    x = torch.randn(2, 3, 16, 16)
    plain = F.conv2d(x, fused.weight, fused.bias, padding=1)
    filtered = F.conv2d(plain, fused.resample_filter.repeat(4, 1, 1, 1), stride=2, padding=1, groups=4)
    torch.testing.assert_close(fused(x)[..., 1:-1, 1:-1], filtered[..., 1:-1, 1:-1])


def test_fused_upsampling_is_an_error() -> None:
    with pytest.raises(ValueError, match="fused"):
        Conv2d(4, 4, 3, up=True, fused_resample=True)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (48, 12), (128, 32), (160, 32)])
def test_group_norm_normalises_its_groups(channels: int, groups: int) -> None:
    norm = GroupNorm(channels)
    y = norm(torch.randn(2, channels, 6, 6) * 3 + 1).reshape(2, groups, -1)
    assert norm.num_groups == groups
    torch.testing.assert_close(y.mean(2), torch.zeros(2, groups), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(2, unbiased=False), torch.ones(2, groups), atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [2, 11, 144])
def test_group_norm_refuses_channels_it_cannot_split(channels: int) -> None:
    with pytest.raises(ValueError, match=f"{channels} channels"):
        GroupNorm(channels)


def test_attention_is_scaled_dot_product_attention() -> None:
    q, k, v = torch.randn(3, 2, 8, 10).unbind(0)
    expected = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
    torch.testing.assert_close(attention(q, k, v), expected)


def test_attention_weights_are_float32_under_half_precision() -> None:
    q, k, v = (torch.randn(3, 2, 8, 10) * 4).to(torch.bfloat16).unbind(0)
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v), out)


def test_qkv_channels_are_laid_out_by_head_then_channel() -> None:
    """The published weights are so. The block's last convolution is zero at first: what is added is the attention."""
    block = UNetBlock(8, 8, 4, num_heads=2).eval()
    for weight in (block.qkv.weight, block.proj.weight):
        assert weight is not None
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 8, 3, 3)
    qkv = block.qkv(block.norm2(x)).reshape(2, 2, 4, 3, 9)
    heads = [attention(*(qkv[:, h, :, i] for i in range(3))) for h in range(2)]
    expected = x + block.proj(torch.cat(heads, dim=1).reshape(2, 8, 3, 3))
    torch.testing.assert_close(block(x, torch.randn(2, 4)), expected)


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="3 attention heads"):
        UNetBlock(8, 8, 4, num_heads=3)


def test_positional_embedding_has_its_end_frequencies() -> None:
    x = torch.tensor([0.7], dtype=torch.float64)
    cos, sin = PositionalEmbedding(8, endpoint=True)(x).chunk(2, dim=1)
    assert cos[0, 0].item() == pytest.approx(math.cos(0.7), abs=1e-12)
    assert sin[0, -1].item() == pytest.approx(math.sin(0.7e-4), abs=1e-12)
    assert PositionalEmbedding(8)(x)[0, -1].item() == pytest.approx(math.sin(0.7e-3), abs=1e-12)


def test_fourier_embedding_is_cosines_then_sines() -> None:
    embedding = FourierEmbedding(6)
    phase = 2 * math.pi * 0.3 * embedding.freqs[None]
    torch.testing.assert_close(embedding(torch.tensor([0.3])), torch.cat([phase.cos(), phase.sin()], 1))


@pytest.mark.parametrize(
    "make", [PositionalEmbedding, lambda number: MLP(1, 2, 2, embedding=number)], ids=["unet", "mlp"]
)
def test_odd_embedding_is_an_error(make: Callable[[int], object]) -> None:
    with pytest.raises(ValueError, match="even number"):
        make(7)


def test_fused_attention_is_the_plain_one() -> None:
    """Values and gradients are those that a GPU computes, here on the CPU."""
    q, k, v = (torch.randn(3, 8, 10, dtype=torch.float64, requires_grad=True) for _ in range(3))
    plain, fused = attention(q, k, v), fused_attention(q, k, v)
    torch.testing.assert_close(fused, plain)
    weight = torch.randn_like(plain)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (plain, fused)))


@pytest.mark.statistical
def test_group_normalisation_under_autocast_keeps_the_low_precision() -> None:
    """Its sums are float32's: the result is near the one in full precision."""
    norm, x = GroupNorm(32), 3 + torch.randn(2, 32, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), norm(x), rtol=0.02, atol=0.05)
