"""The pipeline of DVC: dvc.yaml, written from the graph, and the small files by which DVC sees what a job depends on.

A study file holds more than one job depends on (a title, a batch that affects only memory, the other students), and so
does a source folder. The stages of dvc.yaml therefore depend on a small file for each job, which a cheap stage writes.
"""

import shutil
from pathlib import Path
from typing import Any

import yaml

from consistency.base.errors import UserError
from consistency.base.files import write_bytes, write_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.data.resources import find
from consistency.provenance import graph
from consistency.provenance.code_digest import code_digest

PIPELINE = Path("dvc.yaml")
#: the rules that download, beside the stage's own
_FETCHING = ("dataset", "teacher", "extractor", "student")


def write_plan(job: Job, unused: int = 0) -> None:
    """Write results/<study>/plan/: one JSON file per job with the key of its settings, the digest of its code and the
    sha256 of its downloads; and that many empty files, which dvc.yaml names where a job has fewer inputs than another.

    Raises UserError if dvc.yaml was not written for the study as it is.
    """
    _require_in_step(job)
    shutil.rmtree(_plan(job), ignore_errors=True)
    for stage, each in graph.artifacts(job).values():
        downloads = {name: find(name).sha256 for name in graph.downloads(each, stage)}
        content = {"settings": each.key(stage), "code": code_digest(stage), "downloads": downloads}
        write_json(_plan_file(stage, each), content)
    for k in range(unused):
        write_bytes(_unused(job, k), b"")


def print_pipeline(studies: list[str]) -> None:
    """Print dvc.yaml of those studies, files of config/studies without .yaml. Raises UserError for a bad study."""
    print(pipeline(studies), end="")


def pipeline(studies: list[str]) -> str:
    """Return the text of dvc.yaml: for each stage a template, and the literal files of each job.

    DVC's templates take no lists, so a job's dependencies are named one by one, up to the longest list of the stage.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name in studies:
        study = load_study(f"config/studies/{name}.yaml")
        for stage, each in graph.artifacts(Job(study, StudyPaths(study.name))).values():
            label = name if each.student is None else f"{name}-{each.student}-{each.seed}"
            groups.setdefault(_group(stage, each), {})[label] = _item(stage, each)
    unused = 0
    for items in groups.values():
        longest = max(len(item["deps"]) for item in items.values())
        for item in items.values():
            missing = longest - len(item["deps"])
            unused = max(unused, missing)
            item["deps"] += [f"results/{item['study']}/plan/unused/{k}" for k in range(missing)]
    stages = {"plan": _plan_stage(studies, unused)} | {group: _stage(group, items) for group, items in groups.items()}
    command = f"python -m consistency dvc {' '.join(studies)} > dvc.yaml"
    head = f"# Written by `{command}` (docs/dvc.md): change the study, not this file, and write it again.\n"
    text = yaml.safe_dump({"stages": stages}, sort_keys=False, width=10_000, default_flow_style=None)
    return head + text + "\n" + _shown(studies)


def _require_in_step(job: Job) -> None:
    """Raise UserError unless dvc.yaml is the pipeline of its studies, this one among them."""
    name = job.study.name
    try:
        words = PIPELINE.read_text().partition("`python -m consistency dvc ")[2].partition(" > dvc.yaml`")[0].split()
    except FileNotFoundError:
        raise UserError(f"no {PIPELINE} here: run this in the project's folder") from None
    studies = words if name in words else [name]
    if PIPELINE.read_text() != pipeline(studies):
        raise UserError(
            f"{PIPELINE} is not that of study {name} as it is now: "
            f"run `python -m consistency dvc {' '.join(studies)} > {PIPELINE}`"
        )


def _plan(job: Job) -> Path:
    return job.paths.root / "plan"


def _plan_file(stage: str, job: Job) -> Path:
    place = _plan(job) / stage if job.student is None else _plan(job) / stage / job.student / f"seed{job.seed}"
    return place.with_suffix(".json")


def _unused(job: Job, k: int) -> Path:
    return _plan(job) / "unused" / str(k)


def _group(stage: str, job: Job) -> str:
    """Return the name of a job's stage in dvc.yaml, which is that of its rule."""
    return graph.rule_of(stage, job).replace("_", "-")


def _item(stage: str, job: Job) -> dict[str, Any]:
    """Return the files of one job, as its stage's template takes them."""
    files = [_plan_file(stage, job), *graph.needed(stage, job, job.paths.passed)]
    folder = job.card(stage).parent
    # The table and endpoints of scores lie in a folder that they share with others.
    outs = [job.card(stage), *graph.outputs(stage, job)] if stage == "scores" else [folder]
    return {
        "study": job.study.name,
        "target": str(graph.declared(job, graph.outputs(stage, job)[0])),
        "deps": [str(path) for path in files],
        "outs": [str(path) for path in outs],
    }


def _stage(group: str, items: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(items.values()))
    rule = group.replace("-", "_")
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


def _plan_stage(studies: list[str], unused: int) -> dict[str, Any]:
    return {
        "foreach": studies,
        "do": {
            "cmd": f"PYTHONPATH=src python -m consistency plan --study config/studies/${{item}}.yaml --unused {unused}",
            "deps": ["config/resources.yaml", "src/consistency"],
            "params": [{"config/studies/${item}.yaml": None}],
            "outs": ["results/${item}/plan"],
        },
    }


def _shown(studies: list[str]) -> str:
    """Return the part of dvc.yaml on metrics and plots."""
    reports = [f"results/{name}/report" for name in studies]
    scores = {f"{report}/scores.csv": "fd" for report in reports}
    plots: list[Any] = [
        {
            "learning curves, FD": {
                "template": "learning_curves",
                "x": "step",
                "y": scores,
                "x_label": "training iterations",
                "y_label": "Fréchet distance",
            }
        },
        {
            "learning curves, alignment": {
                "template": "learning_curves",
                "x": "step",
                "y": dict.fromkeys(scores, "alignment"),
                "x_label": "training iterations",
                "y_label": "error to the teacher's endpoint",
            }
        },
        {
            "final table": {
                "template": "final_table",
                "x": "fd",
                "y": {f"{report}/table.csv": "run" for report in reports},
                "x_label": "Fréchet distance",
                "y_label": "student",
            }
        },
        *(f"{report}/figures/curves_{measure}.png" for report in reports for measure in ("fd", "alignment")),
    ]
    content = {"metrics": [f"{report}/summary.json" for report in reports], "plots": plots}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=None)
