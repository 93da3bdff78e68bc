"""The report from a made-up study: everything is there, self-contained, with N and seeds."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.conftest import mistake
from tests.fake_results import OFFICIAL, SMALL, SWEEP, UNTAUGHT, edit_card, make_finished, make_results, make_study
from tests.processes import ROOT, run_python

from consistency.api import read_tables
from consistency.base.arrays import read_table, write_table
from consistency.base.files import sha256
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.evaluation.analysis import SpeedUp
from consistency.report import figures
from consistency.report.page import write_page
from consistency.report.results import TEXT, read_cards, read_histories, read_results
from consistency.report.summary import print_summary, summary_of
from consistency.report.wording import differs_in, sentence, teacher_line
from consistency.stages.report import make_report
from consistency.tracking.records import plan

ONE_SEED = SMALL.replace("seeds: [0, 1]", "seeds: [3]")
PLAIN = SMALL.replace("  analytic: {preconditioning: analytic}", "  bcm: {preconditioning: bcm}")
LARGE = (
    SMALL.replace("seeds: [0, 1]", "varies: [preconditioning, objective]\nseeds: [0, 1, 2]")
    .replace(
        "  analytic: {preconditioning: analytic}",
        "  bcm: {preconditioning: bcm}\n"
        "  analytic: {preconditioning: analytic}\n"
        "  analytic-forward: {preconditioning: analytic-forward}\n"
        "  cm: {preconditioning: cm, objective: endpoint}\n"
        "  analytic-endpoint: {preconditioning: analytic, objective: endpoint}",
    )
    .replace("{trajectory: ctm}", "{trajectory: ctm, endpoint: cm}")
)
RATES = SMALL.replace("steps: 60,", "steps: 60, evaluation_ema: [0.9, 0.9999],")
BOTH = SMALL.replace("students:\n", "varies: [preconditioning, objective, coupling]\nstudents:\n").replace(
    "seeds: [0, 1]", "  gc: {preconditioning: cm, objective: consistency, coupling: gc}\nseeds: [0, 1]"
)


def made(folder: Path, text: str = SMALL) -> Job:
    """A study of that text with all results but a report."""
    job = Job(make_study(folder, text=text), StudyPaths("small", folder / "results"))
    make_results(job)
    return job


def reported(folder: Path, text: str = SMALL) -> Job:
    """The same, and its report."""
    job = made(folder, text)
    make_report(job)
    return job


@pytest.mark.parametrize(
    "text",
    [SMALL, ONE_SEED, PLAIN, LARGE, RATES, SWEEP, BOTH],
    ids=["two", "one seed", "no fit", "six students", "EMA rates", "no teacher", "both papers"],
)
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, text: str) -> None:
    job = reported(tmp_path, text)
    page = (job.paths.report / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|//|\.|/)|@import|url\(""", page)
    names = [path.stem for path in (job.paths.report / "figures").glob("*.png")]
    assert {"samples", "curves_fd", "losses", "speedup_fd"} <= set(names)
    assert ("curves_alignment" in names) == job.study.taught
    assert ("curves_kid" in names) == bool(job.study.coupled)
    assert ("coefficients" in names) == job.study.needs_coefficients
    for name in names:
        assert (job.paths.report / "figures" / f"{name}.svg").stat().st_size > 1000
        assert f'id="{name}"' in page
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S):
        assert re.search(r"seed", caption)
        assert re.search(r"N = \d+|seeds 0 to 15|terms of the training loss", caption)
    assert "not FID" in page
    words = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"\bnan\b", words, re.I)


def test_the_report_is_the_same_whatever_the_users_locale_and_matplotlib(tmp_path: Path) -> None:
    job = reported(tmp_path, SMALL.replace("A small study", "Größe ∞"))
    made = {path: path.read_bytes() for path in job.paths.report.rglob("*") if path.suffix not in ("", ".json")}
    assert "Größe ∞" in made[job.paths.report / "report.html"].decode()
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nlines.linewidth: 9\naxes.facecolor: red\n")
    drawing = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://nowhere"}
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for verb in ("report", "summary"):
        words = ("-m", "consistency", verb, "--study", tmp_path / "small.yaml", "--results", tmp_path / "results")
        said = run_python(*words, **drawing, **ascii_alone).stdout
    assert "Größe ∞: mean ±" in said
    assert {path: path.read_bytes() for path in made} == made


