"""The graph of a study: the files each stage reads and writes, its code, its seeds and its downloads.

Rules, dvc.yaml, cards, verification and the report ask it, so that a dependency is written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency.config.dataset import KINDS
from consistency.config.distances import DISTANCES
from consistency.config.job import PER_STUDENT, Job
from consistency.config.networks import GivenTeacher, OfficialTeacher, Teacher
from consistency.config.paths import sampler_name
from consistency.config.samplers import student_samplers
from consistency.data.resources import INCEPTION

#: the stage that makes an artifact, and its job
Artifact = tuple[str, Job]

#: the tables of the stage flows, and the arrays of its toy
FLOW_FILES = ("transport.csv", "discrepancy.csv", "plane.csv", "limit.csv", "toy.npz")
#: the report's tables, figures apart
REPORT_FILES = ("report.html", "summary.json", "scores.csv", "table.csv", "speedup.csv", "paired.csv")


def artifacts(job: Job) -> dict[str, Artifact]:
    """List the study's artifacts by name, parents first."""
    unneeded = {"coefficients": not job.study.needs_coefficients, "flows": not job.study.flows}
    found: dict[str, Artifact] = {}
    for stage in STAGES:
        if stage != "student" and not unneeded.get(stage):
            name = {"samples": "samples of the teacher", "scores": "calibration"}.get(stage, stage)
            found[name] = (stage, job.of())
        if stage in PER_STUDENT:
            found |= {f"{stage} {each.label}": (stage, each) for each in job.trainings}
    return found


def inputs(stage: str, job: Job) -> list[Path]:
    """Return the files that a job of a stage reads, each of them an output of another stage."""
    return list(dict.fromkeys(STAGES[stage].inputs(job)))


def inputs_made_by(stage: str, job: Job) -> dict[Path, Artifact]:
    """Return the files that a job of a stage reads, each with the artifact that holds it."""
    makers = {path: artifact for artifact in artifacts(job).values() for path in outputs(*artifact)}
    return {path: makers[path] for path in inputs(stage, job)}


def outputs(stage: str, job: Job) -> list[Path]:
    """Return the files that a job of a stage writes beside its card; a report's figures are not known beforehand."""
    return STAGES[stage].outputs(job)


def needed(stage: str, job: Job, gate: Path) -> list[Path]:
    """Return the files and folders that Snakemake must have before a job begins: its inputs, and for a student the
    gate, an output of the calibration that only an accepted teacher has."""
    files = [*inputs(stage, job), *([gate] if stage == "student" else [])]
    return list(dict.fromkeys(declared(job, path) for path in files))


def settled(stage: str, job: Job) -> list[Path]:
    """Return the calibration's files, which do not make a student or its scores outdated when they are rewritten: the
    endpoints depend on nothing outside the student's own key."""
    return [job.of().scores, job.paths.endpoints] if stage in ("student", "scores") else []


def beyond_gate(stage: str, job: Job) -> bool:
    """Return whether a job reads what a student made, or makes it; the report reads the calibration itself."""
    return job.student is not None or stage == "flows"


def declared(job: Job, path: Path) -> Path:
    """Return the rule's output that holds this file: the file, or its folder if the content depends on the study."""
    kind, *below = path.relative_to(job.paths.root).parts
    if path.parent == job.paths.extractor or path.parent.name == "snapshots" or (kind == "samples" and len(below) > 2):
        return path.parent
    # Checkpoints of further EMA rates come and go with the main one.
    return path.with_name("student.safetensors") if kind == "students" and path.suffix == ".safetensors" else path


