"""Timing of the parts of a step, without stalling a GPU."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds spent in named parts of a step; a nested part counts as the inner one alone.

    On a GPU, marks are put into its queue and read only when `read` is called.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._part = ""
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as the part of that name."""
        outer, self._part = self._part, name
        self._mark(outer)
        try:
            yield
        finally:
            self._mark(name)
            self._part = outer

    def _mark(self, ended: str) -> None:
        """Mark the end of the part `ended`."""
        if not self._on_gpu:
            self._marks.append((ended, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((ended, event))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading. Waits for the GPU."""
        seconds: dict[str, float] = defaultdict(float)
        if self._on_gpu and self._marks:
            torch.cuda.synchronize()
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            seconds[name] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        self._marks.clear()
        seconds.pop("", None)  # time between the parts
        return dict(seconds)
