"""The upload to MLflow: what arrives, that nothing arrives twice, and what a person reads when it cannot arrive."""

import errno
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.addresses import LOGINS, hidden
from tests.conftest import mistake
from tests.fake_results import (
    OFFICIAL,
    SMALL,
    UNTAUGHT,
    edit_card,
    make_finished,
    make_student,
    make_study,
    read_scores,
)
from tests.processes import SOURCE, free_port
from tests.tracking.comparison import by_name, planned_points, points_of, runs_of
from tests.tracking.trainings import LAYOUT, history_of

from consistency.base.arrays import write_table
from consistency.base.errors import UserError
from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.evaluation.scores import COLUMNS
from consistency.tracking import server as tracking
from consistency.tracking.records import Record, plan
from consistency.tracking.server import tracking_uri
from consistency.tracking.upload import track_study

NAMES = {"teacher", "ctm", "ctm seed 0", "ctm seed 1", "analytic", "analytic seed 0", "analytic seed 1", "report"}


def track(study: Job) -> dict[str, Any]:
    """Upload a study. Returns what tracked.json says."""
    track_study(study)
    return read_json(study.paths.track / "tracked.json", "track")


def everything(client: Any) -> dict[str, Any]:
    """All that MLflow holds of the study, by run."""
    return {
        run.info.run_id: (run.info.run_name, run.info.status, run.data.params, run.data.tags, points_of(client, run))
        for run in runs_of(client)
    }


def planned(folder: Path, text: str) -> tuple[StudyPaths, dict[str, Record]]:
    """A finished study of that text, and what would be uploaded of it, by name."""
    job = make_finished(folder, text)
    return job.paths, {record.name: record for record in plan(job)}


@contextmanager
def killed(method: str, call: int) -> Iterator[None]:
    """Meet that call of a client's method by a Ctrl-C, within the block."""
    from mlflow import MlflowClient

    calls, original = itertools.count(1), getattr(MlflowClient, method)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, method, dies)
        yield


def artifacts(client: Any, run_id: str, folder: str = "") -> set[str]:
    found = client.list_artifacts(run_id, folder)
    below = [artifacts(client, run_id, item.path) for item in found if item.is_dir]
    return {item.path for item in found if not item.is_dir}.union(*below)


def test_a_first_upload_makes_every_run(small_project: Job, client: Any) -> None:
    tracked = track(small_project)
    runs = by_name(runs_of(client))
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


def test_params_tags_and_data_say_what_a_run_is(small_project: Job, client: Any) -> None:
    track(small_project)
    runs = by_name(runs_of(client))
    seed = runs["analytic seed 1"]
    both = {"preconditioning": "analytic", "seed": "1"}
    params = both | {"dropout": "0.0", "max_heun_steps": "8", "scores.extractor": "classifier"}
    assert both.items() <= seed.data.tags.items() and params.items() <= seed.data.params.items()
    assert runs["analytic"].data.params["seeds"] == "0, 1"
    assert {"network.kind": "mlp", "dataset.kind": "digits"}.items() <= runs["teacher"].data.params.items()
    card = read_json(LAYOUT.root / "students/analytic/seed1/card.json", "student")
    assert seed.data.tags["study_hash"] == key_of(small_project.study, "report")
    assert seed.data.tags["host"] == card["hardware"]["host"]
    # Those in which the students differ come first.
    assert next(iter(plan(small_project)[2].params)) == "preconditioning"
    facts, data = read_json(LAYOUT.dataset / "dataset.json", "dataset"), seed.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("digits", facts["sha256"][:32])
    assert json.loads(data.source) == {"uri": str((LAYOUT.dataset / "images.npy").resolve())}
    profile = json.loads(data.profile)
    assert (profile["features_shape"], profile["sha256"]) == ([192, 8, 8, 1], facts["sha256"])


