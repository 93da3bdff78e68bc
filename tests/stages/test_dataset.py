"""The dataset stage: pixels exactly as Pillow makes them, in sorted order, and errors that name the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Tiny
from tests.image_sources import noise
from tests.stages.conftest import Prepare, Refusal

from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.data.prepared import load_images
from consistency.stages.dataset import make_dataset


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# --- the digits


def test_digits_are_the_1797_images_of_scikit_learn(tiny: Tiny, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    study = tiny({"dataset": {"kind": "digits", "resolution": 8, "channels": 1}})
    layout = StudyPaths(study.name, tmp_path / "results", tmp_path / "state")
    make_dataset(Job(study, layout))
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


def test_the_same_study_makes_the_same_bytes(first_results: StudyPaths, tiny: Tiny, tmp_path: Path) -> None:
    layout = StudyPaths("tiny", tmp_path / "results", tmp_path / "state")
    make_dataset(Job(tiny(), layout))
    for name in ("images.npy", "labels.npy", "dataset.json"):
        assert (layout.dataset / name).read_bytes() == (first_results.dataset / name).read_bytes()
    card = json.loads((layout.dataset / "card.json").read_text())
    assert card["key"] == key_of(tiny(), "dataset")
    assert card["outputs"]["images.npy"] == json.loads((layout.facts).read_text())["sha256"]


# --- image folders


def test_images_come_in_sorted_order_with_their_folders_number(tree: Path, prepare: Prepare) -> None:
    order = ["ant/b.PNG", "cat/deep/a.png", "cat/z.png", "dog/10.png", "dog/2.png"]
    for i, name in reversed(list(enumerate(order))):
        save(tree / name, noise(8, 8, 3, seed=i))
    (tree / "cat" / "notes.txt").write_text("no image")
    (tree / "readme.md").write_text("no class")
    data = prepare()
    assert np.array_equal(data.images, np.stack([noise(8, 8, 3, seed=i) for i in range(5)]))
    assert data.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.facts["classes"] == ["ant", "cat", "dog"]


def test_another_split_is_another_folder(tree: Path, prepare: Prepare) -> None:
    save(tree / "a/1.png", noise(8, 8, 3, seed=1))
    save(tree.parent / "test" / "a/1.png", noise(8, 8, 3, seed=2))
    assert np.array_equal(prepare(split="test").images[0], noise(8, 8, 3, seed=2))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 31), (31, 20), (9, 8), (5, 6), (1, 1), (64, 64)])
def test_the_centred_square_is_resized_by_pillows_lanczos(
    tree: Path, prepare: Prepare, height: int, width: int
) -> None:
    pixels = noise(height, width, 3)
    save(tree / "a/1.png", pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(prepare().images[0], expected)


def test_a_jpeg_is_what_pillow_decodes(tree: Path, prepare: Prepare) -> None:
    for name in ("1.jpg", "2.jpeg", "3.JPG"):
        save(tree / "a" / name, noise(8, 8, 3), quality=90)
    with Image.open(tree / "a/1.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(prepare().images, np.stack([expected] * 3))


def test_broken_exif_is_not_warned_of(tree: Path, prepare: Prepare, recwarn: pytest.WarningsRecorder) -> None:
    save(tree / "a/1.jpg", noise(8, 8, 3), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x0f\x01\x02\0\xff\xff")
    prepare()
    assert not list(recwarn)


def palette() -> Image.Image:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4], pixels[4:, :3], pixels[4:, 3:] = (255, 0, 0), (0, 128, 255), (7, 8, 9)
    return Image.fromarray(pixels).quantize(3)


GREY, COLOUR, TRANSPARENT = noise(8, 8), noise(8, 8, 3), noise(8, 8, 4)


@pytest.mark.parametrize(
    ("picture", "mode", "expected"),
    [
        (Image.fromarray(GREY), "L", np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(COLOUR), "RGB", np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None]),
        (Image.fromarray(TRANSPARENT), "RGBA", TRANSPARENT[..., :3]),
        (palette(), "P", np.asarray(palette().convert("RGB"))),
        (Image.fromarray(GREY > 127), "1", np.where(GREY > 127, 255, 0)[..., None]),
    ],
    ids=["grey is repeated", "colour by Pillow's luma", "transparency is dropped", "palette", "black and white"],
)
def test_an_image_of_another_mode_is_converted(
    tree: Path, prepare: Prepare, picture: Image.Image, mode: str, expected: np.ndarray
) -> None:
    assert picture.mode == mode
    (tree / "a").mkdir()
    picture.save(tree / "a/1.png")
    assert np.array_equal(prepare(channels=expected.shape[-1]).images[0], expected)


# --- what cannot be read


def test_a_folder_that_is_missing_or_has_no_images_is_named(tree: Path, refusal: Refusal) -> None:
    message = refusal(split="test")
    assert "dataset.path: there is no folder" in message and str(tree.with_name("test")) in message
    assert f"{tree} has no <class>/*.png or *.jpg" in refusal()
    save(tree / "no-class.png", noise(8, 8, 3))
    (tree / "a").mkdir()
    (tree / "a" / "1.gif").write_bytes(b"GIF89a")
    assert f"{tree} has no <class>/*.png or *.jpg" in refusal()


@pytest.mark.parametrize("name", ["a/1.png", "a/1.jpg"])
@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: int(0.6 * len(content))],
        lambda content: b"<html>404</html>",
        lambda content: bytes(1000),
        lambda content: b"\x89PNG\r\n\x1a\n" + bytes(99),
    ],
)
def test_a_file_that_is_no_whole_image_is_named(
    tree: Path, refusal: Refusal, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    save(tree / "a/0.png", noise(8, 8, 3))
    path = save(tree / name, noise(64, 64, 3))
    path.write_bytes(damaged(path.read_bytes()))
    assert f"{path} is not a readable image" in refusal()
