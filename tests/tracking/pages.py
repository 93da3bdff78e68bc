"""MLflow's pages of a tracked study, and what is drawn on them."""

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.tracking.browser import Browser
from tests.tracking.servers import wait_until


@dataclass
class Pages:
    """The pages of a tracked study, in a browser."""

    browser: Browser
    address: str
    tracked: dict[str, Any]

    def open(self, page: str) -> None:
        self.browser.forget(self.address)
        self.browser.open(f"{self.address}/#/experiments/{self.tracked['experiment_id']}/{page}")

    def open_run(self, name: str, tab: str = "") -> None:
        self.open(f"runs/{self.tracked['runs'][name]}{tab}?workflowType=machine_learning")

    def unfold(self, name: str) -> None:
        """Open a run's nested runs in the list."""
        run = self.tracked["runs"][name]
        self.browser.click(f"[role=row]:has(a[href$='{run}']) [col-id*='Run Name'] button")

    def open_printed(self) -> None:
        """The page that `track` prints, on this server."""
        self.browser.forget(self.address)
        self.browser.open(f"{self.address}/#{urlsplit(self.tracked['url_hint']).fragment}")


def curves(browser: Browser, metric: str) -> dict[str, Any]:
    """The curves drawn of a metric, by the name of their run: colour, x, y and the scale of the y axis."""
    drawn = browser.run(
        f"""[...document.querySelectorAll('.js-plotly-plot')]
        .filter(plot => plot.querySelector('path.js-line'))
        .flatMap(plot => plot.data
            .filter(trace => trace.metricKey === {json.dumps(metric)})
            .map(trace => ({{
                name: trace.name, colour: trace.marker.color.slice(0, 7), x: trace.x, y: trace.y,
                scale: plot._fullLayout.yaxis.type,
            }})))"""
    )
    return {trace.pop("name"): trace for trace in drawn}


def curves_of(browser: Browser, metric: str, *runs: str) -> dict[str, Any]:
    """The curves of a metric, when those of all the runs are drawn."""
    wait_until(lambda: set(runs) <= curves(browser, metric).keys(), f"the curves of {metric}", 60)
    return curves(browser, metric)
