"""The dataset stage: pixels exactly as Pillow makes them, in sorted order, and errors that name the file."""

import fcntl
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.image_sources import imagenet_files, imagenet_tar

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.locks import only_one
from consistency.stages import dataset as stage
from consistency.stages.dataset import make_dataset
from consistency.study import Study, load_study
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

    def run(workers: int = 1, **settings: Any) -> ImageData:
        path = str(tmp_path / "images")
        dataset = {"kind": "image_folder", "path": path, "resolution": 8, "channels": 3, **settings}
        study = tiny({"dataset": dataset})
        layout = Layout(study.name, tmp_path / "results", tmp_path / "state")
        make_dataset(study, layout, workers)
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
    layout = Layout(study.name, tmp_path / "results", tmp_path / "state")
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
    layout = Layout("tiny", tmp_path / "results", tmp_path / "state")
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
    assert total > 100
    for number in range(1, total, 31):
        with pytest.raises(KeyboardInterrupt):
            stopped_at_line(number, make)
        assert prepare() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    big: Path, prepare: Prepare, make: Make, tmp_path: Path, workers: int
) -> None:
    expected = prepare()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # 100 rows and a half: the limit of a file's size stands in for the disk's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 100 * 192 + 96, hard))
    try:
        message = mistake_of(make, workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "images.npy: File too large. What was there before is untouched; make room" in message
    assert contents(tmp_path / "results/tiny/dataset") == expected


# --- processes


SCRIPT = """
import sys, consistency.stages.dataset as stage
from pathlib import Path
from consistency import __main__ as main
from consistency.layout import Layout
from consistency.study import load_study
import signal
signal.signal(signal.SIGTERM, main._terminated)
signal.signal(signal.SIGINT, signal.default_int_handler)
study = load_study(sys.argv[1])
home = Path(sys.argv[1]).parent
try:
    stage.make_dataset(study, Layout(study.name, home / "results", home / "state"), 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def slow(tmp_path: Path, write_study: Callable[..., Path]) -> Path:
    """A study that takes some seconds: ImageNet's tar, scaled up to 256 pixels."""
    files = imagenet_files(40)
    files = {f"{name[:10]}{k}{name[10:]}": content for k in range(3) for name, content in files.items()}
    path = imagenet_tar(tmp_path / "train.tar", files)
    dataset = {"kind": "imagenet", "path": str(path), "resolution": 256, "channels": 3}
    network = {"kind": "songunet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    return write_study({"dataset": dataset, "teacher.network": network})


def started(study: Path) -> subprocess.Popen[str]:
    """The stage in a process group of its own, with two workers, once it writes images."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(study)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=study.parent,
    )
    deadline = time.monotonic() + 120
    while not unfinished(study.parent):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def unfinished(home: Path) -> list[Path]:
    """The array in the making, with some of its images."""
    return [path for path in home.glob("results/tiny/dataset/.images.npy.*") if path.stat().st_blocks > 256]


def at_work(folder: Path) -> list[int]:
    """Processes whose working directory that is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("how", ["kill -9", "terminate the group", "terminate", "Ctrl-C"])
def test_however_it_is_stopped_the_same_command_ends_with_the_same_bytes(slow: Path, how: str, tmp_path: Path) -> None:
    process = started(slow)
    assert len(at_work(tmp_path)) == 3
    if how == "kill -9":
        process.kill()
    elif how == "terminate":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM if how == "terminate the group" else signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {"kill -9": -9, "Ctrl-C": 130}.get(how, 128 + signal.SIGTERM)
    assert "Traceback" not in output and "Error" not in output
    deadline = time.monotonic() + 30
    while at_work(tmp_path):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    study = load_study(slow)
    layout = Layout("tiny", tmp_path / "results", tmp_path / "state")
    assert list(layout.dataset.iterdir()) == (unfinished(tmp_path) if how == "kill -9" else [])
    make_dataset(study, layout)
    whole = Layout("tiny", tmp_path / "other", tmp_path / "other-state")
    make_dataset(study, whole)
    assert contents(layout.dataset) == contents(whole.dataset)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_several_images_that_cannot_be_read_is_named(big: Path, make: Make, workers: int) -> None:
    for path in (big / "a/298.png", big / "b/299.png"):
        path.write_bytes(path.read_bytes()[:50])
    assert mistake_of(make, workers).startswith(f"{big / 'a/298.png'} is not a readable image")


def mistake_of(make: Make, workers: int) -> str:
    with pytest.raises(UserError) as error:
        make(workers)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_worker_that_is_killed_is_one_line(
    big: Path, prepare: Prepare, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare()
    read, here = stage._Reader.__call__, os.getpid()

    def killed(self: Any, rows: range) -> Any:
        if 200 in rows and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(stage._Reader, "__call__", killed)
        assert "was killed, perhaps for want of memory" in mistake_of(make, 2)
    assert prepare(2) == expected


def test_a_second_preparation_of_a_study_is_refused(
    big: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LOCK_PATIENCE", 0.0)
    folder = tmp_path / "state/tiny/dataset"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("pid 7 on elsewhere")
        other.flush()
        message = mistake_of(make, 1)
    assert f"another process (pid 7 on elsewhere) prepares the dataset in {folder}" in message


def test_a_second_preparation_waits_for_the_first(big: Path, prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "state/tiny/dataset"
    taken, finished = threading.Event(), threading.Event()

    def first() -> None:
        with only_one(folder, "prepares the dataset", 0.0):
            taken.set()
            time.sleep(0.5)
            finished.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert taken.wait(30)
    prepare()
    assert finished.is_set()
    thread.join(30)


# --- the size of ImageNet


def _read_at_random(folder: Path, seed: int, answers: Any) -> None:
    """RssAnon in KiB of this process after ten batches, when the allocator has settled, and after 40 more."""
    torch.set_num_threads(1)
    data, rng, found = load_images(folder), np.random.default_rng(seed), []
    for batch in range(50):
        images, labels = data.take(rng.integers(0, len(data), 50))
        assert images.shape == (50, 3, 64, 64) and not labels.any()
        if batch in (9, 49):
            status = Path("/proc/self/status").read_text()
            found.append(int(status.split("RssAnon:")[1].split()[0]))
    answers.put((data.images.nbytes, *found))


def test_eight_processes_read_a_dataset_of_imagenets_size_in_flat_memory(tmp_path: Path) -> None:
    count = 1_281_167
    path = tmp_path / "images.npy"
    try:
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 64, 64, 3))
    except OSError as error:
        pytest.skip(f"no file of 16 GB here: {error}")
    if path.stat().st_blocks * 512 > 1 << 20:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
    (tmp_path / "dataset.json").write_text(json.dumps({"count": count, "classes": ["0"]}))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    readers = [context.Process(target=_read_at_random, args=(tmp_path, seed, answers)) for seed in range(8)]
    try:
        for reader in readers:
            reader.start()
        sizes = [answers.get(timeout=60) for _ in readers]
    finally:
        for reader in readers:
            reader.join(timeout=60)
        path.unlink()
    for size, first, last in sizes:
        assert size == 15_742_980_096
        # 2,000 rows are 24 MB as bytes, and 98 MB as floats.
        assert last - first < 16 << 10
