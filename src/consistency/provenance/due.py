"""Marks of artifacts that the study no longer describes, so that Snakemake makes them again.

Snakemake's own records may be missing (deleted, pruned) or foreign (results that were copied, unpacked or made by the
verbs). A card is always there: it says with which settings and which code its artifact was made.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from consistency.base.files import write_bytes
from consistency.config.job import Job
from consistency.provenance.card import other_settings
from consistency.provenance.code_digest import code_digest
from consistency.provenance.graph import artifacts


def due_mark(stage: str, job: Job) -> Path:
    """Return the path of an artifact's mark. It lies under the state folder, since it is no result."""
    folder = job.paths.state / job.paths.study / "due" / stage
    return folder / "study" if job.student is None else folder / job.student / f"seed{job.seed}"


def mark_due(job: Job) -> dict[str, str]:
    """Bring the marks of a study up to date. Returns the reason for each artifact, by name, that is to be made again.

    A mark is newer than the artifact exactly if its card names other settings or other code than the study has now.
    """
    reasons = {}
    for name, (stage, each) in artifacts(job).items():
        mark, reason = due_mark(stage, each), _reason(stage, each)
        if reason:
            reasons[name] = reason
            # Not the same text twice: Snakemake also compares the content of small files.
            write_bytes(mark, f"{reason}\n{time.time_ns()}\n".encode())
        else:
            if not mark.exists():
                write_bytes(mark, b"")
            os.utime(mark, (0, 0))
    return reasons


def _reason(stage: str, job: Job) -> str:
    """Say why an artifact is to be made again, '' if it is not or is not there."""
    card: Any = None
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            card = json.loads(job.card(stage).read_text())
        except ValueError:
            return "its card is damaged"
    if not isinstance(card, dict):
        return ""
    # Cards of earlier versions do not name their code.
    code = card.get("code")
    return other_settings(card, job, stage) or ("made by other code" if code not in (None, code_digest(stage)) else "")
