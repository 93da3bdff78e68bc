"""From a finished training's state to its declared outputs."""

from pathlib import Path

from consistency.training.checkpoint import copy_file


def publish_training(state: Path, folder: Path) -> list[Path]:
    """Copy history.jsonl and the snapshots of a finished training beside its checkpoint; returns the copies."""
    snapshots = sorted((state / "snapshots").glob("step-*.safetensors"))
    outputs = [folder / "history.jsonl", *(folder / "snapshots" / path.name for path in snapshots)]
    for stale in set((folder / "snapshots").glob("*")) - set(outputs):
        stale.unlink()
    for source, target in zip([state / "history.jsonl", *snapshots], outputs, strict=True):
        copy_file(source, target)
    return outputs
