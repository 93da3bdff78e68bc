"""A finished study as runs in MLflow, for browsing. The files under results/ remain authoritative.

One experiment per study: a run `teacher`, one run per student (the mean over its seeds) with a nested run per seed, and
a run `report`. The digests in its results' cards identify a run, so the same results are sent once, however often and
from wherever this is called. A run created during its training is completed, not created again.
"""

from typing import Any

from consistency.base.files import write_json
from consistency.config.job import Job
from consistency.tracking import server
from consistency.tracking.records import TRAINING, Record, plan
from consistency.tracking.registry import register_students


def track_study(job: Job) -> None:
    """Upload the finished study to MLFLOW_TRACKING_URI (default: mlflow.db here), register its students as models, and
    write tracked.json.

    A repeated call uploads only new results, and completes interrupted uploads; runs of older results are kept and
    marked superseded. Raises UserError when results are missing or stale, or the server cannot be used.
    """
    study, paths, records = job.study, job.paths, plan(job)
    uri = server.tracking_uri()
    ids: dict[str, str] = {}
    new = 0
    with server.one_at_a_time(uri, paths.track), server.readable_errors(uri):
        client = server.connect(uri)
        experiment = server.open_experiment(client, study.name, study.title)
        known = server.find_runs(client, experiment)
        for record in records:
            tags = server.tags_of(record, job, ids[record.parent] if record.parent else None, "current")
            ids[record.name], sent = _send(client, experiment, known, record, tags | {server.DIGEST: record.digest})
            new += sent
        _supersede(client, known, set(ids.values()), str(paths.root.resolve()))
        models = register_students(client, job, ids)
    clean = server.without_credentials(uri)
    page = server.charts(experiment)
    hint = (
        f"{clean.rstrip('/')}/{page}" if clean.startswith("http") else f"`make ui`, then http://127.0.0.1:5000/{page}"
    )
    content = {"tracking_uri": clean, "experiment": study.name, "experiment_id": experiment, "models": models}
    write_json(paths.track / "tracked.json", content | {"runs": ids, "url_hint": hint})
    done = f"{new} of {len(ids)} runs uploaded" if new else f"all {len(ids)} runs were there already"
    print(f"track {study.name}: {done}; see {hint}", flush=True)


def _send(client: Any, experiment: str, known: list[Any], record: Record, tags: dict[str, str]) -> tuple[str, bool]:
    """Bring one run up to its record. Returns its id, and whether anything but tags had to be sent."""
    run = _find(known, tags) or server.create_run(client, experiment, record, tags)
    run_id: str = run.info.run_id
    if run.info.status == "FINISHED" and run.data.tags[server.STATE] != "live":
        server.set_tags(client, run, tags)
        return run_id, False
    client.update_run(run_id, status="RUNNING")  # whatever its training reported
    server.set_tags(client, run, tags)
    server.describe(client, run, record)
    server.send_points(client, run_id, record.points, server.points_there(client, run))
    for path, folder in record.files:
        if not path.exists():  # `dvc pull` of a part
            continue
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(run_id, str(path), folder or None)
    client.set_terminated(run_id, "FINISHED", record.ended)
    return run_id, True


def _find(known: list[Any], tags: dict[str, str]) -> Any | None:
    """Return the run that holds these results, in whole or in part, else the one created during their training."""
    trained = {server.STATE: "live", TRAINING: tags.get(TRAINING)}
    for wanted in ({server.DIGEST: tags[server.DIGEST]}, trained):
        for run in known:
            if all(run.data.tags.get(name) == value for name, value in wanted.items()):
                return run
    return None


def _supersede(client: Any, known: list[Any], current: set[str], folder: str) -> None:
    """Mark this folder's runs of older results as superseded. They are the user's, so they are kept."""
    for run in known:
        run_id, tags = run.info.run_id, run.data.tags
        if tags.get(server.FOLDER) != folder or run_id in current or tags.get(server.STATE) == "superseded":
            continue
        client.set_tag(run_id, server.STATE, "superseded")
        if run.info.status in ("RUNNING", "SCHEDULED"):  # its upload or its training was killed
            client.set_terminated(run_id, "KILLED")
