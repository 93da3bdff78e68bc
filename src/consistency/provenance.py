"""Cards: what made an artifact, from what, where, and how long it took."""

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from consistency.errors import UserError
from consistency.files import read_json, sha256, write_json
from consistency.study import Study

_PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "clean-fid", "pandas"),
    *("matplotlib", "snakemake", "dvc", "mlflow"),
)


def write_card(
    folder: Path,
    study: Study,
    stage: str,
    *,
    started: float,
    inputs: list[Path],
    outputs: list[Path],
    run: str | None = None,
    seed: int | None = None,
    measured: dict[str, float] | None = None,
    known: dict[Path, str] | None = None,
) -> None:
    """Write folder/card.json. started: time.time() at the stage's start; measured: figures such as evaluations;
    known: digests of files that need not be read again (16 GB of images take half a minute)."""
    known = known or {}
    write_json(
        folder / "card.json",
        {
            "stage": stage,
            "study": study.name,
            "run": run,
            "seed": seed,
            "key": study.key(stage, run, seed),
            "settings": study.settings(stage, run),
            "command": shlex.join(["python", "-m", "consistency", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 3),
            "measured": measured or {},
            "inputs": {str(path): known.get(path) or sha256(path) for path in inputs},
            "outputs": {path.name: known.get(path) or sha256(path) for path in outputs},
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(),
        },
    )


def read_card(
    folder: Path, study: Study, stage: str, run: str | None = None, seed: int | None = None
) -> dict[str, Any]:
    """The card of a stage's folder. Raises UserError if another study, or other settings, made it."""
    made_by = stage + (f" --run {run} --seed {seed}" if run is not None else "")
    card: dict[str, Any] = read_json(folder / "card.json", made_by)
    expected = study.key(stage, run, seed)
    if card.get("key") != expected:
        raise UserError(
            f"{folder} was made by study {card.get('study')!r} with other settings"
            f"{_first_difference(card.get('settings', {}), study.settings(stage, run))}: "
            f"run `{made_by}` again, or give this study another --results folder"
        )
    return card


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """' (key: old -> new)' for the first key in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if old == new else f" ({path}: there {old!r}, here {new!r})"


@cache
def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it has uncommitted changes; both None outside a git checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def hardware() -> dict[str, Any]:
    """Host, processor, cores, memory and GPUs of this machine."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
