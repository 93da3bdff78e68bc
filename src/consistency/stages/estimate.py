"""The verb estimate: what a study costs: operations counted on its networks, GPU-hours, days of a cluster, disk."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.nets.denoiser import build_denoiser
from consistency.nets.official import official_architecture
from consistency.stages.student import schedule_of
from consistency.stages.teacher import architecture_of
from consistency.study import OfficialTeacher, Student, Study, Teacher
from consistency.training.data import load_images

#: images and classes of the known datasets' training sets, for a study whose data is not there yet
_KNOWN = {
    "digits": (1_797, 10),
    "cifar10": (50_000, 10),
    "ffhq": (70_000, 1),
    "imagenet": (1_281_167, 1000),
    "celeba": (162_770, 1),
}
#: operations of Inception-v3 at 299x299 and of VGG16's convolutions at 224x224, forward, an image
_INCEPTION, VGG16_OPERATIONS = 11.4e9, 30.7e9
_BYTES = 4  # of a float32

#: GPUs at hand, and GPUs that one job shares, of the table of days
GPUS, SHARING = (8, 64), (1, 2, 4, 8)


@dataclass(frozen=True)
class Job:
    """A job of the workflow. operations: floating-point, an addition and a multiplication each one; after: the jobs
    that it waits for; shared: whether several GPUs can work on it."""

    stage: str
    operations: float = 0.0
    after: tuple[str, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a study costs. jobs: its graph, by name; disk: bytes at the end, by stage; snapshots: bytes of those that
    serve the learning curves alone; state: bytes of a training under way, beside its snapshots."""

    jobs: dict[str, Job]
    disk: dict[str, float]
    snapshots: float
    state: float

    def operations(self, stage: str) -> float:
        """Those of all jobs of a stage."""
        return sum(job.operations for job in self.jobs.values() if job.stage == stage)


@dataclass(frozen=True)
class _Size:
    """images: of the dataset; pixels, forward, extractor: values and operations an image; weights: bytes a network."""

    images: int
    pixels: int
    forward: float
    extractor: float
    weights: float


def estimate(study: Study, layout: Layout) -> Estimate:
    """What the whole study costs, all students and seeds together.

    Network operations are counted on the study's own architectures (a JVP counts as 2 evaluations, a backward pass as
    2); everything else is small beside them. Raises UserError for an unknown official checkpoint.
    """
    images, classes = _size_of(study, layout)
    forward, parameters = _network(study, classes)
    pixels = study.dataset.resolution**2 * study.dataset.channels
    extractor = _INCEPTION if study.scores.extractor == "inception" else 0.0
    size = _Size(images, pixels, forward, extractor, parameters * _BYTES)

    runs = study.students.values()
    seeds, count = len(study.seeds), study.sampling.count
    finals = seeds * sum(_rates(run) for run in runs) * size.weights
    snapshots = seeds * sum(_snapshots(run) for run in runs) * size.weights
    disk = {
        "dataset": float(images * pixels),
        "extractor": min(images, study.scores.kid_images) * 2048.0 * _BYTES if extractor else 0.0,
        "teacher": size.weights,
        "teacher's samples": float(study.taught * count * pixels),
        "calibration": float(study.taught * study.scores.alignment_count * pixels * _BYTES),
        "coefficients": 0.0,
        "students": finals + snapshots,
        "samples": float(seeds * sum(_arrays(study, run) for run in runs) * count * pixels),
        "scores": 0.0,
    }
    if study.flows:
        disk["flows"] = 0.0
    # The student, its averages, and two moments of the optimiser.
    state = max(1 + _rates(run) + 2 for run in runs) * size.weights
    return Estimate(_jobs(study, size), disk, snapshots, state)


