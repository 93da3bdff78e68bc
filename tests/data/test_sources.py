"""Every source of images against what Pillow, pickle and the archive say of it, and the errors of damaged ones."""

import errno
import hashlib
import io
import os
import pickle
import pkgutil
import re
import resource
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tests.conftest import mistake, vouch_for
from tests.dangers import Call, file_size_limit
from tests.image_sources import (
    CELEBA_SPLITS,
    CIFAR10_CLASSES,
    SYNSETS,
    add,
    celeba_files,
    celeba_partition,
    cifar10_archive,
    cifar10_content,
    cifar10_files,
    edm_files,
    encoded,
    ffhq_files,
    imagenet_files,
    imagenet_tar,
    noise,
    pixels,
    write_folder,
    write_zip,
)
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from consistency.base.errors import UserError
from consistency.config.dataset import KINDS, Dataset
from consistency.data import sources as datasets
from consistency.data.sources import Source, open_source

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore:Corrupt EXIF"),  # the stage does the same
]

Files = dict[str, bytes]
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
#: columns of scikit-learn's photographs
SPLITS = {"train": slice(512), "test": slice(512, None)}
TRAIN = [f"data_batch_{k}" for k in range(1, 6)]


def source(kind: str, path: Path | None, resolution: int = 16, **settings: Any) -> Source:
    text = None if path is None else str(path)
    return open_source(Dataset(kind=kind, path=text, resolution=resolution, **{"channels": 3, **settings}))


def images(opened: Source) -> np.ndarray:
    return np.stack([opened.read(row) for row in range(len(opened))])


def refused(*arguments: Any, **settings: Any) -> str:
    """The message of a source that must fail when it is opened or read."""
    message = mistake(lambda: images(source(*arguments, **settings)))
    assert message.isprintable()
    return message


def lanczos(content: bytes, size: int) -> np.ndarray:
    """A colour image as EDM's tool makes it, by numpy and Pillow."""
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    height, width = pixels.shape[:2]
    side = min(height, width)
    pixels = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


# --- scikit-learn's photographs


def squares(photo: np.ndarray, side: int, size: int) -> np.ndarray:
    """Every fourteenth square of a photograph [H, W, C] in both directions, by rounded means of its pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(photo, (side, side), (0, 1))[::14, ::14]
    factor = side // size
    sums = windows.reshape(-1, photo.shape[2], size, factor, size, factor).sum((3, 5))
    return np.moveaxis((sums + factor**2 // 2) // factor**2, 1, -1).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", KINDS["photos"].sizes)
def test_photos_are_the_squares_of_a_grid_by_their_means(size: int, channels: int) -> None:
    """On both sides of column 512, each square once; a class is a photograph and a side."""
    mode = "RGB" if channels == 3 else "L"
    china, flower = (np.asarray(Image.fromarray(each).convert(mode)) for each in load_sample_images().images)
    cases = [(name, side) for name in ("china", "flower") for side in (16, 32, 64) if side >= size]
    for split, columns in SPLITS.items():
        opened = source("photos", None, size, channels=channels, split=split)
        assert opened.classes == [f"{name}-{side}" for name, side in cases]
        found = images(opened)
        for label, (name, side) in enumerate(cases):
            photo = (china if name == "china" else flower)[:, columns].reshape(427, -1, channels)
            expected = squares(photo, side, size)
            assert sorted(map(bytes, found[opened.labels == label])) == sorted(map(bytes, expected))
        assert len(set(map(bytes, found))) == len(found)
        if split == "train":
            assert (len(found), len(cases)) == KINDS["photos"].sizes[size]


def test_the_splits_of_the_photos_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative of one side of the photographs changes every image of its split, and none of the other."""
    loaded, before = load_sample_images(), {split: images(source("photos", None, split=split)) for split in SPLITS}
    for split, columns in SPLITS.items():
        negatives = [photo.copy() for photo in loaded.images]
        for photo in negatives:
            photo[:, columns] ^= 255
        made = SimpleNamespace(filenames=loaded.filenames, images=negatives)
        monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda made=made: made)
        for each in SPLITS:
            same = (images(source("photos", None, split=each)) == before[each]).all((1, 2, 3))
            assert not same.any() if each == split else same.all()


