"""Scores: what is measured on which images, the calibration that stops a study, every EMA rate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import ABSENT
from tests.stages.conftest import save_students

from consistency.__main__ import main
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.prepared import load_images, to_bytes
from consistency.evaluation import extractor
from consistency.evaluation.extractor import open_extractor, read_data_statistics
from consistency.evaluation.features import Extractor, Statistics, frechet_distance
from consistency.evaluation.samplers import draw, jump_sampler
from consistency.evaluation.scores import CALIBRATION_COLUMNS, COLUMNS
from consistency.nets.checkpoint import load_denoiser
from consistency.provenance.inputs import read_label_weights, read_preconditioning
from consistency.stages.extractor import make_extractor
from consistency.stages.samples import make_samples
from consistency.stages.scores import make_calibration, make_scores

Tiny = Callable[..., Study]
CPU = torch.device("cpu")
RATE = {"student.evaluation_ema": [0.9]}


@pytest.fixture
def layout(tiny: Tiny, results: StudyPaths) -> StudyPaths:
    """The teacher's samples and the extractor too."""
    make_samples(Job(tiny(), results), CPU)
    make_extractor(Job(tiny(), results), CPU)
    return results


def make_student(study: Study, layout: StudyPaths, run: str = "analytic") -> None:
    """A student at every rate and step, with its samples."""
    job = Job(study, layout, run, 0)
    save_students(job, (0, 3, 6, None))
    make_samples(job, CPU)


def scored(study: Study, layout: StudyPaths, run: str = "analytic") -> pd.DataFrame:
    make_calibration(Job(study, layout), CPU)
    make_scores(Job(study, layout, run, 0), CPU)
    return pd.read_csv(Job(study, layout, run, 0).scores)


def test_a_table_has_a_row_for_each_sampler_rate_and_snapshot(tiny: Tiny, layout: StudyPaths) -> None:
    study = tiny(RATE)
    make_student(study, layout)
    table = scored(study, layout)
    assert list(table.columns) == COLUMNS
    final = table[table.kind == "final"]
    own = {("jumps", nfe, rate) for nfe in (1, 2, 5) for rate in (0.5, 0.9)}
    assert set(zip(final.sampler, final.nfe, final.ema, strict=True)) == own | {("gamma=1.0", 2, 0.5)}
    curve = table[table.kind == "curve"]
    wanted = {(step, nfe, rate) for step in (0, 3, 6) for nfe in (1, 2) for rate in (0.5, 0.9)}
    assert set(zip(curve.step, curve.nfe, curve.ema, strict=True)) == wanted
    assert table[["fd", "kid"]].notna().all().all()
    assert (table.alignment.isna() == (table.sampler == "gamma=1.0")).all()
    # Each row is of weights of its own.
    assert table.fd.nunique() == len(table)
    calibration = pd.read_csv(Job(study, layout).scores)
    assert list(calibration.columns) == CALIBRATION_COLUMNS
    assert calibration[["ema", "published", "tolerance"]].isna().all().all()
    assert list(zip(calibration.run, calibration.sampler, calibration.images, strict=True)) == [
        ("data", "halves", 80),
        ("teacher", "heun", 80),
        ("teacher", "heun against half", 80),
    ]
    # Without further rates the main one's rows are the same.
    shutil.rmtree(Job(study, layout, "analytic", 0).samples)
    make_student(tiny(), layout)
    pd.testing.assert_frame_equal(table[table.ema == 0.5].reset_index(drop=True), scored(tiny(), layout))


def test_a_row_is_what_one_computes_from_all_its_images_at_once_in_whatever_batches(
    tiny: Tiny, layout: StudyPaths
) -> None:
    study = tiny()
    make_student(study, layout)
    table = scored(study, layout)
    job = Job(study, layout, "analytic", 0)
    model = load_denoiser(job.weights(step=3))[0]
    jumps = jump_sampler(job, model, read_preconditioning(job, model), 2)
    images = torch.cat(
        [batch for _, batch in draw(study.sampling.batch, model, jumps, 80, read_label_weights(job, model), 0)]
    )
    features = open_extractor(job, load_images(layout.dataset), CPU)(to_bytes(images)).astype(np.float64)
    data = read_data_statistics(Job(study, layout))
    whole = Statistics(features.mean(0), np.cov(features, rowvar=False), features)
    endpoints = np.load(Job(study, layout).scores.with_name("endpoints.npy"))
    row = table[(table.kind == "curve") & (table.step == 3) & (table.nfe == 2)].iloc[0]
    assert row.fd == pytest.approx(frechet_distance(whole, data), rel=1e-9)
    assert row.alignment == pytest.approx(np.square(images[:16].double().numpy() - endpoints).mean(), rel=1e-12)
    assert row.images == 80
    pd.testing.assert_frame_equal(table, scored(tiny({"sampling.batch": 7}), layout), rtol=1e-4)


