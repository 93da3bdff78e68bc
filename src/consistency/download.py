"""Downloads: resumed where they stopped, never two versions of a file glued together, moved into place whole."""

import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path

from consistency import __version__
from consistency.errors import UserError
from consistency.files import write_json
from consistency.progress import Progress

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
# Seconds before each further attempt; an attempt that got further than any before starts the count again.
_PAUSES = (1.0, 4.0, 15.0)
_PASSING = (408, 429, 500, 502, 503, 504)


class _Interrupted(OSError):
    """What came is not the whole file; another attempt may get it."""


class _Refused(OSError):
    """What came is not the file, and another attempt would not bring it."""


_NETWORK = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)


def download(url: str, path: Path, fault: Callable[[Path], str | None], otherwise: str) -> None:
    """Fetch url to path, in place of what is there. Goes on where an interrupted download of the same file stopped.

    fault: what speaks against a file that arrived ('has sha256 ...'), or None; a faulty one is removed and never stands
    at path. otherwise: what else can be done ('put the file at ...'), for the errors. Proxies are those of the
    environment. Raises UserError when the server cannot be reached, the disk is full or the file is faulty.
    """
    part = path.with_name(path.name + ".part")
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part)
    except _NETWORK as error:
        raise UserError(
            f"cannot download {url} ({_reason(error)}). Run the same command again to go on, or {otherwise}"
        ) from None
    found = fault(part)
    if found:
        _discard(part)
        raise UserError(f"{url} gave a file that {found}: it was removed. Do not use that source; {otherwise}")
    with _disk(path):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _notes(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Bring part to the whole of url, in a few attempts."""
    furthest, failed = _size(part), 0
    while True:
        try:
            return _attempt(url, part)
        except _NETWORK as error:
            if _size(part) > furthest:
                furthest, failed = _size(part), 0
            if not _passing(error) or failed == len(_PAUSES):
                raise
            print(f"{url}: {_reason(error)}; trying again in {_PAUSES[failed]:g} s", file=sys.stderr, flush=True)
        time.sleep(_PAUSES[failed])
        failed += 1


def _attempt(url: str, part: Path) -> None:
    """Append what is missing of url to part, or start it afresh where the server's file is another."""
    validator = _validator_of(part, url)
    have = _size(part) if validator else 0
    headers = {"User-Agent": f"consistency-distillation/{__version__}"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        # An opener of its own: urlopen keeps the proxies that the environment named at its first call.
        response = urllib.request.build_opener().open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # nothing was missing
            _discard(part)
            raise _Interrupted("the server's file is shorter than what was there of it: starting over") from None
    with response:
        if response.status == 206:
            total = _continued(response.headers, have, validator, part)
        else:
            have, total = 0, response.length
            _start(part, url, response.headers)
        _append(response, part, have, total)


def _append(response: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> None:
    """Write the answer behind the first `have` bytes of part. total: bytes of the whole file, where the server said."""
    progress = Progress(f"download {part.stem} (bytes)", total or 0, have)
    while chunk := response.read(_CHUNK):
        if have == 0 and _is_web_page(response.headers, chunk):
            raise _Refused("it answered with a web page instead of the file; does the network ask for a login?")
        with _disk(part), part.open("ab") as file:
            file.write(chunk)
        have += len(chunk)
        progress.advance(len(chunk))
    progress.close()
    if have == 0:
        raise _Refused("it answered with an empty file")
    if total is not None and have != total:
        raise _Interrupted(f"the connection closed after {have} of {total} bytes")


def _continued(headers: Message, have: int, validator: str, part: Path) -> int | None:
    """The whole file's size, when the bytes that follow continue part; a part of another file is given up."""
    span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if have == 0 or span is None or int(span[1]) != have or _validator(headers) not in (validator, ""):
        _discard(part)
        raise _Interrupted("the server sent a piece that does not continue what is there: starting over")
    return int(span[2]) if span[2] != "*" else None


# --- what a part is a part of


def _start(part: Path, url: str, headers: Message) -> None:
    """An empty part, with what names this version of the server's file beside it."""
    _discard(part)
    validator = _validator(headers)
    if validator:
        write_json(_notes(part), {"url": url, "validator": validator})


def _validator(headers: Message) -> str:
    """What If-Range takes: a strong ETag, else the date of the last change; '' where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _validator_of(part: Path, url: str) -> str:
    """The validator that part was begun with; '' where there is none, and part cannot be continued."""
    try:
        notes = json.loads(_notes(part).read_text())
        return str(notes["validator"]) if notes["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    with _disk(part):
        part.unlink(missing_ok=True)
        _notes(part).unlink(missing_ok=True)


def _size(part: Path) -> int:
    with suppress(FileNotFoundError):
        return part.stat().st_size
    return 0


# --- errors


def _is_web_page(headers: Message, beginning: bytes) -> bool:
    looks = beginning[:100].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    return looks or headers.get_content_type() == "text/html"


def _passing(error: Exception) -> bool:
    """Whether another attempt may succeed. No route, no name and no listener are no network: told at once."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _PASSING
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    broken = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, TimeoutError, ssl.SSLEOFError)
    return isinstance(cause, (*broken, http.client.IncompleteRead, _Interrupted))


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(cause).split()) or type(cause).__name__


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the disk refuses is not the network's fault."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. "
            "Make room (or mend the permission) and run the same command again to go on"
        ) from None
