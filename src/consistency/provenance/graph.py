"""The graph of a study: what each stage reads and writes, the code that makes it, its seeds and its downloads.

Rules, dvc.yaml, cards, verification and the report ask it, so that a dependency is written once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency.config.dataset import KINDS
from consistency.config.distances import DISTANCES
from consistency.config.job import Job
from consistency.config.networks import OfficialTeacher, Teacher
from consistency.config.paths import sampler_name
from consistency.config.samplers import student_samplers
from consistency.data.resources import INCEPTION

#: the stage that makes an artifact, and its job
Artifact = tuple[str, Job]
Files = Callable[[Job], Iterator[Path]]

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
        if stage in ("student", "samples", "scores"):
            found |= {f"{stage} {each.label}": (stage, each) for each in job.trainings}
    return found


def inputs(stage: str, job: Job) -> list[Path]:
    """Return the files that a job of a stage reads, each of them an output of another stage."""
    return list(dict.fromkeys(STAGES[stage].inputs(job)))


def inputs_made_by(stage: str, job: Job) -> dict[Path, str]:
    """Return the files that a job of a stage reads, each with the verb that makes it."""
    verbs = {path: verb_of(*each) for each in artifacts(job).values() for path in outputs(*each)}
    return {path: verbs[path] for path in inputs(stage, job)}


def outputs(stage: str, job: Job) -> list[Path]:
    """Return the files that a job of a stage writes beside its card; the figures of a report are not known before."""
    return list(STAGES[stage].outputs(job))


def needed(stage: str, job: Job, gate: Path) -> list[Path]:
    """Return what must be there before a job begins, as Snakemake's rules declare it: its inputs or their folders, and
    for a student the gate, an output of the calibration that a teacher who fails it does not have."""
    files = [*inputs(stage, job), *([gate] if stage == "student" else [])]
    return list(dict.fromkeys(declared(job, path) for path in files))


def settled(stage: str, job: Job) -> list[Path]:
    """Return the calibration's files, which it may write again without making a student or its scores other ones: the
    endpoints depend on nothing that is not in a student's own key."""
    return [job.of().scores, job.paths.endpoints] if stage in ("student", "scores") else []


def declared(job: Job, path: Path) -> Path:
    """Return the output of a rule that holds this file: itself, or the folder whose content depends on the study."""
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
    """A stage of the pipeline. entry: the "module:function" that makes its artifact; inputs, outputs: its files."""

    entry: tuple[str, ...]
    inputs: Files
    outputs: Files


def _learnt_from(job: Job) -> Iterator[Path]:
    """Yield the files that a network learns from: the images, and their labels if it is conditional."""
    yield job.paths.images
    if job.study.teacher.conditional:
        yield job.paths.labels


def _fit(job: Job) -> Iterator[Path]:
    """Yield the coefficients, if the student reads them."""
    if job.settings.needs_coefficients:
        yield job.paths.fit


def _predictor(job: Job) -> Iterator[Path]:
    """Yield the weights of the frozen student that makes gc's endpoints, if there is one."""
    if job.predictor and job.settings.frozen:
        yield job.predictor.weights(step=job.settings.frozen.step)


def _dataset_outputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.images, job.paths.labels, job.paths.facts)


def _teacher_inputs(job: Job) -> Iterator[Path]:
    if not isinstance(job.study.teacher, OfficialTeacher):
        yield from _dataset_outputs(job)


def _teacher_outputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.teacher_weights, job.paths.teacher / "history.jsonl")


def _extractor_inputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.images, job.paths.labels)


def _extractor_outputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.extractor / name for name in ("features.npy", "statistics.npz"))
    if job.study.scores.extractor == "classifier":
        yield job.paths.extractor / "classifier.safetensors"


def _coefficients_inputs(job: Job) -> Iterator[Path]:
    yield job.paths.teacher_weights
    yield from _learnt_from(job)


def _coefficients_outputs(job: Job) -> Iterator[Path]:
    yield job.paths.fit


def _student_inputs(job: Job) -> Iterator[Path]:
    yield job.paths.teacher_weights
    yield from _learnt_from(job)
    yield from _fit(job)
    yield from _predictor(job)


