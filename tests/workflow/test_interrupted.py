"""Runs that are interrupted end with the same bits as runs that are not."""

import os
import signal
import subprocess
from typing import Any

import pytest
from tests.processes import wait_until
from tests.workflow.checkout import LONGER, NUMBERS, Checkout, scored

pytestmark = pytest.mark.slow

# The longer of the two chains; the other's repeat is the student that is stopped thrice.
SCORES = "results/tiny/scores/analytic/seed0.csv"


def interrupt(checkout: Checkout, log: str, *targets: str) -> None:
    """Run, and press Ctrl-C once the log of that name is there."""
    file = checkout.path / "logs/tiny" / log
    run = checkout.start(*targets)
    wait_until(file.exists, log)
    assert checkout.interrupt(run) != 0
    assert checkout.litter() == []
    assert checkout.processes() == []


def test_an_independent_run_with_interruptions_has_the_same_bits(
    checkout: Checkout, request: pytest.FixtureRequest
) -> None:
    for log in ["dataset.log", "coefficients.log", "scores/analytic-seed0.log"]:
        interrupt(checkout, log, SCORES)
    checkout.done(SCORES)
    found, expected = checkout.results(*NUMBERS), request.getfixturevalue("finished").results(*NUMBERS)
    assert [name for name in found if found[name] != expected[name]] == []
    chain = {name for name in expected if not name.startswith("report/") and "/ctm/" not in name}
    assert set(found) == chain
    assert len(chain) > 15


class Trainee:
    """A student long enough to be interrupted, in a finished checkout."""

    target = "results/tiny/students/ctm/seed0/student.safetensors"

    def __init__(self, checkout: Checkout) -> None:
        self.checkout = checkout.change(LONGER)
        self.state = checkout.path / "state/tiny/ctm/seed0"
        self.log = checkout.path / "logs/tiny/student/ctm-seed0.log"

    def start(self, until: int) -> subprocess.Popen[str]:
        """Run until the training has passed that step. Returns Snakemake, which leads its process group."""
        run = self.checkout.reproduce(self.target)
        self.checkout.reaches(run, until)
        return run


def test_a_student_stopped_thrice_has_the_same_bits(copied: Checkout, undisturbed: dict[str, Any]) -> None:
    student = Trainee(copied)

    # Ctrl-C: the terminal sends it to the whole group.
    run = student.start(until=100)
    os.killpg(run.pid, signal.SIGINT)
    student.checkout.ends(run)
    assert "student ctm seed 0: stopped at step" in student.checkout.output
    assert "Traceback" not in student.checkout.output
    assert (student.state / "state.pt").exists()
    assert student.checkout.litter() == []

    # kill -9 of Snakemake alone: the trainer notices, saves and leaves.
    run = student.start(until=300)
    run.kill()
    student.checkout.ends(run)
    assert "student ctm seed 0: continues from step" in student.log.read_text()
    assert "student ctm seed 0: stopped at step" in student.log.read_text()
    assert student.checkout.litter() == []

    # kill -9 of everything: what was trained since the last save is trained again.
    run = student.start(until=500)
    os.killpg(run.pid, signal.SIGKILL)
    student.checkout.ends(run)

    assert student.checkout.reproduce(student.target).wait(timeout=600) == 0, student.checkout.output
    assert "An earlier run was killed; resuming it." in student.checkout.output
    assert "student ctm seed 0: continues from step" in student.log.read_text()
    assert scored(student.checkout, "ctm") == undisturbed
    assert not student.state.exists()
