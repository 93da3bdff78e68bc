"""The U-Nets against the official networks: outputs of small ones, names and shapes of the published ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nets.official import OFFICIAL, count, golden, translate
from tests.nets.small import ARCHITECTURES, batch, make

from consistency.nets.adm import DhariwalUNet
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import build_denoiser, init_denoiser, student_from_teacher
from consistency.nets.layers import UNetBlock
from consistency.nets.songunet import SongUNet

SMALL = ARCHITECTURES["ddpmpp"]


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond", "adm_cond"])
def test_the_output_is_that_of_the_official_network(name: str) -> None:
    denoiser, data = golden(name)
    with torch.no_grad():
        denoised = denoiser(data["x"], data["sigma"], labels=data.get("labels"))
    torch.testing.assert_close(denoised, data["denoised"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ncsnpp_uncond", "adm_cond"])
def test_channels_last_gives_the_same_output_and_stays(name: str) -> None:
    denoiser, data = golden(name)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        x = data["x"].contiguous(memory_format=torch.channels_last)
        out = denoiser(x, data["sigma"], labels=data.get("labels"))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, data["denoised"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "edm-cifar10-32x32-uncond-vp",
        "edm-cifar10-32x32-cond-vp",
        "edm-cifar10-32x32-uncond-ve",
        "edm-ffhq-64x64-uncond-vp",
        "edm-imagenet-64x64-cond-adm",
    ],
)
def test_names_and_shapes_are_those_of_the_official_file(name: str) -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(translate(OFFICIAL[name]["init_kwargs"]))
    shapes = {key: list(value.shape) for key, value in denoiser.state_dict().items()}
    assert shapes == OFFICIAL[name]["shapes"]
    assert count(denoiser) == OFFICIAL[name]["parameters"]


def test_the_ctm_student_has_its_published_size() -> None:
    # CTM's CIFAR-10 student: the unconditional DDPM++ without augmentation labels, plus the second time.
    with torch.device("meta"):
        student = SongUNet(32, 3, 3, channel_mult=[2, 2, 2], second_time=True)
    assert count(student) == 55_733_891 - 9 * 128 + 4_662_528


def test_skip_encoder_and_decoder_run() -> None:
    skips = {"encoder_type": "skip", "decoder_type": "skip"}
    net = SongUNet(8, 1, 1, model_channels=16, channel_mult=(1, 2), num_blocks=1, **skips)
    assert {"8x8_aux_norm", "8x8_aux_conv", "8x8_aux_up", "4x4_aux_norm", "4x4_aux_conv"} <= set(net.dec)
    assert {"4x4_aux_down", "4x4_aux_skip"} <= set(net.enc)
    assert net(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_label_dropout_takes_whole_labels_at_its_rate_in_training_only(kind: str) -> None:
    denoiser = make(ARCHITECTURES[kind], label_dim=3, dropout=0.0, label_dropout=0.25)
    x, t = batch(denoiser, 1)
    images, labels = x.expand(1000, *x.shape[1:]), torch.full([1000], 2)
    with torch.no_grad():
        labelled, bare = denoiser(x, t, labels=labels[:1]), denoiser(x, t)
        assert not torch.equal(labelled, bare)
        torch.testing.assert_close(denoiser(images, t, labels=labels), labelled.expand_as(images), atol=1e-4, rtol=1e-4)
        found = denoiser.train()(images, t, labels=labels)
    dropped = ((found - bare).abs() < (found - labelled).abs()).flatten(1).float().mean(1) > 0.5
    expected = torch.where(dropped[:, None, None, None], bare, labelled)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)  # 5 standard errors


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_augment_labels_change_the_output(kind: str) -> None:
    denoiser = make(ARCHITECTURES[kind], augment_dim=9)
    x, t = batch(denoiser)
    plain = denoiser(x, t)
    torch.testing.assert_close(denoiser(x, t, augment_labels=torch.zeros(3, 9)), plain)
    assert (denoiser(x, t, augment_labels=torch.ones(3, 9)) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["embedding_type", "encoder_type", "decoder_type"])
def test_unknown_type_is_an_error(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {wrong} 'resnet'.*standard|positional"):
        SongUNet(8, 1, 1, **{wrong: "resnet"})  # type: ignore[arg-type]


def test_each_level_has_the_blocks_that_a_list_says() -> None:
    """GC's CelebA-64 network: 3, 3, 4, 5 blocks; the decoder has one more a level; only in0 attends."""
    with torch.device("meta"):
        net = SongUNet(64, 3, 3, channel_mult=[1, 2, 2, 2], num_blocks=[3, 3, 4, 5], attn_resolutions=[])
    for part, more in ((net.enc, 0), (net.dec, 1)):
        for size, number in zip([64, 32, 16, 8], [3, 3, 4, 5], strict=True):
            plain = [name for name in part if name.startswith(f"{size}x{size}_block")]
            assert plain == [f"{size}x{size}_block{k}" for k in range(number + more)]
    blocks = [*net.enc.items(), *net.dec.items()]
    assert [name for name, block in blocks if isinstance(block, UNetBlock) and block.num_heads] == ["8x8_in0"]


