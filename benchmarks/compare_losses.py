"""Compare the losses of two commits, step by step: does a change that should not touch the method leave it alone?

    python benchmarks/compare_losses.py main HEAD
    python benchmarks/compare_losses.py v0.1.0 HEAD --study config/studies/digits.yaml --tolerance 1e-4

Each commit trains the study's students with its own code, in a clone of its own, from its own dataset and teacher. Only
what is committed counts. The exit code is 1 if a loss differs by more than the tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

Curves = dict[str, dict[int, float]]


def losses(commit: str, study: Path, folder: Path, cores: int) -> Curves:
    """Train the study's students at a commit. Returns {student and seed: {step: loss}}."""
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", ".", str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=folder, check=True)
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    (folder / "config/studies" / study.name).write_bytes(study.read_bytes())
    students = Path("results") / content["name"] / "students"
    files = [students / name / f"seed{seed}/history.jsonl" for name in content["students"] for seed in content["seeds"]]
    words = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--config", f"studies={content['name']}", "--"]
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    subprocess.run([*words, *map(str, files)], cwd=folder, env=environment, check=True)
    curves: Curves = {}
    for file in files:
        lines = map(json.loads, (folder / file).read_text(encoding="utf-8").splitlines())
        curves[str(file.parent.relative_to(students))] = {line["step"]: line["loss"] for line in lines}
    return curves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="commit, branch or tag")
    parser.add_argument("after", help="commit, branch or tag")
    parser.add_argument("--study", type=Path, default=Path("config/studies/tiny.yaml"), help="default: tiny")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference (default: 0)")
    parser.add_argument("--cores", type=int, default=1)
    args = parser.parse_args()
    commits = [
        subprocess.run(
            ["git", "rev-parse", "--short", commit], check=True, capture_output=True, encoding="utf-8", errors="replace"
        ).stdout.strip()
        for commit in (args.before, args.after)
    ]
    with tempfile.TemporaryDirectory() as folder:
        before, after = (
            losses(commit, args.study, Path(folder) / str(k), args.cores) for k, commit in enumerate(commits)
        )
    print(f"\n| student | step | {commits[0]} | {commits[1]} | relative difference |")
    print("| --- | ---: | ---: | ---: | ---: |")
    worst = 0.0
    for student, curve in before.items():
        for step, loss in curve.items():
            difference = abs(after[student][step] / loss - 1)
            worst = max(worst, difference)
            print(f"| {student} | {step} | {loss:.8g} | {after[student][step]:.8g} | {difference:.1e} |")
    print(f"\nlargest relative difference: {worst:.2g} (allowed: {args.tolerance:g})")
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
