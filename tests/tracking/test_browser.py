"""What a person sees of a tracked study: MLflow's own pages, in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from tests.fake_results import make_report, make_results, make_study
from tests.tracking.browser import Browser
from tests.tracking.comparison import runs_of
from tests.tracking.pages import Pages, curves_of
from tests.tracking.servers import TrackingServer, wait_until
from tests.tracking.trainings import FOUR, finished_study, replayed

from consistency.files import read_json
from consistency.history import read_history
from consistency.layout import Layout
from consistency.tracking.live import EVERY, LIVE
from consistency.tracking.server import connect
from consistency.tracking.upload import track_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The small study in mlflow.db, as `track` leaves it."""
    folder = tmp_path_factory.mktemp("pages")
    study = make_study(folder / "studies")
    layout = Layout(study.name, folder / "results")
    make_results(study, layout)
    make_report(study, layout)
    Image.new("RGB", (60, 40), "teal").save(layout.report / "figures/curves.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        track_study(study, layout)
    return layout


@pytest.fixture(scope="module")
def pages(browser: Browser, results: Layout) -> Iterator[Pages]:
    """The study served as by `make ui`, to a browser in which nothing was set up."""
    server = TrackingServer(results.results.parent, "sqlite:///mlflow.db").start()
    try:
        yield Pages(browser, server.url, read_json(results.track / "tracked.json", "track"))
    finally:
        server.stop()


def test_the_experiment_page_lists_the_runs(pages: Pages) -> None:
    pages.open("runs?workflowType=machine_learning")
    pages.browser.wait_for_text("teacher", "ctm", "analytic", "report", "A small study", "8 matching runs")
    assert "analytic seed 1" not in pages.browser.text()
    pages.unfold("analytic")
    pages.browser.wait_for_text("analytic seed 0", "analytic seed 1")


def test_the_printed_address_compares_the_preconditionings(pages: Pages) -> None:
    pages.open_printed()
    for nfe in (1, 2, 3):
        found = curves_of(pages.browser, f"alignment/nfe{nfe}", "ctm", "analytic")
        assert found.keys() == {"ctm", "analytic"}
        assert found["ctm"]["colour"] != found["analytic"]["colour"]
        assert found["ctm"]["scale"] == "log"  # on a linear one, curves that fall so far lie upon one another
        assert found["ctm"]["x"] == found["analytic"]["x"] == [0, 20, 40, 60]
        assert all(ctm > analytic for ctm, analytic in zip(found["ctm"]["y"], found["analytic"]["y"], strict=True))
        pages.browser.wait_for_text(f"analytic (alignment/nfe{nfe})", f"ctm (alignment/nfe{nfe})")
    # They would take the legend's lines.
    assert not {"teacher", "report"} & {line.strip() for line in pages.browser.text().splitlines()}


def test_the_experiments_note_leads_to_the_comparison(pages: Pages) -> None:
    pages.open("runs?workflowType=machine_learning")
    pages.browser.wait_for_text("A small study")
    links = pages.browser.run("[...document.querySelectorAll('a[href*=compareRunsMode]')].map(link => link.href)")
    assert urlsplit(links[0]).fragment == urlsplit(pages.tracked["url_hint"]).fragment


def test_a_run_page_shows_its_curves(pages: Pages, results: Layout) -> None:
    pages.open_run("analytic seed 1", "/model-metrics")
    history = read_history(results.student("analytic", 1) / "history.jsonl", "student")
    pages.browser.wait_for_text("analytic seed 1 (alignment/nfe1)", "training")
    pages.browser.run("document.querySelector('input[placeholder*=\"Search metric charts\"]').focus()")
    pages.browser.type("distillation")
    drawn = curves_of(pages.browser, "training/distillation", "analytic seed 1")["analytic seed 1"]
    assert (drawn["x"], drawn["y"]) == ([line["step"] for line in history], [line["distillation"] for line in history])


def test_curves_grow_while_a_training_goes_on(pages: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {LIVE: "1", EVERY: "0.2", "MLFLOW_TRACKING_URI": pages.address}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    study, layout = finished_study(tmp_path, FOUR, "growing")
    with replayed(study, layout, "analytic", 1) as training:
        training.write(10)
        wait_until(lambda: "up to step 100" in training.log, "the first points")
        (run,) = runs_of(connect(pages.address), study, "seed")
        page = f"{pages.address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics"
        for count in (10, 20):
            pages.browser.open(page)  # of itself it looks again every half a minute
            curve = curves_of(pages.browser, "training/distillation", "analytic seed 1")["analytic seed 1"]
            assert curve["x"] == [*range(10, 10 * count + 1, 10)]
            training.write(10)
            wait_until(lambda count=count: f"up to step {10 * count + 100}" in training.log, "the next points")


def test_a_run_page_says_what_the_run_is(pages: Pages) -> None:
    pages.open_run("analytic seed 1")
    pages.browser.wait_for_text("analytic seed 1", "Finished", "digits (", "Parent run", "Parameters (")
    _, _, parameters = pages.browser.text().partition("Parameters (")
    # What differs between the students stands first.
    assert [line.strip() for line in parameters.splitlines()][3:5] == ["preconditioning", "analytic"]


def test_a_run_page_shows_its_pictures(pages: Pages) -> None:
    pages.open_run("report", "/artifacts/figures/curves.png")
    pages.browser.wait_for_text("curves.png", "report.html", "coefficients")
    pages.browser.wait_for(
        "[...document.images].some(image => image.naturalWidth === 60 && image.naturalHeight === 40)"
    )