def rule_of(stage: str, job: Job) -> str:
    """Return the name of the rule that makes a job's artifact."""
    teachers = {"samples": "teacher_samples", "scores": "calibration"}
    return teachers.get(stage, stage) if job.student is None else stage


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline. entry: each "module:function" that makes its artifacts; inputs, outputs: its files."""

    entry: tuple[str, ...]
    inputs: Callable[[Job], list[Path]]
    outputs: Callable[[Job], list[Path]]


def _learnt_from(job: Job) -> list[Path]:
    """Return the files that a network learns from: the images, and their labels if it is conditional."""
    return [job.paths.images, *([job.paths.labels] if job.study.teacher.conditional else [])]


def _label_weights(job: Job) -> list[Path]:
    """Return the labels in whose proportions the images of a conditional network are drawn, if they are."""
    in_proportion = job.study.teacher.conditional and job.study.sampling.labels == "data"
    return [job.paths.labels] if in_proportion else []


def _fit(job: Job) -> list[Path]:
    """Return the coefficients, if the job's student reads them."""
    return [job.paths.fit] if job.student is not None and job.settings.needs_coefficients else []


def _predictor(job: Job) -> list[Path]:
    """Return the weights of the frozen student that makes gc's endpoints, if there is one."""
    frozen = job.settings.frozen
    return [job.of(frozen.run, job.seed).weights(step=frozen.step)] if frozen else []


def _weights(job: Job) -> list[Path]:
    """Return the student's weights at each EMA rate; without a student, the teacher's."""
    return [job.paths.teacher_weights] if job.student is None else [job.weights(rate) for rate in job.settings.rates]


def _snapshots(job: Job) -> list[Path]:
    return [job.weights(rate, step) for step in job.settings.snapshots for rate in job.settings.rates]


def _extractor_outputs(job: Job) -> list[Path]:
    classifier = ["classifier.safetensors"] if job.study.scores.extractor == "classifier" else []
    return [job.paths.extractor / name for name in ("features.npy", "statistics.npz", *classifier)]


def _samples_outputs(job: Job) -> list[Path]:
    names = ["heun"] if job.student is None else [sampler.name for sampler in student_samplers(job)]
    return [job.samples / f"{name}.npy" for name in names]


def _scores_inputs(job: Job) -> list[Path]:
    scored = [*_extractor_outputs(job), *_samples_outputs(job), *_label_weights(job)]
    if job.student is None:
        return [*scored, job.paths.teacher_weights]
    return [*scored, job.paths.endpoints, *_weights(job), *_snapshots(job), *_fit(job)]


def _flows_inputs(job: Job) -> list[Path]:
    settings, study = job.study.flows, job.study
    files = _learnt_from(job)
    if settings and settings.discrepancy and study.taught:
        files.append(job.paths.teacher_weights)
    for each in (each for each in job.trainings if each.student in study.coupled):
        files += [*_fit(each), each.weights()]
        if settings and each.student in settings.discrepancy and each.seed == study.seeds[0]:
            files += _predictor(each)
    return files


def _report_inputs(job: Job) -> list[Path]:
    study, paths = job.study, job.paths
    first = [job.of(student, study.seeds[0]) for student in study.students]
    return [
        *(paths.images, paths.facts),
        *([paths.fit] if study.needs_coefficients else []),
        *(outputs("flows", job) if study.flows else []),
        *(path for snapshots in shown_fits(job).values() for path in snapshots.values()),
        *_samples_outputs(job.of()),
        *(each.samples / f"{sampler_name(nfe)}.npy" for each in first for nfe in study.report.grid_nfe),
        *(each.folder / "history.jsonl" for each in job.trainings),
        *(each.scores for each in (job.of(), *job.trainings)),
    ]


def shown_fits(job: Job) -> dict[str, dict[int, Path]]:
    """Return the first seed's snapshots whose own coefficients a report shows: student -> step -> file."""
    found = {}
    for name in job.study.with_own_fit:
        student = job.of(name, job.study.seeds[0])
        steps = student.settings.snapshots if student.settings.refits else [0]
        found[name] = {step: student.weights(step=step) for step in steps}
    return found


