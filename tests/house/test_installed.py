"""The package as `pip install` leaves it: outside any checkout, with the command and all files that it ships.

The wheel is built by way of the source archive, by uv without network: its build backend is in the lock. Its
environment borrows the packages of this one through a .pth file, because installing them would take 5.6 GB. Python
reads no .pth files of a borrowed folder, so this environment's editable installation is not seen there.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tests.processes import ROOT, environment

from consistency import __version__

pytestmark = pytest.mark.slow

BUILT_FROM = ["pyproject.toml", "requirements.in", "LICENSE", "NOTICE", "README.md", "src", "config"]
# One process for all verbs: importing torch takes seconds.
VERBS = """
import sys
import consistency
from consistency.__main__ import main

print(consistency.__file__)
for verb in sys.stdin.read().splitlines():
    code = main([*verb.split(), "--study", "tiny"])
    assert code == 0, verb
"""
TINY = ["dataset", "extractor", "teacher", "coefficients", "samples", "calibration"]
TINY += [
    f"{verb} --student {name} --seed 0" for name in ("ctm", "analytic") for verb in ("student", "samples", "scores")
]
TINY += ["report", "verify results/tiny"]


def uv(*words: object, folder: Path) -> None:
    """Run uv without network; `make install` has put it there, conda has not."""
    pytest.importorskip("uv")
    done = subprocess.run(
        [sys.executable, "-m", "uv", *map(str, words), "--offline", "--quiet"],
        cwd=folder,
        env=environment(PATH=os.defpath),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("tree")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    uv("build", "--no-build-isolation", "--python", sys.executable, "--out-dir", "dist", folder=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of an environment that has the wheel."""
    folder = wheel.parents[1] / "environment"
    uv("venv", "--python", sys.executable, folder, folder=wheel.parent)
    uv("pip", "install", "--no-deps", "--python", folder / "bin/python", wheel, folder=wheel.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(folder: Path, *words: object, given: str = "") -> str:
    """Run a command, which must end well, without the variables that lead to this checkout."""
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTHON")}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=folder, env=variables, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_it_needs_and_asks_for_what_requirements_in_lists(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    shipped = {f"consistency/shipped/studies/{path.name}" for path in (ROOT / "config/studies").glob("*.yaml")}
    templates = {f"consistency/report/templates/{path.name}" for path in ROOT.rglob("src/*/report/templates/*.j2")}
    assert shipped | templates | {"consistency/shipped/resources.yaml", "consistency/py.typed"} <= names
    assert any(re.fullmatch(r"consistency/shipped/(studies/)?README\.md", name) for name in names)
    asked = {line.split()[1].partition("==")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist:")}
    assert {"torch", "pydantic", "shtab"} <= asked


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin/consistency"
    assert run(tmp_path, command, "--version").strip() == __version__
    assert "name: tiny" in run(tmp_path, command, "check", "--study", "tiny")
    assert run(tmp_path, command, "validate")
    script = run(tmp_path, command, "--print-completion", "bash")
    asked = "COMP_WORDS=(consistency val); COMP_CWORD=1; _shtab_consistency; echo ${COMPREPLY[@]}"
    assert run(tmp_path, "bash", given=f"{script}\n{asked}").split() == ["validate"]


def test_the_tiny_study_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    output = run(tmp_path, installed / "bin/python", "-c", VERBS, given="\n".join(TINY))
    assert Path(output.splitlines()[0]).is_relative_to(installed)
    assert (tmp_path / "results/tiny/report/report.html").exists()
    assert not (tmp_path / "config").exists()
