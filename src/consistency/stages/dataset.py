"""Stage dataset: images of any source, converted to one memory-mapped uint8 array."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from consistency.base.arrays import write_array
from consistency.base.errors import UserError, raise_all
from consistency.base.files import atomic, sha256, write_json
from consistency.base.locks import only_one
from consistency.base.progress import Progress
from consistency.config.job import Job
from consistency.config.study import Study
from consistency.data.sources import Source, open_source
from consistency.provenance.card import Card
from consistency.provenance.inputs import require_enough

_BATCH = 64  # most images that a thread reads at once
_BATCH_BYTES = 1 << 20


def make_dataset(job: Job, workers: int = 1) -> None:
    """Write images.npy (uint8 NHWC), labels.npy (int64), dataset.json and card.json.

    workers: number of reading threads, which does not change a byte. An interrupted run starts over. Raises UserError
    for a source that is missing or malformed, for files that are not images, and for fewer images than the study needs.
    """
    card, study, folder = Card(job, "dataset"), job.study, job.paths.dataset
    with only_one(job.paths.state / study.name / "dataset", "prepares the dataset"):
        source = open_source(study.dataset)
        require_enough(study, len(source))
        images = job.paths.images
        for left in folder.glob(f".{images.name}.*.tmp"):  # by a run that was killed
            with suppress(OSError):
                left.unlink()
        with atomic(images) as temporary:
            values, squares = _write_images(study, source, temporary, workers)
            count = len(source) * study.dataset.channels * study.dataset.resolution**2
            # Of all values, in [-1, 1] units.
            sigma_data = math.sqrt(count * squares - values**2) / count / 127.5
            if sigma_data == 0 and study.noise.sigma_data == "measured":
                raise UserError("all pixels of all images are alike, so noise.sigma_data measures 0: give other images")
        write_array(job.paths.labels, source.labels)
        facts = {
            "count": len(source),
            "classes": source.classes,
            "class_counts": np.bincount(source.labels, minlength=len(source.classes)).tolist(),
            "resolution": study.dataset.resolution,
            "channels": study.dataset.channels,
            "source": study.dataset.kind,
            "sha256": sha256(images),
            "sigma_data": sigma_data,
        }
        write_json(job.paths.facts, facts)
        card.write(source=source.identity)


def _write_images(study: Study, source: Source, path: Path, workers: int) -> tuple[int, int]:
    """Write the array. Returns the sums of all values and of their squares, exact and so independent of their order.
    Raises UserError for all images that cannot be used."""
    settings = study.dataset
    shape = (settings.resolution, settings.resolution, settings.channels)
    start = np.lib.format.open_memmap(path, "w+", np.uint8, (len(source), *shape)).offset

    def write(rows: range) -> tuple[int, int, list[str]]:
        found, wrong = list[np.ndarray](), list[str]()
        for row in rows:
            try:
                found.append(source.read(row))
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            return 0, 0, wrong
        images = np.stack(found)
        # Written, not mapped: on a full disk a write raises an error, but a map kills the process.
        with path.open("r+b") as file:
            file.seek(start + rows[0] * images[0].nbytes)
            file.write(images.tobytes())
        return int(images.sum(dtype=np.int64)), int(np.square(images, dtype=np.int64).sum()), wrong

    size = max(1, min(_BATCH, _BATCH_BYTES // math.prod(shape)))
    batches = [range(first, min(first + size, len(source))) for first in range(0, len(source), size)]
    progress = Progress(f"dataset {study.name}", len(source))
    values, squares, errors = 0, 0, list[str]()
    # Broken EXIF, as in ImageNet, does not matter: it says nothing. The filter applies to all threads.
    with warnings.catch_warnings(action="ignore"):
        # Pillow and zlib run in parallel threads: they release the interpreter's lock.
        pool = ThreadPoolExecutor(max(workers, 1))
        try:
            try:
                written = pool.map(write, batches)
            except RuntimeError as error:  # a limit on processes (ulimit -u) forbids threads too
                print(f"dataset {study.name}: {error}: images are read one by one", flush=True)
                written = map(write, batches)
            for rows, (more, more_squares, wrong) in zip(batches, written, strict=True):
                values, squares = values + more, squares + more_squares
                errors += wrong
                progress.update(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
    progress.close()
    raise_all(errors, "images")
    return values, squares