def test_students_may_differ_in_sections_of_other_kinds(tmp_path: Path) -> None:
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, curriculum, predictor]").replace(
        "  gc: {coupling: gc, mu: 0.5}",
        "  gc: {coupling: gc, mu: 0.5, predictor: {run: ic}}\n  ect: {curriculum: {kind: shrinking, double_every: 20}}",
    )
    layout, uploads = planned(tmp_path, f"{text}flows: {{}}\n")
    assert uploads["ect"].tags["curriculum.double_every"] == "20"
    assert "curriculum.double_every" not in uploads["ic"].tags
    assert uploads["ic"].tags["curriculum.first"] == "10"
    assert uploads["gc"].tags["predictor.run"] == "ic" and uploads["ic"].tags["predictor"] == "average"
    assert "No teacher" in uploads["teacher"].first["mlflow.note.content"]
    assert (layout.flows, "flows") in uploads["report"].files


def test_metrics_are_the_results(small_project: Job, client: Any) -> None:
    ids = track(small_project)["runs"]
    runs = by_name(runs_of(client))
    history = history_of(small_project.of("ctm", 0))
    losses = client.get_metric_history(runs["ctm seed 0"].info.run_id, "training/dsm")
    assert [(m.step, m.value) for m in losses] == [(line["step"], line["dsm"]) for line in history]
    started = runs["ctm seed 0"].info.start_time
    assert [m.timestamp - started for m in losses] == [round(1000 * line["seconds"]) for line in history]
    rows = read_scores(LAYOUT.root / "scores/ctm/seed0.csv")
    curve = client.get_metric_history(runs["ctm seed 0"].info.run_id, "fd/nfe2")
    expected = [(int(r["step"]), float(r["fd"])) for r in rows if r["kind"] == "curve" and r["nfe"] == "2"]
    assert [(m.step, m.value) for m in curve] == expected
    final = {row["nfe"]: row for row in rows if row["kind"] == "final" and row["sampler"] == "jumps"}
    metrics = runs["ctm seed 0"].data.metrics
    assert metrics["final/alignment/nfe5"] == float(final["5"]["alignment"])
    assert "final/fd/gamma1-nfe2" in metrics and "final/alignment/gamma1-nfe2" not in metrics
    assert {"cost/seconds", "cost/network_evaluations", "cost/images"} <= metrics.keys()
    teachers = runs["teacher"].data.metrics.keys()
    assert {"training/loss", "final/fd/heun-nfe35", "calibration/kid/data-halves"} <= teachers
    assert "calibration/fd/teacher-heun-against-half" in teachers
    # A student carries the mean over its seeds.
    for key in ("fd/nfe1", "training/loss", "final/kid/nfe2", "cost/seconds"):
        mean, *seeds = (client.get_metric_history(ids[name], key) for name in ("ctm", "ctm seed 0", "ctm seed 1"))
        assert [m.step for m in mean] == [m.step for m in seeds[0]]
        assert [m.value for m in mean] == pytest.approx([(a.value + b.value) / 2 for a, b in zip(*seeds, strict=True)])


def test_artifacts_hold_the_report_the_coefficients_and_the_cards(small_project: Job, client: Any) -> None:
    ids = track(small_project)["runs"]
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


def test_a_second_upload_changes_nothing_that_a_person_has_edited_either(
    small_project: Job, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = track(small_project)
    client.set_tag(first["runs"]["ctm"], "mlflow.note.content", "look here")
    client.set_tag(first["runs"]["ctm"], "mlflow.runName", "my favourite")
    before = everything(client)
    assert track(small_project) == first
    assert everything(client) == before
    assert "all 8 runs were there already" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "call"), [("log_batch", 4), ("log_artifact", 6), ("set_terminated", 2)])
