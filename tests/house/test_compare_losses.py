"""benchmarks/compare_losses.py on two commits of a repository whose trainings are lines that are committed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes import GIT, ROOT, environment

SNAKEFILE = """
rule student:
    output: "results/small/students/{student}/seed{seed}/history.jsonl"
    shell: "cp losses.jsonl {output}"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: of two losses, the last is 1e-3 larger at the second."""
    (tmp_path / "config/studies").mkdir(parents=True)
    (tmp_path / "config/studies/small.yaml").write_text("name: small\nstudents: {ctm: {}}\nseeds: [0]\n")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    git(tmp_path, "init", "--quiet")
    for k, last in enumerate((2.0, 2.002)):
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": last}]
        (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", str(k))
    return tmp_path


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, env=environment(**GIT), check=True)


def test_a_difference_beyond_the_tolerance_fails_and_every_step_is_in_the_table(repository: Path) -> None:
    script = ROOT / "benchmarks/compare_losses.py"
    words = ["HEAD~1", "HEAD", "--study", "config/studies/small.yaml", "--tolerance", "1e-4"]
    done = subprocess.run([sys.executable, script, *words], cwd=repository, env=environment(), stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert b"| ctm/seed0 | 1 | 3 | 3 | 0.0e+00 |" in done.stdout
    assert b"| ctm/seed0 | 2 | 2 | 2.002 | 1.0e-03 |" in done.stdout
