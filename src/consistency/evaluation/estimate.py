"""The verb estimate: a study's cost in operations (counted on its networks), GPU-hours and disk."""

from dataclasses import dataclass
from pathlib import Path

import torch

from consistency.config.dataset import KINDS
from consistency.config.distances import DISTANCES
from consistency.config.job import Job
from consistency.config.measures import Flows
from consistency.config.networks import GivenTeacher, OfficialTeacher, Teacher
from consistency.config.objectives import Consistency
from consistency.config.samplers import student_samplers
from consistency.config.student import Student
from consistency.config.study import Study
from consistency.data.prepared import load_images
from consistency.nets.checkpoint import load_given
from consistency.nets.denoiser import build_denoiser, forward_operations
from consistency.nets.official import official_architecture
from consistency.training.consistency_training import schedule_of
from consistency.training.teachers import architecture_of

#: operations of Inception-v3 at 299x299, forward, an image
_INCEPTION = 11.4e9
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Estimate:
    """Costs of a study. operations: floating-point operations by stage, additions and multiplications counted as one
    each; disk: bytes at the end, by stage; snapshots: bytes used for the learning curves alone; state: bytes of a
    running training, beside its snapshots."""

    operations: dict[str, float]
    disk: dict[str, float]
    snapshots: float
    state: float


@dataclass(frozen=True)
class _Size:
    """Sizes in a study. images: of the dataset; pixels, forward, extractor: values and operations per image; weights:
    bytes per network."""

    images: int
    pixels: int
    forward: float
    extractor: float
    weights: float


def estimate(job: Job) -> Estimate:
    """Return the cost of the whole study, all students and seeds together.

    Network operations are counted on the study's own architectures (a backward pass counts as 2 evaluations);
    everything else is negligible. Raises UserError for an unknown official checkpoint.
    """
    study = job.study
    images, classes = _size_of(job)
    forward, parameters = _network(study, classes)
    pixels = study.dataset.resolution**2 * study.dataset.channels
    extractor = _INCEPTION if study.scores.extractor == "inception" else 0.0
    size = _Size(images, pixels, forward, extractor, parameters * _BYTES)

    jobs = [job.of(name) for name in study.students]
    runs = study.students.values()
    seeds, count = len(study.seeds), study.sampling.count
    finals = seeds * sum(len(student.rates) for student in runs) * size.weights
    snapshots = seeds * sum(len(student.rates) * len(student.snapshots) for student in runs) * size.weights
    disk = {
        "dataset": float(images * pixels),
        "extractor": min(images, study.scores.kid_images) * 2048.0 * _BYTES if extractor else 0.0,
        "teacher": size.weights,
        "teacher's samples": float(study.taught * count * pixels),
        "calibration": float(study.taught * study.scores.alignment_count * pixels * _BYTES),
        "students": finals + snapshots,
        "samples": float(seeds * sum(len(student_samplers(each)) for each in jobs) * count * pixels),
    }
    # The student, its averages, and two moments of the optimiser.
    state = max(1 + len(student.rates) + 2 for student in runs) * size.weights
    return Estimate(_operations(study, jobs, size), disk, snapshots, state)


def _operations(study: Study, jobs: list[Job], size: _Size) -> dict[str, float]:
    """Return the floating-point operations of each stage, in the order of the workflow; jobs: one per student."""
    forward, sampling, scores = size.forward, study.sampling, study.scores
    runs, seeds = list(study.students.values()), len(study.seeds)
    # Without a teacher there are no samples of it and no comparison with its trajectories.
    aligned = scores.alignment_count * (2 * scores.alignment_nodes - 2) * forward
    training = sum(training_operations(study, student, forward) for student in runs)
    teacher = study.teacher.steps * study.teacher.batch if isinstance(study.teacher, Teacher) else 0
    evaluations = sum(sampler.nfe for job in jobs for sampler in student_samplers(job))
    operations = {
        "dataset": 0.0,
        "extractor": size.images * size.extractor,
        "teacher": 3.0 * teacher * forward,
        "teacher's samples": study.taught * sampling.count * (2 * study.calibration.steps - 1) * forward,
        "calibration": study.taught * (aligned + sampling.count * size.extractor),
        "coefficients": study.needs_coefficients
        * study.coefficients.evaluations(size.pixels, study.coefficients.samples)
        * forward,
        "students": seeds * training,
        "samples": seeds * sampling.count * evaluations * forward,
        "scores": seeds * sum(_scoring_operations(job, size) for job in jobs),
    }
    return operations | ({"flows": _flows_operations(study, study.flows, forward)} if study.flows else {})


