"""One zip of a finished study: what it holds, and that unzip, sha256sum and verify agree on it anywhere."""

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import mistake
from tests.dangers import file_size_limit
from tests.fake_results import make_study
from tests.processes import ROOT

from consistency.__main__ import main
from consistency.base.errors import UserError
from consistency.base.files import sha256
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.provenance.archive import make_archive
from consistency.provenance.verification import verify


@pytest.fixture(autouse=True)
def in_the_projects_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def home(finished_small: Path, tmp_path: Path) -> Path:
    """A finished study of one's own: small.yaml and results/."""
    return Path(shutil.copytree(finished_small, tmp_path / "home"))


def pack(home: Path, **options: Any) -> Path:
    study = make_study(home)
    make_archive(Job(study, StudyPaths("small", home / "results")), home / "small.yaml", home / "archives", **options)
    return home / f"archives/small-{key_of(study, 'report')[:8]}.zip"


@pytest.fixture
def unzipped(home: Path, tmp_path: Path) -> Path:
    """An archive that is opened elsewhere."""
    with zipfile.ZipFile(pack(home)) as archive:
        archive.extractall(tmp_path / "there")
    return tmp_path / "there"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_everything_but_arrays_and_snapshots(unzipped: Path, home: Path) -> None:
    made = files(home / "results")
    left_out = {name for name in made if name.endswith(".npy") or "/snapshots/" in name}
    beside = {"config/studies/small.yaml", "requirements.lock", "LICENSE", "NOTICE", "SHA256SUMS"}
    assert left_out
    assert files(unzipped) == {f"results/{name}" for name in made - left_out} | beside
    assert (unzipped / "config/studies/small.yaml").read_bytes() == (home / "small.yaml").read_bytes()


def test_snapshots_come_if_wanted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(home, snapshots=True)
    with zipfile.ZipFile(path) as archive:
        assert "results/small/students/ctm/seed0/snapshots/step-000020.safetensors" in archive.namelist()
    assert f"MiB, sha256 {sha256(path)}" in capsys.readouterr().out


def test_what_was_taken_out_of_the_study_stays_out(home: Path) -> None:
    student = home / "results/small/students/ctm"
    shutil.copytree(student / "seed1", student / "seed9")
    with zipfile.ZipFile(pack(home)) as archive:
        assert not any("seed9" in name for name in archive.namelist())


def test_sha256sum_checks_every_file(unzipped: Path) -> None:
    check = ["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=unzipped, capture_output=True).returncode == 0
    listed = {line.split("  ", 1)[1] for line in (unzipped / "SHA256SUMS").read_text().splitlines()}
    assert listed == files(unzipped) - {"SHA256SUMS"}
    (unzipped / "LICENSE").write_text("mine")
    assert subprocess.run(check, cwd=unzipped, capture_output=True).returncode == 1


def test_verify_says_what_was_left_out_and_what_is_lost(unzipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = unzipped / "results/small"
    assert main(["verify", str(root)]) == 0
    said = capsys.readouterr().out
    assert "dataset                  consistent (left out of the archive: 2 files)" in said
    (root / "coefficients/coefficients.npz").unlink()
    assert main(["verify", str(root)]) == 2
    assert "coefficients             missing: coefficients/coefficients.npz" in capsys.readouterr().out


def test_arrays_that_are_made_again_are_checked(unzipped: Path, home: Path) -> None:
    root = unzipped / "results/small"
    shutil.copy(home / "results/small/dataset/images.npy", root / "dataset")
    assert [finding.faults for finding in verify(root, make_study(home)) if finding.faults] == []
    (root / "dataset/images.npy").write_bytes(b"others")
    assert [finding.artifact for finding in verify(root, make_study(home)) if finding.faults] == ["dataset"]


def test_sums_of_another_study_excuse_nothing(unzipped: Path, home: Path) -> None:
    sums = unzipped / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("results/small/", "results/smaller/"))
    wrong = {finding.artifact for finding in verify(unzipped / "results/small", make_study(home)) if finding.faults}
    assert {"dataset", "samples of the teacher", "student ctm seed 0"} <= wrong


def test_results_that_are_wrong_are_not_packed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "results/small/scores/ctm/seed0.csv").write_text("mine")
    with pytest.raises(UserError, match=r"results/small: 1 of 19 are not consistent"):
        pack(home)
    assert "scores ctm seed 0        tampered with: scores/ctm/seed0.csv" in capsys.readouterr().out
    assert not (home / "archives").exists()


def test_outside_of_the_projects_root_it_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=r"requirements\.lock is not here: run .* in the project's root"):
        pack(home)


def test_a_full_disk_is_one_line_and_leaves_nothing(home: Path) -> None:
    with file_size_limit(10_000):
        assert "File too large" in mistake(pack, home)
    assert list((home / "archives").iterdir()) == []
