"""The files that others read: citation, changelog, hooks, continuous integration."""

import os
import re
import subprocess
import tomllib

import pytest
import yaml
from tests.processes import ROOT

HOUSE = ["Makefile", "pyproject.toml", "environment.yml", "requirements.in", "requirements.lock", "CITATION.cff"]
HOUSE += ["CHANGELOG.md", "CONTRIBUTING.md", "NOTICE", "LICENSE", ".ci/run", ".gitignore", ".gitattributes"]
HOUSE += [".pre-commit-config.yaml", "mkdocs.yml", "requirements-docs.in", "requirements-docs.lock"]


def test_the_citation_has_what_its_format_requires_and_refers_to_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "MIT"
    references = citation["references"]
    assert all({"type", "title", "authors", "year"} <= reference.keys() for reference in references)
    numbers = {identifier["value"] for reference in references for identifier in reference["identifiers"]}
    assert numbers == {"arXiv:2502.02922", "arXiv:2406.09570"}


def test_hooks_are_local_and_come_from_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    (hooks,) = [repository["hooks"] for repository in config["repos"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "snakefmt"}


def test_the_changelog_opens_with_unreleased() -> None:
    sections = re.findall(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text())
    assert sections[0] == "Unreleased"


def test_the_ci_entry_runs() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)


@pytest.mark.parametrize("name", HOUSE)
def test_no_absolute_path_of_a_machine(name: str) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|root|work|opt|mnt|Users|tmp)/\S*", (ROOT / name).read_text())
    assert found == []


IGNORED = ["results/x", "state/x", ".snakemake/x", "mlflow.db", "mlruns/x", ".venv/x", ".venv-docs/x", "build/x"]


@pytest.mark.parametrize("path", IGNORED)
def test_what_a_study_makes_is_ignored(path: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0
