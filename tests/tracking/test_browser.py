"""A tracked study and its report, opened in a real browser: the runs, the curves and the figures are there."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.browser import opened
from tests.fake_results import make_results, make_study
from tests.tracking.debian import needs_debian
from tests.tracking.servers import tracking_server

from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.stages.report import make_report
from consistency.tracking.upload import track_study

#: writes the width of every picture, 0 for a broken one, into the page's title
MEASURE = "<script>onload = () => document.title = [...document.images].map(image => image.naturalWidth)</script>"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_curves_and_figures_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chromium = needs_debian("chromium", "chromium")
    job = Job(make_study(tmp_path / "studies"), StudyPaths("small", tmp_path / "results"))
    make_results(job)
    make_report(job)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    track_study(job)
    tracked = read_json(job.paths.track / "tracked.json", "track")
    with tracking_server(tmp_path, "sqlite:///mlflow.db") as server:
        page = f"{server.url}/#/experiments/{tracked['experiment_id']}/runs?workflowType=machine_learning"
        runs = opened(chromium, page, tmp_path / "first")
        curves = opened(chromium, f"{server.url}/#{urlsplit(tracked['url_hint']).fragment}", tmp_path / "second")
    assert all(f">{name}<" in runs for name in ("teacher", "ctm", "analytic", "report"))
    assert "A small study" in runs and "8 matching runs" in re.sub("<[^>]*>", "", runs)
    # The page that `track` prints: each student in a colour of its own, at four steps and one, two and three jumps.
    lines = re.findall(r'class="js-line" d="([^"]+)" style="[^"]*stroke: (rgb[^;]+);', curves)
    assert all(f"{run} (alignment/nfe{nfe})" in curves for run in job.study.students for nfe in (1, 2, 3))
    assert len(lines) >= 6 and len({colour for _, colour in lines}) == 2
    assert all(path.count("L") == 3 for path, _ in lines)
    assert ">teacher<" not in curves

    report = job.paths.report / "report.html"
    report.write_text(report.read_text().replace("</body>", f"{MEASURE}</body>"))
    shown = opened(chromium, report.as_uri(), tmp_path / "third")
    widths = [int(width) for width in shown.partition("<title>")[2].partition("</title>")[0].split(",")]
    assert len(widths) == len(list((job.paths.report / "figures").glob("*.png"))) and min(widths) > 300
