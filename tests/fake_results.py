"""A finished study without the hours: every file of results/<study>/, with smooth synthetic numbers.

The curves fall as a power of the step, and a student's level depends on its place in the study, so a report has
something to compare. Cards carry the right keys, so readers accept them.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from consistency.base.arrays import write_array, write_arrays, write_table
from consistency.base.files import atomic, sha256, write_bytes, write_json
from consistency.config.job import Job
from consistency.config.networks import OfficialTeacher, Teacher
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.config.samplers import student_samplers
from consistency.config.student import Student
from consistency.config.study import Study
from consistency.evaluation.scores import CALIBRATION_COLUMNS, COLUMNS
from consistency.provenance.card import Card
from consistency.provenance.graph import FLOW_FILES, outputs
from consistency.theory.noise import log_grid
from consistency.theory.oracles import GaussianTeacher

#: two students, two seeds, four points a curve; a test changes what it needs to
SMALL = """
name: small
title: A small study
dataset: {kind: digits, resolution: 8, channels: 1}
noise: {sigma_data: measured}
teacher: {kind: trained, network: {kind: mlp, width: 32, depth: 2}, steps: 400, batch: 32, log_every: 100}
coefficients: {times: 24, samples: 64}
student: {nodes: 18, max_heun_steps: 8, steps: 60, batch: 16, snapshot_every: 20, log_every: 10}
students:
  ctm: {preconditioning: ctm}
  analytic: {preconditioning: analytic}
seeds: [0, 1]
sampling: {count: 96, nfe: [1, 2, 5], gamma: [1.0]}
scores: {extractor: classifier, curve_count: 96, kid_subset_size: 50, alignment_count: 64}
report: {baseline: {trajectory: ctm}}
"""

#: a teacher that is downloaded, and its published score
OFFICIAL = (
    SMALL.replace("{sigma_data: measured}", "{sigma_data: 0.5}")
    .replace(
        "{kind: trained, network: {kind: mlp, width: 32, depth: 2}, steps: 400, batch: 32, log_every: 100}",
        "{kind: edm, checkpoint: edm-cifar10-32x32-uncond-vp.pkl}",
    )
    .replace("scores: {extractor: classifier,", "calibration: {published_fid: 1.05}\nscores: {extractor: inception,")
)

#: three arms of consistency training, without a teacher
UNTAUGHT = """
name: small
title: A small study
dataset: {kind: digits, resolution: 8, channels: 1}
noise: {sigma_data: measured}
teacher: {kind: none, network: {kind: mlp, width: 32, depth: 2}}
coefficients: {}
student: {objective: consistency, preconditioning: cm, steps: 60, batch: 16, snapshot_every: 20, log_every: 10}
varies: [coupling, mu]
students:
  ic: {coupling: ic}
  ot: {coupling: ot}
  gc: {coupling: gc, mu: 0.5}
seeds: [0, 1]
sampling: {count: 96, nfe: [1, 2]}
scores: {extractor: classifier, curve_nfe: [1, 2], curve_count: 96, kid_subset_size: 50, alignment_count: 64}
report: {baseline: {consistency: ic}, grid_nfe: [1, 2]}
"""

#: and a sweep of mu
SWEEP = UNTAUGHT.replace("  gc: {", "  gc1: {coupling: gc, mu: 1.0}\n  gc3: {coupling: gc, mu: 0.3}\n  gc: {")


def make_study(folder: Path, name: str = "small", text: str = SMALL) -> Study:
    """The small study, read from a file as a person's would be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("name: small", f"name: {name}"))
    return load_study(path)


def make_finished(folder: Path, text: str = SMALL, name: str = "small") -> Job:
    """A study's file in a folder, and beside it everything that its stages leave."""
    study = make_study(folder, name, text)
    job = Job(study, StudyPaths(study.name, folder / "results", folder / "state"))
    make_results(job)
    make_report(job)
    return job


def make_results(job: Job) -> None:
    """Write everything that the stages dataset to scores leave for report and track."""
    study, paths = job.study, job.paths
    _dataset(job)
    write_array(paths.extractor / "features.npy", np.zeros((4, 8), np.float32))
    for path in outputs("extractor", job)[1:]:
        write_bytes(path, b"")
    _card(job, "extractor", held_out_accuracy=0.97)
    _teacher(job)
    if study.needs_coefficients:
        _coefficients(job)
    _samples(job)
    _calibration(job)
    # Those that others are made from come first.
    for student in sorted(job.trainings, key=lambda each: each.settings.frozen is not None):
        make_student(student)
    if study.flows:
        _flows(job)