def test_without_a_teacher_nothing_speaks_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = reported(tmp_path, UNTAUGHT)
    names = {path.stem for path in (job.paths.report / "figures").glob("*.png")}
    assert names == {"samples", "curves_fd", "curves_kid", "speedup_fd", "losses"}
    page = text_of(job)
    read = page.split("Commands")[0]
    assert "alignment" not in read.lower()
    assert "starts from random weights, the same for all of one seed, and differs from the others only in" in read
    assert re.search(r"ic : coupling: ic ot : coupling: ot gc : coupling: gc, mu: 0\.5", read)
    assert "teacher 0." not in read and "samples (6)" in read
    assert "No teacher: students are measured against the data alone" in read
    print_summary(job)
    said = capsys.readouterr().out
    assert "alignment" not in said and "KID" in said
    absent = Job(job.study, StudyPaths("ic", tmp_path / "elsewhere"))
    assert "has no results yet" in (said := mistake(print_summary, absent)) and "reproduce --study FILE`" in said


def test_a_sweep_of_mu_has_a_figure_and_a_chapter(tmp_path: Path) -> None:
    job = made(tmp_path, SWEEP)
    assert job.study.mu_sweep == {"ic": 0.0, "gc3": 0.3, "gc": 0.5, "gc1": 1.0}
    results = read_results(job)
    figure = figures.mu_sweep(
        results.main, job.study.mu_sweep, ["ot"], list(job.study.students), [1, 2], results.extractor
    )
    points, means, transported = figure.axes[0].get_lines()
    final = results.main[(results.main.kind == "final") & (results.main.nfe == 1)]
    assert sorted(points.get_xydata().tolist()) == sorted(
        [job.study.mu_sweep[row.run], row.fd] for row in final.itertuples() if row.run != "ot"
    )
    table = results.table[results.table.nfe == 1].set_index("run").fd
    np.testing.assert_allclose(means.get_xydata(), [[mu, table[run]] for run, mu in job.study.mu_sweep.items()])
    assert transported.get_ydata()[0] == pytest.approx(table["ot"])
    figures.close(figure)
    make_report(job)
    assert (job.paths.report / "figures/mu_sweep.png").exists()
    assert "Sweep of mu" in (job.paths.report / "report.html").read_text()


def test_arms_that_differ_in_more_than_mu_are_no_sweep(tmp_path: Path) -> None:
    text = SWEEP.replace("varies: [coupling, mu]", "varies: [coupling, mu, dropout]")
    study = make_study(tmp_path, text=text.replace("gc, mu: 1.0}", "gc, mu: 1.0, dropout: 0.1}"))
    assert study.mu_sweep == {"ic": 0.0, "gc3": 0.3, "gc": 0.5}
    assert make_study(tmp_path, text=UNTAUGHT).mu_sweep == {}


def test_the_claims_are_those_of_the_paper_that_a_student_is_of(tmp_path: Path) -> None:
    coupled, distilled, both = (
        text_of(made(tmp_path / name, text)) for name, text in (("gc", UNTAUGHT), ("ap", SMALL), ("both", BOTH))
    )
    assert "7.42 ± 0.04 with ic, 6.75 ± 0.04 with ot, 5.95 ± 0.05 with gc" in coupled
    assert "2 to 3 times fewer iterations" not in coupled
    assert "2 to 3 times fewer iterations" in distilled and "7.42" not in distilled
    assert "7.42" in both and "2 to 3 times" in both
    assert "start from the teacher (ctm, analytic) or from random weights, the same for all of one seed, (gc)" in both
    assert "gc : preconditioning: cm, objective: consistency, coupling: gc" in both
    assert "ctm : preconditioning: ctm, objective: trajectory The measure" not in both


def test_verdicts_hold_each_coupling_against_independent_noise(tmp_path: Path) -> None:
    job = made(tmp_path, UNTAUGHT)
    said = r"At NFE 1, (\w+)'s FD over the second half of training differs from ic's, .*?: no verdict from 2 seeds"
    assert re.findall(said, text_of(job)) == ["ot", "gc"]


def test_a_section_in_which_students_differ_is_said_by_its_kind(tmp_path: Path) -> None:
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [curriculum]")
    text = re.sub(
        r"students:\n(  .*\n)+",
        "students:\n  ic: {}\n  slow: {curriculum: {kind: doubling, last: 40}}\n"
        "  ect: {curriculum: {kind: shrinking, double_every: 20}}\n",
        text,
    )
    study = make_study(tmp_path, text=text)
    assert differs_in(study, "slow") == "curriculum: doubling (first 10, last 40, p_mean -1.1, p_std 2.0)"
    assert differs_in(study, "ect").startswith("curriculum: shrinking (double_every 20, ")


