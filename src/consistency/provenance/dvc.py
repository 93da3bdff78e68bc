"""The DVC pipeline: dvc.yaml, written from the graph, and the plan, small files that tell DVC what a job depends on.

A study file holds more than any one job depends on (the title, a batch that affects only memory, the other students),
and so does the source folder. So the stages of dvc.yaml depend on a file per job, which a cheap stage writes.
"""

import shutil
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError
from consistency.base.files import sha256, write_bytes, write_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import dump_yaml, load_study
from consistency.data.resources import find
from consistency.provenance import graph
from consistency.provenance.code_digest import code_digest

PIPELINE = Path("dvc.yaml")
# Rules whose jobs may need the rule `resource`, which downloads.
_FETCHING = ("dataset", "teacher", "extractor", "student")


def write_plan(job: Job, unused: int = 0) -> None:
    """Write results/<study>/plan/: one JSON file per job with the key of its settings, the digest of its code and the
    sha256 of its downloads and given files. unused: number of empty files that fill up shorter lists of dependencies in
    dvc.yaml.

    Raises UserError if dvc.yaml was not written for the study as it is.
    """
    _require_in_step(job)
    plan = job.paths.root / "plan"
    shutil.rmtree(plan, ignore_errors=True)
    for stage, each in graph.artifacts(job).values():
        downloads = {name: find(name).sha256 for name in graph.downloads(each, stage)}
        downloads |= {file.name: sha256(file) for file in graph.given(stage, each) if file.exists()}
        content = {"settings": each.key(stage), "code": code_digest(stage), "downloads": downloads}
        write_json(_plan_file(stage, each), content)
    for k in range(unused):
        write_bytes(plan / "unused" / str(k), b"")


def print_pipeline(studies: list[str]) -> None:
    """Print dvc.yaml for studies named by their files in config/studies. Raises UserError for a bad study, and if two
    jobs would have one name."""
    print(pipeline(studies), end="")


def pipeline(studies: list[str]) -> str:
    """Return the text of dvc.yaml: a template per stage and the literal files of each job.

    DVC's templates take no lists, so dependencies are named one by one, up to the longest list of the stage.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name in studies:
        study = load_study(f"config/studies/{name}.yaml")
        for stage, each in graph.artifacts(Job(study, StudyPaths(study.name))).values():
            label = name if each.student is None else f"{name}-{each.student}-{each.seed}"
            items = groups.setdefault(rule := graph.rule_of(stage, each), {})
            if label in items:
                raise UserError(
                    f"two jobs would be the DVC stage {rule}@{label}: rename a student, or leave a study out"
                )
            items[label] = _item(stage, each)
    unused = 0
    for items in groups.values():
        longest = max(len(item["deps"]) for item in items.values())
        for item in items.values():
            missing = longest - len(item["deps"])
            unused = max(unused, missing)
            item["deps"] += [f"results/{item['study']}/plan/unused/{k}" for k in range(missing)]
    plan = {
        "cmd": f"PYTHONPATH=src python -m consistency plan --study config/studies/${{item}}.yaml --unused {unused}",
        "deps": ["config/resources.yaml", "src/consistency"],
        "params": [{"config/studies/${item}.yaml": None}],
        "outs": ["results/${item}/plan"],
    }
    stages = {"plan": {"foreach": studies, "do": plan}}
    stages |= {rule.replace("_", "-"): _stage(rule, items) for rule, items in groups.items()}
    command = f"python -m consistency dvc {' '.join(studies)} > dvc.yaml"
    head = f"# Written by `{command}` (docs/dvc.md): change the study, not this file, and write it again.\n"
    text = dump_yaml({"stages": stages}, width=10_000, default_flow_style=None)
    return head + text + "\n" + _shown(studies)


def _require_in_step(job: Job) -> None:
    """Raise UserError unless dvc.yaml is the pipeline of its studies, this one among them."""
    name = job.study.name
    try:
        text = PIPELINE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {PIPELINE} here: run this in the project's root") from None
    words = text.partition("`python -m consistency dvc ")[2].partition(" > dvc.yaml`")[0].split()
    studies = words if name in words else [name]
    if text != pipeline(studies):
        raise UserError(
            f"{PIPELINE} does not match study {name}: run `python -m consistency dvc {' '.join(studies)} > {PIPELINE}`"
        )


def _plan_file(stage: str, job: Job) -> Path:
    place = job.paths.root / "plan" / stage
    return (place if job.student is None else place / job.student / f"seed{job.seed}").with_suffix(".json")


def _item(stage: str, job: Job) -> dict[str, Any]:
    """Return the files of one job, as its stage's template takes them."""
    card, outputs = job.card(stage), graph.outputs(stage, job)
    return {
        "study": job.study.name,
        "target": str(graph.declared(job, outputs[0])),
        "deps": [str(path) for path in (_plan_file(stage, job), *graph.needed(stage, job, job.paths.passed))],
        # Score files share their folder with those of other jobs.
        "outs": [str(path) for path in ((card, *outputs) if stage == "scores" else (card.parent,))],
    }


def _stage(rule: str, items: dict[str, Any]) -> dict[str, Any]:
    """Return the stage of dvc.yaml that runs a rule for each of its jobs."""
    first = next(iter(items.values()))
    rules = f"{rule} resource" if rule in _FETCHING else rule
    command = "PYTHONPATH=src python -m consistency reproduce --study config/studies/${item.study}.yaml"
    return {
        "foreach": items,
        "do": {
            "cmd": f"{command} --rules {rules} -- ${{item.target}}",
            "deps": [f"${{item.deps[{k}]}}" for k in range(len(first["deps"]))],
            "outs": [f"${{item.outs[{k}]}}" for k in range(len(first["outs"]))],
        },
    }


def _shown(studies: list[str]) -> str:
    """Return the metrics and plots of dvc.yaml."""
    reports = [f"results/{name}/report" for name in studies]

    def curves(measure: str, label: str) -> dict[str, Any]:
        scores = {f"{report}/scores.csv": measure for report in reports}
        axes = {"x_label": "training iterations", "y_label": label}
        return {"template": "learning_curves", "x": "step", "y": scores} | axes

    table = {"template": "final_table", "x": "fd", "y": {f"{report}/table.csv": "run" for report in reports}}
    plots: list[Any] = [
        {"learning curves, FD": curves("fd", "Fréchet distance")},
        {"learning curves, alignment": curves("alignment", "error to the teacher's endpoint")},
        {"final table": table | {"x_label": "Fréchet distance", "y_label": "student"}},
        *(f"{report}/figures/curves_{measure}.png" for report in reports for measure in ("fd", "alignment")),
    ]
    content = {"metrics": [f"{report}/summary.json" for report in reports], "plots": plots}
    return dump_yaml(content, allow_unicode=True, width=10_000, default_flow_style=None)
