"""Containers of numbered files: a folder, a zip or a tar of tars. Any number of threads can read one at random."""

import hashlib
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from consistency.base.errors import UserError, shown, user_error
from consistency.base.progress import track

Array = np.ndarray

SUFFIXES = (b".png", b".jpg", b".jpeg", b".webp", b".bmp", b".tif", b".tiff", b".ppm")
_LEFT_BEHIND = (b"__macosx", b"thumbs.db", b"desktop.ini", b"@eadir")  # by macOS, Windows and Synology
_LONGEST_NAME = 1 << 12  # bytes, what Linux allows in a path
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

    def images(self, *used: str) -> Self:
        """Return a container of only the images; print how many files are left out. used: names that are read apart."""
        images, hidden, others = [], [], []
        for row, name in enumerate(self.names.tolist()):
            if is_hidden(name):
                hidden.append(name)
            elif name.lower().endswith(SUFFIXES):
                images.append(row)
            elif os.fsdecode(name.rpartition(b"/")[2]) not in used:
                others.append(name)
        tell_left_out(self.path, "hidden files or folders", hidden)
        tell_left_out(self.path, "files that are no images", others)
        return self.pick(np.array(images, np.int64))

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
            raise user_error(error, f"cannot read {self.where(row)} ({error.strerror}): repair or remove it") from None

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
    """Files in the tars inside a tar. members: name, offset of the content, size; parts: names of the inner tars."""

    parts: list[str]
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


@contextmanager
def opening(path: str | Path | None) -> Iterator[None]:
    """Raise UserError, naming the file or folder, where the system refuses access to it or what is in it."""
    try:
        yield
    except OSError as error:
        name = shown(error.filename or path or "the images")
        raise user_error(error, f"cannot open {name} ({error.strerror}): mend its disk or mount") from None


def is_hidden(name: bytes) -> bool:
    """Tell whether a path is one of the files and folders that systems and tools leave beside images."""
    parts = name.replace(b"\\", b"/").split(b"/")
    return any(part.lower() in _LEFT_BEHIND or (part[:1] == b"." and part not in (b".", b"..")) for part in parts)


def tell_left_out(path: Path, what: str, names: list[bytes]) -> None:
    """Print one line, if any are left out, with their number and two of them."""
    if names:
        print(f"{path}: {what} left out: {len(names):,} ({', '.join(map(shown, names[:2]))})", flush=True)


def open_folder(root: Path) -> Folder:
    """Open all files below a folder, sorted by path; links are followed, a hidden folder counts as one file. Raises
    OSError if a folder is unreadable."""
    return Folder(root, _table([(name,) for name in sorted(_files_below(os.fsencode(root), b"", frozenset()))], []))


def _files_below(root: bytes, below: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the paths of the files in the folder root/below, none if a link leads to one of those above."""
    place = os.path.join(root, below)
    here = os.stat(place)
    if (here.st_dev, here.st_ino) in above:
        return
    with os.scandir(place) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            linked = entry.is_symlink() and os.path.isdir(entry.path)
            if (linked or entry.is_dir(follow_symlinks=False)) and not is_hidden(entry.name):
                yield from _files_below(root, name, above | {(here.st_dev, here.st_ino)})
            else:
                yield name


def open_zip(path: Path) -> Zip:
    """Open all files of a zip, sorted by name. Raises UserError if it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
        files = [info for info in archive.infolist() if not info.is_dir()]
        rows = [(info.filename.encode(), info.file_size, info.CRC) for info in files]
        members = _table(rows, [("size", np.int64), ("crc", np.uint32)])
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, OverflowError) as error:
        raise user_error(error, f"{path} is not a whole zip file ({error}): download it again") from None
    members.sort(order="name")
    twice = members["name"][1:][members["name"][1:] == members["name"][:-1]]
    if len(twice):
        raise UserError(f"{path} has {shown(twice[0])} twice: make the zip again")
    return Zip(path, members, archive)


def open_tar_of_tars(path: Path, label: str) -> Tar:
    """Open the files in the tars inside a tar, sorted and named <name of the inner tar>/<name in it>.

    Reads the headers once, and no content. Raises UserError for a truncated or compressed tar.
    """
    try:
        with tarfile.open(path, "r:") as outer:
            parts = [part for part in outer.getmembers() if part.isreg() and part.name.endswith(".tar")]
            parts = [part for part in parts if not is_hidden(part.name.encode(errors="surrogateescape"))]
            tables = [_inner(outer, part) for part in track(label)(parts)]
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise user_error(
            error, f"{path} is not a whole, uncompressed tar of tars ({error}): download it again"
        ) from None
    members = np.concatenate([_table([], _PLACE), *tables])
    members.sort(order="name")
    return Tar(path, members, [Path(part.name).stem for part in parts], os.open(path, os.O_RDONLY | os.O_CLOEXEC))


_PLACE = [("offset", np.int64), ("size", np.int64)]


def _inner(outer: tarfile.TarFile, part: tarfile.TarInfo) -> Array:
    """Return the files of an inner tar, with their offsets in the outer tar."""
    folder, start, rows = Path(part.name).stem, part.offset_data, []
    with tarfile.open(fileobj=outer.extractfile(part), mode="r:") as inner:
        for member in inner:
            name = f"{folder}/{member.name}".encode(errors="surrogateescape")
            if member.isreg() and not member.issparse():
                rows.append((name, start + member.offset_data, member.size))
    return _table(rows, _PLACE)


def _table(rows: list[tuple[Any, ...]], numbers: list[tuple[str, Any]]) -> Array:
    """Return a structured array whose first field is as wide as the longest name. Raises ValueError for a name so long
    that the array would be much larger than the names."""
    width = max((len(row[0]) for row in rows), default=1)
    if width > _LONGEST_NAME:
        raise ValueError(f"a name in it has {width:,} bytes")
    return np.array(rows, [("name", f"S{max(width, 1)}"), *numbers])
