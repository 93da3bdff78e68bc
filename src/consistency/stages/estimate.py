"""The verb estimate: what a study costs, in operations counted on its networks, GPU-hours and disk."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from consistency.layout import Layout
from consistency.nets.denoiser import build_denoiser
from consistency.nets.official import official_architecture
from consistency.stages.teacher import architecture_of
from consistency.study import OfficialTeacher, Student, Study, Teacher
from consistency.training.data import load_images

#: images and classes of the known datasets, for a study whose data is not there yet
_KNOWN = {"digits": (1_797, 10), "cifar10": (50_000, 10), "ffhq": (70_000, 1), "imagenet": (1_281_167, 1000)}
#: operations of Inception-v3 at 299x299 and of VGG16's convolutions at 224x224, forward, an image
_INCEPTION, VGG16_OPERATIONS = 11.4e9, 30.7e9
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Cost:
    """operations: floating-point, an addition and a multiplication each one; bytes: kept on disk at the end."""

    stage: str
    operations: float
    bytes: float


def estimate(study: Study, layout: Layout) -> list[Cost]:
    """What each stage of the whole study costs, all students and seeds together.

    Network operations are counted on the study's own architectures (a JVP counts as 2 evaluations, a backward pass as
    2); everything else is small beside them. Raises UserError for an unknown official checkpoint.
    """
    images, classes = _size_of(study, layout)
    forward, parameters = _network(study, classes)
    pixels = study.dataset.resolution**2 * study.dataset.channels
    runs = [study.resolved(run) for run in study.students]
    seeds, sampling, scores = len(study.seeds), study.sampling, study.scores
    teacher_nfe = 2 * sampling.teacher_steps - 1
    extractor = _INCEPTION if scores.extractor == "inception" else 0.0
    weights = parameters * _BYTES

    teacher = 0.0
    if isinstance(study.teacher, Teacher):
        teacher = 3 * study.teacher.steps * study.teacher.batch * forward
    fit = study.coefficients
    probes = pixels if fit.probes == "exact" else fit.probes
    fitted = fit.times * fit.samples * (2 * (probes + 1) + 1) * forward if study.needs_coefficients else 0.0
    reference = sampling.count * teacher_nfe * forward
    kept = sum((1 + len(run.evaluation_ema)) * (2 + run.steps // run.snapshot_every) for run in runs)
    drawn = curve = arrays = 0.0
    for run in runs:
        rates = 1 + len(run.evaluation_ema)
        gammas = len(sampling.gamma) * len(sampling.gamma_nfe) if not run.to_the_end else 0
        arrays += rates * len(sampling.nfe) + gammas
        nfe = rates * sum(sampling.nfe) + (gammas and len(sampling.gamma) * sum(sampling.gamma_nfe))
        drawn += sampling.count * nfe * forward
        points = rates * (1 + run.steps // run.snapshot_every)
        curve += points * scores.curve_count * (sum(scores.curve_nfe) * forward + len(scores.curve_nfe) * extractor)
    aligned = scores.alignment_count * (2 * scores.alignment_nodes - 2) * forward
    flows = 0.0
    if study.flows:
        denoisers = len(study.flows.discrepancy) * study.flows.denoiser_steps * study.flows.denoiser_batch * 4
        flows = (seeds * study.flows.images * study.flows.times * len(study.coupled) + denoisers) * forward
    return [
        Cost("dataset", 0.0, images * pixels),
        Cost("extractor", images * extractor, min(images, scores.kid_images) * 2048 * _BYTES if extractor else 0),
        Cost("teacher", teacher, weights),
        Cost("teacher's samples", reference, sampling.count * pixels),
        Cost("calibration", aligned + sampling.count * extractor, scores.alignment_count * pixels * _BYTES),
        Cost("coefficients", fitted, 0.0),
        Cost("students", seeds * sum(training_operations(run, forward) for run in runs), seeds * kept * weights),
        Cost("samples", seeds * drawn, seeds * arrays * sampling.count * pixels),
        Cost("scores", seeds * (curve + arrays * sampling.count * extractor), 0.0),
        *([Cost("flows", flows, 0.0)] if study.flows else []),
    ]


def training_operations(student: Student, forward: float) -> float:
    """Operations of a student's training. forward: those of one evaluation of one image."""
    if student.objective == "endpoint":
        evaluations = 2.0 + 3 + 1
    elif student.objective == "consistency":
        evaluations = 3.0 + 1 + (1 if student.coupling == "gc" and student.mu else 0)
    else:
        most = student.max_heun_steps or student.nodes - 1
        mean_steps = (2 * most + 1) / 3  # P(n) is proportional to n
        evaluations = 2 * mean_steps + 3 + 3 + 2 + (3 if student.dsm_weight else 0)
    # LPIPS passes both images through VGG16, and back through one of them.
    distance = 4 * VGG16_OPERATIONS if student.distance == "lpips" else 0.0
    return student.steps * student.batch * (evaluations * forward + distance)


def print_estimate(study: Study, layout: Layout, tflops: float) -> None:
    """Print the table. tflops: the sustained 10^12 operations a second of one GPU, as benchmarks/distill_step.py
    measures them."""
    costs = estimate(study, layout)
    print(f"{study.name}: {len(study.students)} students, {len(study.seeds)} seeds, at {tflops:g} TFLOP/s sustained")
    print(f"{'stage':20}{'operations':>12}{'GPU-hours':>12}{'GB on disk':>12}")
    total = Cost("total", sum(c.operations for c in costs), sum(c.bytes for c in costs))
    for cost in [*costs, total]:
        hours = cost.operations / (tflops * 1e12 * 3600)
        print(f"{cost.stage:20}{cost.operations:12.2g}{hours:12,.1f}{cost.bytes / 1e9:12,.1f}")
    trained = next(cost.operations for cost in costs if cost.stage == "students")
    fitted = next(cost.operations for cost in costs if cost.stage == "coefficients")
    one = trained / (len(study.students) * len(study.seeds))
    print(f"The coefficient fit is {fitted / one:.2%} of the mean training of one student, and is made once for all.")


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
    architecture = {**architecture, "second_time": True}
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
