"""The dataset stage: pixels exactly as Pillow makes them, in sorted order, and errors that name the file."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import Tiny, WriteStudy
from tests.dangers import file_size_limit
from tests.image_sources import imagenet_files, imagenet_tar

from consistency.base import locks
from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.data.prepared import ImageData, load_images
from consistency.stages import dataset as stage
from consistency.stages.dataset import make_dataset

Make = Callable[..., ImageData]
Mistake = Callable[..., str]


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

    def run(workers: int = 1, **settings: Any) -> ImageData:
        path = str(tmp_path / "images")
        dataset = {"kind": "image_folder", "path": path, "resolution": 8, "channels": 3, **settings}
        study = tiny({"dataset": dataset})
        layout = StudyPaths(study.name, tmp_path / "results", tmp_path / "state")
        make_dataset(Job(study, layout), workers)
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


def test_images_come_in_sorted_order_with_their_folders_number(tree: Path, make: Make) -> None:
    order = ["ant/b.PNG", "cat/deep/a.png", "cat/z.png", "dog/10.png", "dog/2.png"]
    for i, name in reversed(list(enumerate(order))):
        save(tree / name, noise(8, 8, seed=i))
    (tree / "cat" / "notes.txt").write_text("no image")
    (tree / "readme.md").write_text("no class")
    data = make()
    assert np.array_equal(data.images, np.stack([noise(8, 8, seed=i) for i in range(5)]))
    assert data.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.facts["classes"] == ["ant", "cat", "dog"]


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


def test_a_jpeg_is_what_pillow_decodes(tree: Path, make: Make) -> None:
    for name in ("1.jpg", "2.jpeg", "3.JPG"):
        save(tree / "a" / name, noise(8, 8), quality=90)
    with Image.open(tree / "a/1.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(make().images, np.stack([expected] * 3))


def test_broken_exif_is_not_warned_of(tree: Path, make: Make, recwarn: pytest.WarningsRecorder) -> None:
    save(tree / "a/1.jpg", noise(8, 8), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x0f\x01\x02\0\xff\xff")
    make()
    assert not list(recwarn)


def palette() -> Image.Image:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4], pixels[4:, :3], pixels[4:, 3:] = (255, 0, 0), (0, 128, 255), (7, 8, 9)
    return Image.fromarray(pixels).quantize(3)


GREY, COLOUR, TRANSPARENT = (noise(8, 8, channels) for channels in (1, 3, 4))


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
    tree: Path, make: Make, picture: Image.Image, mode: str, expected: np.ndarray
) -> None:
    assert picture.mode == mode
    (tree / "a").mkdir()
    picture.save(tree / "a/1.png")
    assert np.array_equal(make(channels=expected.shape[-1]).images[0], expected)


# --- what cannot be read


@pytest.fixture
def mistake(make: Make, tmp_path: Path) -> Mistake:
    """mistake(channels=3, ...): the message of a run that must fail: one line, and no half-written array."""

    def fail(**settings: Any) -> str:
        with pytest.raises(UserError) as error:
            make(**settings)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "results").rglob("*images.npy*"))
        return str(error.value)

    return fail


def test_a_folder_that_is_missing_or_has_no_images_is_named(tree: Path, mistake: Mistake) -> None:
    message = mistake(split="test")
    assert "dataset.path: there is no folder" in message and str(tree.with_name("test")) in message
    assert f"{tree} has no <class>/*.png or *.jpg" in mistake()
    save(tree / "no-class.png", noise(8, 8))
    (tree / "a").mkdir()
    (tree / "a" / "1.gif").write_bytes(b"GIF89a")
    assert f"{tree} has no <class>/*.png or *.jpg" in mistake()


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
    tree: Path, mistake: Mistake, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    save(tree / "a/0.png", noise(8, 8))
    path = save(tree / name, noise(64, 64))
    path.write_bytes(damaged(path.read_bytes()))
    assert f"{path} is not a readable image" in mistake()


# --- interrupted, and begun again


COUNT = 300
OUTPUTS = ("images.npy", "labels.npy", "dataset.json")
Prepare = Callable[..., dict[str, bytes]]


@pytest.fixture
def big(tree: Path) -> Path:
    """The image folder with images for several batches."""
    for i in range(COUNT):
        save(tree / f"{'ab'[i % 2]}/{i:03d}.png", noise(12, 12, seed=i))
    return tree


def contents(folder: Path) -> dict[str, bytes]:
    """The stage's files, beside which there is nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*OUTPUTS, "card.json"])
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


