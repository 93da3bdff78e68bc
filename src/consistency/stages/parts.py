"""Arrays that take hours to fill: parts in the state folder, and how many of their first rows are done."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from consistency.files import atomic, read_json, write_json
from consistency.training.distributed import Ranks

RECORD_EVERY = 10.0  # seconds between two notes of what is done, at least


class Parts:
    """uint8 arrays of one shape in a folder. made_from: what their content depends on; parts of other origin are
    removed. Several processes may fill them together; the first makes the files and notes what is done."""

    def __init__(
        self, folder: Path, made_from: dict[str, str], shape: tuple[int, ...], ranks: Ranks, made_by: str
    ) -> None:
        self.folder, self.shape, self.ranks = folder, shape, ranks
        self._note = folder / "progress.json"
        self._content: dict[str, Any] = {"made_from": made_from, "shape": list(shape), "done": {}}
        self._recorded = time.monotonic()
        if self._note.exists():
            found = read_json(self._note, made_by)
            if self._content | {"done": found.get("done")} == found:
                self._content = found
        ranks.wait()  # nobody writes before all have read
        if ranks.first and not self._content["done"]:
            for stale in (self._note, *folder.glob("*.npy"), *folder.glob(".*.tmp")):
                stale.unlink(missing_ok=True)

    def done(self, name: str) -> int:
        """How many rows of an array are done; 0 where there is none."""
        return int(self._content["done"].get(name, 0)) if self.path(name).exists() else 0

    def path(self, name: str) -> Path:
        """Where an array lies."""
        return self.folder / f"{name}.npy"

    def open(self, name: str) -> np.memmap[Any, Any]:
        """The array, memory-mapped for writing; made if there is none. Raises UserError when the disk is too small."""
        if self.ranks.first and not self.path(name).exists():
            with atomic(self.path(name)) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=self.shape)
                with temporary.open("r+b") as file:
                    # A full disk would be noticed only by SIGBUS, in the middle of the sampling.
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        self.ranks.wait()
        return np.lib.format.open_memmap(self.path(name), mode="r+")

    def record(self, name: str, rows: int, images: np.memmap[Any, Any], now: bool = False) -> None:
        """Note that the first rows of an array are done; on disk only every few seconds, unless now."""
        self._content["done"][name] = rows
        if self.ranks.first and (now or time.monotonic() - self._recorded > RECORD_EVERY):
            images.flush()
            write_json(self._note, self._content)
            self._recorded = time.monotonic()
