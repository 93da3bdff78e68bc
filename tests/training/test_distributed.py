"""Several processes train as one would: torchrun on the CPU, with gloo, through the real verb."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import WriteStudy
from tests.processes import SOURCE, environment, start_in, wait_until

from consistency.config.paths import StudyPaths


@dataclass
class Trainer:
    """The verb `student` on the tiny study with changes, in folders of its own."""

    study: Path
    folder: Path
    name: str

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "consistency", "student", "--study", str(self.study), "--student", self.name]
        command += ["--seed", "0", "--device", "cpu", *words]
        return start_in(self.folder, command, environment(PYTHONPATH=SOURCE), self.folder / "output.txt", mode="a")

    def run(self, *words: str) -> None:
        process = self.start(*words)
        assert process.wait(timeout=300) == 0, self.output

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    @property
    def student(self) -> Path:
        return self.folder / "results/tiny/students" / self.name / "seed0"

    def weights(self, name: str = "student") -> dict[str, torch.Tensor]:
        return load_file(self.student / f"{name}.safetensors")

    def history(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.student / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def trainer(write_study: WriteStudy, first_results: StudyPaths, tmp_path: Path) -> Callable[..., Trainer]:
    def make(folder: str, changes: dict[str, Any], student: str = "ctm") -> Trainer:
        shutil.copytree(first_results.results, tmp_path / folder / "results")
        study = write_study(changes).rename(tmp_path / folder / "tiny.yaml")
        return Trainer(study, study.parent, student)

    return make


CHANGES = {"student.steps": 5, "student.snapshot_every": 5, "student.log_every": 1, "student.evaluation_ema": [0.9]}


@pytest.mark.parametrize("student", ["ctm", "ot"])
def test_two_processes_are_one_with_twice_the_batch(
    trainer: Callable[..., Trainer], couplings: dict[str, Any], student: str
) -> None:
    """After five steps, each process in two parts: with the balance of the whole batch, and with its assignment."""
    changes = CHANGES | (couplings if student == "ot" else {"student.dsm_balance": "adaptive"})
    one = trainer("one", changes, student)
    two = trainer("two", {**changes, "compute": {"batch_per_device": 4}}, student)
    one.run()
    two.run("--processes", "2")
    for name in ("student", "student-ema0.9"):
        torch.testing.assert_close(two.weights(name), one.weights(name), rtol=1e-6, atol=1e-6)
    for here, there in zip(two.history(), one.history(), strict=True):
        for name in {"loss", "distillation", "dsm", "dsm_balance", "grad_norm"} & there.keys():
            assert here[name] == pytest.approx(there[name], rel=1e-4)
    card, alone = (json.loads((run.student / "card.json").read_text())["measured"] for run in (two, one))
    assert card["network_evaluations"] == alone["network_evaluations"]


def test_stopped_on_two_processes_it_goes_on_with_one(trainer: Callable[..., Trainer]) -> None:
    """SIGTERM to torchrun, as Slurm sends it: all processes leave at the same step, and the state serves any
    number of them."""
    changes = {**CHANGES, "student.steps": 200, "student.snapshot_every": 200, "student.log_every": 20}
    whole, parts = trainer("whole", changes), trainer("parts", changes)
    whole.run()
    process = parts.start("--processes", "2")
    history = StudyPaths("tiny", state=parts.folder / "state").training_state("ctm", 0) / "history.jsonl"
    wait_until(lambda: (history.exists() and history.read_text()) or process.poll() is not None, "a line of it", 120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert "state saved" in parts.output
    assert "Traceback" not in parts.output
    parts.run()
    assert "continues from step" in parts.output
    assert [line["step"] for line in parts.history()] == list(range(20, 201, 20))
    # 200 steps of RAdam enlarge the last bit in which two sums differ.
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=1e-2, atol=1e-3)


def test_an_indivisible_batch_is_one_clear_error(trainer: Callable[..., Trainer]) -> None:
    three = trainer("three", {**CHANGES, "student.batch": 15})
    assert three.start("--processes", "2").wait(timeout=120) == 2
    # Whichever process says it first; torchrun stops the other.
    assert re.search(r"error( \(process 1\))?: a batch of 15 cannot be shared by 2 processes", three.output)
    assert "Traceback" not in three.output


def test_a_time_limit_that_leaves_no_time_to_begin_is_a_mistake(trainer: Callable[..., Trainer]) -> None:
    """A training saves when it has begun, as for every polite signal: tests/training/test_loop.py."""
    limited = trainer("limited", CHANGES)
    assert limited.start("--time-limit", "0.001").wait(timeout=120) == 2
    assert "error: the time limit was reached before the first state was saved" in limited.output
