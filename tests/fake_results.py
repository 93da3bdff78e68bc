"""A finished study without the hours: every file of results/<study>/, with smooth synthetic numbers.

The curves fall as a power of the step, and a student's level depends on its place in the study, so a report has
something to compare. Cards carry the right keys, so readers accept them.
"""

import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from consistency.files import atomic, sha256, write_bytes, write_json
from consistency.layout import Layout, snapshot_name
from consistency.provenance import write_card
from consistency.stages.flows import FILES
from consistency.stages.inputs import write_array, write_arrays, write_table
from consistency.stages.samples import student_samplers
from consistency.stages.scores import CALIBRATION_COLUMNS, COLUMNS
from consistency.study import OfficialTeacher, Student, Study, Teacher, load_study
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
report: {baseline: {trajectory: ctm}, bootstrap: 100}
"""


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
report: {baseline: {consistency: ic}, grid_nfe: [1, 2], bootstrap: 100}
"""


#: and a sweep of mu
SWEEP = UNTAUGHT.replace("  gc: {", "  gc1: {coupling: gc, mu: 1.0}\n  gc3: {coupling: gc, mu: 0.3}\n  gc: {")


def make_study(folder: Path, name: str = "small", text: str = SMALL) -> Study:
    """The small study, read from a file as a person's would be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("name: small", f"name: {name}"))
    return load_study(path)


def make_finished(folder: Path, text: str = SMALL, name: str = "small") -> tuple[Study, Layout]:
    """A study's file in a folder, and beside it everything that its stages leave."""
    study = make_study(folder, name, text)
    layout = Layout(study.name, folder / "results", folder / "state")
    make_results(study, layout)
    make_report(study, layout)
    return study, layout


def make_results(study: Study, layout: Layout) -> None:
    """Write everything that the stages dataset to scores leave for report and track."""
    _dataset(study, layout)
    write_array(layout.extractor / "features.npy", np.zeros((4, 8), np.float32))
    _card(study, layout, "extractor", [layout.dataset / "images.npy"], held_out_accuracy=0.97)
    _teacher(study, layout)
    if study.needs_coefficients:
        _coefficients(study, layout)
    _samples(study, layout, None, None)
    # Those that others are made from come first.
    for run in sorted(study.students, key=lambda run: study.students[run].frozen is not None):
        for seed in study.seeds:
            make_student(study, layout, run, seed)
    _calibration(study, layout)
    if study.flows:
        _flows(study, layout)


def make_student(study: Study, layout: Layout, run: str, seed: int, level: float = 1.0) -> None:
    """One student's training, samples and scores. level: a factor of all its losses and scores."""
    folder, settings = layout.student(run, seed), study.students[run]
    level *= _level(study, run, seed)
    measured = _history(folder, settings, level, settings.objective)
    for rate in (None, *settings.evaluation_ema):
        for step in range(0, settings.steps + 1, settings.snapshot_every):
            _weights(folder / "snapshots" / snapshot_name(step, rate), study.key("student", run, seed), step)
        _weights(layout.student_file(run, seed, rate), study.key("student", run, seed), settings.steps)
    inputs = [layout.dataset / "images.npy", layout.teacher / "teacher.safetensors"]
    inputs += [layout.coefficients / "coefficients.npz"] if settings.needs_coefficients else []
    if frozen := settings.frozen:
        inputs.append(layout.student_file(frozen.run, seed, step=frozen.step))
    _card(study, layout, "student", inputs, run, seed, **measured)
    _samples(study, layout, run, seed)
    _scores(study, layout, run, seed, level)


