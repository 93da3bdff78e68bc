"""Trainings that cost nothing: a finished history is written again, while the real thread sends its lines."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_results import SMALL, edit_card, make_finished

from consistency.base.files import read_history
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.tracking.live import Follower, followed
from consistency.training.folder import append, prepare, read_identity

#: of the project that is the working directory
LAYOUT = StudyPaths("small")
#: two students with two or four seeds: trainings of 50 lines
FOUR = SMALL.replace("steps: 60, ", "steps: 500, ")
EIGHT = FOUR.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3]")


def finished_study(folder: Path, text: str = EIGHT, name: str = "small") -> Job:
    """A study whose trainings can be followed again: their states are empty, and their cards know their identities."""
    study = make_finished(folder, text, name)
    for job in study.trainings:
        job.state.mkdir(parents=True)
        prepare(job.state, job.key("student"), job.label)
        made = {"training": read_identity(job.state)}
        edit_card(job.card("student"), lambda card, made=made: card.update(made))
    return study


def history_of(job: Job) -> list[dict[str, Any]]:
    """The lines that the training leaves."""
    return read_history(job.folder / "history.jsonl", "student")


@dataclass
class Replay:
    """A training under way, and the thread that sends what it writes."""

    job: Job
    follower: Follower
    written: int = 0

    def sent_up_to(self) -> int:
        """The step of the last line that has been sent."""
        sent = self.follower.points[: self.follower.sent]
        return sent[-1].step if sent else 0

    def write(self, count: int) -> None:
        """Add the next lines to the history; 50 are all."""
        for line in history_of(self.job)[self.written :][:count]:
            append(self.job.state, line)
            self.written += 1


@contextmanager
def replayed(job: Job) -> Iterator[Replay]:
    """A training whose lines the caller writes, followed as the stages do it."""
    with followed(job, job.state) as start:
        start()
        (follower,) = (thread for thread in threading.enumerate() if isinstance(thread, Follower) and not thread.status)
        yield Replay(job, follower)