STAGES = {
    "dataset": Stage(
        ("stages.dataset:make_dataset",),
        inputs=lambda job: [],
        outputs=lambda job: [job.paths.images, job.paths.labels, job.paths.facts],
    ),
    "teacher": Stage(
        ("stages.teacher:make_teacher",),
        inputs=lambda job: [] if isinstance(job.study.teacher, OfficialTeacher) else outputs("dataset", job),
        outputs=lambda job: [job.paths.teacher_weights, job.paths.teacher / "history.jsonl"],
    ),
    "extractor": Stage(
        ("stages.extractor:make_extractor",),
        inputs=lambda job: [job.paths.images, job.paths.labels],
        outputs=_extractor_outputs,
    ),
    "coefficients": Stage(
        ("stages.coefficients:make_coefficients",),
        inputs=lambda job: [job.paths.teacher_weights, *_learnt_from(job)],
        outputs=lambda job: [job.paths.fit],
    ),
    "student": Stage(
        ("stages.student:make_student",),
        inputs=lambda job: [job.paths.teacher_weights, *_learnt_from(job), *_fit(job), *_predictor(job)],
        outputs=lambda job: [*_weights(job), job.folder / "history.jsonl", *_snapshots(job)],
    ),
    "samples": Stage(
        ("stages.samples:make_samples",),
        inputs=lambda job: _weights(job) + _fit(job) + _label_weights(job),
        outputs=_samples_outputs,
    ),
    "scores": Stage(
        ("stages.scores:make_calibration", "stages.scores:make_scores"),
        inputs=_scores_inputs,
        outputs=lambda job: [job.scores, *([job.paths.endpoints, job.paths.passed] if job.student is None else [])],
    ),
    "flows": Stage(
        ("stages.flows:make_flows",),
        inputs=_flows_inputs,
        outputs=lambda job: [job.paths.flows / name for name in FLOW_FILES],
    ),
    "report": Stage(
        ("stages.report:make_report",),
        inputs=_report_inputs,
        outputs=lambda job: [job.paths.report / name for name in REPORT_FILES],
    ),
}


def verb_of(stage: str, job: Job) -> str:
    """Return the verb that makes a job's artifact, with its options."""
    return ("calibration" if stage == "scores" and job.student is None else stage) + job.options


def seeds_of(job: Job, stage: str) -> dict[str, Any]:
    """Return the seeds that a stage itself draws from; those of its inputs are in their cards."""
    study, images = job.study, f"0 to {job.study.sampling.count - 1}"
    seeds: dict[str, dict[str, Any]] = {
        "teacher": {"teacher": study.teacher.seed} if isinstance(study.teacher, Teacher) else {},
        "extractor": {"classifier": study.scores.classifier.seed} if study.scores.extractor == "classifier" else {},
        "coefficients": {"coefficients": study.coefficients.seed},
        "student": {"student": job.seed},
        "samples": {"images": images},
        "scores": {"images": images} if job.student is None else {"student": job.seed, "images": images},
        "flows": {"flows": study.flows.seed, "toy": study.flows.toy_seeds} if study.flows else {},
        "report": {"students": study.seeds},
    }
    return seeds.get(stage, {})


def fetched(stage: str, job: Job) -> list[str]:
    """Return the downloads that a rule waits for; scores take the extractor's."""
    return [] if stage == "scores" else downloads(job, stage)


def given(stage: str, job: Job) -> list[Path]:
    """Return the files of a person's own, beside the images, that a job of a stage opens."""
    teacher = job.study.teacher
    return [Path(teacher.path)] if stage == "teacher" and isinstance(teacher, GivenTeacher) else []


def downloads(job: Job, stage: str) -> list[str]:
    """Return the resources that a job of a stage opens."""
    dataset, teacher = job.study.dataset, job.study.teacher
    inception = INCEPTION if job.study.scores.extractor == "inception" else None
    opened = {
        "dataset": KINDS[dataset.kind].download if dataset.path is None else None,
        "teacher": teacher.checkpoint if isinstance(teacher, OfficialTeacher) else None,
        "extractor": inception,
        "scores": inception,
        "student": None if job.student is None else DISTANCES[job.settings.distance].weights,
    }
    name = opened.get(stage)
    return [name] if name else []
