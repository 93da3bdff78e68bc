"""DhariwalUNet against the official network: output of a small one, names and shapes of the published one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nets.conftest import ARCHITECTURES
from tests.nets.official import OFFICIAL, count, golden, translate
from torch import Tensor

from consistency.nets.adm import DhariwalUNet
from consistency.nets.denoiser import Denoiser, build_denoiser, student_from_teacher
from consistency.nets.layers import UNetBlock

Make = Callable[..., Denoiser]
Batch = Callable[..., tuple[Tensor, Tensor]]
IMAGENET = "edm-imagenet-64x64-cond-adm"
SMALL: dict[str, Any] = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1}


def test_output_of_the_official_network() -> None:
    denoiser, data = golden("adm_cond")
    with torch.no_grad():
        denoised = denoiser(data["x"], data["sigma"], labels=data["labels"])
    torch.testing.assert_close(denoised, data["denoised"], atol=1e-5, rtol=1e-5)


def test_channels_last_gives_the_same_output_and_stays() -> None:
    denoiser, data = golden("adm_cond")
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        out = denoiser(data["x"].contiguous(memory_format=torch.channels_last), data["sigma"], labels=data["labels"])
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, data["denoised"], atol=1e-5, rtol=1e-5)


def test_names_and_shapes_of_the_official_file() -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(translate(OFFICIAL[IMAGENET]["init_kwargs"]))
    shapes = {key: list(value.shape) for key, value in denoiser.state_dict().items()}
    assert shapes == OFFICIAL[IMAGENET]["shapes"]
    assert count(denoiser) == OFFICIAL[IMAGENET]["parameters"] == 295_899_267


def test_heads_of_the_official_network() -> None:
    with torch.device("meta"):
        net = DhariwalUNet(64, 3, 3, label_dim=1000)
    blocks = [block for block in [*net.enc.values(), *net.dec.values()] if isinstance(block, UNetBlock)]
    assert {(b.out_channels, b.num_heads) for b in blocks} == {
        *((192, 0), (384, 0), (576, 0), (768, 0)),  # 64x64, and every resampling block
        *((384, 6), (576, 9), (768, 12)),
    }
    assert sum(block.num_heads > 0 for block in blocks) == 3 * 3 + 1 + 3 * 4


def test_starts_at_zero() -> None:
    assert not DhariwalUNet(8, 1, 1, **SMALL)(torch.randn(2, 1, 8, 8), torch.zeros(2)).any()


def test_student_takes_no_augmentation_and_equals_its_teacher(make: Make, batch: Batch) -> None:
    teacher = make(ARCHITECTURES["adm"], augment_dim=9, label_dim=3)
    student = student_from_teacher(teacher, seed=2).eval()
    assert "model.map_augment.weight" in teacher.state_dict()
    assert "model.map_augment.weight" not in student.state_dict()
    x, t = batch(teacher)
    labels = torch.tensor([2, 0, 1])
    assert torch.equal(student(x, t, t / 3, labels), teacher(x, t, labels=labels))


def test_the_label_enters_the_embedding_of_s_as_that_of_t(make: Make, batch: Batch) -> None:
    student = make(ARCHITECTURES["adm"], label_dim=3, second_time=True)
    for name, weight in student.named_parameters():
        if ".affine." in name:  # all that comes through t's embedding
            weight.data.zero_()
    x, t = batch(student)
    first, second = (student(x, t, t / 2, torch.full([3], c)) for c in (0, 1))
    assert (first - second).abs().max() > 1e-4


def test_label_dropout_zeroes_labels_in_training_only(make: Make, batch: Batch) -> None:
    denoiser = make(ARCHITECTURES["adm"], label_dim=3, dropout=0.0, label_dropout=1.0)
    x, t = batch(denoiser)
    labels = torch.tensor([2, 0, 1])
    denoiser.train()
    assert torch.equal(denoiser(x, t, labels=labels), denoiser(x, t))
    denoiser.eval()
    assert not torch.equal(denoiser(x, t, labels=labels), denoiser(x, t))


def test_augment_labels_change_the_output(make: Make, batch: Batch) -> None:
    denoiser = make(ARCHITECTURES["adm"], augment_dim=9)
    x, t = batch(denoiser)
    plain = denoiser(x, t)
    torch.testing.assert_close(denoiser(x, t, augment_labels=torch.zeros(3, 9)), plain)
    assert (denoiser(x, t, augment_labels=torch.ones(3, 9)) - plain).abs().max() > 1e-3


def test_resolution_that_cannot_be_halved_is_an_error() -> None:
    with pytest.raises(ValueError, match="28 cannot be halved 3 times"):
        DhariwalUNet(28, 1, 1)


@pytest.mark.parametrize(
    ("condition", "message"),
    [("class_labels", "label_dim"), ("augment_labels", "augment_dim"), ("second_noise_labels", "second_time")],
)
def test_condition_the_network_lacks_is_an_error(condition: str, message: str) -> None:
    net = DhariwalUNet(8, 1, 1, **SMALL)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1), **{condition: torch.zeros(1)})
