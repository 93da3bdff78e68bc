"""Real git and DVC repositories in which `dvc repro` runs the tiny study."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from tests.conftest import Changes
from tests.processes import GIT, start_in
from tests.workflow.checkout import Checkout, fresh

#: what a repository has beside what the workflow needs
TRACKED = ["dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitattributes", ".gitignore"]
TRACKED += ["resources/.gitignore"]
#: the stages that start Snakemake, as the tiny study has them
ONCE = ["dataset", "teacher", "coefficients", "extractor", "teacher-samples", "calibration", "report"]
JOBS = {f"{stage}@tiny" for stage in ONCE} | {
    f"{stage}@tiny-{run}-0" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")
}
#: the stage that does not
PLAN = "plan@tiny"


@dataclass(frozen=True)
class Repo:
    """A clone, with its own settings of git and DVC and none of the machine's."""

    path: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Checkout:
        return Checkout(self.path)

    @property
    def environment(self) -> dict[str, str]:
        private = self.path.parent / f"{self.path.name}-private"
        folders = {f"DVC_{name}_DIR": str(private / name) for name in ("GLOBAL_CONFIG", "SYSTEM_CONFIG", "SITE_CACHE")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "CORES": "1", "SHELL": "/bin/bash"}
        return self.checkout.environment | folders | GIT | own | self.variables

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command in a process group of its own, as a shell starts it; its output goes to output.txt."""
        return start_in(self.path, words, self.environment, self._said)

    @property
    def _said(self) -> Path:
        return self.path.parent / f"{self.path.name}-output.txt"

    @property
    def output(self) -> str:
        return self._said.read_text()

    def run(self, *words: str, code: int = 0) -> str:
        """Run a command to its end, which must have that exit code. Returns its output."""
        assert self.start(*words).wait(timeout=900) == code, self.output
        return self.output

    def dvc(self, *words: str, code: int = 0) -> str:
        return self.run("dvc", *words, code=code)

    def git(self, *words: str, code: int = 0) -> str:
        return self.run("git", *words, code=code)

    def repro(self, *words: str) -> set[str]:
        """`dvc repro`. Returns the stages that ran; that Snakemake started for each but the plan, and for no
        other, is checked by its own logs."""
        before = self.snakemakes()
        ran = set(re.findall(r"Running stage '(\S+)':", self.dvc("repro", *words)))
        assert self.snakemakes() - before == len([stage for stage in ran if not stage.startswith("plan@")])
        return ran

    def snakemakes(self) -> int:
        """The number of times that Snakemake has run jobs here."""
        return sum("Job stats:" in log.read_text() for log in (self.path / ".snakemake/log").glob("*.log"))

    def changed(self) -> set[str]:
        """The stages that `dvc status` would run."""
        return set(re.findall(r"(?m)^(\S+):$", self.dvc("status")))

    def set(self, changes: Changes, name: str = "tiny") -> None:
        """Set dotted keys of the study, or of a copy of another name, and write its pipeline."""
        self.checkout.change(changes, name)
        (self.path / "dvc.yaml").write_text(self.checkout.verb("dvc", name))

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def copy(self, path: Path) -> "Repo":
        return replace(self, path=shutil.copytree(self.path, path, symlinks=True))

    def clone(self, path: Path) -> "Repo":
        """The clone that somebody else gets: what is committed, and nothing of DVC's."""
        self.git("clone", "--quiet", ".", str(path))
        return replace(self, path=path)

    def locked(self) -> dict[str, Any]:
        """The stages of dvc.lock."""
        return yaml.safe_load((self.path / "dvc.lock").read_text())["stages"]

    def unsound(self) -> list[Path]:
        """The files of the cache whose content is not what their name says."""
        files = [file for file in (self.path / ".dvc/cache/files/md5").rglob("*") if file.is_file()]
        assert files
        digests = {file: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
        return [file for file in files if digests[file] != file.parent.name + file.name.removesuffix(".dir")]


def origin(path: Path) -> Repo:
    """A repository of this checkout's files, committed, whose pipeline is the tiny study."""
    repo = Repo(fresh(path, *TRACKED).path)
    repo.set({"varies": ["preconditioning", "learning_rate"]})
    repo.git("init", "--quiet", "--initial-branch", "main")
    repo.commit("a study")
    return repo
