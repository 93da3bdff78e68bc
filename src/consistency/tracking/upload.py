"""Upload of a finished study to MLflow, for browsing. The files under results/ remain authoritative.

One experiment per study: a run `teacher`, one run per student (the mean over its seeds) with a nested run per seed, and
a run `report`. The digests in the cards of its results identify a run, so the same results are uploaded once, from any
machine. A run created during its training is completed, not created again.
"""

from typing import Any

from consistency.base.files import write_json
from consistency.base.urls import masked
from consistency.config.job import Job
from consistency.tracking import server
from consistency.tracking.records import TRAINING, Record, plan
from consistency.tracking.registry import register_students


def track_study(job: Job) -> None:
    """Upload the study to MLFLOW_TRACKING_URI (default: mlflow.db here), register its students as models, and write
    tracked.json.

    A repeated call uploads new results and completes interrupted uploads; runs of older results are kept and marked
    superseded. Raises UserError if results are missing or stale, or the server cannot be used.
    """
    study, paths, records = job.study, job.paths, plan(job)
    uri = server.tracking_uri()
    ids: dict[str, str] = {}
    new = 0
    with server.session(job, uri) as (client, experiment):
        known = server.find_runs(client, experiment)
        for record in records:
            tags = server.tags_of(record, job, ids[record.parent] if record.parent else None, "current")
            ids[record.name], sent = _send(client, experiment, known, record, tags | {server.DIGEST: record.digest})
            new += sent
        _supersede(client, known, set(ids.values()), str(paths.root.resolve()))
        models = register_students(client, job, ids)
    clean = masked(uri)
    address = clean.rstrip("/") if clean.startswith("http") else "`make ui`, then http://127.0.0.1:5000"
    hint = f"{address}/{server.charts(experiment)}"
    content = {"tracking_uri": clean, "experiment": study.name, "experiment_id": experiment, "models": models}
    write_json(paths.track / "tracked.json", content | {"runs": ids, "url_hint": hint})
    done = f"{new} of {len(ids)} runs uploaded" if new else f"all {len(ids)} runs were there already"
    print(f"track {study.name}: {done}; see {hint}", flush=True)


def _send(client: Any, experiment: str, known: list[Any], record: Record, tags: dict[str, str]) -> tuple[str, bool]:
    """Update one run to its record. Returns its id, and False if only tags had to be sent."""
    run = _find(known, tags) or server.create_run(client, experiment, record, tags)
    run_id: str = run.info.run_id
    if run.info.status == "FINISHED" and run.data.tags[server.STATE] != "live":
        server.set_tags(client, run, tags)
        return run_id, False
    client.update_run(run_id, status="RUNNING")  # whatever the training reported
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
    """Return the run that holds some or all of these results, else the one created during their training."""
    for wanted in ({server.DIGEST: tags[server.DIGEST]}, {server.STATE: "live", TRAINING: tags.get(TRAINING)}):
        for run in known:
            if wanted.items() <= run.data.tags.items():
                return run
    return None


def _supersede(client: Any, known: list[Any], current: set[str], folder: str) -> None:
    """Mark this folder's runs of older results as superseded. They are the user's, so they are kept."""
    for run in known:
        run_id, tags = run.info.run_id, run.data.tags
        if tags.get(server.FOLDER) != folder or run_id in current or tags.get(server.STATE) == "superseded":
            continue
        client.set_tag(run_id, server.STATE, "superseded")
        if run.info.status in ("RUNNING", "SCHEDULED"):  # its upload or training was killed
            client.set_terminated(run_id, "KILLED")
