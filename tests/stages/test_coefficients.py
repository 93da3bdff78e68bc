"""The stage coefficients: a fit that is stopped, killed or shared by processes is the fit of one process."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Tiny, WriteStudy
from tests.processes import run_python

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.runtime.stopping import Interrupted
from consistency.stages import coefficients
from consistency.stages.coefficients import make_coefficients

CPU = torch.device("cpu")
#: two rounds of 12 times: 128 images and 128 more
FIT = {"coefficients.times": 12, "coefficients.samples": 256, "coefficients.tolerance": 0.0}


def rows(job: Job, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> int:
    """Run the stage; returns the rows that it computed. stop_at: a signal comes after so many."""
    write, count = coefficients.write_array, 0

    def counted(path: Path, array: np.ndarray) -> None:
        nonlocal count
        write(path, array)
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patched:
        patched.setattr(coefficients, "write_array", counted)
        make_coefficients(job, CPU)
    return count


def test_a_stopped_fit_goes_on_with_the_next_time(
    tiny: Tiny, results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tiny(FIT), results)
    assert rows(job, monkeypatch) == 24
    expected = job.paths.fit.read_bytes()
    with pytest.raises(Interrupted, match="coefficients tiny: stopped at time 3 of 12, which are kept"):
        rows(job, monkeypatch, stop_at=15)
    assert rows(job, monkeypatch) == 24 - 15
    assert job.paths.fit.read_bytes() == expected
    assert not (results.state / "tiny/coefficients").exists()


def test_the_times_of_another_teacher_are_not_used(
    tiny: Tiny, results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tiny(FIT), results)
    with pytest.raises(Interrupted):
        rows(job, monkeypatch, stop_at=5)
    model, metadata = load_denoiser(results.teacher_weights)
    save_denoiser(results.teacher_weights, model, {"key": metadata["key"], "study": "of another day"})
    assert rows(job, monkeypatch) == 24


def test_processes_share_the_times_and_change_no_bit(write_study: WriteStudy, results: StudyPaths) -> None:
    study = write_study(FIT)
    found = []
    for processes in (1, 2, 4):
        words = ["--study", study, "--results", results.results, "--state", results.state, "--device", "cpu"]
        run_python("-m", "consistency", "coefficients", *words, "--processes", processes)
        found.append(results.fit.read_bytes())
        shutil.rmtree(results.coefficients)
    assert found[1:] == found[:1] * 2
