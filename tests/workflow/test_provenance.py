"""The real workflow's cards agree, and an archive opens elsewhere and samples from its students."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.workflow.checkout import ROOT, Checkout

pytestmark = pytest.mark.slow

STUDY = "config/studies/tiny.yaml"


def consistency(checkout: Checkout, *words: str) -> str:
    """Run a verb in a checkout, which must end well. Returns what it printed."""
    command = [sys.executable, "-m", "consistency", *words]
    environment = checkout.environment | {"PYTHONPATH": str(checkout.path / "src")}
    done = subprocess.run(command, cwd=checkout.path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_unzipped_in_another_checkout_it_verifies_samples_and_is_completed(copied: Checkout, tmp_path: Path) -> None:
    said = consistency(copied, "verify", "results/tiny")
    assert said.count("  consistent\n") == len(said.splitlines()) == 13
    for name in ("requirements.lock", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copied.path)
    consistency(copied, "archive", "--study", STUDY)
    (path,) = (copied.path / "archives").glob("tiny-*.zip")
    there = copied.copy(tmp_path / "another machine")
    shutil.rmtree(there.path / "results")
    shutil.unpack_archive(path, there.path)
    assert "left out of the archive" in consistency(there, "verify", "results/tiny")
    for run in ("ctm", "analytic"):
        consistency(there, "samples", "--study", STUDY, "--student", run, "--seed", "0")
    consistency(there, "dataset", "--study", STUDY)
    said = consistency(there, "verify", "results/tiny")
    for artifact in ("dataset", "samples ctm seed 0", "samples analytic seed 0"):
        assert f"{artifact:24} consistent\n" in said
    for file in (copied.path / "results/tiny/samples").glob("*/seed0/*.npy"):
        assert (there.path / file.relative_to(copied.path)).read_bytes() == file.read_bytes()
    assert "report: results/tiny/report/report.html" in consistency(there, "summary", "--study", STUDY)