def test_a_killed_upload_is_completed_without_doubles(
    small_project: Job, client: Any, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    monkeypatch.setattr(tracking, "BATCH", 10)
    with killed(method, call):
        track(small_project)
    left = runs_of(client)
    assert [run.info.run_name for run in left if run.info.status == "RUNNING"]
    track(small_project)
    runs = runs_of(client)
    assert {run.info.run_id for run in left} <= {run.info.run_id for run in runs}
    assert sorted(run.info.run_name for run in runs) == sorted(NAMES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for upload in plan(small_project):
        run = next(run for run in runs if run.info.run_name == upload.name)
        assert points_of(client, run) == planned_points(upload)
        assert {path.name for path, _ in upload.files if path.is_file()} <= {
            name.rpartition("/")[2] for name in artifacts(client, run.info.run_id)
        }


def test_changed_results_make_new_runs_keep_the_old_and_may_come_back(small_project: Job, client: Any) -> None:
    shutil.copytree(LAYOUT.results, "aside")
    old = track(small_project)["runs"]
    kept = {name: points_of(client, client.get_run(old[name])) for name in ("ctm", "ctm seed 1")}
    make_student(small_project.of("ctm", 1), level=0.5)
    new = track(small_project)["runs"]
    assert {name for name in NAMES if new[name] != old[name]} == {"ctm", "ctm seed 1"}
    assert client.get_run(new["ctm seed 0"]).data.tags["mlflow.parentRunId"] == new["ctm"]
    assert client.get_run(new["ctm"]).data.metrics["fd/nfe1"] < client.get_run(old["ctm"]).data.metrics["fd/nfe1"]
    for name in ("ctm", "ctm seed 1"):
        run = client.get_run(old[name])
        assert (run.info.run_name, run.data.tags["state"]) == (name, "superseded")
        assert points_of(client, run) == kept[name]
        assert client.get_run(new[name]).data.tags["state"] == "current"
    assert client.get_run(old["ctm seed 1"]).data.tags["mlflow.parentRunId"] == old["ctm"]
    shutil.rmtree(LAYOUT.results)
    Path("aside").rename(LAYOUT.results)
    assert track(small_project)["runs"] == old
    run = client.get_run(old["ctm seed 1"])
    assert (run.info.run_name, run.data.tags["state"]) == ("ctm seed 1", "current")
    assert len(runs_of(client)) == len(NAMES) + 2


def test_a_killed_upload_of_older_results_does_not_run_for_ever(small_project: Job, client: Any) -> None:
    with killed("log_artifact", 1):
        track(small_project)
    edit_card(LAYOUT.teacher / "card.json", lambda card: card["outputs"].update({"teacher.safetensors": "another"}))
    track(small_project)
    assert {run.info.status for run in runs_of(client)} == {"FINISHED", "KILLED"}


def test_results_of_another_folder_are_left_alone(small_project: Job, client: Any) -> None:
    first = track(small_project)["runs"]
    other = Job(small_project.study, StudyPaths("small", Path("elsewhere")))
    shutil.copytree(LAYOUT.results, other.paths.results)
    make_student(other.of("ctm", 1), level=0.5)
    second = track(other)["runs"]
    assert second["ctm seed 1"] != first["ctm seed 1"]
    assert client.get_run(first["ctm seed 1"]).data.tags["state"] == "current"


def test_a_copied_project_records_in_its_own_folder(
    small_project: Job, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = track(small_project)["runs"]
    here = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name} copied")))
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(here)
    make_student(small_project.of("ctm", 1), level=0.5)
    new = track(small_project)["runs"]
    assert set(tmp_path.rglob("*")) == before
    copied = tracking.connect(tracking_uri())
    for run_id in {*old.values(), *new.values()}:
        assert copied.get_run(run_id).info.artifact_uri == f"{here}/mlruns/1/{run_id}/artifacts"
    assert copied.get_run(old["ctm seed 1"]).data.tags["state"] == "superseded"
    assert artifacts(copied, new["ctm seed 1"]) > {"card.json", "seed1.csv"}


def test_a_project_that_records_into_anothers_database_keeps_its_files(
    small_project: Job, client: Any, tmp_path: Path
) -> None:
    place = tmp_path.with_name(f"{tmp_path.name} other") / "mlruns/1"
    place.mkdir(parents=True)
    client.create_experiment("small", str(place))
    report = track(small_project)["runs"]["report"]
    assert client.get_run(report).info.artifact_uri == f"{place}/{report}/artifacts"


def test_no_two_studies_share_a_model(client: Any, tmp_path: Path) -> None:
    text = SMALL.replace("  ctm:", "  x-ctm:").replace("trajectory: ctm", "trajectory: x-ctm")
    jobs = [make_finished(tmp_path / "one", text), make_finished(tmp_path / "other", name="small-x")]
    models = [address.split("/")[1] for job in jobs for address in track(job)["models"].values()]
    assert len(set(models)) == 4


def test_values_that_are_not_finite_are_left_out(small_project: Job, client: Any) -> None:
    path = LAYOUT.root / "scores/ctm/seed0.csv"
    rows: list[dict[str, Any]] = list(read_scores(path))
    rows[0]["fd"], rows[1]["kid"] = "inf", "nan"
    write_table(path, rows, COLUMNS)
    ids = track(small_project)["runs"]
    for name in ("ctm seed 0", "ctm"):
        assert [m.step for m in client.get_metric_history(ids[name], "fd/nfe1")] == [20, 40, 60]


def test_an_endpoint_students_sampler_is_its_own(tmp_path: Path) -> None:
    text = SMALL.replace("analytic: {preconditioning: analytic}", "cm: {objective: endpoint, preconditioning: cm}")
    _, uploads = planned(tmp_path, "varies: [objective, preconditioning]\n" + text)
    keys = {point.key for point in uploads["cm seed 0"].points}
    assert {"fd/nfe2", "final/fd/nfe5", "alignment/nfe1"} <= keys
    assert not keys & {"alignment/nfe2", "training/dsm", "final/alignment/nfe2"}
    assert list(uploads["cm"].params)[:2] == ["objective", "preconditioning"]
    assert not any("coefficients" in folder for _, folder in uploads["report"].files)


def test_further_ema_rates_are_metrics_with_a_suffix(tmp_path: Path) -> None:
    text = SMALL.replace("steps: 60,", "steps: 60, evaluation_ema: [0.9999],")
    layout, uploads = planned(tmp_path / "rates", text)
    _, without = planned(tmp_path / "one rate", SMALL)
    values = {(point.key, point.step): point.value for point in uploads["ctm seed 0"].points}
    scores = {
        (p.key, p.step): p.value for p in without["ctm seed 0"].points if not p.key.startswith(("training/", "cost/"))
    }
    assert {key: values[key] for key in scores} == scores
    rows = [
        row for row in read_scores(layout.root / "scores/ctm/seed0.csv") if row["ema"] == "0.9999" and row["nfe"] == "2"
    ]
    assert values["final/fd/nfe2-ema0.9999", 0] == float(next(r["fd"] for r in rows if r["kind"] == "final"))
    assert values["fd/nfe2-ema0.9999", 20] == float(next(r["fd"] for r in rows if r["step"] == "20"))
    assert not any("gamma" in key and "ema" in key for key, _ in values)


def test_an_official_teacher_has_no_history_and_no_training_time(tmp_path: Path) -> None:
    _, uploads = planned(tmp_path, OFFICIAL)
    teacher = uploads["teacher"]
    assert teacher.params["checkpoint"] == "edm-cifar10-32x32-uncond-vp.pkl"
    assert teacher.params["dataset.kind"] == "digits"
    assert {"cost/parameters", "final/fd/heun-nfe35"} <= {point.key for point in teacher.points}


@pytest.mark.parametrize(
    ("missing", "verb"),
    [
        ("report/card.json", "report"),
        ("scores/ctm/seed0.csv", "scores --student ctm --seed 0"),
        ("students/analytic/seed1/history.jsonl", "student --student analytic --seed 1"),
        ("teacher/card.json", "teacher"),
    ],
)
def test_missing_results_name_the_verb(small_project: Job, missing: str, verb: str) -> None:
    (LAYOUT.root / missing).unlink()
    with pytest.raises(UserError, match=f"`python -m consistency {verb} --study FILE`"):
        track(small_project)


def test_stale_results_are_refused(small_project: Job) -> None:
    other = Job(make_study(Path("studies"), "small", SMALL.replace("batch: 16", "batch: 8")), small_project.paths)
    assert "student.batch: there 16, here 8" in mistake(track, other)


def test_a_deleted_experiment_is_not_revived_silently(small_project: Job, client: Any) -> None:
    client.delete_experiment(track(small_project)["experiment_id"])
    with pytest.raises(UserError, match="mlflow experiments restore"):
        track(small_project)


def test_a_server_that_is_down_is_one_line_soon(small_project: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(UserError, match=f"http://127.0.0.1:{port} does not answer.*results are safe") as caught:
        track(small_project)
    assert time.monotonic() - started < 30
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (LAYOUT.track / "tracked.json").exists()


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "make room on its disk and"), (errno.EACCES, "no permission")]
)
def test_what_a_disk_refuses_is_not_the_servers_fault(number: int, said: str) -> None:
    with pytest.raises(UserError, match=said), tracking.readable_errors("sqlite:///mlflow.db"):
        raise OSError(number, os.strerror(number), "a file")


