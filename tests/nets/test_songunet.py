"""SongUNet against the official networks: outputs of small ones, names and shapes of the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nets.official import OFFICIAL, count, golden, translate

from consistency.nets.denoiser import build_denoiser
from consistency.nets.songunet import SongUNet

CIFAR_VE: dict[str, Any] = {
    "img_resolution": 32,
    "in_channels": 3,
    "out_channels": 3,
    "augment_dim": 9,
    "channel_mult": [2, 2, 2],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond"])
def test_output_of_the_official_network(name: str) -> None:
    denoiser, data = golden(name)
    with torch.no_grad():
        denoised = denoiser(data["x"], data["sigma"], labels=data.get("labels"))
    torch.testing.assert_close(denoised, data["denoised"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ncsnpp_uncond"])
def test_channels_last_gives_the_same_output_and_stays(name: str) -> None:
    denoiser, data = golden(name)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        out = denoiser(data["x"].contiguous(memory_format=torch.channels_last), data["sigma"])
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, data["denoised"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "edm-cifar10-32x32-uncond-vp",
        "edm-cifar10-32x32-cond-vp",
        "edm-cifar10-32x32-uncond-ve",
        "edm-ffhq-64x64-uncond-vp",
    ],
)
def test_names_and_shapes_of_the_official_file(name: str) -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(translate(OFFICIAL[name]["init_kwargs"]))
    shapes = {key: list(value.shape) for key, value in denoiser.state_dict().items()}
    assert shapes == OFFICIAL[name]["shapes"]
    assert count(denoiser) == OFFICIAL[name]["parameters"]


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [
        ({"label_dim": 10}, 56_400_643, 423),
        ({"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 62_761_091, 547),
    ],
    ids=["cifar10-cond-ve", "ffhq-uncond-ve"],
)
def test_size_of_the_official_ncsnpp(changes: dict[str, Any], parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        net = SongUNet(**{**CIFAR_VE, **changes})
    assert (count(net), len(list(net.parameters()))) == (parameters, tensors)


def test_size_of_the_ctm_student() -> None:
    # CTM's CIFAR-10 student: the unconditional DDPM++ without augmentation labels, plus the second time.
    with torch.device("meta"):
        student = SongUNet(32, 3, 3, channel_mult=[2, 2, 2], second_time=True)
    assert count(student) == 55_733_891 - 9 * 128 + 4_662_528


def test_skip_encoder_and_decoder_run() -> None:
    net = SongUNet(
        8,
        1,
        1,
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        encoder_type="skip",
        decoder_type="skip",
    )
    assert {"8x8_aux_norm", "8x8_aux_conv", "8x8_aux_up", "4x4_aux_norm", "4x4_aux_conv"} <= set(net.dec)
    assert {"4x4_aux_down", "4x4_aux_skip"} <= set(net.enc)
    assert net(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


def test_label_dropout_zeroes_labels_in_training_only() -> None:
    torch.manual_seed(0)
    net = SongUNet(
        8, 1, 1, label_dim=4, model_channels=16, channel_mult=(1,), num_blocks=1, dropout=0, label_dropout=1.0
    )
    x, noise, labels = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.eye(4)[:2]
    assert torch.equal(net(x, noise, labels), net(x, noise))
    net.eval()
    assert not torch.equal(net(x, noise, labels), net(x, noise))


def test_augment_labels_change_the_output() -> None:
    denoiser, data = golden("ddpmpp_uncond")
    plain = denoiser(data["x"], data["sigma"])
    zeros = denoiser(data["x"], data["sigma"], augment_labels=torch.zeros(3, 9))
    torch.testing.assert_close(zeros, plain)
    ones = denoiser(data["x"], data["sigma"], augment_labels=torch.ones(3, 9))
    assert (ones - plain).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["embedding_type", "encoder_type", "decoder_type"])
def test_unknown_type_is_an_error(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {wrong} 'resnet'.*standard|positional"):
        SongUNet(8, 1, 1, **{wrong: "resnet"})  # type: ignore[arg-type]


def test_resolution_that_cannot_be_halved_is_an_error() -> None:
    with pytest.raises(ValueError, match="28 cannot be halved 3 times"):
        SongUNet(28, 1, 1)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("class_labels", "label_dim"),
        ("augment_labels", "augment_dim"),
        ("second_noise_labels", "second_time"),
    ],
)
def test_condition_the_network_lacks_is_an_error(condition: str, message: str) -> None:
    net = SongUNet(8, 1, 1, model_channels=16, channel_mult=(1,), num_blocks=1)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1), **{condition: torch.zeros(1)})
