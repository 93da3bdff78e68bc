"""Stage dataset: images of any source to one memory-mapped uint8 array."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from consistency.errors import UserError
from consistency.files import atomic, sha256, write_json
from consistency.layout import Layout
from consistency.progress import track
from consistency.provenance import write_card
from consistency.study import Dataset, Study

_SUFFIXES = {".png", ".jpg", ".jpeg"}
Array = np.ndarray


def make_dataset(study: Study, layout: Layout) -> None:
    """Write images.npy (uint8 NHWC), labels.npy (int64), dataset.json and card.json.

    Raises UserError for a missing or empty folder and for a file that is not an image.
    """
    started = time.time()
    settings, folder = study.dataset, layout.dataset
    count, classes, read = _digits(settings) if settings.kind == "digits" else _image_folder(settings)
    shape = (count, settings.resolution, settings.resolution, settings.channels)
    labels = np.empty(count, np.int64)
    sums = np.zeros(2)
    with atomic(folder / "images.npy") as temporary:
        # Written through the map, image by image: memory stays flat however large the dataset is.
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for i in track(f"dataset {study.name}")(range(count)):
            images[i], labels[i] = read(i)
            signed = images[i] / 127.5 - 1
            sums += signed.mean(), np.square(signed).mean()
        images.flush()
        del images
    with atomic(folder / "labels.npy") as temporary, temporary.open("wb") as file:
        np.save(file, labels)
    mean, square = sums / count
    facts = {
        "count": count,
        "classes": classes,
        "class_counts": np.bincount(labels, minlength=len(classes)).tolist(),
        "resolution": settings.resolution,
        "channels": settings.channels,
        "source": settings.kind,
        "sha256": sha256(folder / "images.npy"),
        "sigma_data": float(np.sqrt(square - mean**2)),
    }
    write_json(folder / "dataset.json", facts)
    outputs = [folder / name for name in ("images.npy", "labels.npy", "dataset.json")]
    write_card(folder, study, "dataset", started=started, inputs=[], outputs=outputs)


Reader = Callable[[int], tuple[Array, int]]


def _digits(settings: Dataset) -> tuple[int, list[str], Reader]:
    """The UCI optical digits: 17 grey levels, 0..16, spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = _limited(digits.target, settings.limit)
    return len(rows), [str(n) for n in range(10)], lambda i: (images[rows[i]], int(digits.target[rows[i]]))


def _image_folder(settings: Dataset) -> tuple[int, list[str], Reader]:
    """A tree <path>/<split>/<class>/<image>, in sorted order."""
    root = Path(settings.path or "") / settings.split
    if not root.is_dir():
        raise UserError(
            f"dataset.path: there is no folder {root} (it must hold one folder of images a class); "
            "set dataset.path and dataset.split in the study"
        )
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files = [(path, k) for k, name in enumerate(classes) for path in _images_of(root / name, settings.limit)]
    if not files:
        raise UserError(f"dataset.path: {root} has no <class>/*.png or *.jpg in it")
    return len(files), classes, lambda i: (_read_image(files[i][0], settings), files[i][1])


def _images_of(folder: Path, limit: int | None) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)[:limit]


def _limited(labels: Array, limit: int | None) -> Array:
    """Rows of the first `limit` images of each class, in order; all without a limit."""
    if limit is None:
        return np.arange(len(labels))
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:limit] for k in np.unique(labels)]))


def _read_image(path: Path, settings: Dataset) -> Array:
    """One image: the centred square, resized by Lanczos on uint8 (EDM's preparation). [R, R, C]."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip the grey levels at 255, silently.
                raise UserError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
            picture = image.convert("RGB" if settings.channels == 3 else "L")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error}): mend or remove it") from None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    size = (settings.resolution, settings.resolution)
    square = picture.crop((left, top, left + side, top + side))
    if square.size != size:
        square = square.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(*size, settings.channels)
