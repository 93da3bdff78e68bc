"""Vary what the intervals of a report hold fixed: the teacher (teacher.seed) and the noises (sampling.first_seed).

    python benchmarks/held_fixed.py --study config/studies/digits.yaml --cores 2      # docs/held_fixed.csv; an hour

Every combination of three teachers and three sets of noises has a report of its own, in a clone of the last commit; the
students of a teacher are trained once. The table has the speed-ups and the paired differences of all reports. With the
clone of an interrupted run (--clone) it goes on.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

KEYS = ["teacher", "noises", "run", "baseline", "measure", "nfe", "kind"]


def reported(content: dict[str, Any], teacher: int, first_seed: int, clone: Path, cores: int) -> pd.DataFrame:
    """Run a study with that teacher and those noises in a clone. Returns its comparisons with the baseline."""
    kept, name = clone / f"build/teacher{teacher}-noises{first_seed}.csv", content["name"]
    if kept.exists():
        return pd.read_csv(kept)
    changed = content | {
        "teacher": content["teacher"] | {"seed": teacher},
        "sampling": content["sampling"] | {"first_seed": first_seed},
    }
    (clone / f"config/studies/{name}.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    words = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--config", f"studies=[{name}]"]
    report = f"results/{name}/report"
    files = [f"{report}/speedup.csv", f"{report}/paired.csv"]
    environment = os.environ | {"PYTHONPATH": str(clone.resolve() / "src")}
    subprocess.run([*words, "--", *files], cwd=clone, env=environment, check=True)
    tables = [pd.read_csv(clone / file).assign(kind=Path(file).stem) for file in files]
    table = pd.concat(tables, ignore_index=True).assign(teacher=teacher, noises=first_seed)
    kept.parent.mkdir(exist_ok=True)
    table.to_csv(kept, index=False)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("config/studies/digits.yaml"), help="default: digits")
    parser.add_argument("--students", nargs="+", default=["ctm", "analytic"], help="default: ctm analytic")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--clone", type=Path, default=Path("build/held_fixed"), help="the clone's folder")
    parser.add_argument("--out", type=Path, default=Path("docs/held_fixed.csv"))
    args = parser.parse_args()
    content = yaml.safe_load(args.study.read_text(encoding="utf-8")) | {"seeds": list(range(args.seeds))}
    content["students"] = {name: content["students"][name] for name in args.students}
    count, found = content["sampling"]["count"], []
    if not args.clone.exists():
        subprocess.run(["git", "clone", "--quiet", ".", str(args.clone)], check=True)
    for teacher in range(3):
        for first_seed in (0, count, 2 * count):
            found.append(reported(content, teacher, first_seed, args.clone, args.cores))
    table = pd.concat(found, ignore_index=True)[[*KEYS, "value", "low", "high"]]
    table.to_csv(args.out, index=False, float_format="%.5g")
    spread = table.groupby(KEYS[2:]).value.agg(["mean", "std"])
    by_teacher = table.groupby([*KEYS[2:], "teacher"]).value.mean().groupby(KEYS[2:]).std().rename("over teachers")
    by_noises = table.groupby([*KEYS[2:], "noises"]).value.mean().groupby(KEYS[2:]).std().rename("over noises")
    print(pd.concat([spread, by_teacher, by_noises], axis=1).to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
