"""Stage dataset: images of any source to one memory-mapped uint8 array."""

import math
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from consistency.errors import UserError
from consistency.files import atomic, sha256, write_json
from consistency.layout import Layout
from consistency.locks import only_one
from consistency.progress import Progress
from consistency.provenance import write_card
from consistency.sources.datasets import CIFAR10_ARCHIVE, Source, open_source
from consistency.study import Study

LOCK_PATIENCE = 60.0  # seconds to wait for the other preparation of the same study
_BATCH = 64  # images, at most, that a worker reads at once
_BATCH_BYTES = 1 << 20


def make_dataset(study: Study, layout: Layout, workers: int = 1) -> None:
    """Write images.npy (uint8 NHWC), labels.npy (int64), dataset.json and card.json.

    Any number of workers makes the same bytes; an interrupted run starts over. Raises UserError for a source that is
    missing or not of its form, and for a file that is not an image.
    """
    started = time.time()
    with only_one(layout.state / layout.study / "dataset", "prepares the dataset", LOCK_PATIENCE):
        source = open_source(study.dataset)
        images = layout.dataset / "images.npy"
        for left in layout.dataset.glob(f".{images.name}.*.tmp"):  # by a run that was killed
            with suppress(OSError):
                left.unlink()
        with atomic(images) as temporary:
            sums = _write_images(study, source, temporary, workers)
        _publish(study, source, layout, sums, started)


# --- the array, by this process or by several

_Sums = tuple[int, int]  # of all values and of their squares: exact, so that no order changes them


def _write_images(study: Study, source: Source, path: Path, workers: int) -> _Sums:
    settings = study.dataset
    shape = (len(source), settings.resolution, settings.resolution, settings.channels)
    reader = _Reader(source, path, np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset, math.prod(shape[1:]))
    size = max(1, min(_BATCH, _BATCH_BYTES // reader.image_bytes))
    batches = [range(first, min(first + size, shape[0])) for first in range(0, shape[0], size)]
    progress = Progress(f"dataset {study.name}", shape[0])
    values = squares = 0
    with closing(_by_several(reader, batches, workers) if workers > 1 else (reader(rows) for rows in batches)) as done:
        for rows, (more, more_squares) in zip(batches, done, strict=True):
            values, squares = values + more, squares + more_squares
            progress.advance(len(rows))
    progress.close()
    return values, squares


@dataclass(frozen=True)
class _Reader:
    """Puts images of the source where they belong in images.npy, whose first one is at `start`."""

    source: Source
    path: Path
    start: int
    image_bytes: int

    def __call__(self, rows: range) -> _Sums:
        images = np.stack([self.source.read(row) for row in rows])
        # Written, not mapped: where a disk is full, a write raises an error and a map kills the process.
        with self.path.open("r+b") as file:
            file.seek(self.start + rows[0] * self.image_bytes)
            file.write(images.tobytes())
        return int(images.sum(dtype=np.int64)), int(np.square(images, dtype=np.int64).sum())


def _by_several(reader: _Reader, batches: Iterable[range], workers: int) -> Generator[_Sums, None, None]:
    # Forked, the workers share the index of a million files with this process.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (reader, os.getpid()))
    try:
        yield from pool.map(_read_own, batches)
    except BrokenProcessPool:
        raise UserError(
            "a process that read images was killed, perhaps for want of memory: run the same command again with "
            "fewer --threads"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_own: _Reader  # of a worker


def _start_worker(reader: _Reader, parent: int) -> None:
    """Take over the reader, and leave stopping to the parent: end when it does, however that is."""
    global _own
    _own = reader
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _read_own(rows: range) -> _Sums:
    return _own(rows)


# --- the results


def _publish(study: Study, source: Source, layout: Layout, sums: _Sums, started: float) -> None:
    """Put what is known of the array beside it."""
    folder, settings = layout.dataset, study.dataset
    outputs = [folder / name for name in ("images.npy", "labels.npy", "dataset.json")]
    facts: dict[str, Any] = {
        "count": len(source),
        "classes": source.classes,
        "class_counts": np.bincount(source.labels, minlength=len(source.classes)).tolist(),
        "resolution": settings.resolution,
        "channels": settings.channels,
        "source": settings.kind,
        "sha256": sha256(outputs[0]),
        "sigma_data": _sigma_data(*sums, len(source) * settings.channels * settings.resolution**2),
    }
    with atomic(outputs[1]) as temporary, temporary.open("wb") as file:
        np.save(file, source.labels)
    write_json(outputs[2], facts)
    archive = settings.kind == "cifar10" and settings.path is None
    write_card(
        study,
        layout,
        "dataset",
        started=started,
        inputs=[],
        outputs=outputs,
        downloads=[CIFAR10_ARCHIVE] if archive else [],
        source=source.identity,
    )


def _sigma_data(values: int, squares: int, count: int) -> float:
    """Standard deviation of all values in [-1, 1] units."""
    return math.sqrt(count * squares - values**2) / count / 127.5
