"""The pipeline of DVC: what it compares changes with exactly the jobs that depend on a key, and dvc.yaml is in step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import Changes, changed, mistake
from tests.processes import ROOT, run_python

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study, load_study
from consistency.config.study import Study
from consistency.provenance import graph
from consistency.provenance.dvc import pipeline, write_plan

STUDIES = sorted(path.stem for path in (ROOT / "config/studies").glob("*.yaml"))
ANALYTIC = {f"{stage}/analytic/seed0" for stage in ("student", "samples", "scores")}
Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Write the plan of the tiny study with changes, in a folder with its dvc.yaml. Returns what is written, by job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/resources.yaml").symlink_to(ROOT / "config/resources.yaml")
    (tmp_path / "config/studies").mkdir()

    def write(changes: Changes | None = None) -> dict[str, Any]:
        content = changed(changes or {})
        Path("config/studies/tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        Path("dvc.yaml").write_text(pipeline(["tiny"]), encoding="utf-8")
        paths = StudyPaths("tiny")
        write_plan(Job(build_study(content), paths), unused=2)
        folder = paths.root / "plan"
        files = folder.rglob("*.json")
        return {str(path.relative_to(folder).with_suffix("")): json.loads(path.read_text()) for path in files}

    return write


def changed_jobs(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {job for job in before if before[job] != after.get(job)}


@pytest.mark.parametrize(
    ("key", "value", "jobs"),
    [
        ("sampling.batch", 32, set()),
        (
            "sampling.labels",
            "balanced",
            {"samples", "scores", "report"}
            | {f"{stage}/{run}/seed0" for stage in ("samples", "scores") for run in ("ctm", "analytic")},
        ),
        ("coefficients.probes", 2, {"coefficients", "report"} | ANALYTIC),
        ("scores.classifier.steps", 21, {"extractor", "scores", "scores/ctm/seed0", "scores/analytic/seed0", "report"}),
        ("calibration.steps", 5, {"samples", "scores", "report"}),
    ],
)
def test_a_key_changes_the_jobs_that_depend_on_it(plan: Plan, key: str, value: Any, jobs: set[str]) -> None:
    assert changed_jobs(plan(), plan({key: value})) == jobs


def test_two_jobs_of_one_name_are_refused(plan: Plan) -> None:
    plan({"students.x-ctm": {"preconditioning": "ctm"}})
    Path("config/studies/tiny-x.yaml").write_text(yaml.safe_dump(changed({"name": "tiny-x"})), encoding="utf-8")
    assert "student@tiny-x-ctm-0" in mistake(pipeline, ["tiny", "tiny-x"])


def test_another_seed_keeps_the_first_and_leaves_no_file_behind(plan: Plan) -> None:
    before, after = plan(), plan({"seeds": [0, 1]})
    assert changed_jobs(before, after) == {"report"}
    assert {job for job in after if job not in before} == {
        f"{stage}/{run}/seed1" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")
    }
    assert plan() == before


def test_what_a_study_does_not_ask_for_has_no_job(plan: Plan, untaught: Changes) -> None:
    assert {"coefficients", "flows"} & plan(untaught).keys() == set()
    assert "flows" in plan(untaught | {"flows": {}})


def test_flows_are_a_job_that_depends_on_the_students(plan: Plan, couplings: Changes) -> None:
    study = couplings | {"flows": {}}
    before = plan(study)
    assert changed_jobs(before, plan(study | {"flows.times": 12})) == {"flows", "report"}
    assert "flows" in changed_jobs(before, plan(study | {"student.learning_rate": 0.01}))


def test_a_pipeline_of_other_students_is_refused_with_the_command_that_writes_it(plan: Plan) -> None:
    plan({"seeds": [0, 1]})
    Path("config/studies/tiny.yaml").write_text(yaml.safe_dump(changed({})), encoding="utf-8")
    job = Job(load_study("config/studies/tiny.yaml"), StudyPaths("tiny"))
    with pytest.raises(UserError, match=r"does not match study tiny: run `python -m consistency dvc tiny > dvc.yaml`"):
        write_plan(job)
    Path("dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"no dvc\.yaml here"):
        write_plan(job)


def test_the_committed_pipeline_is_that_of_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: python -m consistency dvc digits > dvc.yaml."""
    monkeypatch.chdir(ROOT)
    assert (ROOT / "dvc.yaml").read_text() == pipeline(["digits"])


def jobs_of(study: Study, gate: str) -> dict[str, tuple[set[str], set[str]]]:
    """The needed and the written files of each job as the graph says them, by a written file."""
    found = {}
    sign = StudyPaths(study.name).root / "scores" / gate
    for stage, each in graph.artifacts(Job(study, StudyPaths(study.name))).values():
        written = {str(graph.declared(each, path)) for path in graph.outputs(stage, each)}
        found[min(written)] = ({str(path) for path in graph.needed(stage, each, sign)}, written)
    return found


def resolved(text: str) -> list[tuple[set[str], set[str]]]:
    """The dependencies and outputs of each stage of a dvc.yaml, as DVC's templates give them, without the plan."""
    stages = yaml.safe_load(text)["stages"]
    items = [item for name, stage in stages.items() if name != "plan" for item in stage["foreach"].values()]
    return [({path for path in item["deps"] if "/plan/" not in path}, set(item["outs"])) for item in items]


@pytest.mark.parametrize("name", STUDIES)
def test_dvc_has_the_graph_of_every_study(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = resolved(pipeline([name]))
    expected = jobs_of(load_study(f"config/studies/{name}.yaml"), "calibration.passed")
    assert len(found) == len(expected)
    for needed, written in expected.values():
        (outs,) = [outs for deps, outs in found if deps == needed and all(_within(path, outs) for path in written)][:1]
        assert outs


def _within(path: str, outs: set[str]) -> bool:
    return any(Path(path).is_relative_to(out) for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_snakemake_has_the_graph_of_every_study(name: str, tmp_path: Path) -> None:
    """Its own summary of a dry run says so."""
    for file in ("Snakefile", "workflow", "config", "src", "profiles"):
        (tmp_path / file).symlink_to(ROOT / file)
    words = ["-n", "--cores", "1", "--printshellcmds", "--config", f"studies={name}"]
    done = run_python("-m", "snakemake", *words, folder=tmp_path)
    blocks = [block for block in (done.stdout + done.stderr).split("\n\n") if "    output: " in block]
    found = {}
    for block in blocks:
        fields = dict(line.strip().split(": ", 1) for line in block.splitlines() if ": " in line)
        read = {path for path in fields.get("input", "").split(", ") if path.startswith("results/")}
        written = {path for path in fields["output"].split(", ") if path.startswith("results/")}
        found[frozenset(written)] = read
    for needed, written in jobs_of(load_study(ROOT / f"config/studies/{name}.yaml"), "calibration.csv").values():
        if "report" in min(written):
            continue
        read = [read for outputs, read in found.items() if min(written) in outputs]
        assert read == [needed], min(written)