POSTGRES = "postgresql://me:hunter2@127.0.0.1:1/db?x=hunter2"


@pytest.mark.parametrize("uri", ["sqlite:///broken.db", POSTGRES])
def test_an_address_mlflow_cannot_use_is_one_line(
    small_project: Job, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    Path("broken.db").write_text(
        "this is not a database, and it is long enough to be looked at " * 20, encoding="utf-8"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"cannot be used.*results are safe") as caught:
        track(small_project)
    assert "hunter2" not in str(caught.value)


def test_errors_are_cleaned_of_what_mlflow_reads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    assert tracking.without_secrets("http://me:pass@host said t0ken", "") == "http://host said ***"


@pytest.mark.parametrize("address", LOGINS)
def test_no_message_about_an_address_tells_its_secrets(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address, and one where nobody listens, by what MLflow, its database and requests say themselves."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"ftp://{address}")
    assert "is neither a server nor a database" in hidden(mistake(tracking_uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert "is neither a server nor a database" in hidden(mistake(tracking_uri))
    for scheme in ("http", "postgresql"):
        uri = f"{scheme}://{address}"

        def opened(uri: str = uri) -> None:
            with tracking.readable_errors(uri):
                tracking.connect(uri).search_experiments()

        assert re.search("cannot be used|does not answer", hidden(mistake(opened)))


def test_a_sqlite_address_is_absolute_and_others_name_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given, uri in {
        "": f"sqlite:///{tmp_path}/mlflow.db",
        "sqlite:///sub/x.db": f"sqlite:///{tmp_path}/sub/x.db",
        "sqlite:////else/where.db": "sqlite:////else/where.db",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert tracking_uri() == uri
    for given, said in {
        "sqlite://": "names no file",
        "sqlite:///:memory:": "names no file",
        "sqlite:///~/m.db": f"use sqlite:///{Path.home()}/m.db",
        "file:///tmp/nowhere": "is neither a server nor a database",
        "nonsense://me:hunter2@x": "nonsense://x is neither",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert said in mistake(tracking_uri)


def test_nothing_phones_home() -> None:
    """The shell is a person's: no sign of continuous integration, which would end telemetry by itself."""
    shell = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = "from consistency.tracking.server import connect; connect('sqlite:///mlflow.db')\n"
    command += "from mlflow.telemetry import get_telemetry_client; assert get_telemetry_client() is None"
    subprocess.run([sys.executable, "-c", command], env=shell | {"PYTHONPATH": SOURCE}, check=True)


def test_a_schema_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training may end while its thread makes the database; MLflow cannot go on with half of a schema."""
    file = tmp_path / "mlflow.db"

    def half(uri: str) -> None:
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
            database.execute("CREATE TABLE alembic_version (version_num)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mlflow.MlflowClient", half)
        tracking.connect(f"sqlite:///{file}")
    assert not file.exists()
    assert tracking.connect(f"sqlite:///{file}").search_experiments()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mlflow.db"]