def test_a_frozen_predictor_is_said_by_its_student_and_is_in_no_sweep(tmp_path: Path) -> None:
    text = SWEEP.replace("varies: [coupling, mu]", "varies: [coupling, mu, predictor]").replace(
        "  gc: {coupling: gc, mu: 0.5}",
        "  gc: {coupling: gc, mu: 0.5, predictor: {run: ic}}\n"
        "  weak: {coupling: gc, mu: 0.7, predictor: {run: ic, step: 20}}",
    )
    study = make_study(tmp_path, text=text)
    assert differs_in(study, "gc") == "coupling: gc, mu: 0.5, predictor: run ic"
    assert differs_in(study, "weak") == "coupling: gc, mu: 0.7, predictor: run ic, step 20"
    assert differs_in(study, "ot") == "coupling: ot"
    assert study.mu_sweep == {"ic": 0.0, "gc3": 0.3, "gc1": 1.0}


def test_the_tables_are_numbers_for_machines(tmp_path: Path) -> None:
    job = made(tmp_path, LARGE)
    summary = summary_of(read_results(job))
    assert set(summary["final"]) == set(job.study.students)
    assert set(summary["speed_up"]) == set(job.study.students) - {"ctm", "cm"}
    # Endpoint students know no s between: their alignment is measured at one jump only.
    assert "alignment nfe1" in summary["speed_up"]["analytic-endpoint"]
    assert "alignment nfe2" not in summary["speed_up"]["analytic-endpoint"]


def text_of(job: Job) -> str:
    """The text that a reader of the page reads, without pictures and tags."""
    page = write_page(job, read_results(job), read_cards(job), read_histories(job), pictures=[])
    page = re.sub(r"<style.*?</style>", "", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def test_further_rates_are_a_table_and_change_nothing_else(tmp_path: Path) -> None:
    alone, several = reported(tmp_path / "alone"), reported(tmp_path / "several", RATES)
    for name in ("table.csv", "speedup.csv", "paired.csv", "summary.json"):
        assert (several.paths.report / name).read_bytes() == (alone.paths.report / name).read_bytes(), name
    for path in (alone.paths.report / "figures").glob("*.png"):
        assert path.read_bytes() == (several.paths.report / "figures" / path.name).read_bytes()
    table = pd.read_csv(several.paths.report / "ema.csv")
    assert list(zip(table.run, table.nfe, table.ema, strict=True)) == [
        (run, nfe, rate) for run in ("ctm", "analytic") for nfe in (1, 2, 5) for rate in (0.9, 0.999, 0.9999)
    ]
    assert "EMA rates" in text_of(several) and "0.9999" in text_of(several)
    assert "EMA rates" not in text_of(alone)
    assert not (alone.paths.report / "ema.csv").exists()
    assert len(pd.read_csv(several.paths.report / "scores.csv").ema.dropna().unique()) == 3


def test_an_official_teacher_and_its_published_score_come_first(tmp_path: Path) -> None:
    job = made(tmp_path, OFFICIAL)
    page = text_of(job)
    line = "Teacher: FID 1.10 (published 1.05, tolerance 0.1; 96 images, clean-fid legacy_tensorflow, seeds 0-95)"
    assert page.split("A small study", 2)[2].strip().startswith(line)
    assert "Teacher: official EDM checkpoint edm-cifar10-32x32-uncond-vp.pkl, 55,733,891 parameters." in page
    assert "not FID" not in page
    calibration = summary_of(read_results(job))["calibration"]
    assert calibration["teacher heun"] == {"fd": 1.1, "kid": 0.0008, "published": 1.05}
    # The half rows are of other numbers of images than the students'.
    assert set(calibration) == {"data halves", "teacher heun", "teacher heun against half"}
    rows = page.split("Calibration What the measure says")[1].split("Samples")[0]
    assert "one half of the data against the other 0.4 0.0001 48" in rows
    assert "teacher, Heun, NFE 35, against all the data 1.1 0.0008 96" in rows
    assert "teacher, Heun, NFE 35, against one half of the data 1.6 0.0008 48" in rows


def test_published_scores_stand_beside_ours_and_on_their_page(tmp_path: Path) -> None:
    page = text_of(make_finished(tmp_path, name="cifar10-uncond"))
    assert re.search(r"ctm jumps 2 \S+ ± \S+ 3.83 ", page) and re.search(r"ctm jumps 1 \S+ ± \S+ 0\.", page)
    assert "Published:" not in text_of(made(tmp_path / "other"))
    written = (ROOT / "docs/full-size.md").read_text()
    table = pd.read_csv(ROOT / "src/consistency/report/published.csv", dtype=str)
    assert len(table) == 49
    for study, rows in table[table.spread.isna()].groupby("study", sort=False):
        for run, cells in rows.groupby("run", sort=False):
            said = [f"{cell.fid}{'' if cell.read == 'twice' else ' ?'}" for cell in cells.itertuples()]
            assert f"| `{study}` | `{run}` | {' | '.join(said)} |" in written
    for cell in table.dropna().itertuples():
        assert f"{cell.fid} +- {cell.spread} /" in written


def test_where_the_time_of_a_step_goes_is_said(tmp_path: Path) -> None:
    job = made(tmp_path)
    page = text_of(job)
    assert "student data forward backward optimizer teacher peak memory, MiB" in page
    assert "analytic 1.0 20.0 30.0 5.0 200.0 760" in page
    for history in job.paths.root.glob("students/*/*/history.jsonl"):
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith(("time_", "peak_"))} for line in lines]
        history.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "peak memory" not in text_of(job)