def _jobs(study: Study, size: _Size) -> dict[str, Job]:
    """The jobs in the order in which the workflow would submit them."""
    forward, fit, sampling, scores = size.forward, study.coefficients, study.sampling, study.scores
    teacher = 3 * study.teacher.steps * study.teacher.batch * forward if isinstance(study.teacher, Teacher) else 0.0
    probes = size.pixels if fit.probes == "exact" else fit.probes
    fitted = fit.times * fit.samples * (2 * (probes + 1) + 1) * forward if study.needs_coefficients else 0.0
    # Without a teacher nothing is drawn from it, and nothing held against its trajectories.
    drawn = study.taught * sampling.count * (2 * study.calibration.steps - 1) * forward
    aligned = study.taught * scores.alignment_count * (2 * scores.alignment_nodes - 2) * forward
    rated = study.taught * sampling.count * size.extractor
    jobs = {
        "dataset": Job("dataset"),
        "extractor": Job("extractor", size.images * size.extractor, ("dataset",)),
        "teacher": Job("teacher", teacher, ("dataset",), shared=True),
        "teacher's samples": Job("teacher's samples", drawn, ("teacher",), shared=True),
        "calibration": Job("calibration", aligned + rated, ("extractor", "teacher's samples")),
        "coefficients": Job("coefficients", fitted, ("dataset", "teacher")),
    }
    students: dict[str, Job] = {}
    samples: dict[str, Job] = {}
    scored: dict[str, Job] = {}
    for run, student in study.students.items():
        needs = ["dataset", "teacher"]
        needs += ["coefficients"] if student.needs_coefficients else []
        needs += ["calibration"]
        operations = training_operations(student, forward) + _refits(study, student) * forward
        drawn = sampling.count * _evaluations(study, student) * forward
        measured = _scoring_operations(study, student, size)
        for seed in study.seeds:
            name = f"{run} seed {seed}"
            frozen = [f"student {student.frozen.run} seed {seed}"] if student.frozen else []
            students[f"student {name}"] = Job("students", operations, (*needs, *frozen), shared=True)
            samples[f"samples {name}"] = Job("samples", drawn, (f"student {name}",))
            scored[f"scores {name}"] = Job("scores", measured, (f"samples {name}", "calibration"))
    flows = {"flows": Job("flows", _flows_operations(study, forward), tuple(students))} if study.flows else {}
    return jobs | students | samples | scored | flows


def _refits(study: Study, student: Student) -> float:
    """Evaluations of the fits that a student makes of itself."""
    if student.fit != "average":
        return 0.0
    stage = schedule_of(study, student).stage
    times = sum(stage(step) != stage(step - 1) for step in range(1, student.steps))
    return 2.0 * times * study.coefficients.times * study.coefficients.samples


def _flows_operations(study: Study, forward: float) -> float:
    """Operations of the transport costs, and of the trainings of a denoiser for a coupling."""
    flows = study.flows
    assert flows is not None
    transported = len(study.seeds) * flows.images * flows.times * len(study.coupled)
    return (transported + 4 * len(flows.discrepancy) * flows.denoiser_steps * flows.denoiser_batch) * forward


def training_operations(student: Student, forward: float) -> float:
    """Operations of a student's training. forward: those of one evaluation of one image."""
    if student.objective == "endpoint":
        evaluations = 2.0 + 3 + 1
    elif student.objective == "consistency":
        evaluations = 3.0 + 1 + (1 if student.coupling == "gc" and student.mu else 0) + (3 if student.dsm_weight else 0)
    else:
        most = student.max_heun_steps or student.nodes - 1
        mean_steps = (2 * most + 1) / 3  # P(n) is proportional to n
        evaluations = 2 * mean_steps + 3 + 3 + 2 + (3 if student.dsm_weight else 0)
    # LPIPS passes both images through VGG16, and back through one of them.
    distance = 4 * VGG16_OPERATIONS if student.distance == "lpips" else 0.0
    return student.steps * student.batch * (evaluations * forward + distance)


def _scoring_operations(study: Study, student: Student, size: _Size) -> float:
    """Operations of the scores of a student: the points of its learning curve, and the features of its samples."""
    scores = study.scores
    point = scores.curve_count * (sum(scores.curve_nfe) * size.forward + len(scores.curve_nfe) * size.extractor)
    return _snapshots(student) * point + _arrays(study, student) * study.sampling.count * size.extractor


def _rates(student: Student) -> int:
    """EMA rates that are kept."""
    return 1 + len(student.evaluation_ema)


