"""What DVC compares changes with exactly the jobs that depend on a key, as Snakemake's parameters do."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ABSENT

from consistency.base.errors import UserError
from consistency.base.files import write_bytes
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.config.study import Study
from consistency.provenance.dvc import write_plan

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "config/studies").glob("*.yaml"))
Tiny = Callable[..., Study]
ANALYTIC = {f"{stage}/analytic/seed0" for stage in ("student", "samples", "scores")}


@pytest.fixture(autouse=True)
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """dvc.yaml of the working directory, as it comes."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(ROOT / "dvc.yaml", tmp_path))


@pytest.fixture
def frozen(couplings: dict[str, Any]) -> dict[str, Any]:
    """The study of couplings, where gc is made from ic."""
    varies = {"varies": ["coupling", "mu", "predictor", "ema_rate"]}
    return couplings | varies | {"students.gc.predictor": {"run": "ic"}}


def plan(study: Study) -> dict[str, Any]:
    """What is written, by job."""
    layout = StudyPaths(study.name)
    write_plan(Job(study, layout))
    root = layout.root / "plan"
    return {str(path.relative_to(root).with_suffix("")): json.loads(path.read_text()) for path in root.rglob("*.json")}


@pytest.mark.parametrize(
    ("key", "value", "jobs"),
    [
        ("sampling.batch", 32, set()),
        ("coefficients.probes", 2, {"coefficients", "report"} | ANALYTIC),
        ("scores.classifier.steps", 21, {"extractor", "scores", "scores/ctm/seed0", "scores/analytic/seed0", "report"}),
        ("calibration.steps", 5, {"samples", "scores", "report"}),
    ],
)
def test_a_key_changes_the_jobs_that_depend_on_it(tiny: Tiny, key: str, value: Any, jobs: set[str]) -> None:
    before, after = plan(tiny()), plan(tiny({key: value}))
    assert {job for job in before if before[job] != after[job]} == jobs


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_has_a_plan(path: Path, pipeline: Path, tmp_path: Path) -> None:
    """Where students are made from others, with the line that the refusal says."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    study = load_study(path)
    if any(student.frozen for student in study.students.values()):
        with pytest.raises(UserError) as error:
            plan(study)
        pipeline.write_text(pipeline.read_text().replace("- frozen: []", str(error.value).split("`")[1]))
    jobs = [f"{stage}/{run}/seed{k}" for stage in ("student", "samples") for run in study.students for k in study.seeds]
    assert set(plan(study)) > set(jobs)


def test_another_seed_keeps_the_first_and_leaves_no_file_behind(tiny: Tiny) -> None:
    before, after = plan(tiny()), plan(tiny({"seeds": [0, 1]}))
    assert {job for job in before if before[job] != after[job]} == {"report"}
    assert {job for job in after if job not in before} == {
        f"{stage}/{run}/seed1" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")
    }
    assert plan(tiny()) == before


def test_a_section_that_dvc_names_must_be_there(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"has no section report, which dvc\.yaml reads: add `report: \{\}`"):
        plan(tiny({"report": ABSENT}))


def test_a_study_without_a_teacher_fits_nothing(tiny: Tiny, untaught: dict[str, Any]) -> None:
    before = plan(tiny(untaught))
    after = plan(tiny(untaught | {"coefficients.probes": 2, "teacher.network.width": 33}))
    changed = {job for job in before if before[job] != after[job]}
    assert changed == set(before) - {"dataset", "extractor", "coefficients", "flows"}


def test_flows_are_a_job_of_their_own(tiny: Tiny, couplings: dict[str, Any]) -> None:
    study = couplings | {"flows": {}}
    before, after = plan(tiny(study)), plan(tiny(study | {"flows.times": 12}))
    assert {job for job in before if before[job] != after[job]} == {"flows", "report"}
    after = plan(tiny(study | {"student.learning_rate": 0.01}))
    assert "flows" in {job for job in before if before[job] != after[job]}


@pytest.mark.parametrize("said", ["[]", "[{run: gc, predictor: ot}]", "[{run: ic, predictor: gc}]"])
def test_dvc_is_told_which_students_are_made_from_which(
    tiny: Tiny, frozen: dict[str, Any], pipeline: Path, said: str
) -> None:
    order = "- frozen: [{run: gc, predictor: ic}]"
    pipeline.write_text(pipeline.read_text().replace("- frozen: []", f"- frozen: {said}"))
    with pytest.raises(
        UserError,
        match=re.escape(f"dvc.yaml must say which students of tiny are made from which: under vars, write `{order}`"),
    ):
        plan(tiny(frozen))
    pipeline.write_text(pipeline.read_text().replace(f"- frozen: {said}", order))
    assert "student/gc/seed0" in plan(tiny(frozen))


def test_what_is_made_from_no_other_student_is_not_said_to_be(
    tiny: Tiny, frozen: dict[str, Any], pipeline: Path
) -> None:
    pipeline.write_text(pipeline.read_text().replace("- frozen: []", "- frozen: [{run: analytic, predictor: ctm}]"))
    for text in (pipeline.read_text(), "stages: {}", "vars: []", ""):
        pipeline.write_text(text)
        with pytest.raises(UserError, match=re.escape("under vars, write `- frozen: []`")):
            plan(tiny())
    pipeline.unlink()
    with pytest.raises(UserError, match=r"no dvc\.yaml here: run this in the project's folder"):
        plan(tiny())


def inputs(study: Study, of: str | None = None, *student: Any) -> dict[str, Any]:
    """What stands in inputs/ afterwards, by file. student: the only one that is asked for."""
    job = Job(study, StudyPaths("tiny"), *student)
    write_inputs(job, of)
    root = job.paths.root / "inputs"
    return {str(path.relative_to(root)): json.loads(path.read_text()) for path in root.rglob("*.json")}


def write(name: str, content: bytes) -> str:
    """Write a result. Returns its digest."""
    write_bytes(StudyPaths("tiny").root / name, content)
    return hashlib.sha256(content).hexdigest()


def test_only_a_student_that_reads_the_coefficients_misses_them_and_sees_them_change(
    tiny: Tiny, couplings: dict[str, Any]
) -> None:
    name = "coefficients/coefficients.npz"
    with pytest.raises(UserError, match="run `python -m consistency coefficients` first"):
        inputs(tiny())
    assert set(inputs(tiny(couplings)).values()) == {None}
    for content in (b"one", b"two"):
        digest = write(name, content)
        found = inputs(tiny())
        expected = {"ctm/seed0/coefficients.json": None, "analytic/seed0/coefficients.json": {name: digest}}
        assert found == expected | {"flows.json": None}


def test_what_a_student_is_made_from_is_seen_to_change_as_long_as_it_is(tiny: Tiny, frozen: dict[str, Any]) -> None:
    last = write("students/ic/seed0/student.safetensors", b"the last")
    third = write("students/ic/seed0/snapshots/step-000003.safetensors", b"the third")
    assert inputs(tiny(frozen))["gc/seed0/predictor.json"] == {"students/ic/seed0/student.safetensors": last}
    study = tiny(frozen | {"students.gc.predictor.step": 3})
    found = inputs(study, "predictor", "gc", 0)
    assert found["gc/seed0/predictor.json"] == {"students/ic/seed0/snapshots/step-000003.safetensors": third}
    assert not [file for file in found if file.startswith(("ic", "ot")) and "predictor" in file]
    own = tiny(frozen | {"students.gc.predictor": "average"})
    assert "gc/seed0/predictor.json" not in inputs(own, "coefficients", "gc", 0)


def test_flows_see_every_file_that_they_read(tiny: Tiny, frozen: dict[str, Any]) -> None:
    study = tiny(frozen | {"flows": {}, "seeds": [0, 1], "students.gc.predictor.step": 3})
    read = ["dataset/dataset.json", "dataset/labels.npy", "teacher/teacher.safetensors"]
    read += [f"students/{run}/seed{seed}/student.safetensors" for run in study.students for seed in study.seeds]
    read += [f"students/ic/seed{seed}/snapshots/step-000003.safetensors" for seed in study.seeds]
    expected = {name: write(name, name.encode()) for name in read}
    assert inputs(study, "flows") == {"flows.json": expected}
    Path("results/tiny/students/ot/seed1/student.safetensors").unlink()
    with pytest.raises(UserError, match="run `python -m consistency student --run ot --seed 1` first"):
        inputs(study, "flows")
