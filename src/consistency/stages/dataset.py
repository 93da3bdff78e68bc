"""Stage dataset: images of any source to one memory-mapped uint8 array."""

import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from consistency.files import atomic, sha256, write_json
from consistency.layout import Layout
from consistency.locks import only_one
from consistency.progress import Progress
from consistency.provenance import write_card
from consistency.resources import downloads
from consistency.sources.datasets import Source, open_source
from consistency.study import Study

LOCK_PATIENCE = 60.0  # seconds to wait for the other preparation of the same study
_BATCH = 64  # images, at most, that a thread reads at once
_BATCH_BYTES = 1 << 20


def make_dataset(study: Study, layout: Layout, workers: int = 1) -> None:
    """Write images.npy (uint8 NHWC), labels.npy (int64), dataset.json and card.json.

    workers: threads that read; any number makes the same bytes. An interrupted run starts over. Raises UserError for a
    source that is missing or not of its form, and for a file that is not an image.
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


# --- the array

_Sums = tuple[int, int]  # of all values and of their squares: exact, so that no order changes them


def _write_images(study: Study, source: Source, path: Path, workers: int) -> _Sums:
    settings = study.dataset
    shape = (settings.resolution, settings.resolution, settings.channels)
    start = np.lib.format.open_memmap(path, "w+", np.uint8, (len(source), *shape)).offset

    def write(rows: range) -> _Sums:
        images = np.stack([source.read(row) for row in rows])
        # Written, not mapped: where a disk is full, a write raises an error and a map kills the process.
        with path.open("r+b") as file:
            file.seek(start + rows[0] * images[0].nbytes)
            file.write(images.tobytes())
        return int(images.sum(dtype=np.int64)), int(np.square(images, dtype=np.int64).sum())

    size = max(1, min(_BATCH, _BATCH_BYTES // math.prod(shape)))
    batches = [range(first, min(first + size, len(source))) for first in range(0, len(source), size)]
    progress = Progress(f"dataset {study.name}", len(source))
    values = squares = 0
    # Broken EXIF, which ImageNet has, is no concern: it is not looked at. The filter holds for all threads.
    with warnings.catch_warnings(action="ignore"):
        # Pillow and zlib work beside each other in threads: they let go of the interpreter's lock.
        pool = ThreadPoolExecutor(max(workers, 1))
        try:
            for rows, (more, more_squares) in zip(batches, pool.map(write, batches), strict=True):
                values, squares = values + more, squares + more_squares
                progress.update(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
    progress.close()
    return values, squares


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
    write_card(
        study,
        layout,
        "dataset",
        started=started,
        inputs=[],
        outputs=outputs,
        downloads=downloads(study, "dataset"),
        source=source.identity,
    )


def _sigma_data(values: int, squares: int, count: int) -> float:
    """Standard deviation of all values in [-1, 1] units."""
    return math.sqrt(count * squares - values**2) / count / 127.5
