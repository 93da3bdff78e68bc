"""The dataset stage: pixels exactly as Pillow makes them, in sorted order, and errors that name the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Tiny, mistake
from tests.image_sources import noise
from tests.made import make_all
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


GREY, COLOUR = noise(8, 8), noise(8, 8, 3)
OPAQUE = np.dstack([COLOUR, np.full((8, 8), 255, np.uint8)])


@pytest.mark.parametrize(
    ("picture", "mode", "expected"),
    [
        (Image.fromarray(GREY), "L", np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(COLOUR), "RGB", np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None]),
        (Image.fromarray(OPAQUE), "RGBA", COLOUR),
        (palette(), "P", np.asarray(palette().convert("RGB"))),
        (Image.fromarray(GREY > 127), "1", np.where(GREY > 127, 255, 0)[..., None]),
    ],
    ids=["grey is repeated", "colour by Pillow's luma", "opaque alpha is dropped", "palette", "black and white"],
)
def test_an_image_of_another_mode_is_converted(
    tree: Path, prepare: Prepare, picture: Image.Image, mode: str, expected: np.ndarray
) -> None:
    assert picture.mode == mode
    (tree / "a").mkdir()
    picture.save(tree / "a/1.png")
    assert np.array_equal(prepare(channels=expected.shape[-1]).images[0], expected)


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tif", "TIFF", "ppm", "WebP"])
def test_images_of_every_format_are_read(tree: Path, prepare: Prepare, suffix: str) -> None:
    save(tree / f"a/1.{suffix}", COLOUR, **({"lossless": True} if suffix == "WebP" else {}))
    assert np.array_equal(prepare().images[0], COLOUR)


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


@pytest.mark.parametrize(("workers", "bad"), [(1, 2), (4, 2), (1, 25), (3, 25)])
def test_all_bad_images_are_told_in_one_run(tree: Path, refusal: Refusal, workers: int, bad: int) -> None:
    """The first 20 in their order, and how many more there are, over several batches of a thread."""
    for k in range(150):
        save(tree / f"a/{k:03}.png", noise(8, 8, 3))
    wrong = [tree / f"a/{k:03}.png" for k in range(0, 150, 6)][:bad]
    for path in wrong:
        path.write_bytes(b"no image")
    message = refusal(workers=workers)
    assert message.startswith(f"{wrong[0]} is not a readable image")
    assert [f"{path} is not a readable image" in message for path in wrong] == [k < 20 for k in range(bad)]
    assert f"in all, {bad} images cannot be used" in message


# --- what the study needs of its images


def few(tree: Path, tiny: Tiny, images: list[np.ndarray], **changes: Any) -> Job:
    """The job of a study with only these images."""
    for k, pixels in enumerate(images):
        save(tree / f"a/{k}.png", pixels)
    dataset = {"kind": "image_folder", "path": str(tree.parent), "resolution": 8, "channels": 1, **changes}
    study = tiny({"dataset": dataset})
    return Job(study, StudyPaths(study.name, tree.parent / "results", tree.parent / "state"))


@pytest.mark.parametrize(("count", "changes"), [(1, {}), (3, {}), (9, {"limit": 1}), (9, {"limit": 3})])
def test_too_few_images_for_the_calibration_are_said_before_any_is_read(
    tree: Path, tiny: Tiny, count: int, changes: dict[str, int]
) -> None:
    job = few(tree, tiny, [noise(8, 8)] * count, **changes)
    (tree / "a/0.png").write_bytes(b"no image")
    left = changes.get("limit", count)
    assert f"the dataset has {left} images, a study needs 4" in mistake(make_dataset, job)


def test_four_images_are_enough(tree: Path, tiny: Tiny) -> None:
    job = few(tree, tiny, [noise(8, 8, seed=k) for k in range(4)])
    make_all(job)
    assert (job.paths.report / "report.html").exists()


def test_images_of_one_colour_have_no_measured_sigma_data(tree: Path, tiny: Tiny) -> None:
    job = few(tree, tiny, [np.full((8, 8), 7, np.uint8)] * 4)
    assert "noise.sigma_data measures 0" in mistake(make_dataset, job)
    assert not job.paths.images.exists()
