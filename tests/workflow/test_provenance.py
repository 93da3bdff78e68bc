"""The real workflow's cards agree, and an archive opens elsewhere and samples from its students."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.workflow.checkout import ROOT, Checkout

pytestmark = pytest.mark.slow

STUDY = "config/studies/tiny.yaml"
ABSENT = ("CITATION.cff", "LICENSE", "NOTICE", "requirements.in", "requirements.lock", "pyproject.toml")


def consistency(folder: Path, *words: str) -> str:
    """Run a verb of the code in a folder, there, which must end well. Returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "consistency", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_whole_study_is_consistent(finished: Checkout) -> None:
    said = consistency(finished.path, "verify", "results/tiny", "--study", STUDY)
    assert said.count("consistent") == len(said.splitlines()) == 13


def test_unzipped_elsewhere_its_students_draw_the_same_images(copied: Checkout, tmp_path: Path) -> None:
    for name in ABSENT:
        shutil.copy(ROOT / name, copied.path)
    consistency(copied.path, "archive", "--study", STUDY)
    (path,) = (copied.path / "archives").glob("tiny-*.zip")
    there = tmp_path / "another machine"
    shutil.unpack_archive(path, there)
    # The archive is a checkout: its own code does the rest.
    for run in ("ctm", "analytic"):
        consistency(there, "samples", "--study", STUDY, "--run", run, "--seed", "0")
        for file in (copied.path / f"results/tiny/samples/{run}/seed0").glob("*.npy"):
            assert (there / f"results/tiny/samples/{run}/seed0" / file.name).read_bytes() == file.read_bytes()
    assert "report" in consistency(there, "verify", ".")
    assert "report: results/tiny/report/report.html" in consistency(there, "summary", "--study", STUDY)


def test_what_is_computed_again_from_an_archive_fits_it(copied: Checkout, tmp_path: Path) -> None:
    for name in ABSENT:
        shutil.copy(ROOT / name, copied.path)
    consistency(copied.path, "archive", "--study", STUDY)
    (path,) = (copied.path / "archives").glob("tiny-*.zip")
    shutil.rmtree(copied.path / "results")
    consistency(copied.path, "unpack", str(path))
    consistency(copied.path, "dataset", "--study", STUDY)
    said = consistency(copied.path, "verify", "results/tiny", "--study", STUDY)
    assert "dataset                  consistent\n" in said
