"""The commit of the running source: that of its own repository, or none and a warning."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.processes import GIT, environment, run_python

SCRIPT = "import json; from consistency.provenance.environment import git_state; print(json.dumps(git_state())); "
NONE = '{"commit": null, "dirty": null}'


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, env=environment(**GIT), check=True, capture_output=True
    ).stdout.decode()


def repository(folder: Path, *files: str) -> Path:
    """A repository with one commit of those files."""
    folder.mkdir(exist_ok=True)
    (folder / "own").write_text("somebody's own")
    git(folder, "init", "-q")
    git(folder, "add", "own", *files)
    git(folder, "commit", "-q", "-m", "one")
    return folder


def state(source: Path, **variables: Any) -> tuple[str, str]:
    """The state that a process of that source notes, asked twice, and its warnings."""
    done = run_python("-c", SCRIPT + "git_state()", PYTHONPATH=str(source), **variables)
    return done.stdout.strip(), done.stderr


def noted(folder: Path, dirty: str = "false") -> tuple[str, str]:
    return f'{{"commit": "{git(folder, "rev-parse", "HEAD").strip()}", "dirty": {dirty}}}', ""


def test_a_clone_names_its_commit_whatever_a_hook_has_set(package: Path, tmp_path: Path) -> None:
    other = repository(tmp_path / "other")
    repository(tmp_path, "consistency")
    assert state(tmp_path, GIT_DIR=str(other / ".git"), GIT_WORK_TREE=str(other)) == noted(tmp_path)
    os.utime(tmp_path / "own")
    index = (tmp_path / ".git/index").read_bytes()
    assert state(tmp_path) == noted(tmp_path)
    assert (tmp_path / ".git/index").read_bytes() == index
    (package / "data/added.py").touch()
    assert state(tmp_path) == noted(tmp_path, "true")


@pytest.mark.parametrize("case", ["untracked", "hook", "no git", "other owner"])
def test_without_a_commit_of_its_own_there_is_one_warning(package: Path, tmp_path: Path, case: str) -> None:
    variables, reason = {}, "does not track it: run a clone"
    if case == "hook":
        variables, reason = {"GIT_DIR": str(repository(tmp_path / "other") / ".git")}, "not a git repository"
    elif case == "no git":
        variables, reason = {"PATH": str(tmp_path)}, "No such file or directory: 'git'"
    elif case == "other owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a repository away")
        shutil.chown(repository(tmp_path, "consistency"), 65534)
        variables, reason = {"HOME": str(tmp_path)}, "git config --global --add safe.directory"
    else:
        repository(tmp_path)
    said, warning = state(tmp_path, **variables)
    assert said == NONE
    assert warning.count("\n") == 1 and warning.startswith("warning: the results name no commit of the code (")
    assert reason in warning