def test_the_first_photos_of_any_number_are_spread_over_the_classes() -> None:
    labels = source("photos", None, 8).labels
    share = np.bincount(labels) / len(labels)
    for count in (50, 500, 5000):
        assert np.abs(np.bincount(labels[:count], minlength=6) - count * share).max() < 5
    assert np.bincount(source("photos", None, 8, limit=7).labels).tolist() == [7] * 6


# --- CIFAR-10


@pytest.fixture
def archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature archive in resources/, for which the working directory's registry vouches."""
    monkeypatch.chdir(tmp_path)
    archive = tmp_path / "resources/cifar-10-python.tar.gz"
    cifar10_archive(archive, cifar10_files())
    vouch_for(archive)
    return archive


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Batch files whose md5 torchvision knows instead of the originals'."""
    from torchvision.datasets import CIFAR10

    files = cifar10_files()
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, digests[name]] for name in TRAIN])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": digests["batches.meta"]})
    return files


@pytest.fixture(autouse=True)
def _no_temporary_files_stay(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN), ("test", ["test_batch"])])
def test_cifar10_is_its_batches_in_order(archived: Path, split: str, names: list[str]) -> None:
    opened = source("cifar10", None, 32, split=split)
    expected, labels = cifar10_content(cifar10_files(), names)
    assert np.array_equal(images(opened), expected)
    assert opened.labels.tolist() == labels.tolist()
    assert opened.classes == CIFAR10_CLASSES


def test_cifar10_may_be_an_archive_or_folder_of_ones_own(tmp_path: Path, known: Files) -> None:
    archive, parent = tmp_path / "given.tar.gz", tmp_path / "parent"
    cifar10_archive(archive, known)
    folder = write_folder(parent / "cifar-10-batches-py", known)
    renamed = write_folder(tmp_path / "mine", known)
    expected, _ = cifar10_content(known, TRAIN)
    for path in (archive, parent, folder, renamed):
        opened = source("cifar10", path, 32)
        assert np.array_equal(images(opened), expected)
        assert opened.classes == CIFAR10_CLASSES


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_cifar10_pickle_of_another_digest_is_not_opened(
    archived: Path, tmp_path: Path, known: Files, name: str
) -> None:
    mark = tmp_path / "exploded"
    files = known | {name: pickle.dumps(Call(os.mkdir, str(mark)))}
    given = tmp_path / "given.tar.gz"
    cifar10_archive(archived, files)
    assert "has sha256" in refused("cifar10", None, 32)
    cifar10_archive(given, files)
    folder = write_folder(tmp_path / "cifar-10-batches-py", files)
    for path in (given, folder, tmp_path):
        assert f"{path} does not hold the CIFAR-10" in refused("cifar10", path, 32)
    assert not mark.exists()
    # The bomb is a real one.
    pickle.loads(files[name])
    assert mark.exists()


def test_an_incomplete_or_truncated_cifar10_is_named(tmp_path: Path, known: Files) -> None:
    for name in ("data_batch_3", "batches.meta"):
        less = {key: content for key, content in known.items() if key != name}
        folder = write_folder(tmp_path / f"without-{name}", less)
        assert f"{folder} does not hold the CIFAR-10" in refused("cifar10", folder, 32)
    archive = tmp_path / "short.tar.gz"
    cifar10_archive(archive, known)
    archive.write_bytes(archive.read_bytes()[:20_000])
    assert f"{archive} cannot be unpacked" in refused("cifar10", archive, 32)
    archive.write_bytes(b"<html>404</html>")
    assert f"{archive} cannot be unpacked" in refused("cifar10", archive, 32)


def test_a_full_disk_of_temporary_files_is_no_broken_cifar10(tmp_path: Path, known: Files) -> None:
    archive = tmp_path / "whole.tar.gz"
    cifar10_archive(archive, known)
    with file_size_limit(1000):
        assert f"cannot unpack {archive} into {tempfile.gettempdir()}/cifar10-" in refused("cifar10", archive, 32)


