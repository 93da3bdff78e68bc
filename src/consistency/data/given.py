"""Images that a person gives to be scored or fitted: an array, a .npy file, or a folder of pictures."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consistency.base.errors import UserError, raise_all, user_error
from consistency.config.dataset import Dataset
from consistency.data.containers import Folder, open_folder, opening
from consistency.data.pictures import decode
from consistency.data.prepared import to_signed

Array = np.ndarray


def open_given(images: Array | str | Path, settings: Dataset) -> tuple[int, Iterable[Array]]:
    """Return the number of images, and the images as uint8 chunks [n, H, W, C]; a folder's in sorted order, decoded one
    at a time.

    Raises UserError if there are none, if one is unreadable, and if they have not the dataset's size and channels:
    resizing here would change what is measured.
    """
    shape = (settings.resolution, settings.resolution, settings.channels)
    if isinstance(images, str | Path):
        path = Path(images)
        if folder := _pictures(path):
            return len(folder.names), _decoded(folder, shape)
        images, where = _array_of(path), str(path)
    else:
        where = "the array"
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        found, wanted = f"{images.dtype} {list(images.shape)}", ", ".join(map(str, ("N", *shape)))
        raise UserError(f"{where} is {found}, but the study's images are uint8 [{wanted}]: convert it first")
    return len(images), [images]


def read_given(path: Path) -> Tensor:
    """Return the images [N, ...] of a folder of pictures or a .npy: uint8 [N, H, W, C] as float32 [N, C, H, W] in
    [-1, 1], float32 and float64 as they are.

    Raises UserError if there are none, if one is unreadable, and if the pictures differ in size or mode.
    """
    if (folder := _pictures(path)) is None:
        array = _array_of(path)
    else:
        first = decode(folder.read(0), folder.where(0))
        shape = (first.height, first.width, 1 if first.mode == "L" else 3)
        array = np.concatenate(list(_decoded(folder, shape)))
    if array.dtype == np.uint8 and array.ndim == 4:
        return to_signed(torch.from_numpy(array.copy()))
    if array.dtype not in (np.float32, np.float64):
        raise UserError(f"{path} is {array.dtype} {list(array.shape)}: save uint8 [N, H, W, C], or floats [N, ...]")
    return torch.from_numpy(array.copy())


def _pictures(path: Path) -> Folder | None:
    """Open the pictures of a folder; None for a path that is no folder."""
    with opening(path):
        if not path.is_dir():
            return None
        folder = open_folder(path).images()
    if not len(folder.names):
        raise UserError(f"{path} has no *.png or *.jpg in it")
    return folder


def _array_of(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r")  # refuses pickles
        return array if isinstance(array, np.ndarray) else np.empty(0)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise user_error(error, f"{path} is neither a folder of images nor a .npy file ({reason})") from None


def _decoded(folder: Folder, shape: tuple[int, int, int]) -> Iterator[Array]:
    height, width, channels = shape
    wanted = ("RGB" if channels == 3 else "L", width, height)

    def decoded(row: int) -> Array:
        picture = decode(folder.read(row), folder.where(row))
        if (picture.mode, *picture.size) != wanted:
            raise UserError(
                f"{folder.where(row)} has {picture.width}x{picture.height} pixels of mode {picture.mode}, not "
                f"{width}x{height} of {wanted[0]}, as all images must: convert it first"
            )
        return np.array(picture).reshape(1, *shape)

    errors: list[str] = []
    for row in range(len(folder.names)):
        try:
            found = decoded(row)
        except UserError as error:
            errors.append(str(error))
        if not errors:
            yield found
    raise_all(errors, "images")
