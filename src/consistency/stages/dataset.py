"""Stage dataset: images of any source to one memory-mapped uint8 array."""

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO, FileIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np

from consistency.errors import UserError
from consistency.files import atomic, link_file, sha256, write_json
from consistency.layout import Layout
from consistency.locks import only_one
from consistency.progress import Progress
from consistency.provenance import write_card
from consistency.sources.datasets import CIFAR10_ARCHIVE, Source, open_source
from consistency.study import Study

Array = np.ndarray

SAVE_EVERY = 5.0  # seconds between two saves of how far it is
LOCK_PATIENCE = 60.0  # seconds to wait for the other preparation of the same study
_BATCH = 64  # images, at most, that a worker sends at once
_BATCH_BYTES = 1 << 20


def make_dataset(study: Study, layout: Layout, workers: int = 1) -> None:
    """Write images.npy (uint8 NHWC), labels.npy (int64), dataset.json and card.json.

    Goes on where an interrupted run stopped, with the same bytes; so does any number of workers. Raises UserError for
    a source that is missing or not of its form, and for a file that is not an image.
    """
    started = time.time()
    state = layout.state / layout.study / "dataset"
    with only_one(state, "prepares the dataset", LOCK_PATIENCE):
        source = open_source(study.dataset)
        done = _fill(study, source, state, workers)
        _publish(study, source, layout, state, done, started)
        for name in ("progress.json", "images.npy"):
            (state / name).unlink()


# --- the array, which grows under state/


@dataclass(frozen=True)
class _Done:
    """What stands in images.npy: so many rows, and the exact sums of their values and squared values.

    Never changed, only replaced: a signal may interrupt between any two instructions, and the three must agree.
    """

    key: str
    source: str
    rows: int = 0
    values: int = 0
    squares: int = 0

    def plus(self, images: Array) -> Self:
        """With one batch more."""
        values, squares = int(images.sum(dtype=np.int64)), int(np.square(images, dtype=np.int64).sum())
        return replace(self, rows=self.rows + len(images), values=self.values + values, squares=self.squares + squares)


