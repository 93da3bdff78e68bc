"""From a finished training's state to its declared outputs."""

from pathlib import Path

from consistency.files import link_file


def publish_training(state: Path, folder: Path) -> list[Path]:
    """Put history.jsonl and the snapshots of a finished training beside its checkpoint; returns their places."""
    snapshots = sorted((state / "snapshots").glob("step-*.safetensors"))
    outputs = [folder / "history.jsonl", *(folder / "snapshots" / path.name for path in snapshots)]
    for stale in set((folder / "snapshots").glob("*")) - set(outputs):
        stale.unlink()
    for source, target in zip([state / "history.jsonl", *snapshots], outputs, strict=True):
        link_file(source, target)
    return outputs
