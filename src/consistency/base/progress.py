"""Progress with rate and ETA: a bar on a terminal of its own, lines in a log or on a shared terminal."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
Rows = TypeVar("Rows", bound=Sized)

#: set by the workflow to "host:pid" of the Snakemake that starts the jobs
SUPERVISOR = "CONSISTENCY_SUPERVISOR"
#: seconds between two lines of a log
LINE_EVERY = 5.0


class Progress(tqdm):
    """A counter from `initial` to `total`. note: returns text to append to each line; shown: False for all but one of
    several equal counters; more: tqdm's options."""

    monitor_interval = 0  # no monitoring thread

    def __init__(
        self, label: str, total: int, initial: int = 0, note: Callable[[], str] = str, shown: bool = True, **more: Any
    ) -> None:
        if not (shown and sys.stderr.isatty() and SUPERVISOR not in os.environ):
            file = SimpleNamespace(write=partial(_write_line, note, shown))
            more |= {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "miniters": 1, "position": 0}
            more |= {"file": file, "ascii": " #", "ncols": 100}
        super().__init__(desc=label, total=total, initial=initial, **{"unit": "step"} | more)

    def counted(self, pieces: Iterable[Rows]) -> Iterator[Rows]:
        """Yield the pieces, and count the rows of each when the next is requested."""
        for piece in pieces:
            yield piece
            self.update(len(piece))

    def close(self) -> None:
        """Show the final state, even if the work was too short for a line."""
        if self.n > self.initial:
            self.delay = 0
        super().close()

    def reset(self, total: float | None = None) -> None:
        """Restart the count but not the clock; pooch calls it at the end of a download."""
        self.n = 0

    def __bool__(self) -> bool:
        return True

    def __del__(self) -> None:
        """Print nothing, so that an error that ended the work is the last line."""


def _write_line(note: Callable[[], str], shown: bool, text: str) -> None:
    """Write tqdm's text and a note as a line."""
    # A training must still save when the reader of its pipe is gone.
    with suppress(BrokenPipeError):
        if shown and text.strip():
            print(f"{text.strip()} {note()}".rstrip(), file=sys.stderr, flush=True)


def track(label: str) -> Callable[[Iterable[T]], Iterator[T]]:
    """Return a wrapper of a finite iterable that shows its progress."""

    def wrap(steps: Iterable[T]) -> Iterator[T]:
        items = list(steps)
        progress = Progress(label, len(items))
        for item in items:
            yield item
            progress.update()
        progress.close()

    return wrap
