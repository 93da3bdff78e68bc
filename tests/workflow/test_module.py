"""The workflow as a module in a folder of one's own (docs/module.md), written by hand and by snakedeploy."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.processes import GIT, environment, run_python
from tests.workflow.checkout import Checkout, as_module, fresh

pytestmark = pytest.mark.slow

DATASET = "results/tiny/dataset/images.npy"
ADDRESS = "https://github.com/someone/consistency-distillation"
SNAKEDEPLOY = "from snakedeploy.client import main; main()"
#: Snakemake where the package is not installed
WITHOUT = "import sys; sys.modules['consistency'] = None; from snakemake.cli import main; main(sys.argv[1:])"


def git(folder: Path, *words: str) -> str:
    variables = environment(**GIT)
    return subprocess.run(["git", *words], cwd=folder, env=variables, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone with a tag, in a folder with a space."""
    checkout = fresh(tmp_path_factory.mktemp("module") / "a clone", ".gitignore")
    for words in ("init", "add .", "commit -m all", "tag v1"):
        git(checkout.path, *words.split())
    return checkout


@pytest.fixture(scope="module")
def jobs(clone: Checkout) -> set[str]:
    """Every job, as the clone itself plans them."""
    return clone.planned()


@pytest.fixture
def by_hand(clone: Checkout, tmp_path: Path) -> Checkout:
    """A folder with what the page says to put there."""
    for name in ("config", "profiles"):
        shutil.copytree(clone.path / name, tmp_path / name)
    as_module(tmp_path, clone.path)
    return Checkout(tmp_path)


@pytest.fixture
def by_snakedeploy(clone: Checkout, tmp_path: Path) -> Checkout:
    """A folder that snakedeploy has filled from an address, which git takes for that of the clone."""
    instead = {"COUNT": "1", "KEY_0": f"url.{clone.path.as_uri()}.insteadOf", "VALUE_0": ADDRESS}
    variables = {f"GIT_CONFIG_{name}": value for name, value in instead.items()}
    variables |= {"GIT_CONFIG_GLOBAL": os.devnull, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run_python("-c", SNAKEDEPLOY, "deploy-workflow", ADDRESS, "mine", "--tag", "v1", folder=tmp_path, **variables)
    assert f'github("{ADDRESS[19:]}"' in (tmp_path / "mine/workflow/Snakefile").read_text()
    return Checkout(tmp_path / "mine", variables=variables)


def makes_a_dataset_with(code: Checkout, user: Checkout) -> None:
    user.done(DATASET)
    card = json.loads((user.path / DATASET).with_name("card.json").read_text())
    assert card["git"] == {"commit": git(code.path, "rev-parse", "HEAD").strip(), "dirty": False}


def says_how_to_install(user: Checkout, origin: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "-n"], cwd=user.path, env=user.environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: No module named 'consistency")
    assert done.stderr.endswith(f"pip install '{origin}'\n")
    assert "Traceback" not in done.stderr


def test_a_module_of_a_clone_has_its_jobs_and_runs_its_code(by_hand: Checkout, clone: Checkout, jobs: set[str]) -> None:
    assert by_hand.planned() == jobs
    makes_a_dataset_with(clone, by_hand)
    says_how_to_install(by_hand, clone.path)


def test_a_module_of_an_address_has_its_jobs_and_runs_the_package(
    by_snakedeploy: Checkout, clone: Checkout, jobs: set[str]
) -> None:
    installed = replace(by_snakedeploy, variables={**by_snakedeploy.variables, "PYTHONPATH": str(clone.path / "src")})
    assert installed.planned() == jobs
    makes_a_dataset_with(clone, installed)
    says_how_to_install(by_snakedeploy, f"git+{ADDRESS}@v1")
