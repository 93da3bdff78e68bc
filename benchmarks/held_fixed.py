"""Vary what the intervals of a report hold fixed: the teacher (teacher.seed) and the noises (sampling.first_seed).

    python benchmarks/held_fixed.py --study config/studies/digits.yaml --cores 2      # an hour or two

Every combination of three teachers and three sets of noises has a report of its own, in a clone of the last commit; the
students of a teacher are trained once. docs/held_fixed.csv has the speed-ups and the paired differences of all reports,
docs/statistics.md their spread. With the clone of an interrupted run (--clone) it goes on.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


def spread(table: pd.DataFrame) -> str:
    """Return how far the comparisons lie apart, in percent, as Markdown, infinite ones left out."""
    lines = [
        ["comparison", "measure", "NFE", "lowest to highest", "seeds, %", "teachers, %", "noises, %"],
        ["---", "---", "---:", "---:", "---:", "---:", "---:"],
    ]
    for (_, _, measure, nfe, kind), rows in table.groupby(KEYS[2:]):
        logs = np.log(rows.value.where(rows.value.between(1e-9, 1e9)))
        half = (np.log(rows.high / rows.low) / 2).replace(np.inf, np.nan).mean()
        apart = [logs.groupby(rows[name]).mean().std() for name in KEYS[:2]]
        values = f"{rows.value.min():.3f} to {rows.value.max():.3f}"
        cells = [f"{100 * each:.1f}" for each in (half, *apart)]
        lines.append([{"speedup": "speed-up", "paired": "paired ratio"}[kind], measure, f"{nfe}", values, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("config/studies/digits.yaml"), help="default: digits")
    parser.add_argument("--students", nargs="+", default=["ctm", "analytic"], help="default: ctm analytic")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--clone", type=Path, default=Path("build/held_fixed"), help="the clone's folder")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of held_fixed.csv and statistics.md")
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
    table.to_csv(args.docs / "held_fixed.csv", index=False, float_format="%.5g")
    page = args.docs / "statistics.md"
    block = f"\\1\n\n{spread(table)}\n\n\\2"
    page.write_text(re.sub(r"(?s)(<!-- begin: held_fixed -->).*?(<!-- end -->)", block, page.read_text(), count=1))


if __name__ == "__main__":
    main()