def test_what_else_is_in_a_cifar10_archive_goes_nowhere(tmp_path: Path, known: Files) -> None:
    path = tmp_path / "given.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../outside", str(tmp_path / "absolute"), "cifar-10-batches-py/../../outside"):
            add(tar, name, b"x")
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        tar.addfile(link)
        for name, content in known.items():
            add(tar, f"cifar-10-batches-py/{name}", content)
    before = set(tmp_path.rglob("*"))
    assert len(source("cifar10", path, 32)) == 20
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("ffhq", "FFHQ's images1024x1024"),
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("celeba", "CelebA's img_align_celeba"),
        ("edm_zip", "the zip that EDM's dataset_tool.py wrote"),
    ],
)
def test_where_there_is_nothing_it_is_said_what_to_put_there(tmp_path: Path, kind: str, words: str) -> None:
    message = refused(kind, tmp_path / "nowhere", 32)
    assert f"{tmp_path / 'nowhere'}: put {words}" in message


@pytest.mark.parametrize(
    ("kind", "words"), [("ffhq", "has no *.png or *.jpg"), ("imagenet", "has no nXXXXXXXX/*.JPEG")]
)
def test_a_folder_or_zip_without_images_is_named(tmp_path: Path, kind: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} {words}" in refused(kind, tmp_path / "empty")
    path = write_zip(tmp_path / "empty.zip", {"readme.txt": b""})
    assert f"{path} has no *.png or *.jpg" in refused("ffhq", path)


# --- FFHQ


def test_ffhq_is_resized_by_lanczos_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    """The folder and a zip of it are read alike."""
    files, terms = ffhq_files(), {"LICENSE.txt": b"terms"}
    expected = np.stack([lanczos(files[name], 16) for name in sorted(files)])
    backwards = terms | {"images1024x1024/": b""} | {f"images1024x1024/{name}": files[name] for name in reversed(files)}
    paths = [write_folder(tmp_path / "images1024x1024", files | terms)]
    paths += [write_zip(tmp_path / f"{method}.zip", backwards, method) for method in METHODS]
    for path in paths:
        opened = source("ffhq", path)
        assert np.array_equal(images(opened), expected)
        assert opened.labels.tolist() == [0] * 6
        assert opened.classes == ["ffhq"]


def test_an_ffhq_image_that_is_not_square_is_named(tmp_path: Path) -> None:
    files = ffhq_files() | {"00000/00001.png": encoded(pixels(40, 41))}
    folder = write_folder(tmp_path / "wild", files)
    assert f"{folder}/00000/00001.png has 41x40 pixels" in refused("ffhq", folder)
    path = write_zip(tmp_path / "wild.zip", files)
    assert f"00000/00001.png in {path} has 41x40 pixels" in refused("ffhq", path)


def test_thumbnails_beside_ffhqs_images_are_not_taken_for_more_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "ffhq/images1024x1024", ffhq_files())
    write_folder(tmp_path / "ffhq/thumbnails128x128", ffhq_files())
    assert "has two images 00000.png: set dataset.path to images1024x1024" in refused("ffhq", tmp_path / "ffhq")


# --- ImageNet


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("write", [write_folder, imagenet_tar])
def test_imagenet_is_cropped_and_resized_class_by_class(
    tmp_path: Path, write: Callable[[Path, Files], Path], limit: int | None
) -> None:
    """The tree and the tar of tars are read alike, grey and CMYK as Pillow converts them."""
    files = imagenet_files()
    path = write(tmp_path / "train", files | {"readme/a.JPEG": encoded(pixels(9, 9), "JPEG")})
    opened = source("imagenet", path, limit=limit)
    kept = [name for synset in SYNSETS for name in sorted(n for n in files if n.startswith(synset))[:limit]]
    assert np.array_equal(images(opened), np.stack([lanczos(files[name], 16) for name in kept]))
    assert opened.classes == SYNSETS
    assert opened.labels.tolist() == [SYNSETS.index(name.split("/")[0]) for name in kept]


def test_a_tar_of_imagenet_that_is_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    path = imagenet_tar(tmp_path / "train.tar", imagenet_files())
    content = path.read_bytes()
    for share in (0.02, 0.3, 0.7, 0.85):
        path.write_bytes(content[: int(share * len(content))])
        assert f"{path} is not a whole, uncompressed tar of tars" in refused("imagenet", path)


def test_what_is_not_imagenets_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "n01440764.tar", b"")
    assert f"{path} is not a whole, uncompressed tar of tars" in refused("imagenet", path)
    with tarfile.open(path, "w") as tar:
        add(tar, "n01440764/n01440764_1.JPEG", imagenet_files()["n01440764/n01440764_0.JPEG"])
    assert f"{path} has no nXXXXXXXX.tar" in refused("imagenet", path)


