"""Files that are complete or absent: atomic writes, digests, and one clear error when a disk is full."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError


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
            f"cannot write {path}: {error.strerror or error}. What was there before is untouched; "
            "make room (or mend the permission) and run the same command again"
        ) from None
    finally:
        # Whatever prevents this also made the write fail, and the user must see that error.
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
    """Return the path of a stage's output. Raises UserError, naming the verb that makes it, if it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing: run `python -m consistency {verb}` first")
    return path


def read_json(path: Path, made_by: str) -> Any:
    """Read JSON. made_by names the verb that writes it, for the error."""
    try:
        return json.loads(require_output(path, made_by).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `{made_by}` again") from None


def read_lines(path: Path, made_by: str) -> list[str]:
    """Read the lines of a text file. made_by names the verb that writes it, for the error."""
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): run `python -m consistency {made_by}` first") from None


def read_history(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Read a training's history.jsonl; empty for a teacher not trained here. made_by names the verb, for the error."""
    try:
        return [json.loads(line) for line in read_lines(path, made_by)]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `{made_by}` again") from None


def sha256(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Write a file atomically with a function that takes its path."""
    with atomic(path) as temporary:
        try:
            writer(temporary)
        except OSError:
            raise
        except Exception as error:
            # safetensors and torch's zip writer wrap the system's error in their own.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            if "unexpected pos" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def link_file(source: Path, target: Path) -> None:
    """Place a finished file of the state among the results: a hard link, or a copy on another disk.

    The state keeps it too, so that nothing is lost if Snakemake deletes the output of an interrupted job.
    """
    with atomic(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
