"""Trainings that cost nothing: a finished history is written again, while the real thread sends its lines."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_results import SMALL, make_finished

from consistency.files import read_json, write_json
from consistency.layout import Layout
from consistency.study import Study
from consistency.tracking.live import Follower, followed
from consistency.training.folder import append, prepare, read_identity

#: two students with two or four seeds: trainings of 50 lines
FOUR = SMALL.replace("steps: 60, ", "steps: 500, ")
EIGHT = FOUR.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3]")


def finished_study(folder: Path, text: str = EIGHT, name: str = "small") -> tuple[Study, Layout]:
    """A study whose trainings can be followed again: their states are empty, and their cards know their identities."""
    study, layout = make_finished(folder, text, name)
    for run, seed in study.trainings:
        state, card = layout.training_state(run, seed), layout.card("student", run, seed)
        state.mkdir(parents=True)
        prepare(state, study.key("student", run, seed), f"{run} seed {seed}")
        write_json(card, read_json(card, "student") | {"training": read_identity(state)})
    return study, layout


def history_of(layout: Layout, run: str, seed: int) -> list[dict[str, Any]]:
    """The lines that the training leaves."""
    return [json.loads(line) for line in (layout.student(run, seed) / "history.jsonl").read_text().splitlines()]


@dataclass
class Replay:
    """A training under way, and the thread that sends what it writes."""

    layout: Layout
    run: str
    seed: int
    follower: Follower
    written: int = 0

    def sent_up_to(self) -> int:
        """The step of the last line that has been sent."""
        sent = self.follower.points[: self.follower.sent]
        return sent[-1].step if sent else 0

    def write(self, count: int) -> None:
        """Add the next lines to the history; 50 are all."""
        for line in history_of(self.layout, self.run, self.seed)[self.written :][:count]:
            append(self.layout.training_state(self.run, self.seed), line)
            self.written += 1


@contextmanager
def replayed(study: Study, layout: Layout, run: str, seed: int) -> Iterator[Replay]:
    """A training whose lines the caller writes, followed as the stages do it."""
    with followed(study, layout, layout.training_state(run, seed), run, seed) as start:
        start()
        (follower,) = (thread for thread in threading.enumerate() if isinstance(thread, Follower) and not thread.status)
        yield Replay(layout, run, seed, follower)