def test_names_in_a_tar_are_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.JPEG"
    files = {"n01440764/n01440764_1.JPEG": encoded(pixels(20, 20), "JPEG")}
    path = imagenet_tar(tmp_path / "in/train.tar", files)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "../../outside.JPEG", files["n01440764/n01440764_1.JPEG"])
        add(tar, "evil\n\x1b[31m.JPEG", b"no image")
        link = tarfile.TarInfo("link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open(path, "a") as tar:
        add(tar, "../n01443537.tar", inner.getvalue())
    opened = source("imagenet", path)
    assert opened.labels.tolist() == [0, 1, 1]
    assert np.array_equal(opened.read(1), opened.read(0))
    with pytest.raises(UserError, match=r"n01443537/evil\?\?\[31m.JPEG in .* is not a readable image"):
        opened.read(2)
    assert not outside.exists()


# --- EDM's zip


@pytest.mark.parametrize("method", METHODS)
def test_an_edm_zip_is_read_as_edm_reads_it(tmp_path: Path, method: int) -> None:
    expected, labels = noise(7, 16, 16, 3), [3, 0, 1, 0, 3, 2, 0]
    files = edm_files(expected, labels)
    path = write_zip(tmp_path / "edm.zip", {name: files[name] for name in reversed(files)}, method)
    opened = source("edm_zip", path)
    assert np.array_equal(images(opened), expected)
    assert opened.labels.tolist() == labels
    assert opened.classes == ["0", "1", "2", "3"]
    some = source("edm_zip", path, limit=1)
    assert some.identity != opened.identity
    assert np.array_equal(images(some), expected[[0, 1, 2, 5]])


def test_an_edm_zip_without_labels_has_one_class(tmp_path: Path) -> None:
    opened = source("edm_zip", write_zip(tmp_path / "edm.zip", edm_files(noise(3, 16, 16, 1), None)), channels=1)
    assert opened.labels.tolist() == [0, 0, 0]
    assert opened.classes == ["0"]
    assert np.array_equal(images(opened), noise(3, 16, 16, 1))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (lambda f: {n: c for n, c in f.items() if n != "dataset.json"}, "has no dataset.json"),
        (lambda f: {"dataset.json": f["dataset.json"]}, "has no images in it"),
        (lambda f: f | {"dataset.json": b"[]"}, "is not of the form"),
        (lambda f: f | {"dataset.json": b"{"}, "is not of the form"),
        (lambda f: f | {"dataset.json": b"\xff\xfe"}, "is not of the form"),
        (lambda f: f | {"dataset.json": b"[" * 100_000}, "is not of the form"),
        (lambda f: f | {"dataset.json": b'{"labels": [1, 2, 3]}'}, "is not of the form"),
        (lambda f: f | {"dataset.json": b'{"labels": []}'}, "has no class for 00000/img00000000.png"),
        (lambda f: f | {"00000/more.png": f["00000/img00000000.png"]}, "has no class for 00000/more.png"),
        (lambda f: {n: c for n, c in f.items() if "01" not in n}, "names 3 images, the zip has 2"),
        *(
            (lambda f, k=k: f | {"dataset.json": f["dataset.json"].replace(b"2]", k)}, "no class for 00000/img00000002")
            for k in (b"-1]", b"1e9]", b"9" * 30 + b"]", b"true]", b"[0, 1]]")
        ),
        (lambda f: f | {"00000/img00000001.png": b"no image"}, "00000/img00000001.png in {path} is not a readable"),
        (lambda f: f | {"00000/img00000001.png": f["00000/img00000001.png"][:200]}, "is not a readable image"),
        (lambda f: f | {"00000/img00000001.png": encoded(noise(8, 8, 3))}, "has 8x8 pixels of mode RGB"),
        (lambda f: f | {"00000/img00000001.png": encoded(noise(16, 16))}, "16x16 pixels of mode L"),
        (
            lambda f: f | {"00000/img00000001.png": encoded(np.zeros((16, 16), np.uint16))},
            "00000/img00000001.png in {path} has more than 8 bits per channel",
        ),
    ],
)
def test_an_edm_zip_of_another_form_is_named(tmp_path: Path, files: Callable[[Files], Files], words: str) -> None:
    path = write_zip(tmp_path / "edm.zip", files(edm_files(noise(3, 16, 16, 3), [0, 1, 2])))
    message = refused("edm_zip", path)
    assert words.format(path=path) in message
    assert str(path) in message