@pytest.mark.parametrize("published", [{}, {"published": np.nan}])
def test_the_teachers_line_says_its_score_and_its_images(tmp_path: Path, published: dict[str, float]) -> None:
    says = "Teacher: FD 12.35, not FID (1,797 images, classifier features, seeds 0-1796)"
    assert teacher_line({"fd": 12.3456, "images": 1797, **published}, make_study(tmp_path)) == says


def test_the_curves_show_the_teacher_of_all_its_images_alone(tmp_path: Path) -> None:
    results = read_results(made(tmp_path))
    figure = figures.learning_curves(results.main, ["ctm"], [1], "fd", results.extractor)
    constant = [line for line in figure.axes[0].get_lines() if len(set(line.get_ydata())) == 1]
    assert [(line.get_ydata()[0], line.get_label()) for line in constant] == [(1.1, "teacher (Heun), N = 96")]
    figures.close(figure)


def test_a_second_report_is_the_same_and_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    job = reported(tmp_path)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in job.paths.report.rglob("*.*") if path.name != "card.json"}

    before = files()
    for stale in ("figures/mu_sweep.png", "ema.csv"):
        (job.paths.report / stale).touch()
    make_report(job)
    assert files() == before


def found(value: float, low: float, high: float, p: float = 0.01, seeds: int = 5, **fields: Any) -> SpeedUp:
    place = {"run": "analytic", "baseline": "ctm", "measure": "fd", "nfe": 2, "unit": "iterations"}
    final = {"target": 1.0, "baseline_steps": 900.0, "steps": 600.0, "reached": ""}
    return SpeedUp(**place | final | fields, value=value, low=low, high=high, p=p, seeds=seeds)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (
            found(1.5, 1.2, 1.9),
            "speed-up over ctm by FD is 1.50 (1.20 to 1.90): a difference (p = 0.01). It reaches ctm's",
        ),
        (found(1.5, 1.2, 1.9, p=0.2), "1.50 (1.20 to 1.90): no difference is shown (p = 0.2)."),
        (found(1.5, 0.9, np.inf), "1.50 (0.90 to ∞): the curves differ (p = 0.01), but do not fix this number."),
        (found(1.0, 0.995, 1.0), "1.00 (0.99 to 1.00): equal within 1 %."),
        (found(0.5, 0.0, 0.8), "0.50 (0 to 0.80): a difference"),
        (found(0.0, 0.0, 0.4), "is too low to measure (0 to 0.40): a difference"),
        (found(np.nan, 0.0, np.inf), "is not determined (0 to ∞): the curves differ"),
        (found(1.5, 1.2, 1.9, seeds=2, p=np.nan), "1.50 (range 1.20 to 1.90): no verdict from 2 seeds."),
        (found(1.5, np.nan, np.nan, seeds=1, p=np.nan), "1.50: no verdict from 1 seed."),
        (found(1, 1, 1, unit="network_evaluations"), "over ctm by FD by network evaluations is 1.00"),
        (found(1, 1, 1), "It reaches ctm's final FD after 0.67 times as long."),
        (found(1, 1, 1, reached="<", steps=900.0), "It never reaches ctm's final FD (ratio < 1.00)."),
        (found(1, 1, 1, reached=">", steps=90.0), "It has ctm's final FD before training (ratio > 10.00)."),
        (found(1, 1, 1, reached="?"), "ctm has its final FD before training."),
    ],
)
def test_a_speed_up_is_put_into_words(item: SpeedUp, says: str) -> None:
    assert says in sentence(item, "classifier")


def test_the_summary_says_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = made(tmp_path)
    job.paths.track.mkdir()
    (job.paths.track / "tracked.json").write_text(json.dumps({"url_hint": "`make ui`, then look"}))
    print_summary(job)
    said = capsys.readouterr().out
    assert str(job.paths.report / "report.html") in said
    assert "`make ui`, then look" in said
    assert len(re.findall(r"^analytic +jumps", said, re.M)) == len(job.study.sampling.nfe)
    assert "not FID" in said
    assert "speed-up" in said
    assert "nan" not in said


