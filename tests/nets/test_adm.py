"""DhariwalUNet's own: heads, first output, labels; test_songunet.py holds both U-Nets against the official networks."""

import torch
from tests.nets.small import ARCHITECTURES, batch, make

from consistency.nets.adm import DhariwalUNet
from consistency.nets.layers import UNetBlock


def test_attention_has_the_heads_of_the_official_network() -> None:
    with torch.device("meta"):
        net = DhariwalUNet(64, 3, 3, label_dim=1000)
    blocks = [block for block in [*net.enc.values(), *net.dec.values()] if isinstance(block, UNetBlock)]
    assert {(b.out_channels, b.num_heads) for b in blocks} == {
        *((192, 0), (384, 0), (576, 0), (768, 0)),  # 64x64, and every resampling block
        *((384, 6), (576, 9), (768, 12)),
    }
    assert sum(block.num_heads > 0 for block in blocks) == 3 * 3 + 1 + 3 * 4


def test_the_network_starts_at_zero() -> None:
    net = DhariwalUNet(8, 1, 1, model_channels=16, channel_mult=(1,), num_blocks=1)
    assert not net(torch.randn(2, 1, 8, 8), torch.zeros(2)).any()


def test_the_label_enters_the_embedding_of_s_as_that_of_t() -> None:
    student = make(ARCHITECTURES["adm"], label_dim=3, second_time=True)
    for name, weight in student.named_parameters():
        if ".affine." in name:  # all that comes through t's embedding
            weight.data.zero_()
    x, t = batch(student)
    first, second = (student(x, t, t / 2, torch.full([3], c)) for c in (0, 1))
    assert (first - second).abs().max() > 1e-4
