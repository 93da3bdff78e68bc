"""The first losses of every objective are those of tests/golden/losses.json.

A change of the method's arithmetic shows here at once. If it is meant, write the file anew, with the reason in the
commit's message: GOLDEN=write python -m pytest tests/stages/test_golden_losses.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from tests.conftest import ABSENT, Changes, Tiny
from tests.repeatable import repeatable

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.data.prepared import load_images
from consistency.runtime.machine import Machine
from consistency.training.loop import train
from consistency.training.students import student_training

GOLDEN = Path(__file__).parents[1] / "golden/losses.json"
STEPS = 12
LOGGED = {"student.steps": STEPS, "student.log_every": 1, "student.snapshot_every": STEPS}
ENDPOINT = {"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "report.baseline": {}}
CURVES = ["trajectory ctm", "trajectory analytic", "endpoint ctm", "consistency ic", "consistency gc"]


def tolerance(step: int) -> float:
    """Relative tolerance of a loss: processors differ in the last bits, and each update enlarges the difference.

    Between the instruction sets of one Xeon (ATEN_CPU_CAPABILITY default, avx2, avx512) it is at most 1.6e-7.
    """
    return 2e-6 * step


@pytest.mark.parametrize("curve", CURVES)
def test_the_losses_are_the_golden_ones(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths, tmp_path: Path, curve: str
) -> None:
    objective, student = curve.split()
    changes = {"trajectory": {}, "endpoint": ENDPOINT, "consistency": couplings}[objective]
    job = Job(tiny({**changes, **LOGGED}), StudyPaths("tiny", first_results.results, tmp_path), student, 0)
    train(student_training(job, load_images(first_results.dataset), Machine(torch.device("cpu"))))
    losses = [line["loss"] for line in repeatable(job.state / "history.jsonl")]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(golden | {curve: losses}, indent=1) + "\n")
        pytest.skip("written")
    expected = golden[curve]
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True)]
    worst = {k: f"{error:.1e}" for k, error in enumerate(errors, 1) if error > tolerance(k)}
    assert not worst, f"relative differences by step: {worst}; losses {losses}, golden {expected}"
