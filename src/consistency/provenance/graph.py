"""The stages of a study: their artifacts, seeds and downloads."""

from collections.abc import Collection
from typing import Any

from consistency.config.job import Job
from consistency.config.networks import OfficialTeacher, Teacher
from consistency.data.resources import CIFAR10_ARCHIVE, INCEPTION, VGG16

#: the stage that makes an artifact, and its job
Artifact = tuple[str, Job]


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


def downloads(job: Job, stage: str) -> list[str]:
    """Return the resources that a job of a stage opens."""
    dataset, teacher = job.study.dataset, job.study.teacher
    opened = {
        "dataset": CIFAR10_ARCHIVE if dataset.kind == "cifar10" and dataset.path is None else None,
        "teacher": teacher.checkpoint if isinstance(teacher, OfficialTeacher) else None,
        "extractor": INCEPTION if job.study.scores.extractor == "inception" else None,
        "student": VGG16 if job.run is not None and job.student.distance == "lpips" else None,
    }
    name = opened.get(stage)
    return [name] if name else []
