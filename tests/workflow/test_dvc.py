"""The tiny study under DVC, in real clones with real remotes: what runs, what does not, and what is never lost."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer
from tests.workflow.checkout import Checkout
from tests.workflow.dvc_repo import JOBS, PLAN, Repo
from tests.workflow.miniatures import Site

from consistency.config.reading import load_study

pytestmark = pytest.mark.slow

REPORT = "report@tiny"
CTM = {"student@tiny-ctm-0", "samples@tiny-ctm-0", "scores@tiny-ctm-0"}
STUDY = "config/studies/tiny.yaml"
SUMMARY = "results/tiny/report/summary.json"


@pytest.fixture(scope="module")
def reproduced(finished: Checkout, home: Path) -> Repo:
    """(a) A clone in which `dvc repro` ran, its dvc.lock committed, all pushed to a remote in a folder."""
    clone = Repo(finished.path).copy(home / "clone")
    clone.dvc("remote", "add", "--default", "folder", str(home / "remote"))
    clone.commit("a remote")
    clone.dvc("push", "--run-cache")
    return clone


@pytest.fixture(scope="module")
def changed(reproduced: Repo, home: Path) -> Repo:
    """(c) The same where a branch changed one student, and ran."""
    repo = reproduced.copy(home / "changed")
    repo.git("checkout", "--quiet", "-b", "faster")
    repo.set({"students.ctm.learning_rate": 0.02})
    assert repo.repro() == CTM | {REPORT, PLAN}
    repo.commit("ctm learns faster")
    return repo


@pytest.fixture(scope="module")
def experiment(changed: Repo, home: Path) -> Repo:
    """The same again, on main, where an experiment changed one key of the report."""
    repo = changed.copy(home / "experiment")
    repo.git("checkout", "--quiet", "main")
    repo.dvc("checkout")
    study = repo.path / STUDY
    study.write_text(f"# A remark.\n{study.read_text()}")
    repo.commit("a remark")
    repo.dvc("exp", "run", "--name", "more", "--set-param", f"{STUDY}:report.grid_nfe=[1]")
    return repo


@pytest.fixture
def repo(reproduced: Repo, tmp_path: Path) -> Repo:
    """A reproduced clone of one's own."""
    return reproduced.copy(tmp_path / "repo")


def test_dvc_takes_note_of_what_snakemake_made(repo: Repo) -> None:
    before = repo.locked()
    (repo.path / "dvc.lock").unlink()
    shutil.rmtree(repo.path / "results/tiny/plan")
    repo.run("python", "-m", "consistency", "plan", "--study", STUDY, "--unused", "1")
    repo.dvc("commit", "--force")
    assert repo.changed() == set()
    # In another order, perhaps.
    assert repo.locked() == before


def test_metrics_are_the_scores(reproduced: Repo) -> None:
    shown = json.loads(reproduced.dvc("metrics", "show", "--json"))[""]["data"][SUMMARY]["data"]
    assert shown == json.loads((reproduced.path / SUMMARY).read_text())
    assert shown["final"]["ctm"]["jumps nfe1"]["fd"] > 0


def test_metrics_diff_shows_the_changed_student_alone(changed: Repo) -> None:
    found = json.loads(changed.dvc("metrics", "diff", "main", "--json"))[SUMMARY]
    assert {key.split(".")[1] for key in found if key.startswith("final.")} == {"ctm"}
    assert abs(found["final.ctm.jumps nfe1.fd"]["diff"]) > 1e-4


def test_plots_show_curves_and_table_of_both_versions(changed: Repo) -> None:
    plots = json.loads(changed.dvc("plots", "diff", "main", "workspace", "--json"))["data"]
    assert {"learning curves, FD", "learning curves, alignment", "final table"} <= set(plots)
    for name, kinds in {"learning curves, FD": {"curve"}, "final table": set()}.items():
        (plot,) = plots[name]
        rows = plot["content"]["data"]["values"]
        assert {row["rev"] for row in rows} == {"main", "workspace"}
        assert {"ctm", "analytic"} <= {row["run"] for row in rows}
        assert kinds <= {row.get("kind") for row in rows}
    pictures = [plot for plot in plots if plot.endswith(".png")]
    assert {Path(picture).name for picture in pictures} == {"curves_fd.png", "curves_alignment.png"}


