"""Artifacts whose cards name other settings or other code are marked; nothing else is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fake_results import SMALL, edit_card, make_finished, make_study

from consistency.base.files import write_bytes
from consistency.config.job import Job
from consistency.provenance.due import due_mark, mark_due


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A finished small study."""
    return make_finished(tmp_path)


def again(job: Job, old: str, new: str) -> Job:
    """The same results, and the study with another line."""
    return Job(make_study(job.paths.results.parent, text=SMALL.replace(old, new)), job.paths)


def newer(stage: str, job: Job) -> bool:
    """Tell whether a job's mark is newer than its card."""
    return due_mark(stage, job).stat().st_mtime > job.card(stage).stat().st_mtime


def test_what_is_as_the_study_says_is_not_due_however_often_one_looks(job: Job) -> None:
    assert mark_due(job) == mark_due(job) == {}
    assert not newer("dataset", job)


def test_a_changed_key_makes_due_what_depends_on_it_and_is_named(job: Job) -> None:
    found = mark_due(again(job, "{preconditioning: ctm}", "{preconditioning: bcm}"))
    expected = {f"{stage} ctm seed {seed}" for stage in ("student", "samples", "scores") for seed in (0, 1)} | {
        "report"
    }
    assert found.keys() == expected
    assert "(student.preconditioning: there 'ctm', here 'bcm')" in found["student ctm seed 0"]
    assert newer("student", job.of("ctm", 0)) and not newer("student", job.of("analytic", 0))
    # The study is as it was again, and so is everything.
    assert mark_due(job) == {}
    assert not newer("student", job.of("ctm", 0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: edit_card(path, lambda card: card.update(code="0" * 16)), "made by other code"),
        (lambda path: edit_card(path, lambda card: card.pop("code")), None),  # of an earlier version
        (lambda path: write_bytes(path, b"{"), "its card is damaged"),
        (Path.unlink, None),  # nothing says that it was made
    ],
    ids=["code", "no code", "damaged", "none"],
)
def test_other_code_and_a_damaged_card_are_reasons_and_a_missing_card_is_none(
    job: Job, change: Callable[[Path], object], reason: str | None
) -> None:
    change(job.card("teacher"))
    assert mark_due(job) == ({"teacher": reason} if reason else {})
