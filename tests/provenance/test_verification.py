"""Findings of verify in a study's folder: changed, missing and stale files, and those of another study."""

import shutil
from pathlib import Path

import pytest
from tests.fake_results import SMALL, UNTAUGHT, edit_card, make_finished, make_study

from consistency.__main__ import main
from consistency.base.errors import UserError
from consistency.base.files import sha256, write_json
from consistency.config.study import Study
from consistency.provenance.verification import verify


@pytest.fixture
def root(finished_small: Path, tmp_path: Path) -> Path:
    """A finished study of one's own."""
    shutil.copytree(finished_small, tmp_path / "copy")
    return tmp_path / "copy/results/small"


def faults(root: Path, study: Study | None = None) -> dict[str, str]:
    """The faults by artifact."""
    findings = verify(root, study or make_study(root.parents[1]))
    return {finding.artifact: "\n".join(finding.faults) for finding in findings if finding.faults}


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file, and not its length."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def made_again(card: Path, name: str) -> None:
    """Act as if the stage had been run again and had written something else."""
    flip(card.parent / name)
    edit_card(card, lambda content: content["outputs"].update({name: sha256(card.parent / name)}))


def test_a_finished_study_is_consistent(root: Path) -> None:
    labels = [finding.artifact for finding in verify(root, make_study(root.parents[1]))]
    assert faults(root) == {}
    assert labels[:4] == ["dataset", "teacher", "extractor", "coefficients"]
    assert labels[-1] == "report"
    assert len(labels) == 5 + 4 + 5 + 5


def test_flows_are_judged_like_everything_else(tmp_path: Path) -> None:
    job = make_finished(tmp_path, f"{UNTAUGHT}flows: {{}}\n")
    study, layout = job.study, job.paths
    assert faults(layout.root, study) == {}
    finer = make_study(tmp_path / "finer", text=f"{UNTAUGHT}flows: {{times: 30}}\n")
    found = faults(layout.root, finer)
    assert found.keys() == {"flows", "report"}
    assert "(flows.times: there 24, here 30)" in found["flows"]
    none = make_study(tmp_path / "none", text=UNTAUGHT)
    assert verify(layout.root, none)[-1].said == "not checked: 6 files of flows"
    shutil.rmtree(layout.flows)
    assert "flows" not in faults(layout.root, none)
    assert faults(layout.root, study)["flows"].startswith("missing: flows/card.json")


def test_receipts_and_other_tools_notes_are_no_strays(root: Path) -> None:
    for name in ("track/tracked.json", "plan/student/ctm/seed0.json"):
        write_json(root / name, {})
    (root / "samples/ctm/seed0/.snakemake_timestamp").touch()
    (root / "teacher/.gitignore").write_text("/teacher.safetensors\n")
    assert faults(root) == {}


@pytest.mark.parametrize(
    ("name", "artifact"),
    [
        ("dataset/images.npy", "dataset"),
        ("teacher/teacher.safetensors", "teacher"),
        ("coefficients/coefficients.npz", "coefficients"),
        ("students/ctm/seed1/snapshots/step-000020.safetensors", "student ctm seed 1"),
        ("samples/analytic/seed0/nfe1.npy", "samples analytic seed 0"),
        ("scores/calibration.csv", "calibration"),
        ("scores/ctm/seed1.csv", "scores ctm seed 1"),
        ("report/figures/curves.svg", "report"),
    ],
)
def test_a_flipped_bit_and_a_missing_file_are_found(root: Path, name: str, artifact: str) -> None:
    for position in (0, -1):
        flip(root / name, position)
        found = faults(root)
        assert found.keys() == {artifact}
        assert f"tampered with: {name}" in found[artifact]
        flip(root / name, position)
    (root / name).unlink()
    found = faults(root)
    assert found.keys() == {artifact}
    assert f"missing: {name}" in found[artifact]


def test_a_file_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        if path.name == "teacher.safetensors":
            raise PermissionError(13, "Permission denied")
        return sha256(path)

    monkeypatch.setattr("consistency.provenance.verification.sha256", refuse)
    assert "teacher/teacher.safetensors is unreadable (Permission denied)" in faults(root)["teacher"]


def test_a_file_that_no_card_names_is_named(root: Path) -> None:
    (root / "teacher/extra.txt").write_text("x")
    assert faults(root) == {"teacher/extra.txt": "has no card: nothing in this study made it"}


def test_a_key_or_setting_changed_in_a_card_is_found(root: Path) -> None:
    edit_card(root / "report/card.json", lambda card: card.update(key="0" * 16))
    edit_card(root / "coefficients/card.json", lambda card: card["settings"]["coefficients"].update(samples=4096))
    found = faults(root)
    assert found.keys() == {"coefficients", "report"}
    assert "(coefficients.samples: there 4096, here 64)" in found["coefficients"]


def test_an_artifact_in_the_place_of_another_is_found(root: Path) -> None:
    shutil.rmtree(root / "students/ctm/seed1")
    shutil.copytree(root / "students/analytic/seed1", root / "students/ctm/seed1")
    assert "made with other settings" in faults(root)["student ctm seed 1"]


def test_a_card_of_another_study_is_found(root: Path) -> None:
    edit_card(root / "dataset/card.json", lambda card: card.update(study="other"))
    assert faults(root) == {"dataset": "stale: made for study 'other'; run its stage again"}


@pytest.mark.parametrize(
    ("line", "new", "stale", "fresh"),
    [
        ("samples: 64", "samples: 65", {"coefficients", "student analytic seed 0"}, "teacher"),
        ("  ctm: {preconditioning: ctm}", "  ctm: {preconditioning: bcm}", {"student ctm seed 0"}, "dataset"),
        ("[0, 1]", "[0, 1, 2]", {"student analytic seed 2", "scores ctm seed 2", "report"}, "student ctm seed 0"),
    ],
)
def test_a_changed_study_file_makes_stale_what_depends_on_it(
    root: Path, line: str, new: str, stale: set[str], fresh: str
) -> None:
    found = faults(root, make_study(root.parents[1] / "changed", text=SMALL.replace(line, new)))
    assert stale <= found.keys()
    assert fresh not in found


def test_what_was_taken_out_of_the_study_is_counted(root: Path) -> None:
    text = SMALL.replace("seeds: [0, 1]", "seeds: [0]").replace("  analytic: {preconditioning: analytic}\n", "")
    fewer = make_study(root.parents[1] / "fewer", text=text)
    assert faults(root, fewer).keys() == {"report"}
    said = verify(root, fewer)[-1].said
    assert said == "not checked: 44 files of analytic seed 0, analytic seed 1, coefficients, ctm seed 1"


def test_what_was_made_from_an_older_parent_is_stale(root: Path) -> None:
    made_again(root / "students/ctm/seed1/card.json", "student.safetensors")
    found = faults(root)
    assert found.keys() == {"samples ctm seed 1", "scores ctm seed 1"}
    assert (
        "no card names the students/ctm/seed1/student.safetensors that it was made from" in found["samples ctm seed 1"]
    )


def test_a_student_made_from_an_older_student_is_stale(tmp_path: Path) -> None:
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, predictor]")
    job = make_finished(tmp_path, text.replace("gc, mu: 0.5}", "gc, predictor: {run: ic, step: 20}}"))
    root = job.paths.root
    assert faults(root, job.study) == {}
    made_again(root / "students/ic/seed1/card.json", "snapshots/step-000020.safetensors")
    assert "students/ic/seed1/snapshots" in faults(root, job.study)["student gc seed 1"]


def test_a_missing_card_is_named_and_nothing_vouches_for_its_files(root: Path) -> None:
    (root / "dataset/card.json").unlink()
    found = faults(root)
    assert found["dataset"].startswith("missing: dataset/card.json")
    assert "no card names the dataset/images.npy" in found["teacher"]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"x"', "{}", "\x00", '{"outputs": {"x": 3}}'])
def test_a_damaged_card_is_one_line(root: Path, text: str) -> None:
    (root / "teacher/card.json").write_text(text)
    said = faults(root)["teacher"]
    assert said.startswith("damaged: teacher/card.json: ")
    assert "\n" not in said


def test_the_verb_takes_the_study_file_beside_the_results(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root.parents[1] / "small.yaml"
    assert main(["verify", str(root), "--study", str(file)]) == 0
    assert capsys.readouterr().out.count("consistent") == 19
    assert main(["verify", str(root)]) == 2
    assert "has no study file" in capsys.readouterr().err
    (root.parents[1] / "config/studies").mkdir(parents=True)
    shutil.copy(file, root.parents[1] / "config/studies")
    assert main(["verify", str(root)]) == 0
    flip(root / "report/report.html")
    capsys.readouterr()
    assert main(["verify", str(root)]) == 2
    said = capsys.readouterr()
    assert "report                   tampered with: report/report.html is" in said.out
    assert said.err == f"error: {root}: 1 of 19 are not consistent; the reasons are above\n"


def test_what_is_no_folder_is_one_line(root: Path) -> None:
    with pytest.raises(UserError, match="is not a folder: give a study's results"):
        verify(root.parent / "nowhere", make_study(root.parents[1]))
