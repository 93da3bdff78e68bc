"""OpenAI's teacher: a state dict of their names and shapes gives the function that their published U-Net computes.

The reference below is written from that definition (openai/consistency_models, cm/unet.py), in plain float64.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import mistake
from tests.dangers import Call
from tests.draws import seeded
from torch import Tensor

from consistency.nets.denoiser import build_denoiser, student_from_teacher
from consistency.nets.official import OPENAI, official_architecture
from consistency.nets.openai import openai_names, read_openai

State = dict[str, Tensor]
#: three levels, so that the middle ones both begin and end with resampling; 32 groups of 4 channels and more
WIDTH, MULT, BLOCKS, ATTENTION, CLASSES = 128, (1, 1, 2), 2, (4, 2), 5
SMALL = {"network": "adm", "img_resolution": 8, "img_channels": 3, "label_dim": CLASSES, "model_channels": WIDTH}
SMALL |= {"channel_mult": list(MULT), "num_blocks": BLOCKS, "attn_resolutions": list(ATTENTION), "noise_scale": 1000.0}


def shapes(
    size: int, width: int, mult: tuple[int, ...], blocks: int, attention: tuple[int, ...], classes: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the definition with resblock_updown, scale-shift norm and classes."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def block(name: str, channels: int, out: int) -> None:
        layer(f"{name}.in_layers.0", channels)
        layer(f"{name}.in_layers.2", out, channels, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out, 4 * width)
        layer(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if channels != out:
            layer(f"{name}.skip_connection", out, channels, 1, 1)

    def attend(name: str, channels: int) -> None:
        layer(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1, 1)
        layer(f"{name}.proj_out", channels, channels, 1, 1)

    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    found["label_emb.weight"] = (classes, 4 * width)
    channels, count, stack = width * mult[0], 1, [width * mult[0]]
    layer("input_blocks.0.0", channels, 3, 3, 3)
    for level, times in enumerate(mult):
        for _ in range(blocks):
            block(f"input_blocks.{count}.0", channels, width * times)
            channels = width * times
            if size >> level in attention:
                attend(f"input_blocks.{count}.1", channels)
            stack.append(channels)
            count += 1
        if level < len(mult) - 1:
            block(f"input_blocks.{count}.0", channels, channels)
            stack.append(channels)
            count += 1
    block("middle_block.0", channels, channels)
    attend("middle_block.1", channels)
    block("middle_block.2", channels, channels)
    count = 0
    for level, times in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            block(f"output_blocks.{count}.0", channels + stack.pop(), width * times)
            channels, place = width * times, 1
            if size >> level in attention:
                attend(f"output_blocks.{count}.1", channels)
                place = 2
            if level and i == blocks:
                block(f"output_blocks.{count}.{place}", channels, channels)
            count += 1
    layer("out.0", channels)
    layer("out.2", 3, width * mult[0], 3, 3)
    return found


def reference(state: State, x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
    """The denoiser D(x, sigma) with sigma_data 0.5, of a state dict with those names."""
    w = {name: value.double() for name, value in state.items()}

    def same(h: Tensor) -> Tensor:
        return h

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(name: str, h: Tensor) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def block(name: str, h: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
        inner = conv(f"{name}.in_layers.2", resample(F.silu(norm(f"{name}.in_layers.0", h))))
        scale, shift = linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        h = resample(h)
        if f"{name}.skip_connection.weight" in w:
            h = conv(f"{name}.skip_connection", h)
        return h + conv(f"{name}.out_layers.3", F.silu(inner))

    def attend(name: str, h: Tensor) -> Tensor:
        n, c, height, width = h.shape
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm", h)).view(n, 3, c // 64, 64, height * width)
        q, k, v = qkv.unbind(1)
        weights = torch.softmax(torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(64), dim=-1)
        return h + conv(f"{name}.proj_out", torch.einsum("nhts,nhcs->nhct", weights, v).reshape(h.shape))

    def group(name: str, h: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the members of a group; resample: of its last block."""
        members = sorted({int(key.split(".")[len(name.split("."))]) for key in w if key.startswith(f"{name}.")})
        for k in members:
            if f"{name}.{k}.qkv.weight" in w:
                h = attend(f"{name}.{k}", h)
            elif f"{name}.{k}.weight" in w:
                h = conv(f"{name}.{k}", h)
            else:
                h = block(f"{name}.{k}", h, resample if k == members[-1] else same)
        return h

    def double(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    spread = sigma.square() + 0.25
    freqs = torch.exp(-math.log(10_000) * torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
    phase = (1000 * 0.25 * sigma.log())[:, None] * freqs
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", torch.cat([phase.cos(), phase.sin()], dim=1))))
    emb = emb + w["label_emb.weight"][classes]
    h, stack = x / spread.sqrt()[:, None, None, None], []
    for i in range((BLOCKS + 1) * len(MULT)):
        down = i > 0 and i % (BLOCKS + 1) == 0
        h = group(f"input_blocks.{i}", h, (lambda h: F.avg_pool2d(h, 2)) if down else same)
        stack.append(h)
    h = group("middle_block", h, same)
    for i in range((BLOCKS + 1) * len(MULT)):
        up = i % (BLOCKS + 1) == BLOCKS and i < (BLOCKS + 1) * (len(MULT) - 1)
        h = group(f"output_blocks.{i}", torch.cat([h, stack.pop()], dim=1), double if up else same)
    raw = conv("out.2", F.silu(norm("out.0", h)))
    return (0.25 / spread)[:, None, None, None] * x + (0.5 * sigma / spread.sqrt())[:, None, None, None] * raw


@pytest.fixture
def state() -> State:
    generator = seeded()

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
        return scale * torch.randn(shape, generator=generator) + (name.split(".")[-2:] in (["0", "weight"],))

    return {name: draw(name, shape) for name, shape in shapes(8, WIDTH, MULT, BLOCKS, ATTENTION, CLASSES).items()}


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    torch.save(state, tmp_path / OPENAI)
    return tmp_path / OPENAI


def test_the_outputs_are_those_of_the_published_definition(file: Path, state: State) -> None:
    denoiser = read_openai(file, SMALL)
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
    x = torch.randn(4, 3, 8, 8, generator=seeded(1), dtype=torch.float64)
    sigma, classes = torch.tensor([0.002, 0.3, 4.0, 80.0], dtype=torch.float64), torch.tensor([0, 4, 2, 2])
    wanted = reference(state, x, sigma, classes)
    torch.testing.assert_close(denoiser(x, sigma, labels=classes), wanted, rtol=0, atol=1e-10)
    student = student_from_teacher(denoiser).eval()
    torch.testing.assert_close(student(x, sigma, sigma / 2, classes), wanted, rtol=0, atol=1e-10)


def test_the_full_network_has_the_definitions_names_and_shapes() -> None:
    wanted = shapes(64, 192, (1, 2, 3, 4), 3, (32, 16, 8), 1000)
    with torch.device("meta"):
        denoiser = build_denoiser(official_architecture(OPENAI))
    names = openai_names(denoiser)
    assert sorted(names.values()) == sorted(wanted)
    assert sum(map(math.prod, wanted.values())) == 295_899_267
    for ours, parameter in denoiser.named_parameters():
        shape = wanted[names[ours]]
        assert tuple(parameter.shape) == (shape[::-1] if names[ours] == "label_emb.weight" else shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("out.2.bias"), r"1 of \d+ tensors differ, first 'out.2.bias': the file has none, the network"),
        (
            lambda s: s.update({"label_emb.weight": torch.zeros(6, 512), "extra": torch.zeros(1)}),
            r"2 of \d+ tensors differ, first 'extra': the file has \[1\], the network none",
        ),
        (lambda s: s["out.2.bias"].fill_(float("nan")), "holds NaN or infinity in model.out_conv.bias"),
        (lambda s: s.update(step=3), "holds something else than a state dict of tensors"),
        (lambda s: s.update(code=Call(Path.touch, Path("sprung"))), r"is not a whole state dict \(UnpicklingError\)"),
    ],
    ids=["missing", "shape", "nan", "no tensor", "code"],
)
def test_any_other_file_is_refused(
    file: Path, state: State, change: Callable[[State], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    change(state)
    torch.save(state, file)
    found = mistake(read_openai, file, SMALL)
    assert re.search(message, found) and found.endswith(f"download {OPENAI} again")
    assert not Path("sprung").exists()


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert "is not a whole state dict" in mistake(read_openai, file, SMALL)
