"""The examples run as they are, here with a shorter training."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from tests.processes import ROOT


def test_a_denoiser_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    errors = runpy.run_path(str(ROOT / "examples/your_own_denoiser.py"))["main"](steps=5, samples=20)
    assert np.isfinite(list(errors.values())).all() and len(errors) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"your_own_denoiser.npz", "your_own_denoiser.png"}


def test_a_flow_map_in_a_loop_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    main = runpy.run_path(str(ROOT / "examples/flow_map.py"))["main"]
    errors = main(teacher_steps=5, samples=20, steps=3)
    assert np.isfinite(list(errors.values())).all() and len(errors) == 2
