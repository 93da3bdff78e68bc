"""Cards: records of how an artifact was made, from which inputs, where, and in what time."""

import shlex
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError, command_of
from consistency.base.files import read_json, sha256, write_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.data.resources import known_sha256
from consistency.provenance import graph
from consistency.provenance.code_digest import code_digest
from consistency.provenance.environment import git_state, hardware, versions

#: format of this project's cards
CARD = "consistency-card-2"


class Card:
    """The card of a stage's artifact, created when the stage begins.

    Raises UserError if an artifact that the stage reads is missing or was made with other settings than the study has.
    """

    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage, self.started = job, stage, time.time()
        makers = graph.inputs_made_by(stage, job).values()
        for maker, each in {each.card(maker): (maker, each) for maker, each in makers}.values():
            read_card(each, maker)

    @cached_property
    def given(self) -> dict[Path, str]:
        """Digests of the person's own files that the stage opens, read once."""
        return {file: sha256(file) for file in graph.given(self.stage, self.job)}

    def write(
        self,
        outputs: Iterable[Path] | None = None,
        *,
        measured: dict[str, float] | None = None,
        known: dict[Path, str] | None = None,
        source: str | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        """Write the card. outputs: needed where the graph does not know them all; measured: figures such as network
        evaluations; known: digests computed before; source: digest of an input from outside the results; training: its
        id and start. Input paths are relative to the study's folder, output paths to the card's."""
        job, stage = self.job, self.stage
        path = job.card(stage)

        def digests(paths: Iterable[Path], folder: Path) -> dict[str, str]:
            return {p.relative_to(folder).as_posix(): (known or {}).get(p) or digest_of(p, job.paths) for p in paths}

        opened = {f"resources/{name}": known_sha256(name) for name in graph.downloads(job, stage)}
        opened |= {f"given/{file.name}": digest for file, digest in self.given.items()}
        card = {
            "format": CARD,
            "stage": stage,
            "study": job.study.name,
            "run": job.student,
            "seed": job.seed,
            "seeds": graph.seeds_of(job, stage),
            "key": job.key(stage),
            "settings": job.depends_on(stage),
            "code": code_digest(stage),
            "resolved": job.study.model_dump(mode="json"),
            "command": shlex.join(["python", "-m", "consistency", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "measured": measured or {},
            "training": training,
            "source": source,
            "inputs": digests(graph.inputs(stage, job), job.paths.root) | opened,
            "outputs": digests(graph.outputs(stage, job) if outputs is None else outputs, path.parent),
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(job.study.compute.name_host),
        }
        write_json(path, card)


def digest_of(path: Path, paths: StudyPaths) -> str:
    """Return the sha256 of a file; the images' is read from dataset.json, since hashing 16 GB takes half a minute."""
    if path == paths.images:
        return str(read_json(path.with_name("dataset.json"), "dataset")["sha256"])
    return sha256(path)


def read_card(job: Job, stage: str) -> dict[str, Any]:
    """Read the card of an artifact. Raises UserError if it is missing or of another study or other settings."""
    job = job.at(stage)
    made_by, path = graph.verb_of(stage, job), job.card(stage)
    card: dict[str, Any] = read_json(path, made_by)
    if difference := other_settings(card, job, stage):
        made = job.scores if stage == "scores" else path.parent
        again = f"run {command_of(made_by)} again, or give this study another --results folder"
        raise UserError(f"{made} was {difference}: {again}")
    return card


def other_settings(card: dict[str, Any], job: Job, stage: str) -> str:
    """Describe the other study or settings that a card's artifact was made for; '' if they are this job's."""
    if card.get("key") == job.key(stage):
        return ""
    there, here = card.get("settings", {}), job.depends_on(stage)
    if isinstance(there, dict) and there | {"name": None} == here | {"name": None}:
        return f"made for the study {card.get('study')!r}, not {job.study.name!r}"
    return f"made by study {card.get('study')!r} with other settings{first_difference(there, here)}"


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return ' (key: there old, here new)' for the first key in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        found = (first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key) for key in keys)
        return next(filter(None, found), "")
    return "" if old == new else f" ({path}: there {old!r}, here {new!r})"
