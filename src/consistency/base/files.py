"""Files that are complete or absent: atomic writes, digests, and one clear error when a disk is full."""

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from consistency.base.errors import UserError, command_of, user_error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It is moved onto `path` if the block succeeds, else removed.

    Raises UserError if the file cannot be written (a full disk, no permission); the old file stays intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Its previous version is untouched; "
            "free disk space (or fix the permission) and run the same command again"
        ) from None
    finally:
        # If the removal fails too, the user must see the error of the write.
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, readable and with sorted keys."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def require_output(path: Path, verb: str) -> Path:
    """Return the path of a stage's output. Raises UserError if it is missing, naming the verb that makes it, or may not
    be read."""
    try:
        if not path.is_dir():
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise UserError(f"{path} is no file: remove it and run {command_of(verb)} again")
            path.open("rb").close()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {command_of(verb)} first") from None
    except OSError as error:
        raise user_error(error, f"cannot read {path} ({error.strerror}): mend its disk or mount") from None
    return path


@contextmanager
def reading(path: Path, verb: str) -> Iterator[None]:
    """Raise UserError as `require_output` does, or if the block cannot read a stage's output."""
    require_output(path, verb)
    try:
        yield
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, RuntimeError, MemoryError) as error:
        # RuntimeError: of deep brackets, an encrypted zip or one of a later version.
        raise user_error(error, f"{path} is damaged ({error}): delete it and run {command_of(verb)} again") from None


#: bytes of a JSON file; a published page's cards have 100,000. Parsed, a byte may take 60.
_MOST_JSON = 1 << 23


def read_json(path: Path, verb: str) -> dict[str, Any]:
    """Read a JSON object. Raises UserError as `reading` does."""
    with reading(path, verb):
        if (size := path.stat().st_size) > _MOST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than such a file can have")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no keys and values")
        return content


def read_lines(path: Path, verb: str) -> list[str]:
    """Read the lines of a text file. Raises UserError as `reading` does."""
    with reading(path, verb):
        return path.read_text(encoding="utf-8").splitlines()


def read_history(path: Path, verb: str) -> list[dict[str, Any]]:
    """Read a training's history.jsonl; empty for a teacher not trained here. Raises UserError as `reading` does."""
    with reading(path, verb):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sha256(path: Path) -> str:
    """Return a file's hex digest; it is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Write a file atomically with a function that takes its path and may replace the file there."""
    with atomic(path) as temporary:
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            writer(temporary)
            temporary.chmod(mode)  # as umask says: safetensors makes files that only their owner may read
        except OSError:
            raise
        except Exception as error:
            # safetensors and torch's zip writer wrap the system's error in their own.
            found = re.search(r"\(os error (\d+)\)|unexpected pos", str(error))
            if found is None:
                raise
            number = int(found[1] or errno.ENOSPC)
            raise OSError(number, os.strerror(number)) from error


def link_file(source: Path, target: Path) -> None:
    """Publish a file of the state among the results, as a hard link or, on another disk, as a copy.

    It stays in the state, so nothing is lost if Snakemake deletes the output of an interrupted job.
    """
    with atomic(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
