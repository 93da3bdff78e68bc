"""Consistency training without a teacher under DVC, with a student made from another: what runs, and in which order."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Changes, own_handlers
from tests.workflow.conftest import by_verbs
from tests.workflow.dvc_repo import JOBS, PLAN, Repo, origin

pytestmark = pytest.mark.slow

RUNS = ("full", "ic", "gc")
ONCE = {stage for stage in JOBS if "-ctm-" not in stage and "-analytic-" not in stage} - {"coefficients@tiny"}


def of(*runs: str) -> set[str]:
    """The stages of students that start Snakemake."""
    return {f"{stage}@tiny-{run}-0" for stage in ("student", "samples", "scores") for run in runs}


@pytest.fixture(scope="module")
def reproduced(home: Path, untaught: Changes) -> Repo:
    """The study of couplings, made by the verbs, of which DVC took note, committed and pushed to a remote in a folder.

    The student that is made from another comes first in the study's file.
    """
    students = {
        "full": {"coupling": "gc", "predictor": {"run": "ic"}},
        "ic": {"coupling": "ic"},
        "gc": {"coupling": "gc"},
    }
    varies = ["coupling", "predictor", "learning_rate"]
    repo = origin(home / "repo")
    repo.set(untaught | {"students": students, "varies": varies, "report.grid_nfe": [1]})
    with own_handlers():
        assert by_verbs(repo.checkout) == 0
    repo.checkout.verb("plan", "--study", "config/studies/tiny.yaml", "--unused", "1")
    repo.dvc("commit", "--force")
    assert set(repo.locked()) == ONCE | of(*RUNS) | {PLAN}
    repo.dvc("remote", "add", "--default", "folder", str(home / "remote"))
    repo.commit("reproduced")
    repo.dvc("push")
    return repo


def card(repo: Repo, run: str) -> dict[str, Any]:
    """The content of a student's card."""
    return json.loads((repo.path / f"results/tiny/students/{run}/seed0/card.json").read_text())  # type: ignore[no-any-return]


def test_the_student_was_made_from_the_other_and_nothing_else_runs(reproduced: Repo) -> None:
    name = "students/ic/seed0/student.safetensors"
    assert card(reproduced, "full")["inputs"][name] == card(reproduced, "ic")["outputs"]["student.safetensors"]
    assert name not in card(reproduced, "gc")["inputs"]
    assert reproduced.repro() == set()
    assert reproduced.unsound() == []


def test_a_fresh_clone_pulls_and_trains_one_student_on_what_it_pulled(reproduced: Repo, tmp_path: Path) -> None:
    clone = reproduced.clone(tmp_path / "clone")
    clone.dvc("pull")
    assert clone.changed() == set()
    before = card(clone, "ic")
    # Snakemake knows nothing of the results here, and does not train the student again that another is made from.
    clone.set({"students.full.learning_rate": 0.02})
    (clone.path / "results/tiny/dataset/images.npy").touch()
    student = "student@tiny-full-0"
    assert clone.repro(student) == {PLAN, student}
    assert {log.name for log in (clone.path / "logs/tiny/student").iterdir()} == {"full-seed0.log", "full-seed0.tsv"}
    assert card(clone, "ic") == before
    assert card(clone, "full")["inputs"] == card(reproduced, "full")["inputs"]


def test_a_changed_student_runs_what_is_made_from_it_and_no_other(reproduced: Repo, tmp_path: Path) -> None:
    repo = reproduced.copy(tmp_path / "repo")
    repo.set({"students.ic.learning_rate": 0.02})
    students = {"student@tiny-ic-0", "student@tiny-full-0"}
    assert repo.repro("student@tiny-full-0") == students | {PLAN}
    assert repo.changed() == of("ic", "full") - students | {"report@tiny"}
    name = "students/ic/seed0/student.safetensors"
    assert card(repo, "full")["inputs"][name] == card(repo, "ic")["outputs"]["student.safetensors"]
    assert card(repo, "full")["inputs"][name] != card(reproduced, "full")["inputs"][name]
    repo.git("checkout", "--quiet", ".")
    repo.dvc("checkout")
    assert repo.repro() == set()
