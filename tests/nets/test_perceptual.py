"""LPIPS against its definition written out, on random VGG16 weights of the true shapes."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from tests.conftest import mistake
from tests.dangers import Call
from tests.draws import seeded
from torch import Tensor

from consistency.nets.perceptual import PerceptualDistance
from consistency.theory.distance import Distance

# torchvision's numbers of the convolutions before each of the five features
CONVOLUTIONS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
CHANNELS = [64, 128, 256, 512, 512]
LINEAR = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"

Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def vgg16() -> Weights:
    """Random convolutions that keep the size of what goes through them."""
    generator = seeded()
    weights, before = {}, 3
    for numbers, channels in zip(CONVOLUTIONS, CHANNELS, strict=True):
        for number in numbers:
            normal = torch.randn(channels, before, 3, 3, generator=generator)
            weights[f"features.{number}.weight"] = normal * (2 / (9 * before)) ** 0.5
            weights[f"features.{number}.bias"] = 0.1 * torch.randn(channels, generator=generator)
            before = channels
    return weights


@pytest.fixture(scope="session")
def path(vgg16: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(vgg16 | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="session")
def lpips(path: Path) -> Distance:
    return PerceptualDistance(path)


def pair(count: int = 2, channels: int = 3, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1]."""
    a, b = 2 * torch.rand(2, count, channels, size, size, generator=seeded(1)) - 1
    return a, b


def written_out(vgg16: Weights, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS as CTM calls it, on [0, 1]: sum over layers of the pixels' mean of w . (unit features' difference)^2."""
    linear = torch.load(LINEAR, map_location="cpu", weights_only=True)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    total = torch.zeros(len(a))
    x, y = ((F.interpolate(image, size=224, mode="bilinear") / 2 + 0.5 - mean) / deviation for image in (a, b))
    for layer, numbers in enumerate(CONVOLUTIONS):
        if layer:
            x, y = (0.25 * sum(v[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) for v in (x, y))
        for number in numbers:
            weight, bias = vgg16[f"features.{number}.weight"], vgg16[f"features.{number}.bias"]
            x, y = (F.conv2d(v, weight, bias, padding=1).clamp(min=0) for v in (x, y))
        unit_x, unit_y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
        weights = linear[f"lin{layer}.model.1.weight"].flatten()
        total += torch.einsum("c,nchw->n", weights, (unit_x - unit_y) ** 2) / (x.shape[2] * x.shape[3])
    return total


def test_the_distance_is_lpips_written_out(lpips: Distance, vgg16: Weights, no_network: None) -> None:
    a, b = pair()
    found = lpips(a, b)
    assert found.shape == (2,)
    torch.testing.assert_close(found, written_out(vgg16, a, b), rtol=1e-4, atol=0)


def test_the_distance_is_symmetric_positive_and_0_at_equality(lpips: Distance) -> None:
    a, b = pair()
    forth, back = lpips(a, b), lpips(b, a)
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=0)
    assert (forth > 0.01).all()
    assert torch.equal(lpips(a, a), torch.zeros(2))


def test_an_image_counts_for_itself(lpips: Distance) -> None:
    a, b = pair()
    torch.testing.assert_close(lpips(a[1:], b[1:])[0], lpips(a, b)[1], rtol=1e-4, atol=0)


def test_grey_images_are_repeated(lpips: Distance) -> None:
    a, b = pair(1, channels=1, size=8)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_images_of_256_pixels_are_not_resized(lpips: Distance) -> None:
    a, b = pair(1, size=256)
    resized = [F.interpolate(image, size=224, mode="bilinear") for image in (a, b)]
    assert lpips(a, b).item() != pytest.approx(lpips(*resized).item(), rel=1e-3)


@pytest.mark.slow
def test_the_gradient_is_the_difference_quotient(path: Path) -> None:
    distance = PerceptualDistance(path).double()
    a, b = (image.double() for image in pair(1, channels=1, size=8))
    assert torch.autograd.gradcheck(distance, (a.requires_grad_(), b), eps=1e-7, atol=1e-9, rtol=1e-5, fast_mode=True)
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_gradient_at_equality_is_finite(lpips: Distance) -> None:
    a, _ = pair(1)
    b = a.clone().requires_grad_()
    lpips(b, a).sum().backward()
    assert b.grad is not None
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_under_autocast_the_distance_is_float32_and_close(lpips: Distance) -> None:
    """VGG runs in the autocast's type: the result is not the one of float32."""
    a, b = pair(1)
    exact = lpips(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(a.bfloat16(), b.bfloat16())
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)


def test_making_it_draws_no_random_number_and_training_changes_nothing(path: Path) -> None:
    state = torch.random.get_rng_state()
    distance = PerceptualDistance(path).train()
    a, b = pair(1, size=8)
    assert torch.equal(distance(a, b), distance(a, b))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_linear_layers_are_the_official_ones() -> None:
    """Version 0.1 of the authors' repository, lpips/weights/v0.1/vgg.pth."""
    content = LINEAR.read_bytes()
    assert hashlib.md5(content).hexdigest() == "d507d7349b931f0638a25a48a722f98a"
    assert hashlib.sha256(content).hexdigest() == "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.28.bias": None}, r"features\.28\.bias is not a \[512\] tensor"),
        ({"features.0.weight": torch.zeros(64, 1, 3, 3)}, r"features\.0\.weight is not a \[64, 3, 3, 3\] tensor"),
        ({"features.0.bias": torch.full((64,), torch.nan)}, r"features\.0\.bias has values that are not finite"),
        ({"features.0.bias": torch.zeros(64, dtype=torch.int64)}, r"features\.0\.bias has values that are not finite"),
        ({"features.0.bias": Call(Path.touch, Path("harm"))}, "is not a file of VGG16 weights"),
    ],
)
def test_other_tensors_are_refused(
    vgg16: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(vgg16 | change, tmp_path / "other.pth")
    assert re.search(message, mistake(PerceptualDistance, tmp_path / "other.pth"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x02.", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    assert "is not a file of VGG16 weights" in mistake(PerceptualDistance, tmp_path / "other.pth")


def test_a_list_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "other.pth")
    assert "holds no state dict" in mistake(PerceptualDistance, tmp_path / "other.pth")
