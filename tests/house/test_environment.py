"""The environment is described once: requirements.in, its lock, environment.yml and pyproject.toml agree."""

import re
import tomllib

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tests.processes import ROOT

PRESCRIBED = ["snakemake", "snakemake-executor-plugin-slurm", "torch", "torchvision", "dvc", "mlflow", "numpy"]
PRESCRIBED += ["clean-fid", "pyyaml"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CAPS = {"mlflow": "<3.18", "scipy": "<1.18"}


def requirements_in(name: str = "requirements") -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / f"{name}.in").read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def lock_entries(name: str = "requirements") -> list[tuple[Requirement, list[str]]]:
    """Every requirement of a lock with its hashes."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", (ROOT / f"{name}.lock").read_text())
    entries = []
    for block in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = block.split(" --hash=")
        if requirement.strip():
            entries.append((Requirement(requirement.strip()), [value.strip() for value in hashes]))
    return entries


def locked(name: str) -> Requirement:
    (found,) = [requirement for requirement, _ in lock_entries() if requirement.name == name]
    return found


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned by =="
    return specifier.version


@pytest.mark.parametrize("name", sorted(requirements_in()))
def test_the_lock_pins_what_requirements_in_asks_for(name: str) -> None:
    assert pinned_version(locked(name)) == pinned_version(requirements_in()[name]), "run `make lock`"
    assert locked(name).marker is None, f"{name} is not locked for every platform"


def test_the_lock_names_requirements_in_as_the_source_of_exactly_its_entries() -> None:
    text = (ROOT / "requirements.lock").read_text()
    direct, name = set(), ""
    for line in text.splitlines():
        if head := re.match(r"([A-Za-z0-9._-]+)==", line):
            name = head[1]
        elif "-r requirements.in" in line:
            direct.add(name)
    assert direct == set(requirements_in()), "run `make lock`"


def test_the_documentations_lock_pins_what_it_is_asked_for() -> None:
    pinned = {requirement.name: pinned_version(requirement) for requirement, _ in lock_entries("requirements-docs")}
    asked = requirements_in("requirements-docs")
    assert asked
    assert {name: pinned_version(requirement) for name, requirement in asked.items()}.items() <= pinned.items()
    assert "torch" not in pinned


@pytest.mark.parametrize(("name", "at_least"), [("requirements", 200), ("requirements-docs", 20)])
def test_every_locked_package_has_hashes(name: str, at_least: int) -> None:
    entries = lock_entries(name)
    assert len(entries) > at_least
    bare = [str(requirement) for requirement, hashes in entries if not hashes]
    malformed = [v for _, hashes in entries for v in hashes if not re.fullmatch(r"sha256:[0-9a-f]{64}", v)]
    assert bare == []
    assert malformed == []
    assert all(pinned_version(requirement) for requirement, _ in entries)


def test_the_lock_holds_one_version_of_a_package_for_a_given_machine() -> None:
    linux = {"sys_platform": "linux", "platform_machine": "x86_64", "python_full_version": "3.11.7"}
    names = [r.name for r, _ in lock_entries() if r.marker is None or Marker(str(r.marker)).evaluate(linux)]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_registry_is_named() -> None:
    for file in ["requirements.in", "requirements.lock", "requirements-docs.in", "requirements-docs.lock"]:
        text = (ROOT / file).read_text()
        assert re.findall(r"\S*(?:https?|file|ssh|git)://\S*", text) == []
        assert re.findall(r"(?m)^\s*--?(?:index-url|extra-index-url|find-links|i|f)\b.*$", text) == []


def test_a_prescribed_package_is_asked_for_by_name() -> None:
    assert set(PRESCRIBED) <= requirements_in().keys()


@pytest.mark.parametrize(("name", "cap"), CAPS.items())
def test_a_cap_with_a_reason_holds(name: str, cap: str) -> None:
    assert Version(pinned_version(locked(name))) in SpecifierSet(cap)


def test_the_editable_installation_finds_its_build_backend_in_the_lock() -> None:
    (wanted,) = map(Requirement, PYPROJECT["build-system"]["requires"])
    assert Version(pinned_version(locked(wanted.name))) in wanted.specifier


def test_environment_yml_installs_the_lock_and_nothing_beside_it() -> None:
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock"]
    assert [entry.split("=")[0] for entry in conda] == ["python", "pip"]
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert ENVIRONMENT["name"] == PYPROJECT["project"]["name"]


def test_one_python_version_everywhere() -> None:
    (python,) = [e for e in ENVIRONMENT["dependencies"] if isinstance(e, str) and e.startswith("python=")]
    minor = python.removeprefix("python=")
    (compiled_for,) = re.findall(r"uv pip compile .*--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert minor == compiled_for
    assert PYPROJECT["project"]["requires-python"] == f">={minor}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == minor
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{minor.replace('.', '')}"


def test_the_container_has_the_same_lock_and_installer() -> None:
    recipe = (ROOT / "workflow/consistency.def").read_text(encoding="utf-8")
    version = re.search(r"(?m)^UV_VERSION := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    assert f"uv=={version}\n" in recipe
    assert "requirements.lock /opt/requirements.lock\n" in recipe
    assert "--require-hashes -r /opt/requirements.lock" in recipe
    assert (ROOT / "requirements.lock").is_file()
