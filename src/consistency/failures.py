"""What a failed run of the workflow says at its end: a line for each failed job, after pages of Snakemake's own."""

from collections.abc import Iterable
from pathlib import Path

_TAIL = 65536  # bytes of a log that are looked at


def failure(job: str, log: Path, since: float, folder: Path | None = None) -> str:
    """What a failed job said last, and where the rest stands. since: when the run began, seconds since 1970; folder:
    that of its logs on a cluster, if it has any."""
    if not log.exists() or log.stat().st_mtime < since:
        return f"failed: {job}: it never began, and left no log: see above"
    more = f"; of every time it was started: {folder}/" if folder is not None and folder.is_dir() else ""
    return f"failed: {job}: {_last_words(log)} ({log}{more})"


def _last_words(log: Path) -> str:
    """The last line of a log that is an error, else the last line."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL, 0))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.strip()]
    return next((line for line in reversed(said) if line.startswith("error")), said[-1] if said else "it said nothing")


def print_failures(lines: Iterable[str]) -> None:
    """The lines, in order, each once."""
    for line in sorted(set(lines)):
        print(line, flush=True)
