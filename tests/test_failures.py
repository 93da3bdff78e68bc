"""The end of a failed run: one line a job."""

import os
from pathlib import Path

import pytest

from consistency.failures import failure, print_failures


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step 3\nerror: it is damaged: fetch it again\ntee ends\n\n", "error: it is damaged: fetch it again"),
        ("error (process 1): no\nerror: x of 2\n", "error: x of 2"),
        ("Traceback\nKeyError: 'x'\n \n", "KeyError: 'x'"),
        ("", "it said nothing"),
        ("x" * 100_000 + "\nlast\n", "last"),
    ],
)  # fmt: skip
def test_what_a_job_said_last(tmp_path: Path, text: str, said: str) -> None:
    log = tmp_path / "ctm-seed0.log"
    log.write_text(text)
    assert failure("student digits ctm 0", log, 0.0) == f"failed: student digits ctm 0: {said} ({log})"


def test_a_job_without_a_log_of_this_run_never_began(tmp_path: Path) -> None:
    """As one that sbatch refuses."""
    log = tmp_path / "teacher.log"
    never = "failed: teacher digits: it never began, and left no log: see above"
    assert failure("teacher digits", log, 0.0) == never
    log.write_text("error: of yesterday\n")
    os.utime(log, (1000.0, 1000.0))
    assert failure("teacher digits", log, 2000.0) == never
    assert "of yesterday" in failure("teacher digits", log, 900.0)


def test_on_a_cluster_every_start_has_a_log(tmp_path: Path) -> None:
    (tmp_path / "12.log").touch()
    assert failure("x", tmp_path / "12.log", 0.0, tmp_path).endswith(f"of every time it was started: {tmp_path}/)")
    assert failure("x", tmp_path / "12.log", 0.0, tmp_path / "nowhere").endswith("12.log)")


def test_each_failure_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_failures(["failed: b", "failed: a", "failed: b"])
    assert capsys.readouterr().out == "failed: a\nfailed: b\n"
