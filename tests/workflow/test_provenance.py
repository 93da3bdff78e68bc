"""The real workflow's cards agree, and an archive opens elsewhere and samples from its students."""

import shutil
from pathlib import Path

import pytest
from tests.processes import ROOT
from tests.workflow.checkout import Checkout

pytestmark = pytest.mark.slow

STUDY = "config/studies/tiny.yaml"


def test_unzipped_in_another_checkout_it_verifies_samples_and_is_completed(copied: Checkout, tmp_path: Path) -> None:
    said = copied.verb("verify", "results/tiny")
    assert said.count("  consistent\n") == len(said.splitlines()) == 13
    for name in ("requirements.lock", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copied.path)
    copied.verb("archive", "--study", STUDY)
    (path,) = (copied.path / "archives").glob("tiny-*.zip")
    there = copied.copy(tmp_path / "another machine")
    shutil.rmtree(there.path / "results")
    shutil.unpack_archive(path, there.path)
    assert "left out of the archive" in there.verb("verify", "results/tiny")
    there.verb("dataset", "--study", STUDY)  # the samples of a conditional student have the data's class proportions
    for run in ("ctm", "analytic"):
        there.verb("samples", "--study", STUDY, "--student", run, "--seed", "0")
    said = there.verb("verify", "results/tiny")
    for artifact in ("dataset", "samples ctm seed 0", "samples analytic seed 0"):
        assert f"{artifact:24} consistent\n" in said
    for file in (copied.path / "results/tiny/samples").glob("*/seed0/*.npy"):
        assert (there.path / file.relative_to(copied.path)).read_bytes() == file.read_bytes()
    assert "report: results/tiny/report/report.html" in there.verb("summary", "--study", STUDY)
