"""A finished study as runs in MLflow, for browsing. history.jsonl and the score tables stay the truth.

One experiment a study: a run `teacher`, one run a student (the mean over its seeds) with a nested run a seed, and a
run `report`. What is uploaded is first written down without MLflow (`plan`); a digest of it names the run, so the
same results are uploaded once, however often and from wherever this runs. A run that was there while its training
went on (`follow`) is completed, not made again.
"""

import math
from typing import Any

from consistency.files import write_json
from consistency.layout import Layout
from consistency.progress import Progress
from consistency.study import Study
from consistency.tracking.plan import STUDENT, TRAINING, Upload, plan
from consistency.tracking.registry import register_students
from consistency.tracking.server import (
    BATCH,
    DIGEST,
    FOLDER,
    charts,
    connect,
    create_run,
    describe,
    find_runs,
    lock_file,
    one_at_a_time,
    open_experiment,
    points_there,
    readable_errors,
    send_points,
    set_tags,
    tracking_uri,
    warn_of_network_disk,
    without_credentials,
)


def track_study(study: Study, layout: Layout) -> None:
    """Upload the finished study to MLFLOW_TRACKING_URI (default: mlflow.db here), register its students as models, and
    write tracked.json.

    Run again it uploads only what is new, and completes what was interrupted; runs of older results are kept and
    marked superseded. Raises UserError when results are missing or stale, or the server cannot be used.
    """
    uploads = plan(study, layout)
    uri = tracking_uri()
    warn_of_network_disk(uri)
    with one_at_a_time(lock_file(uri, layout.track)), readable_errors(uri):
        client = connect(uri)
        experiment = open_experiment(client, study.name, study.title, uri)
        common = {"study_hash": study.key("report"), FOLDER: str(layout.root.resolve())}
        runs, new = _send(client, experiment, uploads, common, f"track {study.name}")
        models = register_students(client, study, layout, runs)
    clean = without_credentials(uri)
    page = charts(experiment)
    hint = (
        f"{clean.rstrip('/')}/{page}" if clean.startswith("http") else f"`make ui`, then http://127.0.0.1:5000/{page}"
    )
    content = {"tracking_uri": clean, "experiment": study.name, "experiment_id": experiment, "models": models}
    write_json(layout.track / "tracked.json", content | {"runs": runs, "url_hint": hint})
    done = f"{new} of {len(runs)} runs uploaded" if new else f"all {len(runs)} runs were there already"
    print(f"track {study.name}: {done}; see {hint}", flush=True)


def _send(
    client: Any, experiment: str, uploads: list[Upload], common: dict[str, str], label: str
) -> tuple[dict[str, str], int]:
    """Bring the experiment to what was planned. Returns the id of each run, and how many were uploaded."""
    found = find_runs(client, experiment)
    # A finished run comes after an unfinished one of the same content, and so is the one that is taken.
    known = {run.data.tags.get(DIGEST): run for run in sorted(found, key=_is_finished)}
    ids: dict[str, str] = {}
    new = 0
    progress = Progress(label, sum(_pieces(upload) for upload in uploads))
    for upload in uploads:
        tags = upload.tags | common | {"role": upload.role, "state": "current"}
        if upload.parent is not None:
            tags["mlflow.parentRunId"] = ids[upload.parent]
        run = known.get(upload.digest) or _adopt(client, found, upload, tags)
        # The digest is there from the start: what is left of a killed upload is found by it.
        run = run or create_run(client, experiment, upload, tags | {DIGEST: upload.digest})
        ids[upload.name] = run.info.run_id
        _retag(client, run, upload.name, tags)
        if _is_finished(run):
            progress.advance(_pieces(upload))
        else:
            _fill(client, run, upload, progress)
            new += 1
    _supersede(client, found, set(ids.values()), common[FOLDER])
    progress.close()
    return ids, new


def _pieces(upload: Upload) -> int:
    """Calls that an upload takes, for the progress."""
    return 1 + len(upload.files) + len(upload.texts) + math.ceil(len(upload.points) / BATCH)


def _is_finished(run: Any) -> bool:
    return run.info.status == "FINISHED"


def _adopt(client: Any, found: list[Any], upload: Upload, tags: dict[str, str]) -> Any | None:
    """The run that was there while the training went on, now to be completed; None where there is none."""
    for run in found:
        has = run.data.tags
        training = TRAINING in tags and has.get(TRAINING) == tags[TRAINING]
        student = STUDENT in tags and all(has.get(name) == tags[name] for name in (STUDENT, FOLDER))
        same = all(upload.params.get(key) == value for key, value in run.data.params.items())
        if (training or student) and same and DIGEST not in has:
            # Not finished before it is complete, whatever its training had said.
            client.update_run(run.info.run_id, status="RUNNING")
            client.set_tag(run.info.run_id, DIGEST, upload.digest)
            client.set_tag(run.info.run_id, "mlflow.note.content", upload.note)
            return client.get_run(run.info.run_id)
    return None


def _retag(client: Any, run: Any, name: str, tags: dict[str, str]) -> None:
    """Set the tags that are not as they should be; a run that is current again gets its name back."""
    if run.data.tags.get("state") == "superseded":
        tags = tags | {"mlflow.runName": name}
    set_tags(client, run, tags)


def _fill(client: Any, run: Any, upload: Upload, progress: Progress) -> None:
    """Upload what a run lacks, and finish it. Nothing is there twice, whatever a killed upload had left."""
    run_id = run.info.run_id
    describe(client, run, upload)
    progress.advance()
    there = points_there(client, run)
    again = {point.step for point in upload.points if there.get((point.key, point.step), point.value) != point.value}
    if again:
        text = f"steps {min(again)} to {max(again)}: here what was logged before a kill, in history.jsonl what counts"
        client.set_tag(run_id, "trained_again", text)
    for start in range(0, len(upload.points), BATCH):
        batch = upload.points[start : start + BATCH]
        send_points(client, run_id, [point for point in batch if (point.key, point.step) not in there])
        progress.advance()
    for path, folder in upload.files:
        client.log_artifact(run_id, str(path), folder or None)
        progress.advance()
    for name, text in upload.texts:
        client.log_text(run_id, text, name)
        progress.advance()
    client.set_terminated(run_id, "FINISHED", upload.ended)


def _supersede(client: Any, found: list[Any], current: set[str], folder: str) -> None:
    """Mark this folder's runs of older results: they are a person's, so they are kept."""
    from mlflow.entities import RunTag

    for run in found:
        tags = run.data.tags
        if tags.get(FOLDER) != folder or run.info.run_id in current:
            continue
        if tags.get("state") != "superseded":
            name = RunTag("mlflow.runName", f"{run.info.run_name} (superseded)")
            client.log_batch(run.info.run_id, tags=[RunTag("state", "superseded"), name])
        if run.info.status in ("RUNNING", "SCHEDULED"):  # its upload or its training was killed
            client.set_terminated(run.info.run_id, "KILLED")
