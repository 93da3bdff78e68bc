"""Cards: records of how an artifact was made, from which inputs, where, and in what time."""

import shlex
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError
from consistency.base.files import read_json, sha256, write_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.data.resources import known_sha256
from consistency.provenance.environment import git_state, hardware, versions
from consistency.provenance.graph import seeds_of

#: format of this project's cards
CARD = "consistency-card-2"


class Card:
    """The card of a stage's artifact, created when the stage begins."""

    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage, self.started = job, stage, time.time()

    def write(
        self,
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        *,
        measured: dict[str, float] | None = None,
        known: dict[Path, str] | None = None,
        downloads: Iterable[str] = (),
        source: str | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        """Write the card. measured: figures such as evaluations; known: digests that are already computed; downloads:
        resources that were opened; source: a digest of input from outside the results; training: its id and start.
        Input paths are relative to the study's folder, output paths to the card's."""
        job, stage = self.job, self.stage
        path = job.card(stage)

        def digests(paths: Iterable[Path], folder: Path) -> dict[str, str]:
            return {p.relative_to(folder).as_posix(): (known or {}).get(p) or digest_of(p, job.paths) for p in paths}

        opened = {f"resources/{name}": known_sha256(name) for name in downloads}
        content = {
            "format": CARD,
            "stage": stage,
            "study": job.study.name,
            "run": job.run,
            "seed": job.seed,
            "seeds": seeds_of(job, stage),
            "key": job.key(stage),
            "settings": job.settings(stage),
            "resolved": job.study.model_dump(mode="json"),
            "command": shlex.join(["python", "-m", "consistency", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "measured": measured or {},
            "training": training,
            "source": source,
            "inputs": digests(inputs, job.paths.root) | opened,
            "outputs": digests(outputs, path.parent),
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(path, content)


def digest_of(path: Path, layout: StudyPaths) -> str:
    """Return the sha256 of a file; for the images that in dataset.json, since 16 GB take half a minute to read."""
    if path == layout.images:
        return str(read_json(path.with_name("dataset.json"), "dataset")["sha256"])
    return sha256(path)


def read_card(job: Job, stage: str) -> dict[str, Any]:
    """Read the card of an artifact. Raises UserError if it is missing or of another study or other settings."""
    job = job.at(stage)
    made_by = ("calibration" if stage == "scores" and job.run is None else stage) + job.options
    path = job.card(stage)
    card: dict[str, Any] = read_json(path, made_by)
    if card.get("key") != job.key(stage):
        made = job.scores if stage == "scores" else path.parent
        raise UserError(
            f"{made} was made by study {card.get('study')!r} with other settings"
            f"{first_difference(card.get('settings', {}), job.settings(stage))}: "
            f"run `{made_by}` again, or give this study another --results folder"
        )
    return card


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return ' (key: there old, here new)' for the first key in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if old == new else f" ({path}: there {old!r}, here {new!r})"