def test_a_block_more_at_one_level_is_its_parameters_more() -> None:
    """The lowest level of [1, 2] gets one block of 32 channels in the encoder, one of 64 to 32 in the decoder."""
    options: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "attn_resolutions": [], "dropout": 0.0}
    one, more = SongUNet(8, 1, 1, num_blocks=[1, 1], **options), SongUNet(8, 1, 1, num_blocks=[1, 2], **options)

    def block(channels_in: int, channels: int) -> int:
        norms = 2 * channels_in + 2 * channels
        convolutions = (9 * channels_in + 1) * channels + (9 * channels + 1) * channels
        skip = (channels_in + 1) * channels if channels_in != channels else 0
        return norms + convolutions + skip + (4 * 16 + 1) * channels

    # The skip connection that the new block makes widens nothing else: the next block had one of 32 channels too.
    assert count(more) - count(one) == block(32, 32) + block(64, 32)
    assert one.state_dict().keys() < more.state_dict().keys()


def test_a_list_of_equal_numbers_is_the_number() -> None:
    plain = init_denoiser({**SMALL, "num_blocks": 2, "dropout": 0.1}, 3)
    listed = init_denoiser({**SMALL, "num_blocks": [2, 2], "dropout": [0.1, 0.1]}, 3)
    assert list(plain.state_dict()) == list(listed.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 2.0])
    with torch.random.fork_rng():
        first = plain(x, t)
    assert torch.equal(listed(x, t), first)


def test_dropout_is_that_of_the_level() -> None:
    net = SongUNet(16, 1, 1, model_channels=16, channel_mult=[1, 1, 2], num_blocks=1, dropout=[0.0, 0.1, 0.2])
    blocks = [*net.enc.items(), *net.dec.items()]
    found = {(block.dropout, name.split("x")[0]) for name, block in blocks if isinstance(block, UNetBlock)}
    assert found == {(0.0, "16"), (0.1, "8"), (0.2, "4")}


def test_a_network_of_lists_trains_and_comes_back_from_its_file(tmp_path: Path) -> None:
    lists = {"channel_mult": [1, 2, 2], "num_blocks": [1, 2, 3], "dropout": [0.0, 0.1, 0.2], "attn_resolutions": []}
    net = init_denoiser({**SMALL, **lists}, 0).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    (net(torch.randn(2, 1, 8, 8), 0.5) - 1).square().sum().backward()
    gradients = {name: weight.grad for name, weight in net.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    optimizer.step()
    save_denoiser(tmp_path / "net.safetensors", net, {})
    again, _ = load_denoiser(tmp_path / "net.safetensors")
    assert {key: again.architecture[key] for key in lists} == lists
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(x, 0.3), net.eval()(x, 0.3))


def test_a_student_takes_its_teachers_blocks_and_a_dropout_of_its_own() -> None:
    teacher = init_denoiser({**SMALL, "num_blocks": [1, 2]}, 0).eval()
    student = student_from_teacher(teacher, dropout=[0.0, 0.4]).eval()
    assert student.architecture["num_blocks"] == [1, 2]
    assert student.architecture["dropout"] == [0.0, 0.4]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(student(x, 0.7, 0.2), teacher(x, 0.7))


@pytest.mark.parametrize(("key", "value"), [("num_blocks", [1, 2]), ("dropout", [0.1, 0.1, 0.1, 0.1])])
def test_a_list_that_is_not_as_long_as_the_levels_is_an_error(key: str, value: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"{key} lists {len(value)} levels and channel_mult 3"):
        SongUNet(8, 1, 1, model_channels=16, channel_mult=[1, 1, 1], **{key: value})


@pytest.mark.parametrize("network", [SongUNet, DhariwalUNet])
def test_resolution_that_cannot_be_halved_is_an_error(network: Callable[..., torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="28 cannot be halved 3 times"):
        network(28, 1, 1)