def test_plots_make_a_page(reproduced: Repo, tmp_path: Path) -> None:
    reproduced.dvc("plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots/index.html").read_text()
    for words in ("learning curves, FD", "final table", "curves_fd.png", "training iterations"):
        assert words in page


def test_a_comment_runs_nothing(repo: Repo) -> None:
    loop = repo.path / "src/consistency/training/loop.py"
    loop.write_text(f"# A comment.\n{loop.read_text()}")
    assert repo.repro() == {PLAN}
    assert repo.changed() == set()
    assert repo.checkout.planned() == set()


def test_a_change_of_the_students_training_runs_the_students(repo: Repo) -> None:
    file = repo.path / "src/consistency/training/trajectory.py"
    file.write_text(re.sub(r"class Trajectory\b.*:\n", r"\g<0>    changed = True\n", file.read_text()))
    assert repo.repro(PLAN) == {PLAN}
    assert repo.changed() == {"student@tiny-ctm-0", "student@tiny-analytic-0"}
    planned = repo.checkout.planned()
    students = {f"{stage} {run}" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")}
    assert planned == students | {"report", "track"}


def test_an_older_commit_recomputes_nothing(changed: Repo, tmp_path: Path) -> None:
    repo = changed.copy(tmp_path / "repo")
    repo.git("checkout", "--quiet", "main")
    repo.dvc("checkout")
    assert repo.repro() == set()
    assert repo.git("status", "--short") == ""


def test_a_fresh_clone_pulls_the_report(reproduced: Repo, tmp_path: Path) -> None:
    clone = reproduced.clone(tmp_path / "clone")
    clone.dvc("pull")
    report = "results/tiny/report/report.html"
    assert (clone.path / report).read_bytes() == (reproduced.path / report).read_bytes()
    assert clone.changed() == set()
    clone.checkout.done(report, "--touch", "--forceall")
    assert clone.checkout.planned() == {"track"}


def test_a_remote_may_lie_in_s3(reproduced: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "someone", "aws_secret_access_key": "very-secret"}
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="studies")
        for repo in (reproduced.copy(tmp_path / "pusher"), reproduced.clone(tmp_path / "puller")):
            repo.dvc("remote", "add", "s3", "s3://studies/tiny")
            repo.dvc("remote", "modify", "s3", "endpointurl", address)
            for name, value in {**keys, "region": "us-east-1"}.items():
                local = name.removeprefix("aws_") if name != "region" else name
                repo.dvc("remote", "modify", "--local", "s3", local, value)
            repo.dvc("push" if repo.path.name == "pusher" else "pull", "--remote", "s3", REPORT)
        report = "results/tiny/report/report.html"
        assert (repo.path / report).read_bytes() == (reproduced.path / report).read_bytes()
        # What git would commit knows the address and no secret.
        assert "endpointurl" in repo.git("diff") and "very-secret" not in repo.git("diff")
        assert repo.git("status", "--short").split() == ["M", ".dvc/config"]
    finally:
        server.stop()


def test_a_killed_stage_goes_on_and_leaves_the_cache_sound(repo: Repo) -> None:
    student = "student@tiny-ctm-0"
    repo.set({"student.steps": 200, "student.snapshot_every": 100, "student.log_every": 20})
    before = repo.locked()[student]

    def stopped(until: int, how: Callable[[subprocess.Popen[str]], None]) -> None:
        run = repo.start("dvc", "repro", student)
        repo.checkout.reaches(run, until)
        how(run)
        repo.checkout.ends(run)
        assert repo.unsound() == []
        assert repo.locked()[student] == before
        assert student in repo.changed()

    stopped(40, lambda run: os.killpg(run.pid, signal.SIGINT))
    stopped(100, lambda run: os.killpg(run.pid, signal.SIGKILL))
    assert repo.repro(student) == {student}
    assert "student ctm seed 0: continues from step" in (repo.path / "logs/tiny/student/ctm-seed0.log").read_text()
    assert repo.unsound() == []
    assert {out["path"] for out in repo.locked()[student]["outs"]} == {"results/tiny/students/ctm/seed0"}
    assert repo.locked()[student] != before