def make_student(job: Job, level: float = 1.0) -> None:
    """One student's training, samples and scores. level: a factor of all its losses and scores."""
    settings, key = job.settings, job.key("student")
    level *= _level(job)
    measured = _history(job.folder, settings, level, settings.objective)
    for rate in settings.rates:
        for step in settings.snapshots:
            _weights(job.weights(rate, step), key, step)
        _weights(job.weights(rate), key, settings.steps)
    _card(job, "student", **measured)
    _samples(job)
    _scores(job, level)


def edit_card(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a card says."""
    card = json.loads(path.read_text(encoding="utf-8"))
    change(card)
    write_json(path, card)


def make_report(job: Job) -> None:
    """A stand-in for the report stage: a page, a figure, a table, summary.json, card.json."""
    folder = job.paths.report
    write_bytes(folder / "report.html", f"<html><body><h1>{job.study.title}</h1></body></html>\n".encode())
    write_bytes(folder / "figures" / "curves.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>\n')
    write_bytes(folder / "final.csv", b"run,nfe,fd\n")
    write_json(folder / "summary.json", {"study": job.study.name})
    _card(job, "report")


def _dataset(job: Job) -> None:
    study, folder = job.study, job.paths.dataset
    images = _images(study, 2 * study.sampling.count, "dataset")
    write_array(folder / "images.npy", images)
    write_array(folder / "labels.npy", np.arange(len(images)) % 10)
    facts = {
        "count": len(images),
        "sha256": sha256(folder / "images.npy"),
        "classes": [str(k) for k in range(10)],
        "sigma_data": 0.5,
        "resolution": study.dataset.resolution,
        "channels": study.dataset.channels,
        "source": study.dataset.kind,
    }
    write_json(folder / "dataset.json", facts)
    _card(job, "dataset")


def _teacher(job: Job) -> None:
    settings, folder = job.study.teacher, job.paths.teacher
    steps = 0
    measured = {"parameters": 123_456.0}
    if isinstance(settings, Teacher):
        steps = settings.steps
        measured |= _history(folder, settings, 1.0, None)
    else:
        write_bytes(folder / "history.jsonl", b"")
    if isinstance(settings, OfficialTeacher):
        measured = {"parameters": 55_733_891}
    _weights(folder / "teacher.safetensors", job.key("teacher"), steps)
    _card(job, "teacher", **measured)


def _coefficients(job: Job) -> None:
    """l_t and s_t of a Gaussian teacher, with error bars that grow where the signal is small."""
    study, path = job.study, job.paths.fit
    times = log_grid(study.coefficients.times, study.noise.sigma_min, study.noise.sigma_max).flip(0)
    l, s = GaussianTeacher(torch.tensor([0.05, 0.25, 1.0], dtype=torch.float64)).coefficients(times)
    error = 0.02 / (1 + times)
    arrays = {"times": times, "l": l, "l_se": error / 4, "s": s, "s_se": error, "determined": times > 0}
    arrays |= {f"{name}_centred": arrays[name] for name in ("s", "determined")} | {"s_centred_se": error}
    arrays["centre"] = torch.zeros(study.dataset.channels, *[study.dataset.resolution] * 2)
    write_arrays(path, {name: array.numpy() for name, array in arrays.items()})
    _card(job, "coefficients", seconds=3.5, images=study.coefficients.samples, error=5e-4)


def _samples(job: Job) -> None:
    names = ["heun"] if job.student is None else [sampler.name for sampler in student_samplers(job)]
    count = job.study.sampling.count if job.student is not None or job.study.taught else 0
    for name in names:
        write_array(job.samples / f"{name}.npy", _images(job.study, count, f"{job.student} {job.seed} {name}"))
    _card(job, "samples")


def _scores(job: Job, level: float) -> None:
    """Further EMA rates score better, by a tenth each."""
    rows = []
    for k, rate in enumerate((job.settings.ema_rate, *job.settings.evaluation_ema)):
        rows += _rate_rows(job, rate, level * 0.9**k, main=k == 0)
    write_table(job.scores, rows, COLUMNS)
    _card(job, "scores")


def _rate_rows(job: Job, rate: float, level: float, main: bool) -> list[dict[str, Any]]:
    study, settings, scores = job.study, job.settings, job.study.scores
    endpoint, taught = settings.only_to_eps, study.taught
    sampler, rows = "multistep" if endpoint else "jumps", []
    common = {"study": study.name, "run": job.student, "seed": job.seed, "ema": rate, "extractor": _extractor(study)}
    for step in settings.snapshots:
        for nfe in scores.curve_nfe:
            values = _values(step, nfe, level, aligned=taught and (not endpoint or nfe == 1))
            place = {"kind": "curve", "step": step, "sampler": sampler, "nfe": nfe, "images": scores.curve_count}
            rows.append(common | place | values)
    final = [(sampler, nfe, taught and (not endpoint or nfe == 1)) for nfe in study.sampling.nfe]
    if main and not endpoint:
        final += [(f"gamma={g:g}", nfe, False) for g in study.sampling.gamma for nfe in study.sampling.gamma_nfe]
    for name, nfe, aligned in final:
        place = {"kind": "final", "step": settings.steps, "sampler": name, "nfe": nfe, "images": study.sampling.count}
        rows.append(common | place | _values(settings.steps, nfe, level, aligned))
    return rows


def _flows(job: Job) -> None:
    """Files of its names; the figures' tests have real ones."""
    for name in FLOW_FILES:
        write_bytes(job.paths.flows / name, f"{name}\n".encode())
    _card(job, "flows")


def _calibration(job: Job) -> None:
    study, held = job.study, job.study.calibration
    common = {"study": study.name, "kind": "calibration", "images": study.sampling.count}
    common["extractor"] = _extractor(study)
    rows = [common | {"run": "data", "sampler": "halves", "nfe": 0, "fd": 0.4, "kid": 0.0001}]
    rows[0]["images"] = study.sampling.count // 2
    if study.taught:
        teacher = {"run": "teacher", "sampler": "heun", "nfe": 2 * held.steps - 1, "fd": 1.1, "kid": 0.0008}
        against = {"published": held.published_fid, "tolerance": held.tolerance} if held.published_fid else {}
        rows.append(common | teacher | against)
        rows.append(common | teacher | {"sampler": "heun against half", "fd": 1.6, "images": study.sampling.count // 2})
    write_table(job.scores, rows, CALIBRATION_COLUMNS)
    write_bytes(job.paths.passed, b"")
    write_array(job.paths.endpoints, np.zeros((0, 1), np.float32))
    _card(job, "scores")


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of a score table as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")  # type: ignore[return-value]


def _values(step: int, nfe: int, level: float, aligned: bool) -> dict[str, float]:
    fall = level / math.sqrt(nfe) / (1 + step / 10) ** 0.7
    values = {"fd": round(40 * fall, 5), "kid": round(0.05 * fall, 7)}
    return values | ({"alignment": round(0.2 * fall, 6)} if aligned else {})


def _level(job: Job) -> float:
    runs = list(job.study.students)
    return (1.3 - 0.4 * runs.index(str(job.student)) / max(len(runs) - 1, 1)) * (1 + 0.03 * (job.seed or 0))


def _extractor(study: Study) -> str:
    return "classifier" if study.scores.extractor == "classifier" else f"inception-{study.scores.mode}"


def _history(folder: Path, settings: Teacher | Student, level: float, objective: str | None) -> dict[str, float]:
    """Write history.jsonl; objective None is the teacher's. Returns what the training measured."""
    lines = []
    parts = {"time_data": 0.001, "time_forward": 0.02, "time_backward": 0.03, "time_optimizer": 0.005}
    if objective in ("trajectory", "endpoint"):
        parts["time_teacher"] = 0.2
    for step in range(settings.log_every, settings.steps + 1, settings.log_every):
        fall = level / (1 + step / 10) ** 0.5
        terms = {"loss": 0.8 * fall}
        if objective is not None:
            terms["consistency" if objective == "consistency" else "distillation"] = 0.6 * fall
        if objective == "trajectory":
            terms["dsm"] = 0.2 * fall
        speed = {"images_per_second": 10.0 * settings.batch, "seconds": round(step / 10, 3)}
        memory = {"peak_memory_mib": 700.0 + step}
        lines.append({"step": step, **terms, "grad_norm": 2 * fall, **speed, **memory, **parts})
    write_bytes(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {"images": settings.steps * settings.batch, "seconds": lines[-1]["seconds"]}


def _images(study: Study, count: int, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    size, channels = study.dataset.resolution, study.dataset.channels
    draws = np.random.default_rng(zlib.crc32(name.encode()))
    return draws.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def _weights(path: Path, key: str, step: int) -> None:
    with atomic(path) as temporary:
        save_file({"weight": torch.full((2,), float(step))}, temporary, {"key": key, "step": str(step)})


def _card(job: Job, stage: str, **measured: float) -> None:
    """The card of what lies in a stage's folder; for scores what the graph says."""
    folder = job.card(stage).parent
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "card.json"]
    if measured:
        measured["network_evaluations"] = 12.0 * measured.get("images", 100)
    card = Card(job, stage)
    card.started -= 2
    card.write(None if stage == "scores" else files, measured=measured)