# --- the tables that it reads

#: names that are numbers, truth values or missing values to those who guess
NAMES = ("100", "007", "1e3", "null", "0.5", "nan", "true")


def test_names_that_look_like_numbers_are_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    students = [f'  "{name}": {{preconditioning: ctm, dropout: 0.{k}}}\n' for k, name in enumerate(NAMES)]
    text = re.sub(r"students:\n(  .*\n)+", f"varies: [preconditioning, dropout]\nstudents:\n{''.join(students)}", SMALL)
    text = text.replace("name: small", 'name: "2024"').replace("{trajectory: ctm}", '{trajectory: "100"}')
    path = tmp_path / "2024.yaml"
    path.write_text(text)
    job = Job(load_study(path), StudyPaths("2024", tmp_path / "results"))
    make_results(job)
    make_report(job)
    tables = read_tables(job.study, tmp_path / "results")
    assert {name: tuple(dict.fromkeys(table.run)) for name, table in tables.items()} == {
        "scores": ("data", "teacher", *NAMES),
        "table": NAMES,
        "speedup": NAMES[1:],
        "paired": NAMES[1:],
    }
    assert set(tables["scores"].study) == {"2024"} and set(tables["paired"].baseline) == {"100"}
    assert [record.name for record in plan(job) if record.role == "student"] == list(NAMES)
    print_summary(job)
    said = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} +jumps", said, re.M) for name in NAMES)
    # The study as the page prints it is the study.
    page = html.unescape((job.paths.report / "report.html").read_text())
    path.write_text(page.split("every default written out</summary><pre>")[1].split("</pre>")[0])
    assert load_study(path) == job.study


def rewrite(job: Job, change: Callable[[pd.DataFrame], object]) -> None:
    """Change a student's table as if it had been written so."""
    table = read_table(job.scores, "", TEXT)
    change(table)
    write_table(job.scores, table.to_dict("records"), list(table.columns))  # type: ignore[arg-type]
    edit_card(job.card("scores"), lambda card: card["outputs"].update({job.scores.name: sha256(job.scores)}))


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("run", "ctm", "row of study 'small', run 'ctm' seed 1, but it belongs to analytic seed 1 of study 'small'"),
        ("study", "other", "row of study 'other', run 'analytic' seed 1, but"),
        ("seed", 0, "run 'analytic' seed 0, but it belongs to analytic seed 1"),
        ("fd", np.nan, "student analytic, seed 1, step 20, jumps, NFE 2: fd is missing, so no mean"),
        (
            "kid",
            np.inf,
            "NFE 2: kid is inf, .* run `python -m consistency scores --student analytic --seed 1 --study FILE` again",
        ),
        ("alignment", np.nan, "student analytic, seed 1, step 20, jumps, NFE 2: alignment is missing"),
    ],
)
def test_a_row_that_would_be_left_out_of_the_means_is_an_error(
    tmp_path: Path, column: str, value: object, says: str
) -> None:
    job = made(tmp_path)
    seed = job.of("analytic", 1)

    def change(table: pd.DataFrame) -> None:
        (row,) = table.index[(table.kind == "curve") & (table.step == 20) & (table.nfe == 2)]
        table.loc[row, column] = value

    rewrite(seed, change)
    message = mistake(read_results, job)
    assert re.search(says, message)
    if column in ("run", "study", "seed"):
        assert str(seed.scores) in message and "scores --student analytic --seed 1" in message


def test_the_alignment_error_may_be_missing_where_no_seed_has_it(tmp_path: Path) -> None:
    job = made(tmp_path)
    for seed in job.study.seeds:
        rewrite(job.of("ctm", seed), lambda table: table.loc.__setitem__((table.nfe == 2, "alignment"), np.nan))
    assert np.isnan(read_results(job).table.set_index(["run", "nfe", "sampler"]).alignment["ctm", 2, "jumps"])
    rewrite(job.of("ctm", 1), lambda table: table.__setitem__("alignment", np.nan))
    assert "student ctm, seed 1, step 0, jumps, NFE 1: alignment is missing" in mistake(read_results, job)


def test_text_in_a_column_of_numbers_is_damage(tmp_path: Path) -> None:
    job = made(tmp_path)
    rewrite(job.of("ctm", 0), lambda table: table.__setitem__("fd", "much"))
    assert "seed0.csv is damaged (its column fd holds text)" in mistake(read_results, job)
