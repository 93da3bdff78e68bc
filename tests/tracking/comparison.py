"""What a tracking server holds, against the histories of the trainings."""

from collections import Counter
from typing import Any

from tests.tracking.trainings import history_of

from consistency.files import read_json
from consistency.layout import Layout
from consistency.study import Study
from consistency.tracking.plan import Record
from consistency.tracking.server import find_runs

Points = list[tuple[str, int, float, int]]


def expected_points(layout: Layout, run: str, seed: int) -> Points:
    """The training's curves as its history says them: metric, step, value, time."""
    started = read_json(layout.card("student", run, seed), "student")["training"]["started"]
    return sorted(
        (f"training/{name}", line["step"], value, started + round(1000 * line["seconds"]))
        for line in history_of(layout, run, seed)
        for name, value in line.items()
        if name not in ("step", "seconds")
    )


def runs_of(client: Any, study: Study, role: str = "") -> list[Any]:
    """The runs of the study, in the one experiment of its name; with a role, those that have it."""
    (experiment,) = (found for found in client.search_experiments() if found.name == study.name)
    return find_runs(client, experiment.experiment_id, **({"role": role} if role else {}))


def planned(upload: Record) -> Points:
    """Every point that the server is to have of a run."""
    return sorted((p.key, p.step, p.value, p.time) for p in upload.points)


def points_of(client: Any, run: Any, prefix: str = "") -> Points:
    """Every point that the server has of a run, or of some metrics of it, but the machine's; one that is there twice,
    twice."""
    keys = [key for key in run.data.metrics if key.startswith(prefix) and not key.startswith("system/")]
    histories = (client.get_metric_history(run.info.run_id, key) for key in keys)
    return sorted((m.key, m.step, m.value, m.timestamp) for history in histories for m in history)


def assert_complete(client: Any, study: Study, layout: Layout, *others: str) -> dict[str, Any]:
    """One parent a student, one run a training, and exactly the points of its history. Returns the runs by name."""
    found = runs_of(client, study)
    trainings = {f"{run} seed {seed}": (run, seed) for run in study.students for seed in study.seeds}
    names = Counter(run.info.run_name for run in found)
    assert names == dict.fromkeys({*study.students, *trainings, *others}, 1)
    runs = {run.info.run_name: run for run in found}
    for name, (run, seed) in trainings.items():
        assert runs[name].info.status == "FINISHED"
        assert runs[name].data.tags["mlflow.parentRunId"] == runs[run].info.run_id
        assert points_of(client, runs[name], "training/") == expected_points(layout, run, seed)
    return runs


def ids(runs: dict[str, Any]) -> dict[str, str]:
    """The runs' ids by name."""
    return {name: run.info.run_id for name, run in runs.items()}
