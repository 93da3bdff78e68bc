"""What the Snakemake workflow catalog asks of a repository whose usage it calls standardized."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.processes import ROOT

USAGE: dict[str, Any] = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
RULES = sorted((ROOT / "workflow/rules").iterdir())


@pytest.mark.parametrize("name", ["README.md", "config/README.md", "config/config.yaml", "workflow/Snakefile"])
def test_the_files_that_it_reads_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_its_search_finds_the_repository() -> None:
    words = set(re.findall(r"\w+", (ROOT / "README.md").read_text().lower()))
    assert {"snakemake", "workflow"} <= words


def test_every_file_of_rules_is_one_and_is_included() -> None:
    included = re.findall(r'(?m)^include: "(.+)"$', (ROOT / "workflow/Snakefile").read_text())
    assert sorted(ROOT / "workflow" / name for name in included) == RULES
    assert {path.suffix for path in RULES} == {".smk"}


def test_its_settings_have_the_keys_that_it_knows() -> None:
    assert USAGE.keys() == {"mandatory-flags", "software-stack-deployment", "report"}
    assert USAGE["mandatory-flags"].keys() == {"desc", "flags"}
    assert all(isinstance(value, str) for value in USAGE["mandatory-flags"].values())
    deployment = USAGE["software-stack-deployment"]
    assert deployment.keys() == {"conda", "apptainer", "apptainer+conda", "report"}
    assert all(isinstance(value, bool) for value in deployment.values())
    assert USAGE["report"] is deployment["report"] is True


def test_its_settings_are_those_of_the_rules() -> None:
    text = "\n".join(path.read_text() for path in [ROOT / "workflow/Snakefile", *RULES])
    text = text.replace('container: config["container"]', "")  # the user's own image: the workflow brings none
    for method, directive in {"conda": "conda", "apptainer": "container"}.items():
        assert USAGE["software-stack-deployment"][method] == bool(re.search(rf"(?m)^ *{directive}:", text))
    assert "report(" in text


def test_its_page_explains_every_file_of_the_configuration() -> None:
    page = (ROOT / "config/README.md").read_text()
    assert page.startswith("# Configuration\n")
    (key,) = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    files = [path for path in (ROOT / "config").iterdir() if path.suffix == ".yaml"]
    profiles = [Path("profiles", path.name, "config.yaml") for path in (ROOT / "workflow/profiles").iterdir()]
    for word in [key, *(path.relative_to(ROOT) for path in files), *profiles]:
        assert f"`{word}`" in page, word