def edit_card(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a card says."""
    card = json.loads(path.read_text())
    change(card)
    write_json(path, card)


def make_report(study: Study, layout: Layout) -> None:
    """A stand-in for the report stage: a page, a figure, a table, summary.json, card.json."""
    write_bytes(layout.report / "report.html", f"<html><body><h1>{study.title}</h1></body></html>\n".encode())
    write_bytes(layout.report / "figures" / "curves.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>\n')
    write_bytes(layout.report / "final.csv", b"run,nfe,fd\n")
    write_json(layout.report / "summary.json", {"study": study.name})
    scores = [layout.scores(None, None), *(layout.scores(run, seed) for run in study.students for seed in study.seeds)]
    _card(study, layout, "report", scores)


def _dataset(study: Study, layout: Layout) -> None:
    images = _images(study, 2 * study.sampling.count, "dataset")
    write_array(layout.dataset / "images.npy", images)
    write_array(layout.dataset / "labels.npy", np.arange(len(images)) % 10)
    facts = {
        "count": len(images),
        "sha256": sha256(layout.dataset / "images.npy"),
        "classes": [str(k) for k in range(10)],
        "sigma_data": 0.5,
        "resolution": study.dataset.resolution,
        "channels": study.dataset.channels,
        "source": study.dataset.kind,
    }
    write_json(layout.dataset / "dataset.json", facts)
    _card(study, layout, "dataset", [])


def _teacher(study: Study, layout: Layout) -> None:
    settings = study.teacher
    steps, inputs = 0, [layout.dataset / "images.npy", layout.dataset / "labels.npy"]
    measured = {"parameters": 123_456.0}
    if isinstance(settings, Teacher):
        steps = settings.steps
        measured |= _history(layout.teacher, settings, 1.0, None)
    else:
        write_bytes(layout.teacher / "history.jsonl", b"")
    if isinstance(settings, OfficialTeacher):
        inputs, measured = [], {"parameters": 55_733_891}
    _weights(layout.teacher / "teacher.safetensors", study.key("teacher"), steps)
    _card(study, layout, "teacher", inputs, **measured)


def _coefficients(study: Study, layout: Layout) -> None:
    """l_t and s_t of a Gaussian teacher, with error bars that grow where the signal is small."""
    times = log_grid(study.coefficients.times, study.noise.sigma_min, study.noise.sigma_max).flip(0)
    l, s = GaussianTeacher(torch.tensor([0.05, 0.25, 1.0], dtype=torch.float64)).coefficients(times)
    error = 0.02 / (1 + times)
    arrays = {"times": times, "l": l, "l_se": error / 4, "s": s, "s_se": error, "determined": times > 0}
    write_arrays(layout.coefficients / "coefficients.npz", {name: array.numpy() for name, array in arrays.items()})
    inputs = [layout.teacher / "teacher.safetensors", layout.dataset / "images.npy"]
    _card(study, layout, "coefficients", inputs, seconds=3.5)


def _samples(study: Study, layout: Layout, run: str | None, seed: int | None) -> None:
    names, made_from = ["heun"], layout.teacher / "teacher.safetensors"
    if run is not None and seed is not None:
        names, made_from = [sampler.name for sampler in student_samplers(study, run)], layout.student_file(run, seed)
    count = study.sampling.count if run is not None or study.taught else 0
    for name in names:
        write_array(layout.samples(run, seed) / f"{name}.npy", _images(study, count, f"{run} {seed} {name}"))
    _card(study, layout, "samples", [made_from], run, seed)


def _scores(study: Study, layout: Layout, run: str, seed: int, level: float) -> None:
    """Further EMA rates score better, by a tenth each."""
    settings, rows = study.students[run], []
    for k, rate in enumerate((settings.ema_rate, *settings.evaluation_ema)):
        rows += _rate_rows(study, run, seed, rate, level * 0.9**k, main=k == 0)
    write_table(layout.scores(run, seed), rows, COLUMNS)
    inputs = [layout.student_file(run, seed), *sorted(layout.samples(run, seed).glob("*.npy"))]
    _card(study, layout, "scores", inputs, run, seed)


def _rate_rows(study: Study, run: str, seed: int, rate: float, level: float, main: bool) -> list[dict[str, Any]]:
    settings, scores = study.students[run], study.scores
    endpoint, taught = settings.to_the_end, study.taught
    sampler, rows = "multistep" if endpoint else "jumps", []
    common = {"study": study.name, "run": run, "seed": seed, "ema": rate, "extractor": _extractor(study)}
    for step in range(0, settings.steps + 1, settings.snapshot_every):
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


def _flows(study: Study, layout: Layout) -> None:
    """Files of its names; the figures' tests have real ones."""
    for name in FILES:
        write_bytes(layout.flows / name, f"{name}\n".encode())
    students = [layout.student_file(run, seed) for run in study.coupled for seed in study.seeds]
    _card(study, layout, "flows", [layout.dataset / "images.npy", *students])


def _calibration(study: Study, layout: Layout) -> None:
    held = study.calibration
    common = {"study": study.name, "kind": "calibration", "images": study.sampling.count}
    common["extractor"] = _extractor(study)
    rows = [common | {"run": "data", "sampler": "halves", "nfe": 0, "fd": 0.4, "kid": 0.0001}]
    if study.taught:
        teacher = {"run": "teacher", "sampler": "heun", "nfe": 2 * held.steps - 1, "fd": 1.1, "kid": 0.0008}
        against = {"published": held.published_fid, "tolerance": held.tolerance} if held.published_fid else {}
        rows.append(common | teacher | against)
    write_table(layout.scores(None, None), rows, CALIBRATION_COLUMNS)
    _card(study, layout, "scores", [layout.samples(None, None) / "heun.npy"])


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of a score table as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")  # type: ignore[return-value]


def _values(step: int, nfe: int, level: float, aligned: bool) -> dict[str, float]:
    fall = level / math.sqrt(nfe) / (1 + step / 10) ** 0.7
    values = {"fd": round(40 * fall, 5), "kid": round(0.05 * fall, 7)}
    return values | ({"alignment": round(0.2 * fall, 6)} if aligned else {})


def _level(study: Study, run: str, seed: int) -> float:
    return (1.3 - 0.4 * list(study.students).index(run) / max(len(study.students) - 1, 1)) * (1 + 0.03 * seed)


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


def _card(
    study: Study,
    layout: Layout,
    stage: str,
    inputs: list[Path],
    run: str | None = None,
    seed: int | None = None,
    **measured: float,
) -> None:
    """The card of what lies in a stage's folder; of the table alone for scores."""
    folder = layout.card(stage, run, seed).parent
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "card.json"]
    if stage == "scores":
        files = [layout.scores(run, seed)]
    if measured:
        measured["network_evaluations"] = 12.0 * measured.get("images", 100)
    started = time.time() - 2
    write_card(study, layout, stage, run, seed, started=started, inputs=inputs, outputs=files, measured=measured)