@pytest.fixture
def prepare(make: Make, tmp_path: Path) -> Prepare:
    """prepare(workers, ...): runs the stage and returns its files' contents."""

    def run(workers: int = 1, **settings: Any) -> dict[str, bytes]:
        make(workers, **settings)
        assert not [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        return contents(tmp_path / "results/tiny/dataset")

    return run


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_any_number_of_workers_makes_the_same_bytes(big: Path, prepare: Prepare, workers: int) -> None:
    assert prepare(workers) == prepare(1)


def stopped_at_line(number: float, make: Make) -> int:
    """Run with Ctrl-C pressed before the stage executes its line of that number. Returns how many it executed."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != stage.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        make()
    finally:
        sys.settrace(previous)
    return lines


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_interruption_at_any_line_ends_with_the_same_bytes(big: Path, prepare: Prepare, make: Make) -> None:
    expected = prepare()
    total = stopped_at_line(math.inf, make)
    assert total > 50
    for number in range(1, total, 17):
        with pytest.raises(KeyboardInterrupt):
            stopped_at_line(number, make)
        assert prepare() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    big: Path, prepare: Prepare, make: Make, tmp_path: Path, workers: int
) -> None:
    expected = prepare()
    message = r"images\.npy: File too large\. What was there before is untouched; make room"
    # 100 rows and a half: the limit of a file's size stands in for the disk's.
    with file_size_limit(128 + 100 * 192 + 96), pytest.raises(UserError, match=message):
        make(workers)
    assert contents(tmp_path / "results/tiny/dataset") == expected


# --- processes


@pytest.fixture
def slow(tmp_path: Path, write_study: WriteStudy) -> Path:
    """A study that takes some seconds: ImageNet's tar, scaled up to 256 pixels."""
    files = imagenet_files(40)
    files = {f"{name[:10]}{k}{name[10:]}": content for k in range(3) for name, content in files.items()}
    path = imagenet_tar(tmp_path / "train.tar", files)
    dataset = {"kind": "imagenet", "path": str(path), "resolution": 256, "channels": 3}
    network = {"kind": "songunet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    return write_study({"dataset": dataset, "teacher.network": network})


def unfinished(home: Path) -> list[Path]:
    """The array in the making, with some of its images."""
    return [path for path in home.glob("results/tiny/dataset/.images.npy.*") if path.stat().st_blocks > 256]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_however_it_is_stopped_the_same_command_ends_with_the_same_bytes(
    slow: Path, how: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "consistency", "dataset", "--study", str(slow), "--threads", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as process:
        deadline = time.monotonic() + 120
        while not unfinished(tmp_path):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in output and "Error" not in output
    study = load_study(slow)
    layout = StudyPaths("tiny", tmp_path / "results", tmp_path / "state")
    assert list(layout.dataset.iterdir()) == (unfinished(tmp_path) if how == signal.SIGKILL else [])
    make_dataset(Job(study, layout))
    whole = StudyPaths("tiny", tmp_path / "other", tmp_path / "other-state")
    make_dataset(Job(study, whole))
    assert contents(layout.dataset) == contents(whole.dataset)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_several_images_that_cannot_be_read_is_named(big: Path, workers: int, mistake: Mistake) -> None:
    for path in (big / "a/298.png", big / "b/299.png"):
        path.write_bytes(path.read_bytes()[:50])
    assert mistake(workers=workers).startswith(f"{big / 'a/298.png'} is not a readable image")


def test_a_second_preparation_of_a_study_is_refused(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    folder = tmp_path / "state/tiny/dataset"
    with locks.only_one(folder, "is working"):
        message = mistake()
    assert message.startswith(f"another process (pid {os.getpid()} on ")
    assert f"prepares the dataset in {folder}: wait for it or stop it" in message


# --- the size of ImageNet


def _read_at_random(folder: Path, seed: int) -> tuple[int, int]:
    """RssAnon in KiB of this process after ten batches, when the allocator has settled, and after 40 more."""
    torch.set_num_threads(1)
    data, rng, found = load_images(folder), np.random.default_rng(seed), []
    for batch in range(50):
        images, labels = data.take(rng.integers(0, len(data), 50))
        assert images.shape == (50, 3, 64, 64) and not labels.any()
        if batch in (9, 49):
            status = Path("/proc/self/status").read_text()
            found.append(int(status.split("RssAnon:")[1].split()[0]))
    return found[0], found[1]


def test_several_processes_read_a_dataset_of_imagenets_size_in_flat_memory(tmp_path: Path) -> None:
    count = 1_281_167
    path = tmp_path / "images.npy"
    try:
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 64, 64, 3))
    except OSError as error:
        pytest.skip(f"no file of 16 GB here: {error}")
    try:
        if path.stat().st_blocks * 512 > 1 << 20:
            pytest.skip("this file system has no sparse files")
        np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
        (tmp_path / "dataset.json").write_text(json.dumps({"count": count, "classes": ["0"]}))
        with multiprocessing.get_context("spawn").Pool(4, maxtasksperchild=1) as pool:
            found = pool.starmap(_read_at_random, [(tmp_path, seed) for seed in range(4)], chunksize=1)
    finally:
        path.unlink()
    for first, last in found:
        # 2,000 rows are 24 MB as bytes, and 98 MB as floats.
        assert last - first < 16 << 10
