"""Cards: what made an artifact, from what, where, and how long it took."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from consistency import slurm_job
from consistency.errors import UserError
from consistency.files import read_json, sha256, write_json
from consistency.layout import Layout
from consistency.resources import known_sha256
from consistency.study import Study, Teacher

#: what the cards and the checkpoints of this project call themselves
CARD, CHECKPOINT = "consistency-card-2", "consistency-denoiser-1"

#: stage, run and seed; without a run, samples are the teacher's and scores the calibration
Artifact = tuple[str, str | None, int | None]

_PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "clean-fid", "pandas"),
    *("matplotlib", "snakemake", "dvc", "mlflow"),
)


def write_card(
    study: Study,
    layout: Layout,
    stage: str,
    run: str | None = None,
    seed: int | None = None,
    *,
    started: float,
    inputs: Iterable[Path],
    outputs: Iterable[Path],
    measured: dict[str, float] | None = None,
    known: dict[Path, str] | None = None,
    downloads: Iterable[str] = (),
    source: str | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write the card of what a stage made. started: time.time() at its start; measured: figures such as evaluations;
    known: digests of files that need not be read again; downloads: resources that were opened; source: a digest of
    what else was read outside of the results; training: its id and when it began. Inputs are named from the study's
    folder on, outputs from the card's."""
    card = layout.card(stage, run, seed)

    def digests(paths: Iterable[Path], folder: Path) -> dict[str, str]:
        return {p.relative_to(folder).as_posix(): (known or {}).get(p) or digest_of(p, layout) for p in paths}

    write_json(
        card,
        {
            "format": CARD,
            "stage": stage,
            "study": study.name,
            "run": run,
            "seed": seed,
            "seeds": seeds_of(study, stage, run, seed),
            "key": study.key(stage, run, seed),
            "settings": study.settings(stage, run),
            "resolved": study.model_dump(mode="json"),
            "command": shlex.join(["python", "-m", "consistency", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 3),
            "measured": measured or {},
            "training": training,
            "source": source,
            "inputs": digests(inputs, layout.root) | {f"resources/{name}": known_sha256(name) for name in downloads},
            "outputs": digests(outputs, card.parent),
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(),
        },
    )


def digest_of(path: Path, layout: Layout) -> str:
    """The sha256 of a file; of the images what dataset.json says, since 16 GB take half a minute to read."""
    if path == layout.dataset / "images.npy":
        return str(read_json(path.with_name("dataset.json"), "dataset")["sha256"])
    return sha256(path)


def seeds_of(study: Study, stage: str, run: str | None, seed: int | None) -> dict[str, Any]:
    """The seeds that a stage itself draws from; those of its inputs stand in their cards."""
    images = f"0 to {study.sampling.count - 1}"
    seeds: dict[str, dict[str, Any]] = {
        "teacher": {"teacher": study.teacher.seed} if isinstance(study.teacher, Teacher) else {},
        "extractor": {"classifier": study.scores.classifier.seed} if study.scores.extractor == "classifier" else {},
        "coefficients": {"coefficients": study.coefficients.seed},
        "student": {"student": seed},
        "samples": {"images": images},
        "scores": {"images": images} if run is None else {"student": seed, "images": images},
        "flows": {"flows": study.flows.seed, "toy": study.flows.toy_seeds} if study.flows else {},
        "report": {"students": study.seeds},
    }
    return seeds.get(stage, {})


def artifacts(study: Study, also: Collection[str] = ()) -> dict[str, Artifact]:
    """List what a study makes, by what it is called, parents first. also: stages that count even if not needed."""
    unneeded = {"coefficients": not study.needs_coefficients, "flows": not study.flows}
    found: dict[str, Artifact] = {}
    for stage in ("dataset", "teacher", "extractor", "coefficients", "student", "samples", "scores", "flows", "report"):
        if stage != "student" and (stage in also or not unneeded.get(stage)):
            name = {"samples": "samples of the teacher", "scores": "calibration"}.get(stage, stage)
            found[name] = (stage, None, None)
        if stage in ("student", "samples", "scores"):
            found |= {f"{stage} {run} seed {seed}": (stage, run, seed) for run, seed in study.trainings}
    return found


def read_card(
    folder: Path, study: Study, stage: str, run: str | None = None, seed: int | None = None
) -> dict[str, Any]:
    """The card of a stage's folder or score table. Raises UserError if another study, or other settings, made it."""
    verb = "calibration" if stage == "scores" and run is None else stage
    made_by = verb + (f" --run {run} --seed {seed}" if run is not None else "")
    path = folder.with_suffix(".card.json") if folder.suffix == ".csv" else folder / "card.json"
    card: dict[str, Any] = read_json(path, made_by)
    expected = study.key(stage, run, seed)
    if card.get("key") != expected:
        raise UserError(
            f"{folder} was made by study {card.get('study')!r} with other settings"
            f"{first_difference(card.get('settings', {}), study.settings(stage, run))}: "
            f"run `{made_by}` again, or give this study another --results folder"
        )
    return card


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """' (key: there old, here new)' for the first key in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
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
        with suppress(PackageNotFoundError):
            found[package] = version(package)
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
        "slurm_job": slurm_job.number(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