def _snapshots(student: Student) -> int:
    """Snapshots of a training, of every rate, that of the start included."""
    return _rates(student) * (1 + student.steps // student.snapshot_every)


def _arrays(study: Study, student: Student) -> int:
    """Arrays of samples of a student and seed."""
    sampling = study.sampling
    gammas = len(sampling.gamma) * len(sampling.gamma_nfe) if not student.to_the_end else 0
    return _rates(student) * len(sampling.nfe) + gammas


def _evaluations(study: Study, student: Student) -> int:
    """Evaluations for one image of every array."""
    sampling = study.sampling
    gammas = len(sampling.gamma) * sum(sampling.gamma_nfe) if not student.to_the_end else 0
    return _rates(student) * sum(sampling.nfe) + gammas


def makespan(jobs: Mapping[str, Job], gpus: int, sharing: int) -> float:
    """From the start of the first job to the end of the last, in operations of one GPU.

    A shared job takes `sharing` GPUs and is that much faster, every other job of any operations takes one. A job starts
    as soon as those before it are done and GPUs are free, the earlier of two first. Raises UserError when a job wants
    more GPUs than there are.
    """
    if sharing > gpus:
        raise UserError(f"a job of {sharing} GPUs never starts on {gpus}: take fewer for a job")

    def wanted(job: Job) -> int:
        return (sharing if job.shared else 1) if job.operations else 0

    waiting, done, running = dict(jobs), set[str](), list[tuple[float, str]]()
    now, free = 0.0, gpus
    while waiting or running:
        for name, job in list(waiting.items()):
            if wanted(job) <= free and done.issuperset(job.after):
                del waiting[name]
                free -= wanted(job)
                heapq.heappush(running, (now + job.operations / max(wanted(job), 1), name))
        now, name = heapq.heappop(running)
        free += wanted(jobs[name])
        done.add(name)
    return now


def print_estimate(study: Study, layout: Layout, tflops: float, gpus: Sequence[int] = GPUS) -> None:
    """Print the tables. tflops: the sustained 10^12 operations a second of one GPU, as benchmarks/distill_step.py
    measures them; gpus: for how many the days are to be told."""
    found = estimate(study, layout)
    hour = tflops * 1e12 * 3600
    print(f"{study.name}: {len(study.students)} students, {len(study.seeds)} seeds, at {tflops:g} TFLOP/s sustained")
    print(f"{'stage':20}{'operations':>12}{'GPU-hours':>12}{'GB on disk':>12}")
    rows = [(stage, found.operations(stage), size) for stage, size in found.disk.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    for stage, operations, size in rows:
        print(f"{stage:20}{operations:12.2g}{operations / hour:12,.1f}{size / 1e9:12,.1f}")
    print(f"Of the students' disk, {found.snapshots / 1e9:,.1f} GB are the snapshots of the learning curves.")
    print(
        f"While a training goes on, its state takes {found.state / 1e9:,.1f} GB more, twice that while it is written."
    )
    one = found.operations("students") / (len(study.students) * len(study.seeds))
    if study.needs_coefficients:
        share = found.operations("coefficients") / one
        print(f"The coefficient fit is {share:.2%} of the mean training of one student, and is made once for all.")
    print_days(found.jobs, hour, gpus)


def print_days(jobs: Mapping[str, Job], hour: float, gpus: Sequence[int] = GPUS) -> None:
    """Print how long the jobs take. hour: the operations of one GPU in an hour."""
    print("Days from the first job to the last, if nobody else is in the way and n GPUs are n times as fast as one;")
    print("trainings and the teacher's samples share GPUs, every other job takes one:")
    print(f"{'GPUs':>6}" + "".join(f"{f'{each} a job':>11}" for each in SHARING))
    for count in gpus:
        days = [f"{makespan(jobs, count, each) / hour / 24:.3g}" if each <= count else "" for each in SHARING]
        print(f"{count:6}" + "".join(f"{value:>11}" for value in days))


def _size_of(study: Study, layout: Layout) -> tuple[int, int]:
    """Images and classes of the data: what is there, else what is known of it, else an assumption that is printed."""
    if (layout.dataset / "dataset.json").exists():
        data = load_images(layout.dataset)
        return len(data), data.classes
    if study.dataset.kind in _KNOWN:
        return _KNOWN[study.dataset.kind]
    print(f"{study.name}: the data is not there yet; taken as 50,000 images of 10 classes")
    return 50_000, 10


def _network(study: Study, classes: int) -> tuple[float, int]:
    """Operations of one evaluation of one image, and the parameters, of the student."""
    if isinstance(study.teacher, OfficialTeacher):
        architecture = official_architecture(study.teacher.checkpoint) | {"augment_dim": 0}
    else:
        architecture = architecture_of(study, study.teacher, classes, 0.5)
    # A student that begins at random is its teacher's network as it is.
    architecture = {**architecture, "second_time": any(student.second_time for student in study.students.values())}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_denoiser(architecture).parameters())
    return forward_operations(architecture), parameters


def forward_operations(architecture: dict[str, Any]) -> float:
    """Operations of one evaluation of one image, an addition and a multiplication each one. Nothing is computed."""
    with torch.device("meta"):
        denoiser = build_denoiser(architecture).eval()
        x = torch.zeros(1, denoiser.img_channels, denoiser.img_resolution, denoiser.img_resolution)
        with FlopCounterMode(display=False) as counter:
            denoiser(x, torch.ones(1))
    return float(counter.get_total_flops())
