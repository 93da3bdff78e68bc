"""The folder of a training: its identity, its saved state, its history and snapshots."""

import json
import math
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from consistency.base.files import link_file, read_json, write_bytes, write_json
from consistency.training.state import load_state

STATE, _IDENTITY = "state.pt", "training.json"


def prepare(folder: Path, key: str, label: str) -> dict[str, Any] | None:
    """Prepare the folder for a start or a resumption. A state of other settings is set aside, the history is truncated
    to the saved step, partial files of a killed process are removed, and a new training gets its identity. Returns the
    state to resume from, None to start. Raises UserError for a damaged one."""
    for stale in (*folder.glob(".*.tmp"), *folder.glob("snapshots/.*.tmp")):
        stale.unlink(missing_ok=True)
    state = load_state(folder / STATE)
    if state is not None and state.get("key") != key:
        aside = folder.with_name(f"{folder.name}.{state.get('key')}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(folder, aside)
        print(f"{label}: the settings changed, so this starts over; the old state is in {aside}", flush=True)
        state = None
    path = folder / _IDENTITY
    if not path.exists() or read_json(path, "").get("key") != key:
        write_json(path, {"key": key, "id": uuid.uuid4().hex, "started": round(1000 * time.time())})
    history = folder / "history.jsonl"
    if state is None:
        (folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)
        write_bytes(history, b"")
        return None
    step = state["clock"]["step"]
    written = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    write_bytes(history, "".join(line + "\n" for line in written if _line_step(line) <= step).encode())
    print(f"{label}: continues from step {step}", flush=True)
    return state


def read_identity(folder: Path) -> dict[str, Any]:
    """Read the training's random id, by which MLflow's run is found again, and its start: started, milliseconds since
    1970. Both stay the same however often it is interrupted."""
    found = read_json(folder / _IDENTITY, "")
    return {"id": found["id"], "started": found["started"]}


def publish_training(state: Path, folder: Path) -> list[Path]:
    """Place history.jsonl and the snapshots of a finished training beside its checkpoint; return their paths."""
    snapshots = sorted((state / "snapshots").glob("step-*.safetensors"))
    outputs = [folder / "history.jsonl", *(folder / "snapshots" / path.name for path in snapshots)]
    for stale in set((folder / "snapshots").glob("*")) - set(outputs):
        stale.unlink()
    for source, target in zip([state / "history.jsonl", *snapshots], outputs, strict=True):
        link_file(source, target)
    return outputs


def append(folder: Path, line: dict[str, float]) -> None:
    """Add a line to history.jsonl."""
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _line_step(line: str) -> float:
    """Return the step of a history line; a line truncated by a kill sorts last."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf
