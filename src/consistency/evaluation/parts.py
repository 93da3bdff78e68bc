"""Arrays that take hours to fill: partial arrays in the state folder, and the number of their finished rows."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from consistency.base.files import atomic, read_json, write_json
from consistency.runtime.distributed import Ranks

RECORD_EVERY = 10.0  # seconds between two records of progress, at least


class Parts:
    """uint8 arrays of one shape in a folder. made_from: identifies their inputs; parts made from others are removed.
    Several processes may fill them together; the first makes the files and records progress."""

    def __init__(self, folder: Path, made_from: dict[str, str], shape: tuple[int, ...], ranks: Ranks) -> None:
        self.folder, self.shape, self.ranks = folder, shape, ranks
        self._note = folder / "progress.json"
        self._content: dict[str, Any] = {"made_from": made_from, "shape": list(shape), "done": {}}
        self._recorded = time.monotonic()
        if self._note.exists():
            found = read_json(self._note, "")
            if self._content | {"done": found.get("done")} == found:
                self._content = found
        ranks.wait()  # no process writes before all have read
        if ranks.first and not self._content["done"]:
            for stale in (self._note, *folder.glob("*.npy"), *folder.glob(".*.tmp")):
                stale.unlink(missing_ok=True)

    def done(self, name: str) -> int:
        """Return the number of finished first rows of an array; 0 if there is none."""
        return int(self._content["done"].get(name, 0)) if self.path(name).exists() else 0

    def path(self, name: str) -> Path:
        """Return the path of an array."""
        return self.folder / f"{name}.npy"

    def open(self, name: str) -> np.memmap[Any, Any]:
        """Open or create an array, memory-mapped for writing. Raises UserError if the disk is too small."""
        if self.ranks.first and not self.path(name).exists():
            with atomic(self.path(name)) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=self.shape)
                with temporary.open("r+b") as file:
                    # A full disk would otherwise show only as SIGBUS, in the middle of the sampling.
                    if hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        self.ranks.wait()
        return np.lib.format.open_memmap(self.path(name), mode="r+")

    def record(self, name: str, rows: int, images: np.memmap[Any, Any], now: bool = False) -> None:
        """Record that the first rows of an array are done; on disk only every few seconds, unless now."""
        self._content["done"][name] = rows
        if self.ranks.first and (now or time.monotonic() - self._recorded > RECORD_EVERY):
            images.flush()
            write_json(self._note, self._content)
            self._recorded = time.monotonic()
