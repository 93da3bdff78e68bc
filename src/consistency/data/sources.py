"""Datasets: their images, order and classes."""

import gzip
import hashlib
import json
import os
import pickle
import pkgutil
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from consistency.base.errors import UserError, shown, user_error
from consistency.config.dataset import KINDS, Dataset
from consistency.data import pictures
from consistency.data.containers import (
    Container,
    is_hidden,
    open_folder,
    open_tar_of_tars,
    open_zip,
    opening,
    tell_left_out,
)
from consistency.data.resources import open_resource

Array = np.ndarray
Fit = Callable[[Image.Image, str, Dataset], Image.Image]

_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_ARCHIVE = str(KINDS["cifar10"].download)
_CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_BATCH_BYTES = 1 << 26  # larger than any file of CIFAR-10
_CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_CELEBA_PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")  # the original, Kaggle's
#: CelebA's splits in the order of their numbers in the partition, with their image counts
_CELEBA_SPLITS = {"train": 162_770, "valid": 19_867, "test": 19_962}
#: photos: sides of the squares, their distance, and the width of the held-out strip at the right; pixels
_SIDES, _STEP, _STRIP = (16, 32, 64), 14, 128
_SYNSET = re.compile(r"n\d{8}")
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Source:
    """Images in a fixed order; any number of threads can read them at random.

    classes: names; labels: int64 [N]; identity: hex digest that changes with the source; read(row): uint8 [R, R, C],
    raises UserError for an unreadable image.
    """

    classes: list[str]
    labels: Array
    identity: str
    read: Callable[[int], Array]

    def __len__(self) -> int:
        return len(self.labels)


def open_source(settings: Dataset) -> Source:
    """Open a study's images; with a limit, the first `limit` of each class. Raises UserError."""
    with opening(settings.path):
        opened: Source = pkgutil.resolve_name(f"{__name__}:{settings.kind}")(settings)
    if settings.limit is None:
        return opened
    import pandas as pd

    place = pd.Series(opened.labels).groupby(opened.labels).cumcount()
    rows = np.flatnonzero(place < settings.limit)
    return Source(
        opened.classes,
        opened.labels[rows],
        hashlib.sha256(opened.identity.encode() + rows.tobytes()).hexdigest(),
        lambda row: opened.read(int(rows[row])),
    )


