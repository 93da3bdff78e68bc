"""The dataset stage: pixels exactly as Pillow makes them, in sorted order, and errors that name the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.stages.dataset import make_dataset
from consistency.study import Study
from consistency.training.data import ImageData, load_images, to_signed

Tiny = Callable[..., Study]
Make = Callable[..., ImageData]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An empty image folder <tmp>/images/train."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def make(tiny: Tiny, tmp_path: Path) -> Make:
    """make(channels=3, ...): runs the stage on the image folder and loads what it wrote."""

    def run(**settings: Any) -> ImageData:
        path = str(tmp_path / "images")
        dataset = {"kind": "image_folder", "path": path, "resolution": 8, "channels": 3, **settings}
        study = tiny({"dataset": dataset})
        layout = Layout(study.name, tmp_path / "results")
        make_dataset(study, layout)
        return load_images(layout.dataset)

    return run


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# --- the digits


def test_digits_are_the_1797_images_of_scikit_learn(tiny: Tiny, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    study = tiny({"dataset": {"kind": "digits", "resolution": 8, "channels": 1}})
    layout = Layout(study.name, tmp_path)
    make_dataset(study, layout)
    data, digits = load_images(layout.dataset), load_digits()
    assert data.images.shape == (1797, 8, 8, 1)
    assert np.array_equal(data.labels, digits.target)
    assert np.array_equal(np.round(data.images[..., 0] / 255 * 16), digits.images)
    assert data.images.min() == 0
    assert data.images.max() == 255
    assert data.facts["class_counts"] == np.bincount(digits.target).tolist()
    assert data.facts["classes"] == list("0123456789")
    images, _ = data.take(np.arange(1797))
    assert data.facts["sigma_data"] == pytest.approx(images.double().std(correction=0).item(), rel=1e-6)


def test_a_limit_takes_the_first_of_each_class(first_results: Layout) -> None:
    from sklearn.datasets import load_digits

    data, target = load_images(first_results.dataset), load_digits().target
    assert data.facts["class_counts"] == [20] * 10
    rows = np.sort(np.concatenate([np.flatnonzero(target == k)[:20] for k in range(10)]))
    assert np.array_equal(data.labels, target[rows])


def test_the_same_study_makes_the_same_bytes(first_results: Layout, tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout("tiny", tmp_path)
    make_dataset(tiny(), layout)
    for name in ("images.npy", "labels.npy", "dataset.json"):
        assert (layout.dataset / name).read_bytes() == (first_results.dataset / name).read_bytes()
    card = json.loads((layout.dataset / "card.json").read_text())
    assert card["key"] == tiny().key("dataset")
    assert card["outputs"]["images.npy"] == json.loads((layout.dataset / "dataset.json").read_text())["sha256"]


# --- image folders


def test_images_come_in_sorted_order_with_their_folders_number(tree: Path, make: Make) -> None:
    pixels = {}
    for i, name in enumerate(["dog/2.png", "dog/10.png", "cat/z.png", "cat/deep/a.png", "ant/b.PNG"]):
        pixels[name] = noise(8, 8, seed=i)
        save(tree / name, pixels[name])
    (tree / "cat" / "notes.txt").write_text("no image")
    (tree / "readme.md").write_text("no class")
    data = make()
    order = ["ant/b.PNG", "cat/deep/a.png", "cat/z.png", "dog/10.png", "dog/2.png"]
    assert np.array_equal(data.images, np.stack([pixels[name] for name in order]))
    assert data.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.facts["classes"] == ["ant", "cat", "dog"]


def test_a_limit_is_for_each_folder(tree: Path, make: Make) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png"):
        save(tree / name, noise(8, 8))
    assert make(limit=2).labels.tolist() == [0, 0, 1]


def test_another_split_is_another_folder(tree: Path, make: Make) -> None:
    save(tree / "a/1.png", noise(8, 8, seed=1))
    save(tree.parent / "test" / "a/1.png", noise(8, 8, seed=2))
    assert np.array_equal(make(split="test").images[0], noise(8, 8, seed=2))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 31), (31, 20), (9, 8), (5, 6), (1, 1), (64, 64)])
def test_the_centred_square_is_resized_by_pillows_lanczos(tree: Path, make: Make, height: int, width: int) -> None:
    pixels = noise(height, width)
    save(tree / "a/1.png", pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(make().images[0], expected)


def test_an_image_of_the_right_size_is_kept_to_the_bit(tree: Path, make: Make) -> None:
    save(tree / "a/1.png", noise(8, 8))
    assert np.array_equal(make().images[0], noise(8, 8))


def test_a_jpeg_is_what_pillow_decodes(tree: Path, make: Make) -> None:
    for name in ("1.jpg", "2.jpeg", "3.JPG"):
        save(tree / "a" / name, noise(8, 8), quality=90)
    with Image.open(tree / "a/1.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(make().images, np.stack([expected] * 3))


def test_grey_images_become_colour_by_repetition(tree: Path, make: Make) -> None:
    grey = noise(8, 8, 1)
    save(tree / "a/1.png", grey)
    assert np.array_equal(make().images[0], np.repeat(grey[..., None], 3, 2))


def test_colour_images_become_grey_by_pillows_luma(tree: Path, make: Make) -> None:
    save(tree / "a/1.png", noise(8, 8))
    expected = np.asarray(Image.fromarray(noise(8, 8)).convert("L"))[..., None]
    assert np.array_equal(make(channels=1).images[0], expected)


def test_transparency_is_dropped(tree: Path, make: Make) -> None:
    save(tree / "a/1.png", noise(8, 8, 4))
    assert np.array_equal(make().images[0], noise(8, 8, 4)[..., :3])


def test_a_palette_is_looked_up(tree: Path, make: Make) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4], pixels[4:, :3], pixels[4:, 3:] = (255, 0, 0), (0, 128, 255), (7, 8, 9)
    image = Image.fromarray(pixels).quantize(3)
    assert image.mode == "P"
    (tree / "a").mkdir()
    image.save(tree / "a/1.png")
    assert np.array_equal(make().images[0], pixels)


def test_black_and_white_images_are_0_and_255(tree: Path, make: Make) -> None:
    (tree / "a").mkdir()
    Image.fromarray(noise(8, 8, 1) > 127).save(tree / "a/1.png")
    assert np.array_equal(make(channels=1).images[0, ..., 0], np.where(noise(8, 8, 1) > 127, 255, 0))


def test_sigma_data_is_the_standard_deviation_of_all_values(tree: Path, make: Make) -> None:
    for i in range(3):
        save(tree / f"a/{i}.png", noise(8, 8, seed=i) // (i + 1))
    data = make()
    assert data.facts["sigma_data"] == pytest.approx(float((data.images / 127.5 - 1).std()), rel=1e-9)
    import torch

    assert to_signed(torch.from_numpy(np.array(data.images))).std(correction=0).item() == pytest.approx(
        data.facts["sigma_data"], rel=1e-5
    )


# --- what cannot be read


def mistake(make: Make, tmp_path: Path, **settings: Any) -> str:
    """The message of a run that must fail: one line, and no half-written array."""
    with pytest.raises(UserError) as error:
        make(**settings)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "results").rglob("*images.npy*"))
    return str(error.value)


def test_a_missing_folder_is_named_with_the_key(make: Make, tmp_path: Path) -> None:
    message = mistake(make, tmp_path)
    assert "dataset.path: there is no folder" in message
    assert str(tmp_path / "images/train") in message


def test_a_folder_without_images_is_named(tree: Path, make: Make, tmp_path: Path) -> None:
    assert f"{tree} has no <class>/*.png or *.jpg" in mistake(make, tmp_path)
    save(tree / "no-class.png", noise(8, 8))
    (tree / "a").mkdir()
    (tree / "a" / "1.gif").write_bytes(b"GIF89a")
    assert f"{tree} has no <class>/*.png or *.jpg" in mistake(make, tmp_path)


@pytest.mark.parametrize("name", ["a/1.png", "a/1.jpg"])
@pytest.mark.parametrize("keep", [0, 10, 0.6])
def test_a_truncated_image_is_named(tree: Path, make: Make, tmp_path: Path, name: str, keep: float) -> None:
    save(tree / "a/0.png", noise(8, 8))
    path = save(tree / name, noise(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    assert f"{path} is not a readable image" in mistake(make, tmp_path)


@pytest.mark.parametrize(
    "content", [b"not an image", b"<html>404</html>", bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(99)]
)
def test_a_file_that_is_no_image_is_named(tree: Path, make: Make, tmp_path: Path, content: bytes) -> None:
    path = tree / "a/1.png"
    path.parent.mkdir()
    path.write_bytes(content)
    assert f"{path} is not a readable image" in mistake(make, tmp_path)


def test_16_bit_images_are_refused_rather_than_clipped(tree: Path, make: Make, tmp_path: Path) -> None:
    path = save(tree / "a/1.png", np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    for channels in (1, 3):
        assert f"{path} has more than 8 bits a channel" in mistake(make, tmp_path, channels=channels)


def test_a_failed_run_leaves_the_old_dataset(tree: Path, make: Make, tmp_path: Path) -> None:
    path = save(tree / "a/1.png", noise(8, 8))
    before = np.array(make().images)
    path.write_bytes(b"not an image")
    with pytest.raises(UserError):
        make()
    assert np.array_equal(load_images(tmp_path / "results/tiny/dataset").images, before)
