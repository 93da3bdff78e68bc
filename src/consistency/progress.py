"""Progress with rate and ETA: a bar on a terminal of one's own, readable lines everywhere else."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from tqdm import tqdm

from consistency.supervision import SUPERVISOR

T = TypeVar("T")

#: seconds between two lines where no bar can be drawn (a log file, or a terminal shared with other jobs)
LINE_EVERY = 5.0


class Progress:
    """A counter from `initial` to `total` that shows itself, unless it is one of several that are the same.

    note: a callable whose text is appended to a line.
    """

    def __init__(
        self, label: str, total: int, initial: int = 0, note: Callable[[], str] = lambda: "", shown: bool = True
    ) -> None:
        self.label, self.total, self.count, self.initial, self.note = label, total, initial, initial, note
        self.started = self.shown = time.monotonic()
        self.visible = shown
        own_terminal = shown and sys.stderr.isatty() and SUPERVISOR not in os.environ
        self.bar = tqdm(desc=label, total=total, initial=initial, unit="step") if own_terminal else None

    def advance(self, steps: int = 1) -> None:
        """Count steps, and show where it stands if it is time to."""
        self.count += steps
        if self.bar is not None:
            self.bar.update(steps)
        elif time.monotonic() - self.shown >= LINE_EVERY:
            self.show()

    def show(self) -> None:
        """Write one line: label, bar, count, elapsed, ETA, rate."""
        if not self.visible:
            return
        self.shown = time.monotonic()
        meter = tqdm.format_meter(
            self.count,
            self.total,
            self.shown - self.started,
            ncols=100,
            prefix=self.label,
            unit="step",
            initial=self.initial,
            ascii=" #",
        )
        # The reader of a pipe may be gone while a training still has to save: a line less is no reason to fail.
        with suppress(BrokenPipeError):
            print(f"{meter} {self.note()}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final state."""
        if self.bar is not None:
            self.bar.close()
        else:
            self.show()


def track(label: str) -> Callable[[Iterable[T]], Iterator[T]]:
    """A wrapper of a sized iterable that shows its progress."""

    def wrap(steps: Iterable[T]) -> Iterator[T]:
        items = list(steps)
        progress = Progress(label, len(items))
        for item in items:
            yield item
            progress.advance()
        progress.close()

    return wrap