@pytest.mark.parametrize(("count", "half"), [(60, 60), (200, 100)])
def test_data_and_teacher_are_compared_with_one_half_at_equal_numbers(
    tiny: Tiny, layout: StudyPaths, count: int, half: int
) -> None:
    """200 images have halves of 100. The teacher gives the data back."""
    job = Job(tiny({"sampling.count": count}), layout)
    data = load_images(layout.dataset)
    make_samples(job, CPU)
    np.save(job.samples / "heun.npy", data.images[:count])
    make_calibration(job, CPU)
    table = pd.read_csv(job.scores).set_index("sampler")
    assert table.images.to_dict() == {"halves": half, "heun": count, "heun against half": half}
    features = open_extractor(job, data, CPU)(data.images)
    order = torch.randperm(200, generator=generator(0, "halves")).numpy()
    first, second = (Statistics.of(features[part[:half]]) for part in (order[:100], order[100:]))
    assert table.fd["halves"] == pytest.approx(frechet_distance(second, first), rel=1e-6)
    same = Statistics.of(features[:count][:half])
    assert table.fd["heun against half"] == pytest.approx(frechet_distance(same, first), rel=1e-6)
    assert (abs(table.fd["heun"]) < 1e-3) == (count == 200)


def test_endpoint_students_are_aligned_at_one_jump_only(tiny: Tiny, layout: StudyPaths) -> None:
    study = tiny({"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "report": {}})
    make_student(study, layout)
    table = scored(study, layout)
    assert set(table.sampler) == {"multistep"}
    assert (table.alignment.notna() == (table.nfe == 1)).all()


# --- the calibration rule

INCEPTION = {"scores.extractor": "inception", "calibration.published_fid": 1.0}


def inception_played_by(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few random projections in place of Inception: the distance of 2048 features would take a minute."""
    matrix = np.random.default_rng(0).normal(size=(64, features)).astype(np.float32)

    def batch(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255 @ matrix

    monkeypatch.setattr(extractor, "open_resource", lambda name: Path(name))
    made = Extractor("inception-legacy_tensorflow", batch)
    monkeypatch.setattr(extractor, "inception_extractor", lambda *_: made)


@pytest.fixture
def verb(
    layout: StudyPaths, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, Any]], int]:
    """verb("calibration", {"calibration.published_fid": 2.0}): the real verb, with a stand-in for Inception."""
    inception_played_by(4, monkeypatch)

    def run(name: str, changes: dict[str, Any]) -> int:
        words = [name, "--study", str(write_study(INCEPTION | changes)), "--device", "cpu"]
        return main([*words, "--results", str(layout.results), "--state", str(layout.state)])

    return run


def test_a_teacher_that_is_off_stops_the_study_and_nothing_is_lost(
    verb: Callable[..., int], layout: StudyPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("extractor", {}) == 0
    samples, table = (layout.root / name for name in ("samples/teacher/heun.npy", "scores/calibration.csv"))
    before = samples.read_bytes()
    table.write_text("of another day\n")
    assert verb("calibration", {}) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    measured = json.loads(layout.measured_calibration.read_text())
    for said in (
        f"FID is {measured['fd']:.4g}",
        "published 1 within 0.1",
        "calibration.tolerance",
        "from 80 images",
        "legacy_tensorflow",
        "data prepared in another way",
        "scores.mode",
        str(layout.measured_calibration),
    ):
        assert said in error
    assert not table.exists()
    assert samples.read_bytes() == before
    assert measured["images"] == 80
    # With a wider tolerance the same command goes on, and says what it was held against.
    wider = {"calibration.tolerance": abs(measured["fd"] - 1) + 0.01}
    assert verb("calibration", wider) == 0
    teacher = pd.read_csv(table).set_index("sampler").loc["heun"]
    assert (teacher.published, teacher.tolerance) == (1.0, pytest.approx(wider["calibration.tolerance"]))
    assert teacher.fd == pytest.approx(measured["fd"], rel=1e-12)
    assert not layout.measured_calibration.exists()
    assert table.with_name("endpoints.npy").exists()


@pytest.mark.parametrize(("off", "code"), [(0.09, 0), (-0.09, 0), (0.11, 2), (-0.11, 2)])
def test_the_tolerance_is_on_both_sides(verb: Callable[..., int], layout: StudyPaths, off: float, code: int) -> None:
    assert verb("extractor", {}) == 0
    verb("calibration", {"calibration.tolerance": 1e-9})
    fid = json.loads(layout.measured_calibration.read_text())["fd"]
    assert verb("calibration", {"calibration.published_fid": fid + off}) == code


def test_too_few_images_for_the_features_are_warned_of_once(
    tiny: Tiny, layout: StudyPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tiny({"scores.extractor": "inception"})
    words = "fewer images than the 90 features (sampling.count 80, scores.curve_count 80, data halves 80): "
    for features, warned in ((4, 0), (90, 1)):
        inception_played_by(features, monkeypatch)
        make_extractor(Job(study, layout), CPU)
        make_calibration(Job(study, layout), CPU)
        assert capsys.readouterr().out.count(words) == warned