def _student_outputs(job: Job) -> Iterator[Path]:
    yield from (job.weights(rate) for rate in job.settings.rates)
    yield job.folder / "history.jsonl"
    yield from _snapshots(job)


def _snapshots(job: Job) -> Iterator[Path]:
    yield from (job.weights(rate, step) for step in job.settings.snapshots for rate in job.settings.rates)


def _samples_inputs(job: Job) -> Iterator[Path]:
    if job.student is None:
        yield job.paths.teacher_weights
    else:
        yield from (job.weights(rate) for rate in job.settings.rates)
        yield from _fit(job)


def _samples_outputs(job: Job) -> Iterator[Path]:
    names = ["heun"] if job.student is None else [sampler.name for sampler in student_samplers(job)]
    yield from (job.samples / f"{name}.npy" for name in names)


def _scores_inputs(job: Job) -> Iterator[Path]:
    yield from _extractor_outputs(job)
    yield from _samples_outputs(job)
    if job.student is None:
        yield job.paths.teacher_weights
    else:
        yield job.paths.endpoints
        yield from (job.weights(rate) for rate in job.settings.rates)
        yield from _snapshots(job)
        yield from _fit(job)


def _scores_outputs(job: Job) -> Iterator[Path]:
    yield job.scores
    if job.student is None:
        yield from (job.paths.endpoints, job.paths.passed)


def _flows_inputs(job: Job) -> Iterator[Path]:
    settings, study = job.study.flows, job.study
    yield from _learnt_from(job)
    if settings and settings.discrepancy and study.taught:
        yield job.paths.teacher_weights
    for each in (each for each in job.trainings if each.student in study.coupled):
        yield from _fit(each)
        yield each.weights()
        if settings and each.student in settings.discrepancy and each.seed == study.seeds[0]:
            yield from _predictor(each)


def _flows_outputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.flows / name for name in FLOW_FILES)


def _report_inputs(job: Job) -> Iterator[Path]:
    study, paths = job.study, job.paths
    yield from (paths.images, paths.facts)
    if study.needs_coefficients:
        yield paths.fit
    if study.flows:
        yield from _flows_outputs(job)
    yield from (path for snapshots in shown_fits(job).values() for path in snapshots.values())
    yield from _samples_outputs(job.of())
    names = [f"{sampler_name(nfe)}.npy" for nfe in study.report.grid_nfe]
    yield from (job.of(student, study.seeds[0]).samples / name for student in study.students for name in names)
    yield from (each.folder / "history.jsonl" for each in job.trainings)
    yield from (each.scores for each in (job.of(), *job.trainings))


def _report_outputs(job: Job) -> Iterator[Path]:
    yield from (job.paths.report / name for name in REPORT_FILES)


def shown_fits(job: Job) -> dict[str, dict[int, Path]]:
    """Return the first seed's snapshots whose own coefficients a report shows: student -> step -> file."""
    students = [job.of(name, job.study.seeds[0]) for name in job.study.with_own_fit]
    return {
        str(each.student): {
            step: each.weights(step=step) for step in (each.settings.snapshots if each.settings.refits else [0])
        }
        for each in students
    }


STAGES = {
    "dataset": Stage(("stages.dataset:make_dataset",), lambda job: iter(()), _dataset_outputs),
    "teacher": Stage(("stages.teacher:make_teacher",), _teacher_inputs, _teacher_outputs),
    "extractor": Stage(("stages.extractor:make_extractor",), _extractor_inputs, _extractor_outputs),
    "coefficients": Stage(("stages.coefficients:make_coefficients",), _coefficients_inputs, _coefficients_outputs),
    "student": Stage(("stages.student:make_student",), _student_inputs, _student_outputs),
    "samples": Stage(("stages.samples:make_samples",), _samples_inputs, _samples_outputs),
    "scores": Stage(("stages.scores:make_calibration", "stages.scores:make_scores"), _scores_inputs, _scores_outputs),
    "flows": Stage(("stages.flows:make_flows",), _flows_inputs, _flows_outputs),
    "report": Stage(("stages.report:make_report",), _report_inputs, _report_outputs),
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
