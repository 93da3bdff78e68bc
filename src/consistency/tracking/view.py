"""The page that compares a study's students: them alone, their scores first and on a logarithmic axis.

MLflow 3.17 keeps a saved view as a tag of the experiment, which the page's address names. Its form is the page's own,
read off what the page saves; tests/tracking/test_browser.py opens it in a browser.
"""

import base64
import json
import time
import zlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

#: the tag of the experiment that holds the view
VIEW = "mlflow.sharedViewState.students"
#: the scores that fall by orders of magnitude; KID may be negative, and keeps its linear axis
_LOGARITHMIC = ("alignment/", "fd/")
_STUDENTS = "tags.role != 'teacher' AND tags.role != 'report' AND tags.state != 'superseded'"
_TRAINING = "tags.role = 'seed' AND tags.state = 'live'"


def charts(experiment: str, live: bool = False) -> str:
    """The page, from the server's address on, that shows the students' curves side by side, without teacher, report
    and older results (the view must be there: without it the page shows another); or the seeds that train, before
    their means are there. Without its first word MLflow 3 opens its page for language models."""
    shown = f"searchFilter={quote(_TRAINING)}" if live else f"viewStateShareKey={VIEW.rpartition('.')[2]}"
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&{shown}"


def saved_view(metrics: Iterable[str] = ()) -> str:
    """The tag's value. metrics: of those that a study has, in order; without one, the page draws what it finds.

    Charts of other metrics are added by the page, after these.
    """
    now = round(1000 * time.time())
    return json.dumps({"name": "Students", "createdAt": now, "updatedAt": now, "state": _packed(_state(metrics))})


def is_untouched(value: str) -> bool:
    """Whether a tag's value is still that of an experiment without metrics: no person's, and to be replaced."""
    return _packed(_state(())) in value


def _state(metrics: Iterable[str]) -> dict[str, Any]:
    found = list(metrics)
    shown = [metric for score in _LOGARITHMIC for metric in found if metric.startswith(score)]
    state: dict[str, Any] = {"searchFilter": _STUDENTS}
    if not shown:
        return state
    sections = dict.fromkeys(metric.partition("/")[0] for metric in shown)
    return state | {
        "compareRunCharts": [_chart(metric) for metric in shown],
        "compareRunSections": [{"uuid": name, "name": name, "display": True} | _KEPT for name in sections],
        "isAccordionReordered": True,  # otherwise the page puts its own sections in between, by name
    }


# Not generated: the page does not take it away again.
_KEPT = {"isReordered": False, "deleted": False, "isGenerated": False}


def _chart(metric: str) -> dict[str, Any]:
    return {
        "uuid": metric,
        "type": "LINE",
        "runsCountToCompare": 10,
        "metricSectionId": metric.partition("/")[0],
        "deleted": False,
        "isGenerated": False,
        "displayName": metric,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "log",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _packed(state: dict[str, Any]) -> str:
    """As MLflow packs it: a tag holds 5,000 characters."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