def _fill(study: Study, source: Source, state: Path, workers: int) -> _Done:
    """Append the images that are missing in state/images.npy, saving how far it is now and then."""
    settings = study.dataset
    shape = (len(source), settings.resolution, settings.resolution, settings.channels)
    done = _resume(study, source, state, shape)
    progress = Progress(f"dataset {study.name}", len(source), done.rows)
    with _writing(state / "images.npy") as file:
        file.truncate(_end(shape, done.rows))
        file.seek(0, os.SEEK_END)
        saved = time.monotonic()
        try:
            size = max(1, min(_BATCH, _BATCH_BYTES // math.prod(shape[1:])))
            with closing(_in_order(source, range(done.rows, len(source)), size, workers)) as batches:
                for images in batches:
                    _append(file, images.tobytes())
                    done = done.plus(images)
                    progress.advance(len(images))
                    if time.monotonic() - saved > SAVE_EVERY:
                        _save(file, state, done)
                        saved = time.monotonic()
        finally:
            _save(file, state, done)
    progress.close()
    return done


def _resume(study: Study, source: Source, state: Path, shape: tuple[int, ...]) -> _Done:
    """How far an earlier run came; nowhere, with a line that says so, when its settings or its source were others."""
    fresh = _Done(study.key("dataset"), source.identity)
    try:
        done = _Done(**json.loads((state / "progress.json").read_text()))
        whole = (state / "images.npy").stat().st_size >= _end(shape, done.rows)
    except (OSError, ValueError, TypeError):
        done, whole = fresh, False
    if whole and (done.key, done.source) == (fresh.key, fresh.source):
        print(f"dataset {study.name}: continues from image {done.rows} of {len(source)}", flush=True)
        return done
    if (state / "progress.json").exists():
        print(f"dataset {study.name}: the settings or the source changed, so this starts over", flush=True)
    with _writing(state / "images.npy", afresh=True) as file:
        _append(file, _header(shape))
    return fresh


def _header(shape: tuple[int, ...]) -> bytes:
    """What stands before the values in a .npy of uint8."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _end(shape: tuple[int, ...], rows: int) -> int:
    """Bytes of images.npy with so many rows."""
    return len(_header(shape)) + rows * math.prod(shape[1:])


@contextmanager
def _writing(path: Path, afresh: bool = False) -> Iterator[FileIO]:
    """images.npy for writing. Raises UserError when there is no room or no permission."""
    # Written, not mapped: where a disk is full, a write raises an error and a map kills the process.
    try:
        if afresh:
            # An earlier run may have linked the old one to where the results are.
            path.unlink(missing_ok=True)
        with FileIO(path, "x+" if afresh else "r+") as file:
            yield file
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Make room (or mend the permission) and run the same "
            "command again: it goes on from there"
        ) from None


def _append(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _save(file: FileIO, state: Path, done: _Done) -> None:
    """Write down how far it is, after what it says is on the disk."""
    os.fsync(file.fileno())
    write_json(state / "progress.json", asdict(done))


# --- reading, by this process or by several


def _in_order(source: Source, wanted: range, size: int, workers: int) -> Generator[Array, None, None]:
    """The images of those rows, in order, a batch [size, R, R, C] at a time."""
    batches = (wanted[first : first + size] for first in range(0, len(wanted), size))
    if workers <= 1 or not wanted:
        for rows in batches:
            yield _read(source, rows)
        return
    # Forked, the workers share the index of a million files with this process. What they read comes through a pipe,
    # in small batches, and needs no shared memory.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (source, os.getpid()))
    try:
        ahead = deque(pool.submit(_read_own, rows) for rows in islice(batches, 2 * workers))
        while ahead:
            images = ahead.popleft().result()
            ahead.extend(pool.submit(_read_own, rows) for rows in islice(batches, 1))
            yield images
    except BrokenProcessPool:
        raise UserError(
            "a process that read images was killed, perhaps for want of memory: run the same command again with "
            "fewer --threads; it goes on from there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: Source, rows: range) -> Array:
    return np.stack([source.read(row) for row in rows])


_own: Source  # of a worker


def _start_worker(source: Source, parent: int) -> None:
    """Take over the source, and leave stopping to the parent: end when it does, however that is."""
    global _own
    _own = source
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _read_own(rows: range) -> Array:
    return _read(_own, rows)


# --- the results


def _publish(study: Study, source: Source, layout: Layout, state: Path, done: _Done, started: float) -> None:
    """Put the whole array and what is known of it where the results are."""
    images, folder, settings = state / "images.npy", layout.dataset, study.dataset
    facts: dict[str, Any] = {
        "count": len(source),
        "classes": source.classes,
        "class_counts": np.bincount(source.labels, minlength=len(source.classes)).tolist(),
        "resolution": settings.resolution,
        "channels": settings.channels,
        "source": settings.kind,
        "sha256": sha256(images),
        "sigma_data": _sigma_data(done, len(source) * settings.channels * settings.resolution**2),
    }
    # Until all is written a run that is killed here goes on with the whole array.
    link_file(images, folder / "images.npy")
    with atomic(folder / "labels.npy") as temporary, temporary.open("wb") as file:
        np.save(file, source.labels)
    write_json(folder / "dataset.json", facts)
    outputs = [folder / name for name in ("images.npy", "labels.npy", "dataset.json")]
    known = {outputs[0]: facts["sha256"]}
    archive = study.dataset.kind == "cifar10" and study.dataset.path is None
    write_card(
        study,
        layout,
        "dataset",
        started=started,
        inputs=[],
        outputs=outputs,
        known=known,
        downloads=[CIFAR10_ARCHIVE] if archive else [],
        source=source.identity,
    )


def _sigma_data(done: _Done, count: int) -> float:
    """Standard deviation of all values in [-1, 1] units, from exact sums: no order and no batch changes it."""
    return math.sqrt(count * done.squares - done.values**2) / count / 127.5