def test_an_experiment_changes_one_key_and_keeps_the_file_readable(experiment: Repo) -> None:
    assert set(re.findall(r"Running stage '(\S+)':", experiment.output)) == {PLAN, REPORT}
    study = experiment.path / STUDY
    assert study.read_text().startswith("# A remark.\n")
    assert load_study(study).report.grid_nfe == [1]
    assert "more" in experiment.dvc("exp", "list")
    shown = json.loads(experiment.dvc("params", "diff", "--json"))[STUDY]
    assert shown == {"report.grid_nfe": {"old": "[1, 2]", "new": "[1]"}}


def test_two_branches_merge_into_a_valid_lock_and_only_the_report_runs(experiment: Repo, tmp_path: Path) -> None:
    repo = experiment.copy(tmp_path / "repo")
    repo.commit("another grid")
    ours = repo.locked()

    said = repo.git("merge", "faster", code=1)
    assert re.findall(r"CONFLICT .*: Merge conflict in (\S+)", said) == ["dvc.lock"]
    assert repo.locked() == ours  # valid, until it is made anew
    # The other's student, its samples and its scores come from the run cache.
    assert repo.repro() == {PLAN, REPORT}
    assert set(re.findall(r"Stage '(\S+)' is cached", repo.output)) >= CTM
    repo.commit("merged")
    theirs = yaml.safe_load(repo.git("show", "faster:dvc.lock"))["stages"]
    assert {stage: repo.locked()[stage] for stage in CTM} == {stage: theirs[stage] for stage in CTM}
    assert repo.changed() == set()


def test_a_teacher_is_imported_by_its_digest(repo: Repo, site: Site, tmp_path: Path) -> None:
    name, content = "edm-cifar10-32x32-uncond-vp.pkl", b"a checkpoint"
    (site.folder / name).write_bytes(content)
    registry = repo.path / "config/resources.yaml"
    entries = yaml.safe_load(registry.read_text())
    entries[name] |= {"url": f"{site.url}/{name}", "sha256": hashlib.sha256(content).hexdigest()}
    registry.write_text(yaml.safe_dump(entries))
    repo.dvc("import-url", f"{site.url}/{name}", f"resources/{name}")
    repo.commit("a teacher")
    assert f"resources/{name}.dvc" in repo.git("ls-files")
    repo.dvc("push", f"resources/{name}")
    assert "is there already" in repo.run("python", "-m", "consistency", "fetch", name)

    (site.folder / name).unlink()
    clone = repo.clone(tmp_path / "clone")
    clone.dvc("pull", f"resources/{name}")
    assert "is there already" in clone.run("python", "-m", "consistency", "fetch", name)
    (clone.path / "resources" / name).unlink()
    (clone.path / "resources" / name).write_bytes(b"something else")
    assert f"modified:           resources/{name}" in clone.dvc("status", f"resources/{name}.dvc")


def test_another_study_is_one_command(repo: Repo) -> None:
    repo.set({"students": {"bcm": {"preconditioning": "bcm"}}, "report.baseline": {}}, "mine")
    stages = re.findall(r"(?m)^\S+", repo.dvc("stage", "list"))
    assert "student@mine-bcm-0" in stages and not [stage for stage in stages if "tiny" in stage]
    # The lock keeps what is known of the first.
    assert repo.repro("plan@mine") == {"plan@mine"}
    assert set(repo.locked()) > JOBS
