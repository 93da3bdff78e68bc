"""Cards: records of how an artifact was made, from which inputs, where, and in what time."""

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
from consistency.job import Job
from consistency.layout import Layout
from consistency.resources import known_sha256
from consistency.study import Teacher

#: format of this project's cards
CARD = "consistency-card-2"

#: the stage that makes an artifact, and its job
Artifact = tuple[str, Job]

_PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "clean-fid", "pandas"),
    *("matplotlib", "snakemake", "dvc", "mlflow"),
)


class Card:
    """The card of a stage's artifact, created when the stage begins."""

    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage, self.started = job, stage, time.time()

    def write(
        self,
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        *,
        measured: dict[str, float] | None = None,
        known: dict[Path, str] | None = None,
        downloads: Iterable[str] = (),
        source: str | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        """Write the card. measured: figures such as evaluations; known: digests that are already computed; downloads:
        resources that were opened; source: a digest of input from outside the results; training: its id and start.
        Input paths are relative to the study's folder, output paths to the card's."""
        job, stage = self.job, self.stage
        path = job.card(stage)

        def digests(paths: Iterable[Path], folder: Path) -> dict[str, str]:
            return {p.relative_to(folder).as_posix(): (known or {}).get(p) or digest_of(p, job.paths) for p in paths}

        opened = {f"resources/{name}": known_sha256(name) for name in downloads}
        content = {
            "format": CARD,
            "stage": stage,
            "study": job.study.name,
            "run": job.run,
            "seed": job.seed,
            "seeds": seeds_of(job, stage),
            "key": job.key(stage),
            "settings": job.settings(stage),
            "resolved": job.study.model_dump(mode="json"),
            "command": shlex.join(["python", "-m", "consistency", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "measured": measured or {},
            "training": training,
            "source": source,
            "inputs": digests(inputs, job.paths.root) | opened,
            "outputs": digests(outputs, path.parent),
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(path, content)


def digest_of(path: Path, layout: Layout) -> str:
    """Return the sha256 of a file; for the images that in dataset.json, since 16 GB take half a minute to read."""
    if path == layout.dataset / "images.npy":
        return str(read_json(path.with_name("dataset.json"), "dataset")["sha256"])
    return sha256(path)


def seeds_of(job: Job, stage: str) -> dict[str, Any]:
    """Return the seeds that a stage itself draws from; those of its inputs are in their cards."""
    study, images = job.study, f"0 to {job.study.sampling.count - 1}"
    seeds: dict[str, dict[str, Any]] = {
        "teacher": {"teacher": study.teacher.seed} if isinstance(study.teacher, Teacher) else {},
        "extractor": {"classifier": study.scores.classifier.seed} if study.scores.extractor == "classifier" else {},
        "coefficients": {"coefficients": study.coefficients.seed},
        "student": {"student": job.seed},
        "samples": {"images": images},
        "scores": {"images": images} if job.run is None else {"student": job.seed, "images": images},
        "flows": {"flows": study.flows.seed, "toy": study.flows.toy_seeds} if study.flows else {},
        "report": {"students": study.seeds},
    }
    return seeds.get(stage, {})


def artifacts(job: Job, also: Collection[str] = ()) -> dict[str, Artifact]:
    """List the study's artifacts by name, parents first. also: stages that count even if not needed."""
    unneeded = {"coefficients": not job.study.needs_coefficients, "flows": not job.study.flows}
    found: dict[str, Artifact] = {}
    for stage in ("dataset", "teacher", "extractor", "coefficients", "student", "samples", "scores", "flows", "report"):
        if stage != "student" and (stage in also or not unneeded.get(stage)):
            name = {"samples": "samples of the teacher", "scores": "calibration"}.get(stage, stage)
            found[name] = (stage, job.of())
        if stage in ("student", "samples", "scores"):
            found |= {f"{stage} {each.label}": (stage, each) for each in job.trainings}
    return found


def read_card(job: Job, stage: str) -> dict[str, Any]:
    """Read the card of an artifact. Raises UserError if it is missing or of another study or other settings."""
    job = job.at(stage)
    made_by = ("calibration" if stage == "scores" and job.run is None else stage) + job.options
    path = job.card(stage)
    card: dict[str, Any] = read_json(path, made_by)
    if card.get("key") != job.key(stage):
        made = job.scores if stage == "scores" else path.parent
        raise UserError(
            f"{made} was made by study {card.get('study')!r} with other settings"
            f"{first_difference(card.get('settings', {}), job.settings(stage))}: "
            f"run `{made_by}` again, or give this study another --results folder"
        )
    return card


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return ' (key: there old, here new)' for the first key in which two settings differ."""
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
