"""The pictures of docs/tracking.md: `python -m tests.tracking.screenshots FOLDER`, with the demo's results in FOLDER.

It serves FOLDER/mlflow.db on the loopback, as `make ui` does, and writes docs/images/mlflow-*.png.
"""

import sys
from pathlib import Path

from PIL import Image
from tests.tracking.browser import Browser
from tests.tracking.pages import Pages, curves_of
from tests.tracking.servers import ROOT, TrackingServer

from consistency.files import read_json

CHROMIUM = "/usr/bin/chromium"
STUDY = "digits"
PICTURES = ROOT / "docs/images"


def main(folder: Path) -> None:
    """Take all pictures."""
    tracked = read_json(folder / f"results/{STUDY}/track/tracked.json", "track")
    server = TrackingServer(folder, "sqlite:///mlflow.db")
    try:
        server.start()
        with Browser(CHROMIUM) as browser:
            pages = Pages(browser, server.url, tracked)
            for name, prepare in {
                "runs": _runs,
                "comparison": _comparison,
                "run": _run,
                "curves": _curves,
                "machine": _machine,
                "figures": _figures,
                "model": _model,
            }.items():
                prepare(pages)
                _save(browser, PICTURES / f"mlflow-{name}.png")
    finally:
        server.stop()


def _save(browser: Browser, path: Path) -> None:
    # On a first visit MLflow opens its assistant at the right.
    browser.click("button[aria-label=Close]")
    browser.rest()
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.picture(path)
    with Image.open(path) as picture:
        picture.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KB")


def _runs(pages: Pages) -> None:
    pages.browser.resize(1400, 620)
    pages.open("runs?workflowType=machine_learning")
    pages.unfold("analytic")
    pages.unfold("ctm")
    pages.browser.wait_for_text("analytic seed 1", "ctm seed 1")


def _comparison(pages: Pages) -> None:
    pages.browser.resize(1400, 900)
    pages.open_printed()
    curves_of(pages.browser, "alignment/nfe3", "ctm", "analytic")


def _run(pages: Pages) -> None:
    pages.browser.resize(1400, 1000)
    pages.open_run("analytic seed 1")
    pages.browser.wait_for_text("Registered models", "digits (")


def _curves(pages: Pages) -> None:
    pages.browser.resize(1400, 900)
    pages.open_run("analytic seed 1", "/model-metrics")
    curves_of(pages.browser, "alignment/nfe3", "analytic seed 1")


def _machine(pages: Pages) -> None:
    pages.open_run("analytic seed 1", "/system-metrics")
    curves_of(pages.browser, "system/cpu_utilization_percentage", "analytic seed 1")


def _figures(pages: Pages) -> None:
    pages.open_run("report", "/artifacts/figures/samples.png")
    pages.browser.wait_for("[...document.images].some(image => image.naturalWidth > 300)")


def _model(pages: Pages) -> None:
    pages.browser.resize(1400, 620)
    name, _, version = pages.tracked["models"]["analytic"].removeprefix("models:/").partition("/")
    pages.browser.forget(pages.address)
    pages.browser.open(f"{pages.address}/#/models/{name}/versions/{version}?workflowType=machine_learning")
    pages.browser.wait_for_text("sha256")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
