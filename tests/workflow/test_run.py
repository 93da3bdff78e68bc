"""The tiny study end to end, what a changed key runs again, and what a mistake says."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from tests.browser import opened
from tests.processes import wait_until
from tests.tracking.debian import needs_debian
from tests.workflow.checkout import Checkout

LAST = {"report", "track"}
CTM = {"student ctm", "samples ctm", "scores ctm"}
ANALYTIC = {"student analytic", "samples analytic", "scores analytic"}
SCORED = {"calibration", "scores ctm", "scores analytic"}
SAMPLED = {"teacher_samples", "samples ctm", "samples analytic"}


def test_a_run_makes_what_lies_in_its_folders_and_leaves_nothing_behind(finished: Checkout) -> None:
    """Snakemake itself misses every file that a rule names."""
    for folder in ("students/analytic/seed0/snapshots", "samples/analytic/seed0", "scores/extractor", "report/figures"):
        files = list((finished.path / "results/tiny" / folder).iterdir())
        assert len(files) > 1 and all(file.stat().st_size > 0 for file in files if file.suffix)
    assert finished.litter() == []
    assert finished.states() == []
    assert list((finished.path / "state/tiny/due").iterdir())
    assert finished.processes() == []


def test_logs_are_readable_lines(finished: Checkout) -> None:
    logs = finished.path / "logs/tiny"
    for name, label in {
        "teacher": "teacher tiny",
        "coefficients": "coefficients tiny",
        "student/ctm-seed0": "student ctm seed 0",
        "scores/analytic-seed0": "scores analytic seed 0",
    }.items():
        text = (logs / f"{name}.log").read_text()
        assert re.search(rf"(?m)^{label}: 100%\|#+\| (\d+)/\1 \[", text), text
        assert "\r" not in text and "\x1b" not in text
    assert (logs / "teacher.tsv").read_text().startswith("s\th:m:s")


def test_the_same_command_again_does_nothing(copied: Checkout) -> None:
    said = copied.done()
    assert "Nothing to be done" in said
    assert "workflow specific profile profiles/default" in said


# key: (its new value, the jobs that run again)
AGAIN: dict[str, tuple[Any, set[str]]] = {
    "sampling.batch": (32, set()),
    "report.grid_nfe": ([1], LAST),
    "students.ctm.preconditioning": ("bcm", CTM | LAST),
    "coefficients.probes": (2, {"coefficients"} | ANALYTIC | LAST),
    "calibration.tolerance": (0.2, {"calibration"} | LAST),
    "scores.classifier.steps": (21, {"extractor"} | SCORED | LAST),
    "scores.kid_subset_size": (8, SCORED | LAST),
    "sampling.first_seed": (100, SAMPLED | SCORED | LAST),
    "seeds": ([0, 1], CTM | ANALYTIC | LAST),
}


# It also says that a finished run which is moved, as `copied` is, does not run again.
@pytest.mark.slow
@pytest.mark.parametrize("key", AGAIN)
def test_a_changed_key_runs_what_depends_on_it(copied: Checkout, key: str) -> None:
    value, jobs = AGAIN[key]
    assert copied.change({key: value}).planned() == jobs


def test_another_seed_keeps_the_first(copied: Checkout) -> None:
    copied.change({"seeds": [0, 1]}).planned()
    assert set(re.findall(r"seed=(\d+)", copied.output)) == {"1"}


@pytest.mark.slow
def test_the_cards_decide_where_snakemake_remembers_nothing(copied: Checkout) -> None:
    shutil.rmtree(copied.path / ".snakemake")
    assert copied.planned() == set()
    assert copied.change({"coefficients.probes": 2}).planned() == {"coefficients"} | ANALYTIC | LAST
    assert "tiny, coefficients: made by study 'tiny' with other settings (coefficients.probes: there 1, here 2)" in (
        copied.output
    )
    # What was made in the meantime, and what was not touched, is as the study says.
    assert copied.change({"coefficients.probes": 1}).planned() == set()


@pytest.mark.slow
def test_a_study_edited_during_a_run_is_read_by_the_next_run(copied: Checkout) -> None:
    log = copied.path / "logs/tiny/coefficients.log"
    log.unlink()
    run = copied.change({"coefficients.probes": 2}).start()
    wait_until(log.exists, "the first job")
    copied.change({"title": "Edited", "student.learning_rate": 0.5})
    assert run.wait(timeout=600) == 0, copied.output
    for name in ("report/card.json", "students/analytic/seed0/card.json"):
        card = json.loads((copied.path / "results/tiny" / name).read_text())
        assert card["resolved"]["title"] != "Edited"
        assert card["resolved"]["student"].get("learning_rate") != 0.5
    assert copied.planned() == CTM | ANALYTIC | LAST


def says_one_line(checkout: Checkout) -> str:
    """The only line of a run that stops before any job, Snakemake's own notes apart."""
    assert checkout.run() == 1
    notes = ("Using workflow specific profile", "Config file ")
    (line,) = [line for line in checkout.output.splitlines() if not line.startswith(notes)]
    assert not (checkout.path / "results").exists()
    return line