def _arrays(images: Array, labels: Array, classes: Iterable[str]) -> Source:
    """Return a source of images in memory."""
    labels, digest = np.asarray(labels, np.int64), hashlib.sha256()
    for array in (images, labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Source(list(classes), labels, digest.hexdigest(), lambda row: images[row])


def _files(container: Container, labels: Array, classes: list[str], fit: Fit, settings: Dataset) -> Source:
    """Return a source of image files, decoded when read. Raises UserError for a class without images, which a
    conditional network would sample all the same."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(
            f"dataset.path: {container.path} has {len(empty)} of {len(classes)} classes without an image, first "
            f"{shown(classes[empty[0]])}: add its images, or take the class out"
        )

    def read(row: int) -> Array:
        where = container.where(row)
        picture = pictures.decode(container.read(row), where, as_stored=settings.kind == "imagenet")
        square = fit(picture, where, settings)
        return np.asarray(square).reshape(settings.resolution, settings.resolution, settings.channels)

    return Source(classes, labels, container.identity.hex(), read)


# --- in memory


def digits(settings: Dataset) -> Source:
    """Load the UCI optical digits; their grey levels 0..16 are scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return _arrays(images, digits.target, map(str, range(10)))


def photos(settings: Dataset) -> Source:
    """Cut scikit-learn's two photographs into squares of three sides on a grid, each reduced by means of its pixels.

    A class is a photograph and a side. Multiples of the golden ratio, modulo 1, order the images: the first of any
    number are spread over all classes and positions.
    """
    from sklearn.datasets import load_sample_images

    found, classes = load_sample_images(), list[str]()
    images, labels = list[Array](), list[int]()
    for name, pixels in zip(found.filenames, found.images, strict=True):
        picture = pictures.coloured(Image.fromarray(pixels), settings)
        edge = picture.width - _STRIP
        left, right = (0, edge) if settings.split == "train" else (edge, picture.width)
        for side in (side for side in _SIDES if side >= settings.resolution):
            for y in range(0, picture.height - side + 1, _STEP):
                for x in range(left, right - side + 1, _STEP):
                    square = picture.reduce(side // settings.resolution, (x, y, x + side, y + side))
                    images.append(np.asarray(square).reshape(*square.size, settings.channels))
                    labels.append(len(classes))
            classes.append(f"{Path(name).stem}-{side}")
    order = np.argsort(np.arange(len(labels)) * ((5**0.5 - 1) / 2) % 1)
    return _arrays(np.stack(images)[order], np.array(labels)[order], classes)


def cifar10(settings: Dataset) -> Source:
    """Open CIFAR-10 from its python archive or folder, the training batches in order."""
    path = None if settings.path is None else Path(settings.path)
    if path is not None and path.is_dir():
        batches = path if (path / "data_batch_1").exists() else path / _CIFAR10_FOLDER
        return _read_cifar10(batches.resolve(), settings, path, vouched=False)
    if path is not None and not path.is_file():
        raise UserError(
            f"dataset.path: there is no {path}: put {_CIFAR10_ARCHIVE} of {_CIFAR10_PAGE} there, or its folder "
            f"{_CIFAR10_FOLDER}; or remove dataset.path to download it"
        )
    archive = path or open_resource(_CIFAR10_ARCHIVE)
    with TemporaryDirectory(prefix="cifar10-") as folder:
        # open_resource has checked the sha256 of its archive; for any other, torchvision checks the md5 of each file.
        _unpack_cifar10(archive, Path(folder))
        return _read_cifar10(Path(folder) / _CIFAR10_FOLDER, settings, archive, vouched=path is None)


def _unpack_cifar10(archive: Path, folder: Path) -> None:
    """Unpack only the regular files that torchvision reads; skip everything else, links included."""
    from torchvision.datasets import CIFAR10

    files = [*(name for name, _ in CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"]]
    wanted = {f"{_CIFAR10_FOLDER}/{name}" for name in files}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = (each for each in tar if each.name in wanted and each.isreg() and each.size <= _BATCH_BYTES)
            tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): download it again from {_CIFAR10_PAGE}") from None
    except OSError as error:
        advice = "make room there, or set TMPDIR to a folder on another disk"
        raise user_error(error, f"cannot unpack {archive} into {folder} ({error.strerror}): {advice}") from None


def _read_cifar10(batches: Path, settings: Dataset, given: Path, vouched: bool) -> Source:
    """Read with torchvision, which unpickles: only files whose md5 it knows, unless they are vouched for."""
    from torchvision.datasets import CIFAR10

    attributes: dict[str, Any] = {"base_folder": batches.name}
    if vouched:
        attributes["train_list"] = [[name, None] for name, _ in CIFAR10.train_list]
        attributes["test_list"] = [[name, None] for name, _ in CIFAR10.test_list]
        attributes["meta"] = CIFAR10.meta | {"md5": None}
    here = type("CIFAR10Here", (CIFAR10,), attributes)
    try:
        data = here(batches.parent, train=settings.split == "train")
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise user_error(
            error,
            f"{given} does not hold the CIFAR-10 of {_CIFAR10_PAGE} (a file is missing or has another md5): "
            f"download {_CIFAR10_ARCHIVE} again",
        ) from None
    return _arrays(data.data, np.array(data.targets), data.classes)


# --- files


def image_folder(settings: Dataset) -> Source:
    """Open a tree <path>/<split>/<class>/<image>, in sorted order."""
    root = Path(settings.path or "") / settings.split
    if not root.is_dir():
        raise UserError(
            f"dataset.path: there is no folder {root} (it must hold one folder of images per class); "
            "set dataset.path and dataset.split in the study"
        )
    folders = (entry.name for entry in root.iterdir() if entry.is_dir())
    classes = [name for name in folders if not is_hidden(os.fsencode(name))]
    empty = f"dataset.path: {root} has no <class>/*.png or *.jpg in it"
    return _by_class(open_folder(root), classes, settings, empty)


def imagenet(settings: Dataset) -> Source:
    """Open ILSVRC2012's training images: the tree nXXXXXXXX/*.JPEG or the tar of tars, with the same result."""
    path = Path(settings.path or "")
    if path.is_dir():
        container: Container = open_folder(path)
        folders = [entry.name for entry in path.iterdir() if entry.is_dir()]
        empty = f"dataset.path: {path} has no nXXXXXXXX/*.JPEG in it"
    elif path.is_file():
        container = tar = open_tar_of_tars(path, f"index of {path.name}")
        folders = tar.parts
        empty = f"dataset.path: {path} has no nXXXXXXXX.tar with images in it: is it the training set's tar?"
    else:
        raise UserError(
            f"dataset.path: there is no {path}: put ILSVRC2012_img_train.tar of https://image-net.org there, or the "
            "folder it unpacks to (one folder nXXXXXXXX per class)"
        )
    return _by_class(container, [name for name in folders if _SYNSET.fullmatch(name)], settings, empty)


def _by_class(container: Container, classes: list[str], settings: Dataset, empty: str) -> Source:
    """Open the images whose first folder is one of the classes: classes in sorted order, images by path. empty: the
    error where there are none."""
    images, classes = container.images(), sorted(classes)
    labels = {os.fsencode(name): k for k, name in enumerate(classes)}
    names = images.names.tolist()
    rows = [row for row, name in enumerate(names) if b"/" in name and name.partition(b"/")[0] in labels]
    rows.sort(key=lambda row: names[row].replace(b"/", b"\0"))  # folder by folder
    if not rows:
        raise UserError(empty)
    tell_left_out(container.path, "images outside of the class folders", np.delete(images.names, rows).tolist())
    found = np.array([labels[names[row].partition(b"/")[0]] for row in rows])
    return _files(images.pick(np.array(rows)), found, classes, pictures.crop_and_resize, settings)


def ffhq(settings: Dataset) -> Source:
    """Open FFHQ's aligned images, of one class: the folder or a zip of it, with the same result."""
    wanted = "FFHQ's images1024x1024 there (the folder, or a zip of it; https://github.com/NVlabs/ffhq-dataset)"
    container = _folder_or_zip(Path(settings.path or ""), wanted)
    _rows_by_name(container, "images1024x1024 alone, without thumbnails")
    labels = np.zeros(len(container.names), np.int64)
    return _files(container, labels, ["ffhq"], pictures.resize, settings)


def celeba(settings: Dataset) -> Source:
    """Open a split of CelebA's aligned images, of one class, in the partition's order: a folder or a zip."""
    path = Path(settings.path or "")
    container = _folder_or_zip(path, f"CelebA's img_align_celeba there (the folder, or its zip; {_CELEBA_PAGE})")
    partition = _celeba_partition(path)
    wanted = _celeba_names(partition, settings.split)
    rows = _rows_by_name(container, "img_align_celeba alone")
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} images that {partition} lists for {settings.split}, "
            f"first {shown(missing[0])}: download img_align_celeba.zip of {_CELEBA_PAGE} again"
        )
    chosen = container.pick(np.array([rows[name] for name in wanted]))
    return _files(chosen, np.zeros(len(wanted), np.int64), ["celeba"], pictures.shrink_and_crop, settings)


def _celeba_partition(images: Path) -> Path:
    """Find the partition: in the images' folder, beside it or its zip, or where the original or Kaggle's tree
    has it."""
    for place in (images, images.parent, images.parent.parent, images.parent.parent / "Eval"):
        for name in _CELEBA_PARTITIONS:
            if (place / name).is_file():
                return place / name
    raise UserError(
        f"{_CELEBA_PARTITIONS[0]}, which defines CelebA's splits, is not in {images.parent}: put it beside "
        f"{images.name} (folder Eval of {_CELEBA_PAGE})"
    )


def _celeba_names(partition: Path, split: str) -> list[bytes]:
    """Read the image names of a split from the partition's lines `000001.jpg 0`, in a .csv `000001.jpg,0` below a
    header."""
    import pandas as pd

    form: dict[str, Any] = {"sep": r"\s+", "header": None} if partition.suffix == ".txt" else {"header": 0}
    try:
        table = pd.read_csv(partition, names=["name", "split"], dtype={"split": int}, **form)
    except OSError as error:
        raise user_error(error, f"cannot read {partition} ({error.strerror}): mend its disk or mount") from None
    except ValueError:
        raise UserError(f"{partition} has a line that is not of the form `000001.jpg 0`: download it again") from None
    names = [name.encode() for name in table.name[table.split == list(_CELEBA_SPLITS).index(split)]]
    different, count = len(set(names)), _CELEBA_SPLITS[split]
    if (len(names), different) != (count, count):
        raise UserError(
            f"{partition} lists {different} different images for {split} in {len(names)} lines, CelebA has {count}: "
            f"download it again from {_CELEBA_PAGE} (for a part of CelebA: dataset.limit)"
        )
    return names


def _folder_or_zip(path: Path, what: str) -> Container:
    """Open the images below a folder or in a zip, sorted. what: the remedy. Raises UserError if there are none."""
    if path.is_dir():
        container: Container = open_folder(path)
    elif path.is_file():
        container = open_zip(path)
    else:
        raise UserError(f"dataset.path: there is no {path}: put {what}")
    container = container.images(*_CELEBA_PARTITIONS)
    if not len(container.names):
        raise UserError(f"dataset.path: {path} has no *.png or *.jpg in it")
    return container


def _rows_by_name(container: Container, instead: str) -> dict[bytes, int]:
    """Map file names to rows. Raises UserError for a name in two folders; instead: a better dataset.path."""
    rows: dict[bytes, int] = {}
    for row, path in enumerate(container.names.tolist()):
        name = path.rpartition(b"/")[2]
        if rows.setdefault(name, row) != row:
            raise UserError(f"{container.path} has two images {shown(name)}: set dataset.path to {instead}")
    return rows


def edm_zip(settings: Dataset) -> Source:
    """Open the output of EDM's dataset tool, with EDM's order and labels."""
    path = Path(settings.path or "")
    if not path.is_file():
        raise UserError(f"dataset.path: there is no file {path}: put the zip that EDM's dataset_tool.py wrote there")
    everything = open_zip(path)
    meta = np.flatnonzero(everything.names == b"dataset.json")
    if not len(meta):
        raise UserError(f"{path} has no dataset.json: make the zip with EDM's dataset_tool.py")
    images = everything.images("dataset.json")
    if not len(images.names):
        raise UserError(f"{path} has no images in it: make the zip again with EDM's dataset_tool.py")
    # A name and a class for each image; JSON may write a letter in six.
    size, most = int(everything.members["size"][meta[0]]), (1 << 20) + 64 * len(images.names)
    if size > most + 6 * int(np.char.str_len(images.names).sum()):
        raise UserError(
            f"dataset.json in {path} has {size:,} bytes for {len(images.names):,} images: make the zip again"
        )
    labels = _edm_labels(everything.read(int(meta[0])), images.names, path)
    return _files(images, labels, [str(k) for k in range(int(labels.max()) + 1)], pictures.keep, settings)


def _edm_labels(content: bytes, names: Array, path: Path) -> Array:
    """Return the class of each image from dataset.json; all 0 if it has none."""
    try:
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return np.zeros(len(names), np.int64)
        if not isinstance(pairs, list):
            raise TypeError
        classes: dict[str, Any] = dict(pairs)
        twice = Counter(name for name, _ in pairs).most_common(1)
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f'dataset.json in {path} is not of the form {{"labels": [[name, class], ...]}}: make the zip again'
        raise UserError(message) from None
    if twice and twice[0][1] > 1:
        raise UserError(f"dataset.json in {path} has {shown(twice[0][0])} twice: make the zip again")
    labels = np.empty(len(names), np.int64)
    for row, raw in enumerate(names.tolist()):
        label = classes.get(raw.decode().replace("\\", "/"))
        if type(label) is not int or not 0 <= label < _MOST_CLASSES:
            message = f"dataset.json in {path} has no class for {shown(raw)} that is a whole number: make the zip again"
            raise UserError(message)
        labels[row] = label
    if len(classes) > len(names):
        raise UserError(f"dataset.json in {path} names {len(classes)} images, the zip has {len(names)}: make it again")
    return labels
