"""Miniatures of the real datasets in their true form: the layout, names and encodings of the originals."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SYNSETS = ["n01440764", "n01443537", "n02105855"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth random image with some noise, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    smooth = [Image.fromarray(channel).resize((width, height)) for channel in np.moveaxis(coarse, -1, 0)]
    noisy = np.stack(smooth, -1).astype(int) + rng.integers(-20, 21, (height, width, channels))
    image: np.ndarray = noisy.clip(0, 255).astype(np.uint8)
    return image[..., 0] if channels == 1 else image


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's content."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A plain file of a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# --- CIFAR-10


def cifar10_files(per_batch: int = 4) -> dict[str, bytes]:
    """The batch files, pickles of {data: uint8 [n, 3072] (red, green, blue planes), labels, ...}, and batches.meta."""
    rng = np.random.default_rng(0)
    files = {}
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {
            "batch_label": f"batch {number + 1}",
            "labels": [(per_batch * number + i) % 10 for i in range(per_batch)],
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "filenames": [f"image_{number}_{i}.png" for i in range(per_batch)],
        }
        files[name] = pickle.dumps(content, protocol=2)
    meta = {"num_cases_per_batch": per_batch, "label_names": CIFAR10_CLASSES, "num_vis": 3072}
    files["batches.meta"] = pickle.dumps(meta, protocol=2)
    return files


def cifar10_archive(path: Path, files: dict[str, bytes]) -> None:
    """cifar-10-python.tar.gz with those batch files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            add(tar, f"cifar-10-batches-py/{name}", content)
        add(tar, "cifar-10-batches-py/readme.html", b"<html></html>")


def cifar10_content(files: dict[str, bytes], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of batch files that the tests themselves wrote."""
    batches = [pickle.loads(files[name]) for name in names]
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return np.moveaxis(planes, 1, 3), np.concatenate([batch["labels"] for batch in batches])


# --- FFHQ


def ffhq_files(count: int = 6, size: int = 40) -> dict[str, bytes]:
    """images1024x1024/00000/00000.png, ..., smaller than the originals; across two subfolders."""
    numbers = [*range(count // 2), *range(1000, 1000 + count - count // 2)]
    return {f"{k // 1000:02d}000/{k:05d}.png": encoded(pixels(size, size, seed=k)) for k in numbers}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    """Write those files below a folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write those files into a zip, in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- ImageNet


def imagenet_files(per_class: int = 3) -> dict[str, bytes]:
    """nXXXXXXXX/nXXXXXXXX_<k>.JPEG: colour of many shapes, and the oddities: grey, CMYK, broken EXIF, a PNG."""
    files = {}
    for k, synset in enumerate(SYNSETS):
        for i in range(per_class):
            shape = [(60, 80), (75, 50), (64, 64)][i % 3]
            content = encoded(pixels(*shape, seed=10 * k + i), "JPEG", quality=90)
            files[f"{synset}/{synset}_{100 * i + k}.JPEG"] = content
    first = SYNSETS[0]
    files[f"{first}/{first}_7.JPEG"] = encoded(pixels(50, 70, 1, seed=50), "JPEG")
    files[f"{first}/{first}_8.JPEG"] = encoded(Image.fromarray(pixels(50, 70, seed=51)).convert("CMYK"), "JPEG")
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x0f\x01\x02\0\xff\xff"
    files[f"{first}/{first}_9.JPEG"] = encoded(pixels(50, 70, seed=52), "JPEG", exif=broken)
    files[f"{SYNSETS[2]}/{SYNSETS[2]}_2933.JPEG"] = encoded(pixels(50, 70, 4, seed=53), "PNG")
    return files


def imagenet_tar(path: Path, files: dict[str, bytes]) -> Path:
    """ILSVRC2012_img_train.tar: a tar of one tar a class, both in an order of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as outer:
        for synset in sorted({name.split("/")[0] for name in files}, reverse=True):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for name in reversed([name for name in files if name.startswith(f"{synset}/")]):
                    add(inner, name.split("/")[1], files[name])
            add(outer, f"{synset}.tar", content.getvalue())
    return path


# --- CelebA

#: images of the miniature's train, valid and test
CELEBA_SPLITS = {"train": 5, "valid": 2, "test": 3}


def celeba_files(folder: str = "img_align_celeba/") -> dict[str, bytes]:
    """img_align_celeba/000001.jpg, ..., of the originals' 178x218 pixels; splits alternate, unlike the original's."""
    count = sum(CELEBA_SPLITS.values())
    return {f"{folder}{k:06d}.jpg": encoded(pixels(218, 178, seed=k), "JPEG") for k in range(1, count + 1)}


def celeba_partition() -> dict[str, bytes]:
    """list_eval_partition.txt of those files: 000001.jpg 0, ...; images 2, 4 are valid, 6, 8, 10 test."""
    lines = [f"{k:06d}.jpg {number}\n" for k, number in enumerate([0, 1, 0, 1, 0, 2, 0, 2, 0, 2], 1)]
    return {"list_eval_partition.txt": "".join(lines).encode()}


# --- EDM's zip


def edm_files(images: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
    """The files that EDM's dataset tool writes: 00000/img00000000.png, ..., uncompressed, then dataset.json."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    files = {
        name: encoded(image.squeeze(-1) if image.shape[-1] == 1 else image, compress_level=0, optimize=False)
        for name, image in zip(names, images, strict=True)
    }
    pairs = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    return files | {"dataset.json": json.dumps({"labels": pairs}).encode()}
