"""Copies of this checkout in which the real Snakemake runs the tiny study."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ["Snakefile", "Makefile", "environment.yml", "config", "profiles", "workflow", "src"]
OURS = ("CONSISTENCY_", "SNAKEMAKE_", "MLFLOW_", "PYTEST_", "MAKE", "MFLAGS")


@dataclass(frozen=True)
class Checkout:
    """A copy of the project in which Snakemake may run."""

    path: Path

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "studies=tiny", *words]

    def environment(self) -> dict[str, str]:
        """The outside's, without what a surrounding workflow, make or MLflow would bring in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        return kept | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Snakemake in a process group of its own, as a shell starts it; its output goes to output.txt."""
        with (self.path / "output.txt").open("w") as output:
            return subprocess.Popen(
                self.command(*words),
                cwd=self.path,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, *words: str) -> tuple[int, str]:
        """Run Snakemake to its end: (exit code, output)."""
        code = self.start(*words).wait(timeout=600)
        return code, (self.path / "output.txt").read_text()

    def done(self, *words: str) -> str:
        """Run Snakemake, which must end well."""
        code, output = self.run(*words)
        assert code == 0, output
        return output

    def planned(self, *words: str) -> set[str]:
        """The jobs of a dry run, such as 'student ctm'; without `all`."""
        blocks = re.findall(r"(?m)^(?:local)?rule (\w+):\n((?:    .*\n)*)", self.done("-n", *words))
        runs = [(name, re.search(r"run=([\w-]+)", text)) for name, text in blocks if name != "all"]
        return {f"{name} {run[1]}" if run else name for name, run in runs}

    def edit(self, old: str, new: str, study: str = "tiny") -> None:
        """Replace in the study's file what occurs there once."""
        file = self.path / f"config/studies/{study}.yaml"
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        file.write_text(text.replace(old, new))

    def copy(self, path: Path) -> "Checkout":
        shutil.copytree(self.path, path, symlinks=True)
        return Checkout(path)

    def litter(self) -> list[Path]:
        """Temporary files that nobody removed."""
        folders = [self.path / name for name in ("results", "state", "logs")]
        return [file for folder in folders for file in folder.rglob("*.tmp")]


def fresh(path: Path) -> Checkout:
    """A copy of the files of this checkout that the workflow needs."""
    path.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, path / name, symlinks=True)
        else:
            shutil.copy2(source, path / name, follow_symlinks=False)
    return Checkout(path)
