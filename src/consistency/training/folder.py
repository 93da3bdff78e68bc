"""The folder of a training: its lock, its saved state, its history and snapshots."""

import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consistency.errors import UserError
from consistency.files import write_bytes
from consistency.training.checkpoint import load_state, save_state

LOCK_PATIENCE = 60.0  # seconds to wait for the trainer of a killed workflow to notice and leave


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two runs cannot train in it. Raises UserError when another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"another process ({file.read().strip()}) is working in {folder}: wait for it or stop it"
                    ) from None
                time.sleep(0.5)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def prepare(folder: Path, key: str, label: str) -> None:
    """Make the folder ready for going on, or for a start: a state of other settings is set aside, the history is cut
    back to the saved step, what a killed process had half written is removed. Raises UserError for a damaged state."""
    for stale in (*folder.glob(".*.tmp"), *folder.glob("snapshots/.*.tmp")):
        stale.unlink(missing_ok=True)
    state = read(folder)
    if state is not None and state.get("key") != key:
        aside = folder.with_name(f"{folder.name}.{state.get('key')}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(folder, aside)
        print(f"{label}: the settings changed, so this starts over; the old state is in {aside}", flush=True)
        state = None
    history = folder / "history.jsonl"
    if state is None:
        (folder / "state.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)
        write_bytes(history, b"")
        return
    step = state["clock"]["step"]
    written = history.read_text().splitlines() if history.exists() else []
    write_bytes(history, "".join(line + "\n" for line in written if _line_step(line) <= step).encode())
    print(f"{label}: continues from step {step}", flush=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The saved state, if there is one. Raises UserError when it is damaged."""
    return load_state(folder / "state.pt")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the saved state."""
    save_state(folder / "state.pt", state)


def append(folder: Path, line: dict[str, float]) -> None:
    """Add a line to history.jsonl."""
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _line_step(line: str) -> float:
    """The step of a history line; a line cut off by a kill comes after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf
