"""Published results: what a page holds, that publishing again changes nothing, and what verify finds."""

import getpass
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tests.conftest import mistake
from tests.fake_results import SMALL, edit_card, make_results, make_study

from consistency.__main__ import main
from consistency.base.files import sha256
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.provenance.archive import archive_of
from consistency.report.blocks import BLOCKS
from consistency.report.publish import publish
from consistency.report.release import licence_of, release
from consistency.report.verification import verify_published
from consistency.stages.report import make_report

pytestmark = pytest.mark.usefixtures("handlers")

RATES = SMALL.replace("steps: 60,", "steps: 60, evaluation_ema: [0.9, 0.9999],")
CHECK = ["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"]


def made(folder: Path, text: str = SMALL) -> Job:
    """A finished study in a checkout's folders, and its page."""
    study = make_study(folder / "config/studies", text=text)
    job = Job(study, StudyPaths("small", folder / "results"))
    make_results(job)
    make_report(job)
    publish(job, folder / "docs/results", folder / "archives")
    return job


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    made(folder)
    return folder


@pytest.fixture
def home(published: Path, tmp_path: Path) -> Path:
    """A checkout of one's own with a published study."""
    return Path(shutil.copytree(published, tmp_path / "home"))


def job_of(home: Path) -> Job:
    return Job(make_study(home / "config/studies"), StudyPaths("small", home / "results"))


def again(home: Path) -> Path:
    """Publish once more. Returns the page."""
    publish(job_of(home), home / "docs/results", home / "archives")
    return home / "docs/results/small/README.md"


def faults(home: Path, study: Study | None = None) -> dict[str, str]:
    """The faults by file and artifact."""
    findings = verify_published(home / "docs/results/small", study or job_of(home).study)
    return {finding.artifact: "\n".join(finding.faults) for finding in findings if finding.faults}


def test_a_release_has_students_a_model_card_and_what_it_rests_on(home: Path, tmp_path: Path) -> None:
    job = job_of(home)
    release(job, home / "archives", tmp_path / "release")
    folder = tmp_path / "release/small"
    students = {f"{run}-seed{seed}.safetensors" for run, seed in job.study.trainings}
    assert students | {"README.md", "SHA256SUMS", "cards.json", "table.csv"} <= {path.name for path in folder.iterdir()}
    subprocess.run(CHECK, cwd=folder, check=True)
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["license"] == licence_of(job.study) == "mit"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (named,) = re.findall(r"load_student\(.(.+).\)", code)
    assert named in students
    assert text.count("<!-- begin:") == text.count("<!-- end -->") > 3
    assert "**which is not FID**" in text
    before = contents(folder)
    release(job, home / "archives", tmp_path / "release")
    assert contents(folder) == before


def test_an_unfinished_study_is_not_released(home: Path, tmp_path: Path) -> None:
    job = job_of(home)
    job.card("report").unlink()
    assert "not consistent" in mistake(release, job, home / "archives", tmp_path / "release")
    assert not (tmp_path / "release").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def vouch(folder: Path) -> None:
    """Act as a writer who changes SHA256SUMS too."""
    names = sorted({path.name for path in folder.iterdir()} - {"README.md", "SHA256SUMS"})
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_page_holds_all_that_its_numbers_come_from(published: Path) -> None:
    folder, report = published / "docs/results/small", published / "results/small/report"
    tables = {"scores.csv", "table.csv", "speedup.csv", "paired.csv", "summary.json"}
    figures = {path.name for path in (report / "figures").glob("*.png")}
    assert {path.name for path in folder.iterdir()} == tables | figures | {
        *("coefficients.csv", "cards.json", "SHA256SUMS", "README.md")
    }
    for name in tables:
        assert (folder / name).read_bytes() == (report / name).read_bytes()
    centred = {"s_centred", "s_centred_se", "determined_centred"}
    assert set(pd.read_csv(folder / "coefficients.csv")) == centred | {"times", "l", "l_se", "s", "s_se", "determined"}
    assert subprocess.run(CHECK, cwd=folder, capture_output=True).returncode == 0
    page = (folder / "README.md").read_text()
    assert page.startswith("# small: A small study\n")
    assert re.findall(r"<!-- begin: (.*) -->", page) == list(BLOCKS)
    assert "N = 96; seeds 0, 1." in page
    assert "| `analytic` | `ctm` | alignment error | " in page
    assert len(figures) == page.count("](") - 1
    assert not re.search(r"\bnan\b", page, re.I)


def test_cards_name_neither_host_nor_user_nor_folders(home: Path) -> None:
    command = f"python -m consistency report --study {home}/small.yaml --state=/mnt/x --results ../y/z"
    edit_card(home / "results/small/report/card.json", lambda card: card.update(command=command))
    again(home)
    text = (home / "docs/results/small/cards.json").read_text()
    cards = json.loads(text)
    assert (
        cards["cards"]["report"]["command"] == "python -m consistency report --study small.yaml --state=x --results z"
    )
    assert cards["cards"]["student ctm seed 0"]["outputs"].keys() >= {"students/ctm/seed0/student.safetensors"}
    assert len(cards["machines"]) == len(cards["packages"]) == 1
    assert cards["archive"] is None
    for secret in (f'"{platform.node()}"', getpass.getuser() + "/", str(home), '"host"', '"slurm_job"', '"/'):
        assert secret not in text


def test_publishing_again_changes_nothing(home: Path) -> None:
    before = contents(home / "docs/results/small")
    again(home)
    assert contents(home / "docs/results/small") == before


def test_a_page_of_ones_own_keeps_its_prose_and_has_the_figures_it_names(home: Path) -> None:
    page = home / "docs/results/small/README.md"
    prose = "# Mine\n\nWords.\n\n<!-- begin: final fd -->\nold\n<!-- end -->\n\n![x](curves_fd.png) ../other/y.png\n"
    page.write_text(prose)
    (page.parent / "ema.csv").write_text("of an earlier study\n")
    (page.parent / "notes.csv").write_text("processor,difference\nother,0.5\n")
    text = again(home).read_text()
    assert re.sub(r"(?s)(final fd -->).*?(<!-- end)", r"\1\nold\n\2", text) == prose
    assert "| `ctm` | " in text
    assert [path.name for path in page.parent.glob("*.png")] == ["curves_fd.png"]
    assert not (page.parent / "ema.csv").exists()
    assert "notes.csv" in (page.parent / "SHA256SUMS").read_text()
    assert faults(home) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- begin: finals -->\n<!-- end -->\n", "unknown block 'finals'; did you mean 'final"),
        ("<!-- begin: paired -->\n", "a block that does not end"),
        ("![x](curves.png)\n", r"names curves\.png; the report has coefficients\.png, "),
    ],
)
def test_a_mistake_in_the_page_is_one_line_and_nothing_is_written(home: Path, text: str, said: str) -> None:
    (home / "docs/results/small/README.md").write_text(text)
    before = contents(home / "docs/results/small")
    assert re.search(said, mistake(again, home))
    assert contents(home / "docs/results/small") == before


def test_ema_rates_have_a_table_and_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    job = made(tmp_path, RATES.replace("{baseline: {trajectory: ctm}}", "{}"))
    folder = tmp_path / "docs/results/small"
    assert set(pd.read_csv(folder / "ema.csv").ema) == {0.9, 0.9999, job.study.students["ctm"].ema_rate}
    blocks = re.findall(r"<!-- begin: (.*) -->", (folder / "README.md").read_text())
    assert blocks == [name for name in BLOCKS if name not in ("verdicts", "speed-up", "final score", "paired")]
    assert faults(tmp_path, job.study) == {}
    (folder / "README.md").write_text("<!-- begin: paired --><!-- end -->\n")
    publish(job, tmp_path / "docs/results", tmp_path / "archives")
    assert "\nNot measured in this study.\n" in (folder / "README.md").read_text()


def test_unfinished_and_changed_results_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(home / "docs/results/small")
    (home / "results/small/students/ctm/seed1/card.json").unlink()
    assert "are not consistent; the reasons are above" in mistake(again, home)
    assert re.search(r"student ctm seed 1 +missing: students/ctm/seed1/card\.json", capsys.readouterr().out)
    assert contents(home / "docs/results/small") == before


def test_an_archive_of_these_results_is_named(home: Path) -> None:
    job = job_of(home)
    path = archive_of(job, home / "archives")
    path.parent.mkdir()
    shutil.make_archive(str(path.with_suffix("")), "zip", home, "results")
    cards = json.loads((again(home).parent / "cards.json").read_text())
    assert cards["archive"] == {"name": path.name, "sha256": sha256(path)}
    edit_card(job.card("report"), lambda card: card.update(seconds=1))  # results made again since
    assert json.loads((again(home).parent / "cards.json").read_text())["archive"] is None


def test_a_changed_missing_or_further_file_is_found(home: Path) -> None:
    folder = home / "docs/results/small"
    replace_in(folder / "table.csv", "0.0", "0.1")
    (folder / "losses.png").unlink()
    (folder / "more.csv").write_text("x\n1\n")
    found = faults(home)
    assert found.keys() == {"table.csv", "losses.png", "more.csv"}
    assert found["table.csv"].startswith("tampered with: not the file of SHA256SUMS")


def test_what_the_cards_do_not_have_is_found_whatever_sha256sums_says(home: Path) -> None:
    folder = home / "docs/results/small"
    (folder / "summary.json").unlink()
    shutil.copy(folder / "losses.png", folder / "mine.png")
    replace_in(folder / "README.md", "(losses.png)", "(gone.png)")
    vouch(folder)
    again = "run `python -m consistency publish --study FILE` again"
    assert faults(home) == {
        "summary.json": f"missing: {again}",
        "mine.png": "tampered with: no card names this file",
        "README.md": f"gone.png is missing\nlosses.png is not named: {again}\nmine.png is not named: {again}",
    }


def test_a_table_of_another_version_is_one_line(home: Path) -> None:
    folder = home / "docs/results/small"
    replace_in(folder / "speedup.csv", "value,", "speed,")
    vouch(folder)
    said = mistake(verify_published, folder, job_of(home).study)
    assert "speedup.csv has other columns than this version's report" in said


def test_a_number_changed_with_its_digest_is_found(home: Path) -> None:
    folder = home / "docs/results/small"
    table = pd.read_csv(folder / "paired.csv")
    table.assign(value=table.value * (1 + 1e-6)).to_csv(folder / "paired.csv", index=False)
    vouch(folder)
    found = faults(home)
    assert found.keys() == {"paired.csv"}
    assert "no card names this file" in found["paired.csv"]
    assert "does not follow from scores.csv" in found["paired.csv"]
    # And with its card's digest too.
    cards = json.loads((folder / "cards.json").read_text())
    cards["cards"]["report"]["outputs"]["report/paired.csv"] = sha256(folder / "paired.csv")
    (folder / "cards.json").write_text(json.dumps(cards))
    vouch(folder)
    assert faults(home)["paired.csv"].startswith("does not follow from scores.csv: ")


def test_a_changed_block_is_found_and_changed_prose_is_not(home: Path) -> None:
    page = home / "docs/results/small/README.md"
    replace_in(page, "# small", "# My small")
    assert faults(home) == {}
    replace_in(page, "| `ctm` | ", "| `ctm` | 1")
    assert faults(home) == {"README.md": "block 'final fd' is not what publish writes"}


def test_another_study_file_is_found_and_the_key_named(home: Path) -> None:
    text = SMALL.replace("samples: 64", "samples: 65").replace("  ctm: {preconditioning: ctm}", "  ctm: {}")
    found = faults(home, make_study(home / "config/studies", text=text.replace("seeds: [0, 1]", "seeds: [0]")))
    assert "made with other settings (coefficients.samples: there 64, here 65)" in found["coefficients"]
    assert "student ctm seed 1" not in found  # more seeds than the file names are no other setting
    assert "dataset" not in found


def test_a_page_from_before_a_key_was_added_is_consistent(home: Path) -> None:
    folder = home / "docs/results/small"
    cards = json.loads((folder / "cards.json").read_text())
    del cards["study"]["sampling"]["first_seed"]
    for card in cards["cards"].values():
        card["key"] = "0" * 16  # of the settings as they were
    (folder / "cards.json").write_text(json.dumps(cards))
    vouch(folder)
    assert faults(home) == {}


def test_the_verb_publishes_and_verifies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    shutil.rmtree("docs")
    assert main(["publish", "--study", "small"]) == 0
    assert main(["verify", "docs/results/small"]) == 0
    replace_in(Path("docs/results/small/cards.json"), '"key": "', '"key": "0')
    assert main(["verify", "docs/results/small"]) == 2


def test_a_damaged_cards_file_is_one_line(home: Path) -> None:
    folder = home / "docs/results/small"
    (folder / "cards.json").write_text("{}")
    vouch(folder)
    assert "cards.json: " in mistake(verify_published, folder, job_of(home).study)
