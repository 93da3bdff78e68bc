"""Downloads: resumable, checked by sha256 before use, moved into place whole."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from consistency.errors import UserError
from consistency.files import sha256
from consistency.progress import Progress

_CHUNK = 1 << 20


def download(url: str, path: Path, digest: str) -> None:
    """Fetch url to path unless a file of that sha256 is there. Goes on where an interrupted download stopped.

    Proxies are those of the environment. Raises UserError when the server cannot be reached or the digest is wrong.
    """
    if path.exists() and sha256(path) == digest:
        print(f"{path} is there already", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _fetch(url, part)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {url} ({reason}). Run the same command again to go on, or put the file with "
            f"sha256 {digest} at {path} by hand"
        ) from None
    found = sha256(part)
    if found != digest:
        part.unlink()
        raise UserError(f"{url} gave a file of sha256 {found}, not {digest}: it was removed; do not use that source")
    os.replace(part, path)


def _fetch(url: str, part: Path) -> None:
    """Append what is missing of url to part."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # nothing is missing
                return
            raise
    with response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length") or 0) + (have if resumed else 0)
        progress = Progress(f"download {part.stem}", total, have if resumed else 0)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.advance(len(chunk))
        progress.close()
    if total and part.stat().st_size < total:
        raise OSError(f"the connection closed after {part.stat().st_size} of {total} bytes")
