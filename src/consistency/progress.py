"""Progress with rate and ETA: a bar on a terminal of one's own, readable lines everywhere else."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

from tqdm import tqdm

from consistency.supervision import SUPERVISOR

T = TypeVar("T")

#: seconds between two lines where no bar can be drawn (a log file, or a terminal shared with other jobs)
LINE_EVERY = 5.0


class Progress(tqdm):
    """A counter from `initial` to `total` that shows itself, unless it is one of several that are the same.

    note: a callable whose text is appended to a line; more: tqdm's options.
    """

    monitor_interval = 0  # no thread of tqdm's beside a training

    def __init__(
        self, label: str, total: int, initial: int = 0, note: Callable[[], str] = str, shown: bool = True, **more: Any
    ) -> None:
        if not (shown and sys.stderr.isatty() and SUPERVISOR not in os.environ):
            file = SimpleNamespace(write=partial(_write_line, note, shown))
            more |= {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "miniters": 1, "position": 0}
            more |= {"file": file, "ascii": " #", "ncols": 100}
        super().__init__(desc=label, total=total, initial=initial, **{"unit": "step"} | more)

    def close(self) -> None:
        """Show the final state, also of what was too short for a line."""
        if self.n > self.initial:
            self.delay = 0
        super().close()

    def reset(self, total: float | None = None) -> None:
        """Count anew, as pooch does at the end of a download, with the clock going on."""
        self.n = 0

    def __bool__(self) -> bool:
        return True

    def __del__(self) -> None:
        """Leave the last word to the error that ended what was counted."""


def _write_line(note: Callable[[], str], shown: bool, text: str) -> None:
    """Write what tqdm would draw as a line of its own, with a note behind it."""
    # The reader of a pipe may be gone while a training still has to save: a line less is no reason to fail.
    with suppress(BrokenPipeError):
        if shown and text.strip():
            print(f"{text.strip()} {note()}".rstrip(), file=sys.stderr, flush=True)


def track(label: str) -> Callable[[Iterable[T]], Iterator[T]]:
    """A wrapper of a sized iterable that shows its progress."""

    def wrap(steps: Iterable[T]) -> Iterator[T]:
        items = list(steps)
        progress = Progress(label, len(items))
        for item in items:
            yield item
            progress.update()
        progress.close()

    return wrap
