"""Marks of outdated artifacts, by which Snakemake makes them again.

Snakemake's own records may be missing (deleted, pruned) or foreign (results that were copied, unpacked or made by the
verbs). The card is always there, and names the settings and the code that its artifact was made with.
"""

import os
import time
from pathlib import Path

from consistency.base.errors import NoPermission, UserError
from consistency.base.files import read_json, write_bytes
from consistency.config.job import Job
from consistency.provenance.card import other_settings
from consistency.provenance.code_digest import code_digest
from consistency.provenance.graph import artifacts


def due_mark(stage: str, job: Job) -> Path:
    """Return the path of an artifact's mark, under the state folder, since it is no result."""
    folder = job.paths.state / job.paths.study / "due" / stage
    return folder / "study" if job.student is None else folder / job.student / f"seed{job.seed}"


def mark_due(job: Job) -> dict[str, str]:
    """Update the marks of a study. Returns the name of each outdated artifact and the reason.

    A mark is newer than its artifact exactly if the card names other settings or other code than the study has now.
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


def is_due(mark: Path) -> bool:
    """Return whether a mark is newer than any artifact."""
    return mark.stat().st_mtime > 0


def _reason(stage: str, job: Job) -> str:
    """Return the reason to make an artifact again, or '' if it is up to date or has no card."""
    if not job.card(stage).exists():
        return ""
    try:
        card = dict(read_json(job.card(stage), stage))
    except NoPermission:
        raise
    except (UserError, TypeError, ValueError):
        return "its card is damaged"
    # Cards of earlier versions do not name their code.
    code = card.get("code")
    return other_settings(card, job, stage) or ("made by other code" if code not in (None, code_digest(stage)) else "")