def _flows_operations(study: Study, flows: Flows, forward: float) -> float:
    """Return the operations of the transport costs and of training a denoiser for each coupling."""
    transported = len(study.seeds) * flows.images * flows.times * len(study.coupled)
    return (transported + 4 * len(flows.discrepancy) * flows.denoiser_steps * flows.denoiser_batch) * forward


def training_operations(study: Study, student: Student, forward: float) -> float:
    """Return the operations of a student's training, its own fits included. forward: of one evaluation of one image."""
    refits = 0.0
    if isinstance(student, Consistency) and student.refits:
        stage = schedule_of(student, study.noise).stage
        times = sum(stage(step) != stage(step - 1) for step in range(1, student.steps))
        refits = 2.0 * times * study.coefficients.times * study.coefficients.samples
    step = student.evaluations * forward + DISTANCES[student.distance].operations
    return student.steps * student.batch * step + refits * forward


def _scoring_operations(job: Job, size: _Size) -> float:
    """Return the operations of a student's scores: points of its learning curve, and features of its samples."""
    student, scores = job.settings, job.study.scores
    point = scores.curve_count * (sum(scores.curve_nfe) * size.forward + len(scores.curve_nfe) * size.extractor)
    samples = len(student_samplers(job)) * job.study.sampling.count
    return len(student.rates) * len(student.snapshots) * point + samples * size.extractor


def print_estimate(job: Job, tflops: float) -> None:
    """Print the table. tflops: sustained 10^12 operations per second of one GPU, from benchmarks/distill_step.py."""
    study, hour = job.study, tflops * 1e12 * 3600
    students, seeds = len(study.students), len(study.seeds)
    print(f"{study.name}: {students} students, {seeds} seeds, at {tflops:g} TFLOP/s sustained", flush=True)
    print("counting the operations of its networks: up to half a minute", flush=True)
    found = estimate(job)
    print(f"{'stage':20}{'operations':>12}{'GPU-hours':>12}{'GB on disk':>12}")
    rows = [(stage, operations, found.disk.get(stage, 0.0)) for stage, operations in found.operations.items()]
    rows = [row for row in rows if any(row[1:])]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    for stage, operations, size in rows:
        print(f"{stage:20}{operations:12.2g}{_short(operations / hour):>12}{_short(size / 1e9):>12}")
    print(f"Of the students' disk, {_short(found.snapshots / 1e9)} GB are the snapshots of the learning curves.")
    print(f"A running training keeps a state of {_short(found.state / 1e9)} GB, twice that while it is written.")
    if study.needs_coefficients:
        share = found.operations["coefficients"] / found.operations["students"] * len(study.trainings)
        print(f"The coefficient fit is {share:.2%} of the mean training of one student, and is made once for all.")


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _size_of(job: Job) -> tuple[int, int]:
    """Return images and classes of the data: of the prepared dataset, else known values, else a printed assumption."""
    study, folder = job.study, job.paths.dataset
    if (folder / "dataset.json").exists():
        data = load_images(folder)
        return len(data), data.classes
    kind = KINDS[study.dataset.kind]
    if size := kind.size or kind.sizes.get(study.dataset.resolution):
        return size
    print(f"{study.name}: the data is not there yet; taken as 50,000 images of 10 classes")
    return 50_000, 10


def _network(study: Study, classes: int) -> tuple[float, int]:
    """Return the operations of one evaluation of one image by the student, and its parameters."""
    if isinstance(study.teacher, OfficialTeacher):
        architecture = official_architecture(study.teacher.checkpoint) | {"augment_dim": 0}
    elif isinstance(study.teacher, GivenTeacher) and study.teacher.network is None:
        architecture = load_given(Path(study.teacher.path), None)[0].architecture
    else:
        architecture = architecture_of(study, study.teacher, classes, 0.5)
    # A student with random initial weights has its teacher's architecture.
    architecture = {**architecture, "second_time": any(student.takes_s for student in study.students.values())}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_denoiser(architecture).parameters())
    return forward_operations(architecture), parameters
