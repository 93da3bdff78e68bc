"""Containers of numbered files: a folder, a zip or a tar of tars. Any number of threads can read one at random."""

import hashlib
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from consistency.base.errors import NoPermission, UserError
from consistency.base.progress import track

Array = np.ndarray

SUFFIXES = (b".png", b".jpg", b".jpeg")
_LARGEST = 1 << 28  # bytes of a file in an archive; anything larger is not an image


@dataclass(frozen=True)
class Container(ABC):
    """Numbered files. path: folder or archive; members: structured [N], `name` and the fields of the subclass."""

    path: Path
    members: Array

    @property
    def names(self) -> Array:
        """Path of each file inside the container, bytes [N]."""
        return self.members["name"]

    @property
    def identity(self) -> bytes:
        """Digest that changes when files are added, removed or (in an archive) changed."""
        # The padding of the names counts too; its width follows from the longest name.
        return hashlib.sha256(self.members.tobytes()).digest()

    def pick(self, rows: Array) -> Self:
        """Return a container of only those files."""
        return replace(self, members=self.members[rows])

    def images(self) -> Self:
        """Return a container of only the files with an image's suffix."""
        return self.pick(np.flatnonzero([is_image(name) for name in self.names.tolist()]))

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Read the content of a file. Raises UserError if it cannot be read or is damaged."""

    def where(self, row: int) -> str:
        """Return the name of a file for a message."""
        return f"{shown(self.names[row])} in {self.path}"


@dataclass(frozen=True)
class Folder(Container):
    """Files below a folder. members: name."""

    def where(self, row: int) -> str:
        return shown(str(self._file(row)))

    def read(self, row: int) -> bytes:
        try:
            return self._file(row).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.where(row)} ({error.strerror}): repair or remove it") from None

    def _file(self, row: int) -> Path:
        return self.path / os.fsdecode(bytes(self.names[row]))


@dataclass(frozen=True)
class Zip(Container):
    """Members of a zip. members: name, size, crc."""

    archive: zipfile.ZipFile

    def read(self, row: int) -> bytes:
        name, size, _ = self.members[row].tolist()
        try:
            if size > _LARGEST:
                raise ValueError(f"it has {size} bytes")
            with self.archive.open(name.decode()) as file:
                # At most the declared size, so that a zip bomb is detected and not unpacked.
                return file.read(size)
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.where(row)} is damaged ({error}): download or make the zip again") from None


@dataclass(frozen=True)
class Tar(Container):
    """Files in an uncompressed tar. members: name, offset of the content, size."""

    file: int  # descriptor

    def read(self, row: int) -> bytes:
        _, offset, size = self.members[row].tolist()
        try:
            content = os.pread(self.file, min(size, _LARGEST), offset)
        except OSError as error:
            raise UserError(f"cannot read {self.where(row)} ({error.strerror}): download the tar again") from None
        if len(content) != size:
            raise UserError(f"{self.where(row)} is truncated: download the tar again")
        return content


def shown(name: bytes | str) -> str:
    """Return a file name as printable text for a one-line message."""
    text = os.fsdecode(bytes(name)) if isinstance(name, bytes) else name
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def is_image(name: bytes) -> bool:
    """Tell whether a name has an image's suffix."""
    return name.lower().endswith(SUFFIXES)


def open_folder(root: Path, names: Iterable[bytes]) -> Folder:
    """Open those files of a folder, in the given order."""
    return Folder(root, _table([(name,) for name in names], []))


def images_below(folder: Path) -> list[bytes]:
    """List the relative paths of the images below a folder, unordered. Raises UserError if a folder is unreadable."""
    root, found = os.fsencode(folder), []

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {shown(error.filename)} ({error.strerror}): fix its permission")

    for place, _, files in os.walk(root, onerror=fail):
        below = os.path.relpath(place, root)
        found += [name if below == b"." else os.path.join(below, name) for name in files if is_image(name)]
    return found


def open_zip(path: Path) -> Zip:
    """Open all files of a zip, sorted by name. Raises UserError if it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
        files = [info for info in archive.infolist() if not info.is_dir()]
        rows = [(info.filename.encode(), info.file_size, info.CRC) for info in files]
        members = _table(rows, [("size", np.int64), ("crc", np.uint32)])
    except PermissionError as error:
        raise NoPermission(error) from None
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a whole zip file ({error}): download it again") from None
    members.sort(order="name")
    twice = members["name"][1:][members["name"][1:] == members["name"][:-1]]
    if len(twice):
        raise UserError(f"{path} has {shown(twice[0])} twice: make the zip again")
    return Zip(path, members, archive)


def open_tar_of_tars(path: Path, label: str) -> Tar:
    """Open the images in the tars inside a tar, sorted and named <name of the inner tar>/<name in it>.

    Reads the headers once, and no content. Raises UserError for a truncated or compressed tar.
    """
    try:
        with tarfile.open(path, "r:") as outer:
            parts = [part for part in outer.getmembers() if part.isreg() and part.name.endswith(".tar")]
            tables = [_inner(outer, part) for part in track(label)(parts)]
    except PermissionError as error:
        raise NoPermission(error) from None
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a whole, uncompressed tar of tars ({error}): download it again") from None
    members = np.concatenate([_table([], _PLACE), *tables])
    members.sort(order="name")
    return Tar(path, members, os.open(path, os.O_RDONLY | os.O_CLOEXEC))


_PLACE = [("offset", np.int64), ("size", np.int64)]


def _inner(outer: tarfile.TarFile, part: tarfile.TarInfo) -> Array:
    """Return the images of an inner tar, with their offsets in the outer tar."""
    folder, start, rows = Path(part.name).stem, part.offset_data, []
    with tarfile.open(fileobj=outer.extractfile(part), mode="r:") as inner:
        for member in inner:
            name = f"{folder}/{member.name}".encode(errors="surrogateescape")
            if member.isreg() and not member.issparse() and is_image(name):
                rows.append((name, start + member.offset_data, member.size))
    return _table(rows, _PLACE)


def _table(rows: list[tuple[Any, ...]], numbers: list[tuple[str, Any]]) -> Array:
    """Return a structured array whose first field is as wide as the longest name."""
    width = max((len(row[0]) for row in rows), default=1)
    return np.array(rows, [("name", f"S{max(width, 1)}"), *numbers])