def test_a_misspelt_key_stops_before_any_job(checkout: Checkout) -> None:
    typo = checkout.change({"student.batchh": 3}, "typo")
    line = says_one_line(typo)
    assert line.startswith("error: config/studies/typo.yaml: ")
    assert line.endswith("unknown key 'student.batchh'; did you mean 'batch'?")


def test_a_wrong_tracking_address_stops_before_any_job(checkout: Checkout) -> None:
    checkout.variables["MLFLOW_TRACKING_URI"] = "./mlruns"
    assert says_one_line(checkout).startswith("error: MLFLOW_TRACKING_URI ./mlruns is neither")


def test_a_batch_that_its_processes_cannot_share_stops_before_any_job(checkout: Checkout) -> None:
    """The student's: the teacher's training would come first."""
    odd = checkout.change({"student.batch": 15}, "odd")
    assert odd.run("--set-resources", "student:gpu=2") != 0
    assert "error: a batch of 15 cannot be shared by 2 processes" in odd.output
    assert "Traceback" not in odd.output
    assert not (odd.path / "results/odd").exists()
    assert list((odd.path / ".snakemake/locks").glob("*")) == []


def test_an_unknown_configuration_key_stops_before_any_job(checkout: Checkout) -> None:
    (checkout.path / "config/config.yaml").write_text("studies: tiny\nstudys: tiny\n")
    assert "unknown key 'studys'" in says_one_line(checkout)


def test_a_failing_job_shows_its_error_last(checkout: Checkout) -> None:
    nowhere = checkout.change({"dataset.kind": "image_folder", "dataset.path": "data/nowhere"}, "nowhere")
    assert nowhere.run() == 1
    log = nowhere.output.split("Logfile logs/nowhere/dataset.log:")[-1]
    assert re.search(r"(?m)^error: dataset\.path: there is no folder data/nowhere/train ", log)
    assert "Traceback" not in nowhere.output
    assert nowhere.litter() == []


@pytest.fixture(scope="module")
def offline(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run without a network."""
    # Snakemake fetches what is not in its package; a proxy that nobody serves is as good as no network.
    proxies = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    return replace(finished.copy(tmp_path_factory.mktemp("offline") / "copied"), variables=proxies)


@pytest.fixture(scope="module")
def unpacked(offline: Checkout) -> Path:
    """The folder in Snakemake's report.zip."""
    offline.done("--report", "report.zip")
    with ZipFile(offline.path / "report.zip") as file:
        file.extractall(offline.path / "unpacked")
    (folder,) = (offline.path / "unpacked").iterdir()
    return folder


def test_snakemake_makes_its_report_as_one_page(offline: Checkout) -> None:
    offline.done("--report", "page.html")
    figures = list((offline.path / "results/tiny/report/figures").glob("*.png"))
    assert len(figures) >= 5
    assert all(f"Adding {figure.name}" in offline.output for figure in figures)


def test_snakemakes_report_as_a_zip_holds_the_report_and_its_figures(offline: Checkout, unpacked: Path) -> None:
    report = offline.path / "results/tiny/report"
    expected = [report / "report.html", *(report / "figures").glob("*.png")]
    found = {file.name: file.read_bytes() for file in unpacked.glob("data/raw/*/*")}
    assert found == {file.name: file.read_bytes() for file in expected}


def test_snakemakes_report_opens_in_a_browser(unpacked: Path, tmp_path: Path) -> None:
    chromium = needs_debian("chromium", "chromium")
    page = opened(chromium, (unpacked / "report.html").as_uri(), tmp_path / "profile")
    # The menu is written by the page's own script.
    menu = re.sub("<[^>]*>", " ", page.partition('<div id="app">')[2].partition("<script")[0]).split()
    assert {"Workflow", "Statistics", "Results"} <= set(menu)
