"""The dataset stage interrupted, short of room or shared by threads: the same bytes in the end, or what was there."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import WriteStudy
from tests.dangers import file_size_limit
from tests.image_sources import encoded, imagenet_files, imagenet_tar, noise, write_folder
from tests.processes import start_python, wait_until
from tests.stages.conftest import Prepare, Refusal

from consistency.base import locks
from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.stages import dataset as stage
from consistency.stages.dataset import make_dataset

OUTPUTS = ("images.npy", "labels.npy", "dataset.json")
Contents = dict[str, bytes]


@pytest.fixture
def big(tree: Path) -> Path:
    """The image folder with images for several batches."""
    return write_folder(tree, {f"{'ab'[i % 2]}/{i}.png": encoded(noise(12, 12, 3, seed=i)) for i in range(100, 400)})


def contents(folder: Path) -> dict[str, bytes]:
    """The stage's files, beside which there is nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*OUTPUTS, "card.json"])
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


@pytest.fixture
def prepared(prepare: Prepare, tmp_path: Path) -> Callable[..., Contents]:
    """prepared(workers): run the stage, and return its files' contents."""

    def run(workers: int = 1) -> Contents:
        prepare(workers)
        assert not [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        return contents(tmp_path / "results/tiny/dataset")

    return run


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_any_number_of_workers_makes_the_same_bytes(big: Path, prepared: Callable[..., Contents], workers: int) -> None:
    assert prepared(workers) == prepared(1)


def test_without_threads_images_are_read_one_by_one(
    big: Path, prepared: Callable[..., Contents], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    expected = prepared()
    monkeypatch.setattr("threading.Thread.start", refuse)
    assert prepared(4) == expected
    assert "dataset tiny: can't start new thread: images are read one by one\n" in capsys.readouterr().out


def stopped_at_line(number: float, prepare: Prepare) -> int:
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
        prepare()
    finally:
        sys.settrace(previous)
    return lines


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_interruption_at_any_line_ends_with_the_same_bytes(
    big: Path, prepared: Callable[..., Contents], prepare: Prepare
) -> None:
    expected = prepared()
    total = stopped_at_line(math.inf, prepare)
    assert total > 50
    for number in range(1, total, 17):
        with pytest.raises(KeyboardInterrupt):
            stopped_at_line(number, prepare)
        assert prepared() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    big: Path, prepared: Callable[..., Contents], prepare: Prepare, tmp_path: Path, workers: int
) -> None:
    expected = prepared()
    message = r"images\.npy: File too large\. Its previous version is untouched; free disk space"
    # 100 rows and a half: the limit of a file's size stands in for the disk's.
    with file_size_limit(128 + 100 * 192 + 96), pytest.raises(UserError, match=message):
        prepare(workers)
    assert contents(tmp_path / "results/tiny/dataset") == expected


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
    words = ["-m", "consistency", "dataset", "--study", slow, "--threads", "2"]
    with start_python(*words, folder=tmp_path, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: unfinished(tmp_path) or process.poll() is not None, "some of the images", 120)
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
def test_the_first_of_several_images_that_cannot_be_read_is_named(big: Path, workers: int, refusal: Refusal) -> None:
    for path in (big / "a/398.png", big / "b/399.png"):
        path.write_bytes(path.read_bytes()[:50])
    assert refusal(workers=workers).startswith(f"{big / 'a/398.png'} is not a readable image")


def test_a_second_preparation_of_a_study_is_refused(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    folder = tmp_path / "state/tiny/dataset"
    with locks.only_one(folder, "is working"):
        message = refusal()
    assert message.startswith(f"another process (pid {os.getpid()} on ")
    assert f"prepares the dataset in {folder}: wait for it or stop it" in message
