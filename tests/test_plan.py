"""What DVC compares changes with exactly the jobs that depend on a key, as Snakemake's parameters do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.plan import write_inputs, write_plan
from consistency.study import Study

CTM = {f"{stage}/ctm/seed0" for stage in ("student", "samples", "scores")}
ANALYTIC = {f"{stage}/analytic/seed0" for stage in ("student", "samples", "scores")}
SCORED = {"scores", "scores/ctm/seed0", "scores/analytic/seed0"}
TEACHER = {"teacher", "samples", "coefficients"} | SCORED | CTM | ANALYTIC


def plan(study: Study, folder: Path) -> dict[str, Any]:
    """What is written, by job."""
    layout = Layout(study.name, folder)
    write_plan(study, layout)
    root = layout.root / "plan"
    return {str(path.relative_to(root).with_suffix("")): json.loads(path.read_text()) for path in root.rglob("*.json")}


@pytest.mark.parametrize(
    ("key", "value", "jobs"),
    [
        ("sampling.batch", 32, set()),
        ("compute.channels_last", True, set()),
        ("noise.rho", 7.0, set()),
        ("title", "Another", set()),
        ("report.bootstrap", 60, set()),
        ("students.ctm.preconditioning", "bcm", CTM),
        ("coefficients.probes", 2, {"coefficients"} | ANALYTIC),
        ("student.learning_rate", 0.01, CTM | ANALYTIC),
        ("scores.kid_subsets", 3, SCORED),
        ("scores.classifier.steps", 21, SCORED | {"extractor"}),
        ("sampling.teacher_steps", 5, SCORED | {"samples", "samples/ctm/seed0", "samples/analytic/seed0"}),
        ("dataset.horizontal_flip", True, TEACHER),
        ("teacher.steps", 80, TEACHER),
        ("dataset.limit", 21, TEACHER | {"dataset", "extractor"}),
    ],
)
def test_a_key_changes_the_jobs_that_depend_on_it(
    tiny: Callable[..., Study], tmp_path: Path, key: str, value: Any, jobs: set[str]
) -> None:
    before, after = plan(tiny(), tmp_path / "before"), plan(tiny({key: value}), tmp_path / "after")
    silent = {"sampling.batch", "compute.channels_last", "noise.rho"}
    assert {job for job in before if before[job] != after[job]} == jobs | (set() if key in silent else {"report"})


def test_another_seed_keeps_the_first(tiny: Callable[..., Study], tmp_path: Path) -> None:
    before, after = plan(tiny(), tmp_path), plan(tiny({"seeds": [0, 1]}), tmp_path)
    assert {job for job in before if before[job] != after[job]} == {"report"}
    assert {job for job in after if job not in before} == {
        f"{stage}/{run}/seed1" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")
    }


def test_a_job_that_is_gone_leaves_no_file(tiny: Callable[..., Study], tmp_path: Path) -> None:
    before, after = plan(tiny({"seeds": [0, 1]}), tmp_path), plan(tiny(), tmp_path)
    assert {job for job in before if job.endswith("seed1")} and set(after) < set(before)
    assert not [job for job in after if job.endswith("seed1")]


def test_a_section_that_dvc_names_must_be_there(tiny: Callable[..., Study], tmp_path: Path, absent: object) -> None:
    with pytest.raises(UserError, match=r"has no section report, which dvc\.yaml reads: add `report: \{\}`"):
        plan(tiny({"report": absent}), tmp_path)


def test_a_study_without_a_teacher_has_no_plan(
    tiny: Callable[..., Study], untaught: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tiny has no teacher, .*run `snakemake --config studies=tiny` instead"):
        plan(tiny(untaught), tmp_path)


def test_flows_are_a_job_of_their_own(tiny: Callable[..., Study], couplings: dict[str, Any], tmp_path: Path) -> None:
    study = couplings | {"flows": {}}
    before, after = plan(tiny(study), tmp_path), plan(tiny(study | {"flows.times": 12}), tmp_path)
    assert {job for job in before if before[job] != after[job]} == {"flows", "report"}
    after = plan(tiny(study | {"student.learning_rate": 0.01}), tmp_path)
    assert "flows" in {job for job in before if before[job] != after[job]}


def test_students_made_from_students_have_no_plan(
    tiny: Callable[..., Study], couplings: dict[str, Any], tmp_path: Path
) -> None:
    frozen = {"varies": ["coupling", "mu", "predictor"], "students.gc.predictor": {"run": "ic"}}
    with pytest.raises(
        UserError, match=r"students\.gc is made from another student, .*snakemake --config studies=tiny"
    ):
        plan(tiny(couplings | frozen), tmp_path)


def test_only_a_student_that_reads_the_coefficients_sees_them_change(
    tiny: Callable[..., Study], tmp_path: Path
) -> None:
    layout = Layout("tiny", tmp_path)
    said = []
    for content in (b"one", b"two"):
        layout.coefficients.mkdir(parents=True, exist_ok=True)
        (layout.coefficients / "coefficients.npz").write_bytes(content)
        write_inputs(tiny(), layout)
        said.append({run: (layout.root / f"inputs/{run}.json").read_bytes() for run in ("ctm", "analytic")})
    assert said[0]["ctm"] == said[1]["ctm"]
    assert said[0]["analytic"] != said[1]["analytic"]


def test_missing_coefficients_say_what_to_do(tiny: Callable[..., Study], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `python -m consistency coefficients` first"):
        write_inputs(tiny(), Layout("tiny", tmp_path))