def test_a_16_bit_colour_png_is_refused_rather_than_halved(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # Pillow writes no such file: 16x16 RGB, 16 bits a channel.
    rows = b"".join(b"\0" + bytes(16 * 6) for _ in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    files = edm_files(noise(3, 16, 16, 3), None) | {"00000/img00000001.png": png}
    assert "has more than 8 bits per channel" in refused("edm_zip", write_zip(tmp_path / "edm.zip", files))


# --- CelebA


@pytest.fixture
def celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """img_align_celeba and its partition, of a CelebA with ten images."""
    monkeypatch.setattr(datasets, "_CELEBA_SPLITS", CELEBA_SPLITS)
    write_folder(tmp_path / "celeba", celeba_files() | celeba_partition())
    return tmp_path / "celeba/img_align_celeba"


def shrunk(number: int, size: int) -> np.ndarray:
    """An image of CelebA as GC's code makes it: torchvision's Resize (Lanczos) and CenterCrop."""
    transform = Compose([Resize(size, interpolation=InterpolationMode.LANCZOS), CenterCrop(size)])
    with Image.open(io.BytesIO(celeba_files()[f"img_align_celeba/{number:06d}.jpg"])) as picture:
        return np.array(transform(picture))


@pytest.mark.parametrize("size", [64, 32, 17])
@pytest.mark.parametrize(("split", "numbers"), [("train", [1, 3, 5, 7, 9]), ("valid", [2, 4]), ("test", [6, 8, 10])])
def test_celeba_is_resized_and_then_cropped_as_gc_does(celeba: Path, size: int, split: str, numbers: list[int]) -> None:
    opened = source("celeba", celeba, size, split=split)
    assert np.array_equal(images(opened), np.stack([shrunk(number, size) for number in numbers]))
    assert opened.labels.tolist() == [0] * len(numbers)
    assert opened.classes == ["celeba"]
    # The other datasets are cropped before they are resized, which is not the same.
    assert not np.array_equal(opened.read(0), lanczos(celeba_files()[f"img_align_celeba/{numbers[0]:06d}.jpg"], size))


def test_celebas_partition_may_lie_where_the_original_has_it(celeba: Path) -> None:
    """It may lie in the folder above (torchvision), with the images, or as Img/ and Eval/."""
    expected, partition = images(source("celeba", celeba)), celeba.parent / "list_eval_partition.txt"
    assert np.array_equal(images(source("celeba", celeba.parent)), expected)
    write_folder(celeba.parent / "original/Eval", celeba_partition())
    files = {"__MACOSX/img_align_celeba/._000001.jpg": b"not an image"} | celeba_files()
    path = write_zip(celeba.parent / "original/Img/img_align_celeba.zip", dict(reversed(files.items())))
    partition.rename(celeba / partition.name)
    assert np.array_equal(images(source("celeba", celeba)), expected)
    assert np.array_equal(images(source("celeba", path)), expected)


def test_a_missing_partition_of_celeba_says_where_to_put_it(celeba: Path) -> None:
    (celeba.parent / "list_eval_partition.txt").unlink()
    message = refused("celeba", celeba)
    assert f"list_eval_partition.txt, which defines CelebA's splits, is not in {celeba.parent}" in message


def test_missing_images_of_celeba_are_counted_and_the_first_is_named(celeba: Path) -> None:
    for number in (2, 5, 7):
        (celeba / f"{number:06d}.jpg").unlink()
    message = refused("celeba", celeba)
    assert f"{celeba} lacks 2 of the 5 images that" in message and "first 000005.jpg" in message
    assert "lacks 1 of the 2 images" in refused("celeba", celeba, split="valid")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace(b"000009.jpg 0\n", b""),
            "lists 4 different images for train in 4 lines, CelebA has 5",
        ),
        (lambda text: text + b"000011.jpg 0\n", "lists 6 different images for train in 6 lines, CelebA has 5"),
        (
            lambda text: text.replace(b"000009.jpg 0", b"000007.jpg 0"),
            "lists 4 different images for train in 5 lines, CelebA has 5",
        ),
        (lambda text: b"image_id,partition\n" + text, "{} has a line that is not of the form `000001.jpg 0`"),
        (lambda text: text.replace(b"000009.jpg 0", b"000009.jpg 3"), "lists 4 different images for train in 4 lines"),
        (lambda text: b"", "lists 0 different images for train"),
    ],
)
def test_a_partition_of_another_count_or_form_is_refused(
    celeba: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    partition = celeba.parent / "list_eval_partition.txt"
    partition.write_bytes(change(partition.read_bytes()))
    message = refused("celeba", celeba)
    assert str(partition) in message and words.format(partition) in message


def test_the_splits_of_the_real_celeba_are_all_its_images(tmp_path: Path) -> None:
    write_folder(tmp_path, celeba_files() | {"list_eval_partition.txt": b""})
    said = [refused("celeba", tmp_path, split=split) for split in ("train", "valid", "test")]
    assert sum(int(re.findall(r"CelebA has (\d+)", message)[0]) for message in said) == 202_599


def test_a_celeba_of_other_images_is_named(celeba: Path) -> None:
    (celeba / "000003.jpg").write_bytes(encoded(pixels(218, 218), "JPEG"))
    assert f"{celeba}/000003.jpg has 218x218 pixels, but CelebA's aligned images have 178x218" in refused(
        "celeba", celeba
    )
    write_folder(celeba.parent / "again", celeba_files(""))
    assert f"{celeba.parent} has two images 000001.jpg" in refused("celeba", celeba.parent)


# --- zips


@pytest.mark.parametrize("kind", ["ffhq", "edm_zip"])
def test_a_zip_that_is_cut_off_or_none_is_named(tmp_path: Path, kind: str) -> None:
    path = write_zip(tmp_path / "images.zip", edm_files(noise(3, 16, 16, 3), None))
    content = path.read_bytes()
    for wrong in (content[: len(content) // 2], content[:-30], b"", b"<html>404</html>"):
        path.write_bytes(wrong)
        assert f"{path} is not a whole zip file" in refused(kind, path)


@pytest.mark.parametrize("method", METHODS)
def test_one_flipped_bit_in_a_zip_is_found(tmp_path: Path, method: int) -> None:
    files = edm_files(noise(3, 16, 16, 3), None)
    path = write_zip(tmp_path / "edm.zip", files, method)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("00000/img00000001.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 100 + info.compress_size // 2] ^= 16
    path.write_bytes(content)
    assert f"00000/img00000001.png in {path} is damaged" in refused("edm_zip", path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = write_zip(tmp_path / "edm.zip", edm_files(noise(1, 16, 16, 3), None) | {"00000/z.png": bytes(1 << 29)}, 8)
    assert bomb.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"00000/z.png in {bomb} is damaged (it has {1 << 29} bytes)" in refused("edm_zip", bomb)
    # The same, with a directory that lies about the size.
    bomb.write_bytes(bomb.read_bytes().replace(struct.pack("<I", 1 << 29), struct.pack("<I", 1000)))
    assert f"00000/z.png in {bomb} is damaged (Bad CRC-32" in refused("edm_zip", bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_an_encrypted_zip_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "edm.zip", edm_files(noise(3, 16, 16, 3), None))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "is encrypted" in refused("edm_zip", path)


def test_a_name_that_a_zip_has_twice_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "edm.zip", edm_files(noise(3, 16, 16, 3), None))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("00000/img00000001.png", b"")
    assert "has 00000/img00000001.png twice" in refused("edm_zip", path)


def test_names_in_a_zip_are_never_followed(tmp_path: Path) -> None:
    files = {f"../../{name}": content for name, content in ffhq_files().items()} | {
        "/etc/0.png": encoded(noise(16, 16, 3))
    }
    path = write_zip(tmp_path / "in/ffhq.zip", files)
    before = set(tmp_path.rglob("*"))
    assert len(images(source("ffhq", path))) == 7
    assert set(tmp_path.rglob("*")) == before


def test_an_image_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ffhq", ffhq_files())
    opened = source("ffhq", folder)
    (folder / "00000/00000.png").unlink()
    with pytest.raises(UserError, match=rf"cannot read {folder}/00000/00000.png \(No such file"):
        opened.read(0)


def test_the_identity_of_a_source_changes_with_its_files(tmp_path: Path) -> None:
    files = ffhq_files()
    folder = write_folder(tmp_path / "ffhq", files)
    first = source("ffhq", folder).identity
    assert source("ffhq", folder).identity == first
    (folder / "00000/00002.png").rename(folder / "00000/00003.png")
    assert source("ffhq", folder).identity != first
    one = write_zip(tmp_path / "one.zip", edm_files(noise(3, 16, 16, 3), [0, 1, 2]))
    two = write_zip(tmp_path / "two.zip", edm_files(255 - noise(3, 16, 16, 3), [0, 1, 2]))
    assert source("edm_zip", one).identity != source("edm_zip", two).identity


# --- what is left out, in every kind

#: what systems and tools leave beside images; a folder counts once, or once a file of an archive
HIDDEN = [".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.jpg", "Thumbs.db", "desktop.ini", "@eaDir/a.png"]


def tree_files() -> Files:
    """An image folder of two classes."""
    return {f"train/{name}/{k}.png": encoded(noise(16, 16, 3, seed=k)) for name in ("cat", "dog") for k in range(3)}


def folder_of(path: Path, files: Files) -> Path:
    return write_folder(path / "train", {name.removeprefix("train/"): content for name, content in files.items()})


def celeba_folder(path: Path, files: Files) -> Path:
    return write_folder(path, files | celeba_partition())


def celeba_zip(path: Path, files: Files) -> Path:
    write_folder(path, celeba_partition())
    return write_zip(path / "img_align_celeba.zip", files)


EVERY_KIND: list[tuple[str, Callable[[Path, Files], Path], Files, list[str]]] = [
    ("image_folder", write_folder, tree_files(), ["train/", "train/cat/", "train/dog/deep/"]),
    ("imagenet", write_folder, imagenet_files(), ["", f"{SYNSETS[0]}/", f"{SYNSETS[1]}/deep/"]),
    ("imagenet", imagenet_tar, imagenet_files(), [f"{SYNSETS[0]}/", f"{SYNSETS[2]}/"]),
    ("ffhq", write_folder, ffhq_files(), ["", "00000/"]),
    ("ffhq", write_zip, ffhq_files(), ["", "00000/"]),
    ("celeba", celeba_folder, celeba_files(), ["", "img_align_celeba/"]),
    ("celeba", celeba_zip, celeba_files(), ["", "img_align_celeba/"]),
    ("edm_zip", write_zip, edm_files(noise(3, 16, 16, 3), [0, 1, 2]), ["", "00000/"]),
]


@pytest.fixture
def ten_of_celeba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_CELEBA_SPLITS", CELEBA_SPLITS)


@pytest.mark.usefixtures("ten_of_celeba")
@pytest.mark.parametrize(("kind", "write", "files", "folders"), EVERY_KIND)
def test_hidden_files_and_others_are_left_out_and_counted(
    tmp_path: Path,
    kind: str,
    write: Callable[[Path, Files], Path],
    files: Files,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = source(kind, write(tmp_path / "plain", files))
    assert capsys.readouterr().out == ""
    hidden = {f"{folder}{name}": b"" for folder in folders for name in HIDDEN}
    path = write(tmp_path / "more", files | hidden | {f"{folders[-1]}notes.txt": b"", f"{folders[-1]}old.heic": b""})
    opened = source(kind, path)
    assert (opened.classes, opened.labels.tolist()) == (plain.classes, plain.labels.tolist())
    assert np.array_equal(images(opened), images(plain))
    first, second = capsys.readouterr().out.splitlines()
    assert f"hidden files or folders left out: {len(hidden)} (" in first
    assert "files that are no images left out: 2 (" in second and "notes.txt" in second


@pytest.mark.parametrize(
    ("kind", "write", "files", "name"),
    [
        ("image_folder", write_folder, tree_files() | {"train/empty/.x.png": b""}, "empty"),
        ("imagenet", write_folder, imagenet_files() | {"n00000001/notes.txt": b""}, "n00000001"),
        ("imagenet", imagenet_tar, imagenet_files() | {"n00000001/._x.JPEG": b""}, "n00000001"),
        ("edm_zip", write_zip, edm_files(noise(3, 16, 16, 3), [0, 1, 3]), "2"),
    ],
)
def test_a_class_without_images_is_named(
    tmp_path: Path, kind: str, write: Callable[[Path, Files], Path], files: Files, name: str
) -> None:
    assert f"classes without an image, first {name}:" in refused(kind, write(tmp_path / "empty", files))


@pytest.mark.parametrize(
    ("kind", "files"), [("image_folder", tree_files()), ("imagenet", imagenet_files()), ("ffhq", ffhq_files())]
)
def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path, kind: str, files: Files) -> None:
    """A link in the class folder to images elsewhere, and links around it, to its parents and to itself."""
    moved = sorted(files)[0]
    plain = source(kind, write_folder(tmp_path / "plain", files))
    linked = write_folder(tmp_path / "linked", {name: content for name, content in files.items() if name != moved})
    write_folder(tmp_path / "elsewhere", {"0/" + moved.split("/")[-1]: files[moved]})
    place = linked / moved
    place.parent.mkdir(exist_ok=True)
    (place.parent / "0").symlink_to(tmp_path / "elsewhere/0")
    for name, target in {"up": linked, "here": place.parent, "self": place.parent / "self"}.items():
        (place.parent / name).symlink_to(target)
    (tmp_path / "elsewhere/0/back").symlink_to(linked)
    assert sorted(map(bytes, images(source(kind, linked)))) == sorted(map(bytes, images(plain)))


def test_images_outside_of_the_classes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folder(tmp_path, tree_files() | {"train/lost.png": b"", "train/also.jpg": b""})
    assert len(source("image_folder", path)) == 6
    assert (
        f"{path}/train: images outside of the class folders left out: 2 (also.jpg, lost.png)" in capsys.readouterr().out
    )
    path = imagenet_tar(tmp_path / "train.tar", imagenet_files() | {"readme/a.JPEG": b""})
    assert len(source("imagenet", path)) == 13
    assert f"{path}: images outside of the class folders left out: 1 (readme/a.JPEG)" in capsys.readouterr().out


@pytest.mark.usefixtures("ten_of_celeba")
@pytest.mark.parametrize("asked", ["os.stat", "os.scandir", "os.listdir", "io.open", "builtins.open"])
@pytest.mark.parametrize(
    ("kind", "write", "files"),
    [*(each[:3] for each in EVERY_KIND), ("cifar10", write_folder, cifar10_files())],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path,
    known: Files,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    kind: str,
    write: Callable[[Path, Files], Path],
    files: Files,
) -> None:
    path = write(tmp_path / "locked", files)
    function, calls = pkgutil.resolve_name(asked), []

    def locked(place: Any = ".", *more: Any, **options: Any) -> Any:
        if str(tmp_path) in os.fsdecode(place if isinstance(place, bytes) else str(place)):
            calls.append(place)
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return function(place, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(asked, locked)
        try:
            source(kind, path, 32 if kind == "cifar10" else 16)
        except UserError as error:
            assert "permission" in str(error) and "\n" not in str(error)
            assert str(tmp_path / "locked") in str(error)
        else:
            assert not calls


# --- Kaggle's CelebA


def kaggle_partition() -> Files:
    """list_eval_partition.csv, with the same content as the original."""
    text = celeba_partition()["list_eval_partition.txt"].replace(b" ", b",").replace(b"\n", b"\r\n")
    return {"list_eval_partition.csv": b"image_id,partition\r\n" + text}


@pytest.mark.usefixtures("ten_of_celeba")
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("below", ["", "img_align_celeba", "img_align_celeba/img_align_celeba"])
def test_kaggles_celeba_is_read(tmp_path: Path, split: str, below: str) -> None:
    original = source("celeba", write_folder(tmp_path / "original", celeba_files() | celeba_partition()), split=split)
    write_folder(tmp_path / "kaggle", celeba_files("img_align_celeba/img_align_celeba/") | kaggle_partition())
    assert np.array_equal(images(source("celeba", tmp_path / "kaggle" / below, split=split)), images(original))


@pytest.mark.usefixtures("ten_of_celeba")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.partition(b"\n")[2], "lists 4 different images for train"),
        (lambda text: text.replace(b",", b";"), "has a line that is not of the form"),
    ],
)
def test_a_csv_of_another_form_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    files = {name: change(content) for name, content in kaggle_partition().items()}
    assert words in refused("celeba", write_folder(tmp_path, celeba_files() | files))
