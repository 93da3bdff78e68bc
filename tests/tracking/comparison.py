"""Comparison of a tracking server's content with the histories of the trainings."""

from typing import Any

from tests.tracking.trainings import history_of

from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.tracking.records import Record
from consistency.tracking.server import find_runs

Points = list[tuple[str, int, int, float]]


def expected_points(job: Job) -> Points:
    """The training's curves as its history says them: metric, step, time, value."""
    started = read_json(job.card("student"), "student")["training"]["started"]
    return sorted(
        (f"training/{name}", line["step"], started + round(1000 * line["seconds"]), value)
        for line in history_of(job)
        for name, value in line.items()
        if name not in ("step", "seconds")
    )


def planned_points(upload: Record) -> Points:
    """The points that the upload of a run has planned."""
    return sorted((point.key, point.step, point.time, point.value) for point in upload.points)


def runs_of(client: Any, study: str = "small", **tags: str) -> list[Any]:
    """The runs in the study's experiment; with tags, those that have them."""
    return find_runs(client, client.get_experiment_by_name(study).experiment_id, **tags)


def by_name(runs: list[Any]) -> dict[str, Any]:
    """Runs by name; two of a name would be one too many."""
    found = {run.info.run_name: run for run in runs}
    assert len(found) == len(runs)
    return found


def points_of(client: Any, run: Any) -> Points:
    """Every point of a run but the machine's figures; one that is there twice, twice."""
    keys = [key for key in run.data.metrics if not key.startswith("system/")]
    histories = (client.get_metric_history(run.info.run_id, key) for key in keys)
    return sorted((m.key, m.step, m.timestamp, m.value) for history in histories for m in history)


def assert_complete(client: Any, study: Job, *others: str) -> dict[str, Any]:
    """One parent a student, one run a training, and exactly the points of its history. Returns the runs by name."""
    runs = by_name(runs_of(client, study.study.name))
    assert runs.keys() == {*study.study.students, *(job.label for job in study.trainings), *others}
    for job in study.trainings:
        run = runs[job.label]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == runs[str(job.student)].info.run_id
        curves = [point for point in points_of(client, run) if point[0].startswith("training/")]
        assert curves == expected_points(job)
    return runs


def ids(runs: dict[str, Any]) -> dict[str, str]:
    """The runs' ids by name."""
    return {name: run.info.run_id for name, run in runs.items()}
