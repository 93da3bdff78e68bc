"""The upload to MLflow: what arrives, that nothing arrives twice, and what a person reads when it cannot arrive."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.fake_results import (
    SMALL,
    UNTAUGHT,
    edit_card,
    make_finished,
    make_student,
    make_study,
    read_scores,
)
from tests.tracking.comparison import planned, points_of, runs_of

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.stages.inputs import write_table
from consistency.stages.scores import COLUMNS
from consistency.study import Study
from consistency.tracking import server as tracking
from consistency.tracking.plan import Record, plan
from consistency.tracking.server import tracking_uri, without_credentials
from consistency.tracking.upload import track_study

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"teacher", "ctm", "ctm seed 0", "ctm seed 1", "analytic", "analytic seed 0", "analytic seed 1", "report"}


@dataclass
class Project:
    """A project folder with a finished study in it."""

    study: Study
    layout: Layout

    def track(self) -> dict[str, Any]:
        track_study(self.study, self.layout)
        return json.loads((self.layout.track / "tracked.json").read_text())


@pytest.fixture
def project(small_project: Study) -> Project:
    return Project(small_project, Layout(small_project.name))


@pytest.fixture
def runs(project: Project, client: Any) -> dict[str, Any]:
    """Every run of a first upload, by name."""
    project.track()
    return {run.info.run_name: run for run in runs_of(client, project.study)}


def uploads(folder: Path, text: str) -> dict[str, Record]:
    """What is planned of a finished study of that text, by run."""
    return {upload.name: upload for upload in plan(*make_finished(folder, text))}


def everything(client: Any, study: Study) -> dict[str, Any]:
    """All that MLflow holds of the study, by run."""
    return {
        run.info.run_id: (run.info.run_name, run.info.status, run.data.params, run.data.tags, points_of(client, run))
        for run in runs_of(client, study)
    }


def artifacts(client: Any, run_id: str, folder: str = "") -> set[str]:
    found = client.list_artifacts(run_id, folder)
    below = [artifacts(client, run_id, item.path) for item in found if item.is_dir]
    return {item.path for item in found if not item.is_dir}.union(*below)


def test_a_first_upload_makes_every_run(project: Project, client: Any) -> None:
    tracked = project.track()
    runs = {run.info.run_name: run for run in runs_of(client, project.study)}
    assert set(runs) == NAMES == set(tracked["runs"])
    assert {name: run.info.run_id for name, run in runs.items()} == tracked["runs"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    for student in ("ctm", "analytic"):
        assert [parents[f"{student} seed {seed}"] for seed in (0, 1)] == [tracked["runs"][student]] * 2
    assert {parents[name] for name in ("teacher", "ctm", "analytic", "report")} == {None}
    assert tracked["experiment"] == "small"
    assert tracked["experiment_id"] == runs["ctm"].info.experiment_id
    assert tracked["tracking_uri"] == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert f"/experiments/{tracked['experiment_id']}/" in tracked["url_hint"]


def test_params_and_tags_say_what_a_run_is(project: Project, runs: dict[str, Any]) -> None:
    seed = runs["analytic seed 1"]
    assert seed.data.params["preconditioning"] == seed.data.tags["preconditioning"] == "analytic"
    assert seed.data.params["seed"] == seed.data.tags["seed"] == "1"
    assert seed.data.params["dropout"] == "0.0"
    assert seed.data.params["max_heun_steps"] == "8"
    assert seed.data.params["scores.extractor"] == "classifier"
    assert runs["analytic"].data.params["seeds"] == "0, 1"
    assert runs["teacher"].data.params["network.kind"] == "mlp"
    assert runs["teacher"].data.params["dataset.kind"] == "digits"
    card = json.loads((project.layout.student("analytic", 1) / "card.json").read_text())
    assert seed.data.tags["study_hash"] == project.study.key("report")
    assert seed.data.tags["host"] == card["hardware"]["host"]
    # Those in which the students differ come first.
    assert next(iter(plan(project.study, project.layout)[2].params)) == "preconditioning"


def test_students_may_differ_in_sections_of_other_kinds(tmp_path: Path) -> None:
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, curriculum, predictor]").replace(
        "  gc: {coupling: gc, mu: 0.5}",
        "  gc: {coupling: gc, mu: 0.5, predictor: {run: ic}}\n  ect: {curriculum: {kind: shrinking, double_every: 20}}",
    )
    found = uploads(tmp_path, f"{text}flows: {{}}\n")
    assert found["ect"].tags["curriculum.double_every"] == "20"
    assert "curriculum.double_every" not in found["ic"].tags
    assert found["ic"].tags["curriculum.first"] == "10"
    assert found["gc"].tags["predictor.run"] == "ic" and found["ic"].tags["predictor"] == "average"
    assert "No teacher" in found["teacher"].first["mlflow.note.content"]
    assert (tmp_path / "results/small/flows", "flows") in found["report"].files


def test_metrics_are_the_results(project: Project, client: Any, runs: dict[str, Any]) -> None:
    history = [json.loads(x) for x in (project.layout.student("ctm", 0) / "history.jsonl").read_text().splitlines()]
    losses = client.get_metric_history(runs["ctm seed 0"].info.run_id, "training/dsm")
    assert [(m.step, m.value) for m in losses] == [(line["step"], line["dsm"]) for line in history]
    started = runs["ctm seed 0"].info.start_time
    assert [m.timestamp - started for m in losses] == [round(1000 * line["seconds"]) for line in history]
    rows = read_scores(project.layout.scores("ctm", 0))
    curve = client.get_metric_history(runs["ctm seed 0"].info.run_id, "fd/nfe2")
    expected = [(int(r["step"]), float(r["fd"])) for r in rows if r["kind"] == "curve" and r["nfe"] == "2"]
    assert [(m.step, m.value) for m in curve] == expected
    final = {row["nfe"]: row for row in rows if row["kind"] == "final" and row["sampler"] == "jumps"}
    metrics = runs["ctm seed 0"].data.metrics
    assert metrics["final/alignment/nfe5"] == float(final["5"]["alignment"])
    assert "final/fd/gamma1-nfe2" in metrics and "final/alignment/gamma1-nfe2" not in metrics
    assert {"cost/seconds", "cost/network_evaluations", "cost/images"} <= metrics.keys()
    metrics = runs["teacher"].data.metrics
    assert {"training/loss", "final/fd/heun-nfe35", "calibration/kid/data-halves"} <= metrics.keys()


def test_a_student_carries_the_mean_over_its_seeds(client: Any, runs: dict[str, Any]) -> None:
    ids = [runs[name].info.run_id for name in ("ctm", "ctm seed 0", "ctm seed 1")]
    for key in ("fd/nfe1", "training/loss", "final/kid/nfe2", "cost/seconds"):
        mean, *seeds = (client.get_metric_history(run_id, key) for run_id in ids)
        assert [m.step for m in mean] == [m.step for m in seeds[0]]
        assert [m.value for m in mean] == pytest.approx([(a.value + b.value) / 2 for a, b in zip(*seeds, strict=True)])


def test_artifacts_hold_the_report_the_coefficients_and_the_cards(project: Project, client: Any) -> None:
    ids = project.track()["runs"]
    assert artifacts(client, ids["report"]) == {
        "report.html",
        "summary.json",
        "final.csv",
        "card.json",
        "figures/curves.svg",
        "coefficients/coefficients.npz",
        "coefficients/card.json",
        "dataset/dataset.json",
        "extractor/card.json",
        "dataset/card.json",
    }
    common = {"card.json", "history.jsonl", "samples/card.json"}
    assert artifacts(client, ids["ctm seed 0"]) > common | {"seed0.csv"}  # and its model
    assert artifacts(client, ids["ctm seed 1"]) == common | {"seed1.csv"}
    assert artifacts(client, ids["teacher"]) == common | {"calibration.csv"}
    assert client.get_run(ids["ctm"]).info.artifact_uri.startswith(str(Path.cwd() / "mlruns"))


def test_the_dataset_is_named_by_its_digest(project: Project, runs: dict[str, Any]) -> None:
    facts = json.loads((project.layout.dataset / "dataset.json").read_text())
    data = runs["ctm seed 0"].inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("digits", facts["sha256"][:32])
    assert json.loads(data.source) == {"uri": str((project.layout.dataset / "images.npy").resolve())}
    profile = json.loads(data.profile)
    assert (profile["features_shape"], profile["sha256"]) == ([192, 8, 8, 1], facts["sha256"])


def test_a_second_upload_changes_nothing(project: Project, client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = project.track()
    before = everything(client, project.study)
    assert project.track() == first
    assert everything(client, project.study) == before
    assert "all 8 runs were there already" in capsys.readouterr().out


def test_a_persons_edits_are_kept(project: Project, client: Any) -> None:
    ids = project.track()["runs"]
    client.set_tag(ids["ctm"], "mlflow.note.content", "look here")
    client.set_tag(ids["ctm"], "mlflow.runName", "my favourite")
    project.track()
    run = client.get_run(ids["ctm"])
    assert (run.data.tags["mlflow.note.content"], run.info.run_name) == ("look here", "my favourite")


@pytest.mark.parametrize(("method", "call"), [("log_batch", 4), ("log_artifact", 6), ("set_terminated", 2)])
def test_a_killed_upload_is_completed_without_doubles(
    project: Project, client: Any, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "BATCH", 10)
    calls, original = [0], getattr(MlflowClient, method)

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, method, dies)
        project.track()
    left = runs_of(client, project.study)
    assert [run.info.run_name for run in left if run.info.status == "RUNNING"]
    project.track()
    runs = runs_of(client, project.study)
    assert {run.info.run_id for run in left} <= {run.info.run_id for run in runs}
    assert sorted(run.info.run_name for run in runs) == sorted(NAMES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for upload in plan(project.study, project.layout):
        run = next(run for run in runs if run.info.run_name == upload.name)
        assert points_of(client, run) == planned(upload)
        assert {path.name for path, _ in upload.files if path.is_file()} <= {
            name.rpartition("/")[2] for name in artifacts(client, run.info.run_id)
        }


def test_changed_results_make_new_runs_and_keep_the_old(project: Project, client: Any) -> None:
    old = project.track()["runs"]
    kept = {name: points_of(client, client.get_run(old[name])) for name in ("ctm", "ctm seed 1")}
    make_student(project.study, project.layout, "ctm", 1, level=0.5)
    new = project.track()["runs"]
    assert {name for name in NAMES if new[name] != old[name]} == {"ctm", "ctm seed 1"}
    assert client.get_run(new["ctm seed 0"]).data.tags["mlflow.parentRunId"] == new["ctm"]
    assert client.get_run(new["ctm"]).data.metrics["fd/nfe1"] < client.get_run(old["ctm"]).data.metrics["fd/nfe1"]
    for name in ("ctm", "ctm seed 1"):
        run = client.get_run(old[name])
        assert (run.info.run_name, run.data.tags["state"]) == (name, "superseded")
        assert points_of(client, run) == kept[name]
        assert client.get_run(new[name]).data.tags["state"] == "current"
    assert client.get_run(old["ctm seed 1"]).data.tags["mlflow.parentRunId"] == old["ctm"]


def test_results_that_come_back_are_current_again(project: Project, client: Any) -> None:
    folder, aside = project.layout.results, Path("aside")
    shutil.copytree(folder, aside)
    first = project.track()["runs"]
    make_student(project.study, project.layout, "ctm", 1, level=0.5)
    project.track()
    shutil.rmtree(folder)
    aside.rename(folder)
    assert project.track()["runs"] == first
    run = client.get_run(first["ctm seed 1"])
    assert (run.info.run_name, run.data.tags["state"]) == ("ctm seed 1", "current")
    assert len(runs_of(client, project.study)) == len(NAMES) + 2


def test_a_killed_upload_of_older_results_does_not_run_for_ever(
    project: Project, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "log_artifact", dies)
        project.track()
    edit_card(project.layout.card("teacher"), lambda card: card["outputs"].update({"teacher.safetensors": "another"}))
    project.track()
    assert {run.info.status for run in runs_of(client, project.study)} == {"FINISHED", "KILLED"}


def test_results_of_another_folder_are_left_alone(project: Project, client: Any) -> None:
    first = project.track()["runs"]
    other = Layout(project.study.name, Path("elsewhere"))
    shutil.copytree(project.layout.results, other.results)
    make_student(project.study, other, "ctm", 1, level=0.5)
    second = Project(project.study, other).track()["runs"]
    assert second["ctm seed 1"] != first["ctm seed 1"]
    assert client.get_run(first["ctm seed 1"]).data.tags["state"] == "current"


def test_values_that_are_not_finite_are_left_out(project: Project, client: Any) -> None:
    path = project.layout.scores("ctm", 0)
    rows: list[dict[str, Any]] = list(read_scores(path))
    rows[0]["fd"], rows[1]["kid"] = "inf", "nan"
    write_table(path, rows, COLUMNS)
    ids = project.track()["runs"]
    for name in ("ctm seed 0", "ctm"):
        assert [m.step for m in client.get_metric_history(ids[name], "fd/nfe1")] == [20, 40, 60]


def test_an_endpoint_students_sampler_is_its_own(tmp_path: Path) -> None:
    text = SMALL.replace("analytic: {preconditioning: analytic}", "cm: {objective: endpoint, preconditioning: cm}")
    found = uploads(tmp_path, "varies: [objective, preconditioning]\n" + text)
    keys = {point.key for point in found["cm seed 0"].points}
    assert {"fd/nfe2", "final/fd/nfe5", "alignment/nfe1"} <= keys
    assert not keys & {"alignment/nfe2", "training/dsm", "final/alignment/nfe2"}
    assert list(found["cm"].params)[:2] == ["objective", "preconditioning"]
    assert not any("coefficients" in folder for _, folder in found["report"].files)


def test_further_ema_rates_are_metrics_with_a_suffix(project: Project) -> None:
    study, layout = make_finished(Path("other"), SMALL.replace("steps: 60,", "steps: 60, evaluation_ema: [0.9999],"))
    several, alone = (
        next(upload for upload in plan(*made) if upload.name == "ctm seed 0")
        for made in ((study, layout), (project.study, project.layout))
    )
    values = {(point.key, point.step): point.value for point in several.points}
    scores = {(p.key, p.step): p.value for p in alone.points if not p.key.startswith(("training/", "cost/"))}
    assert {key: values[key] for key in scores} == scores
    rows = [row for row in read_scores(layout.scores("ctm", 0)) if row["ema"] == "0.9999" and row["nfe"] == "2"]
    assert values["final/fd/nfe2-ema0.9999", 0] == float(next(r["fd"] for r in rows if r["kind"] == "final"))
    assert values["fd/nfe2-ema0.9999", 20] == float(next(r["fd"] for r in rows if r["step"] == "20"))
    assert not any("gamma" in key and "ema" in key for key, _ in values)


def test_an_official_teacher_has_no_history_and_no_training_time(tmp_path: Path) -> None:
    text = SMALL.replace("{sigma_data: measured}", "{sigma_data: 0.5}").replace(
        "{kind: trained, network: {kind: mlp, width: 32, depth: 2}, steps: 400, batch: 32, log_every: 100}",
        "{kind: edm, checkpoint: edm-cifar10-32x32-uncond-vp.pkl}",
    )
    teacher = uploads(tmp_path, text)["teacher"]
    assert teacher.params["checkpoint"] == "edm-cifar10-32x32-uncond-vp.pkl"
    assert teacher.params["dataset.kind"] == "digits"
    assert {"cost/parameters", "final/fd/heun-nfe35"} <= {point.key for point in teacher.points}


@pytest.mark.parametrize(
    ("missing", "verb"),
    [
        ("report/card.json", "report"),
        ("scores/ctm/seed0.csv", "scores --run ctm --seed 0"),
        ("students/analytic/seed1/history.jsonl", "student --run analytic --seed 1"),
        ("teacher/card.json", "teacher"),
    ],
)
def test_missing_results_name_the_verb(project: Project, missing: str, verb: str) -> None:
    (project.layout.root / missing).unlink()
    with pytest.raises(UserError, match=f"`python -m consistency {verb}`"):
        project.track()


def test_stale_results_are_refused(project: Project) -> None:
    longer = make_study(Path("studies"), "small", SMALL.replace("batch: 16", "batch: 8"))
    with pytest.raises(UserError, match=r"student\.batch: there 16, here 8"):
        track_study(longer, project.layout)


def test_a_deleted_experiment_is_not_revived_silently(project: Project, client: Any) -> None:
    client.delete_experiment(project.track()["experiment_id"])
    with pytest.raises(UserError, match="mlflow experiments restore"):
        project.track()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://me:hunter2@127.0.0.1:1", "http://127.0.0.1:1 does not answer"),
        ("file:///tmp/nowhere", "cannot be used"),
        ("nonsense://x", "cannot be used"),
        ("postgresql://me:hunter2@127.0.0.1:1/db?x=hunter2", "cannot be used"),
        ("", r"mlflow\.db cannot be used"),
    ],
)
def test_a_server_that_is_down_or_none_is_one_line_soon(
    project: Project, monkeypatch: pytest.MonkeyPatch, uri: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Path("mlflow.db").write_text("this is not a database, and it is long enough to be looked at " * 20)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{said}.*results are safe") as caught:
        project.track()
    assert time.monotonic() - started < 30
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (project.layout.track / "tracked.json").exists()


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://me:pass@host:5000/base", "http://host:5000/base"),
        ("https://me:p#a/s@s@host", "https://host"),
        ("postgresql://me:pass@host/db?password=pass", "postgresql://host/db"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_credentials_are_taken_out(uri: str, clean: str) -> None:
    assert without_credentials(uri) == clean


def test_errors_are_cleaned_of_credentials() -> None:
    text = "API request to http://me:p%40ss@host/api failed; password p@ss"
    assert (
        tracking.without_secrets(text, "http://me:p%40ss@host")
        == "API request to http://***host/api failed; password ***"
    )


def test_a_sqlite_address_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/sub/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////else/where.db")
    assert tracking_uri() == "sqlite:////else/where.db"
    for nowhere in ("sqlite://", "sqlite:///:memory:"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
        with pytest.raises(UserError, match="names no file"):
            tracking_uri()


def test_another_upload_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    with (
        tracking.one_at_a_time("http://host", tmp_path, 0),
        pytest.raises(UserError, match=r"another process \(pid .*\) uploads to MLflow"),
        tracking.one_at_a_time("http://host", tmp_path, 0.3),
    ):
        pass


def test_nothing_phones_home() -> None:
    """As in a person's shell: no sign of continuous integration, which would end telemetry by itself."""
    shell = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = "from consistency.tracking.server import connect; connect('sqlite:///mlflow.db')\n"
    command += "from mlflow.telemetry import get_telemetry_client; assert get_telemetry_client() is None"
    subprocess.run([sys.executable, "-c", command], env=shell | {"PYTHONPATH": str(ROOT / "src")}, check=True)
