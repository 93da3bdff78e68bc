"""The two files that Snakemake can be started with: the root's and the main one."""

import json
import os
from pathlib import Path

import pytest
from tests.processes import run_python
from tests.workflow.checkout import Checkout

MAIN = ("-s", "workflow/Snakefile")
STAND_IN = """#!/bin/bash
if [ "$1" = --version ]; then echo apptainer version 1.3.0; exit; fi
echo "$@" > "$(dirname "$0")/words"
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


def test_both_files_make_the_same_graph_up_to_the_rule_all(checkout: Checkout) -> None:
    words = ["-m", "snakemake", "--d3dag", "--config", "studies=tiny"]
    root, main = (run_python(*words, *file, folder=checkout.path).stdout for file in ((), MAIN))
    assert json.loads(root) == json.loads(main)
    rules = [node["value"]["rule"] for node in json.loads(root)["nodes"]]
    assert rules.count("all") == rules.count("track") == 1


def test_a_user_without_a_name_can_run_it(checkout: Checkout, tmp_path: Path) -> None:
    """As a container started with any uid; Snakemake and its Slurm plugin ask for the name."""
    nameless = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    (tmp_path / "sitecustomize.py").write_text(nameless)
    names = dict.fromkeys(["LOGNAME", "USER", "LNAME", "USERNAME"], "")
    words = ["-m", "snakemake", "--cores", "1", "--dry-run", "--config", "studies=tiny"]
    assert "dry-run" in run_python(*words, folder=checkout.path, PYTHONPATH=str(tmp_path), **names).stdout


def test_the_stages_run_in_the_container_that_is_named(checkout: Checkout, tmp_path: Path) -> None:
    """With a stand-in for Apptainer, which notes its words and runs the stage outside."""
    stand_in = tmp_path / "apptainer"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (checkout.path / "own.sif").touch()
    words = ["-m", "snakemake", "--cores", "1", "--sdm", "apptainer", "--config", "studies=tiny", "container=own.sif"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run_python(*words, "--", "results/tiny/dataset/images.npy", folder=checkout.path, PATH=path)
    assert "own.sif bash -c" in (tmp_path / "words").read_text()
    assert (checkout.path / "results/tiny/dataset/images.npy").exists()


@pytest.mark.slow
def test_a_run_that_is_finished_with_one_file_is_finished_with_the_other(copied: Checkout) -> None:
    assert "Nothing to be done" in copied.done(*MAIN)
