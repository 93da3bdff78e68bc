"""What verify says of a study's folder: consistent, stale, tampered with, missing, and what it refuses."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fake_results import SMALL, UNTAUGHT, make_report, make_results, make_student, make_study

from consistency.archive import verify
from consistency.errors import UserError
from consistency.files import sha256, write_json
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.study import Study, settings_key
from consistency.training.checkpoint import save_denoiser
from consistency.verification import Finding, print_findings, require_consistent


@pytest.fixture
def root(finished_small: Path, tmp_path: Path) -> Path:
    """A finished study of one's own."""
    shutil.copytree(finished_small, tmp_path / "copy")
    return tmp_path / "copy/results/small"


@pytest.fixture
def study(root: Path) -> Study:
    return make_study(root.parents[1])


def states(root: Path, study: Study | None = None) -> dict[str, str]:
    """The state of each artifact that is not consistent."""
    return {finding.artifact: finding.state for finding in verify(root, study) if finding.state != "consistent"}


def notes(root: Path, artifact: str, study: Study | None = None) -> str:
    (found,) = [finding for finding in verify(root, study) if finding.artifact == artifact]
    return "\n".join(note for _, note in found.faults)


def edit_card(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    card = json.loads(path.read_text())
    change(card)
    write_json(path, card)


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file, and not its length."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# --- consistent


def test_a_finished_study_is_consistent_anywhere(root: Path, study: Study) -> None:
    assert states(root) == {}
    assert states(root, study) == {}
    labels = [finding.artifact for finding in verify(root)]
    assert labels[:4] == ["dataset", "teacher", "extractor", "coefficients"]
    assert labels[-1] == "report"
    assert len(labels) == 5 + 4 + 5 + 5


def test_receipts_and_other_tools_notes_are_no_strays(root: Path) -> None:
    for name in (
        "track/tracked.json",
        "plan/teacher.json",
        "plan/student/ctm/seed0.json",
        "inputs/ctm/seed0/coefficients.json",
    ):
        write_json(root / name, {})
    (root / "samples/ctm/seed0/.snakemake_timestamp").touch()
    (root / "teacher/.gitignore").write_text("/teacher.safetensors\n")
    assert states(root) == {}


def test_flows_are_judged_like_everything_else(tmp_path: Path) -> None:
    study = make_study(tmp_path, text=f"{UNTAUGHT}flows: {{}}\n")
    layout = Layout(study.name, tmp_path / "results", tmp_path / "state")
    make_results(study, layout)
    make_report(study, layout)
    assert states(layout.root, study) == {}
    assert [finding.artifact for finding in verify(layout.root)][-2:] == ["flows", "report"]
    finer = make_study(tmp_path / "finer", text=f"{UNTAUGHT}flows: {{times: 30}}\n")
    assert states(layout.root, finer).keys() == {"flows", "report"}
    assert "flows.times: there 24, here 30" in notes(layout.root, "flows", finer).replace("(", "").replace(")", "")
    flip(layout.flows / "toy.npz")
    assert states(layout.root) == {"flows": "tampered"}
    make_student(study, layout, "gc", 1, level=2.0)
    flip(layout.student_file("gc", 1))
    edit_card(
        layout.student("gc", 1) / "card.json",
        lambda card: card["outputs"].update({"student.safetensors": sha256(layout.student_file("gc", 1))}),
    )
    assert "was made from another students/gc/seed1/student.safetensors" in notes(layout.root, "flows")
    shutil.rmtree(layout.flows)
    assert states(layout.root)["flows"] == "missing"


def test_staleness_goes_from_student_to_student(tmp_path: Path) -> None:
    """A predictor's name may come after that of the student made from it."""
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, predictor]").replace(
        "  gc: {coupling: gc, mu: 0.5}",
        "  gc: {coupling: gc, mu: 0.5, predictor: {run: ic, step: 20}}\n"
        "  again: {coupling: gc, mu: 0.5, predictor: {run: gc}}",
    )
    study = make_study(tmp_path, text=text)
    layout = Layout(study.name, tmp_path / "results", tmp_path / "state")
    make_results(study, layout)
    make_student(study, layout, "again", 0)
    make_student(study, layout, "again", 1)
    make_report(study, layout)
    assert states(layout.root, study) == {}
    card = layout.student("ic", 1) / "card.json"
    make_student(study, layout, "ic", 1, level=2.0)
    name = "snapshots/step-000020.safetensors"
    content = json.loads(card.read_text())
    flip(layout.student("ic", 1) / name)
    edit_card(card, lambda card: card["outputs"].update({name: sha256(layout.student("ic", 1) / name)}))
    assert content["outputs"][name] != json.loads(card.read_text())["outputs"][name]
    found = states(layout.root)
    assert {
        f"{stage} {run} seed 1" for stage in ("student", "samples", "scores") for run in ("gc", "again")
    } <= found.keys()
    assert "student gc seed 0" not in found and "student ot seed 1" not in found
    assert "student gc seed 1, which is stale" in notes(layout.root, "student again seed 1")


def test_a_student_made_from_one_of_other_settings_is_stale(tmp_path: Path) -> None:
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, predictor, learning_rate]")
    text = text.replace("gc, mu: 0.5}", "gc, predictor: {run: ic}}")
    study = make_study(tmp_path, text=text)
    layout = Layout(study.name, tmp_path / "results", tmp_path / "state")
    make_results(study, layout)
    assert "student gc seed 0" not in states(layout.root)
    other = make_study(tmp_path / "other", text=text.replace("{coupling: ic}", "{coupling: ic, learning_rate: 0.01}"))
    make_student(other, layout, "ic", 0)
    assert "made with other settings than student ic seed 0 (student.learning_rate" in notes(
        layout.root, "student gc seed 0"
    )


# --- tampered


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
@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_bit_is_found(root: Path, name: str, artifact: str, position: int) -> None:
    flip(root / name, position)
    assert states(root) == {artifact: "tampered"}
    assert name in notes(root, artifact)


def test_a_setting_changed_in_a_card_is_found(root: Path) -> None:
    edit_card(root / "coefficients/card.json", lambda card: card["settings"]["coefficients"].update(samples=4096))
    assert states(root)["coefficients"] == "tampered"
    assert "key" in notes(root, "coefficients")


def test_a_changed_resolved_study_is_found(root: Path) -> None:
    edit_card(root / "report/card.json", lambda card: card["resolved"].update(title="Another"))
    assert states(root) == {"report": "tampered"}


def test_an_artifact_put_in_the_place_of_another_is_found(root: Path) -> None:
    shutil.rmtree(root / "students/ctm/seed1")
    shutil.copytree(root / "students/analytic/seed1", root / "students/ctm/seed1")
    assert states(root)["students/ctm/seed1/card.json"] == "tampered"
    assert "student analytic seed 1" in notes(root, "students/ctm/seed1/card.json")


def test_weights_that_contradict_their_card_are_found(
    root: Path, study: Study, make_denoiser: Callable[..., Denoiser]
) -> None:
    path, card = root / "students/ctm/seed0/student.safetensors", root / "students/ctm/seed0/card.json"

    def claim(**metadata: Any) -> str:
        save_denoiser(path, make_denoiser(), metadata)
        edit_card(card, lambda content: content["outputs"].update({path.name: sha256(path)}))
        return notes(root, "student ctm seed 0")

    parents = {"teacher.safetensors": sha256(root / "teacher/teacher.safetensors")}
    key = study.key("student", "ctm", 0)
    assert claim(key=key, run="ctm", seed=0, parents=parents) == ""
    assert "says key" in claim(key="0" * 16)
    assert "says run 'analytic'" in claim(key=key, run="analytic")
    assert "another parent teacher.safetensors" in claim(key=key, parents={"teacher.safetensors": "0" * 64})


def test_dataset_json_must_know_its_images(root: Path) -> None:
    path = root / "dataset/dataset.json"
    write_json(path, json.loads(path.read_text()) | {"sha256": "0" * 64})
    edit_card(root / "dataset/card.json", lambda card: card["outputs"].update({"dataset.json": sha256(path)}))
    assert "another digest of images.npy" in notes(root, "dataset")


# --- stale


def made_again(card: Path, name: str) -> None:
    """As if the stage had been run again and had written something else."""
    flip(card.parent / name)
    edit_card(card, lambda content: content["outputs"].update({name: sha256(card.parent / name)}))


def test_what_was_made_from_an_older_parent_is_stale(root: Path) -> None:
    made_again(root / "students/ctm/seed1/card.json", "student.safetensors")
    assert states(root) == {"samples ctm seed 1": "stale", "scores ctm seed 1": "stale", "report": "stale"}
    assert "another students/ctm/seed1/student.safetensors" in notes(root, "samples ctm seed 1")
    assert "scores ctm seed 1, which is stale" in notes(root, "report")


def test_another_teacher_makes_all_stale_but_the_data(root: Path) -> None:
    made_again(root / "teacher/card.json", "teacher.safetensors")
    fresh = {finding.artifact for finding in verify(root)} - states(root).keys()
    assert fresh == {"dataset", "extractor", "teacher"}


def test_a_parent_with_other_settings_makes_stale(root: Path) -> None:
    def change(card: dict[str, Any]) -> None:
        card["settings"]["coefficients"]["samples"] = 4096
        card["key"] = settings_key("coefficients", None, card["settings"])

    edit_card(root / "coefficients/card.json", change)
    found = states(root)
    assert {"student analytic seed 0", "student analytic seed 1", "report"} <= found.keys()
    assert "student ctm seed 0" not in found
    said = notes(root, "student analytic seed 0")
    assert "other settings than coefficients (coefficients.samples: there 4096, here 64)" in said


def test_a_file_in_place_of_a_missing_parent_must_be_the_one(root: Path) -> None:
    (root / "dataset/card.json").unlink()
    flip(root / "dataset/images.npy")
    found = states(root)
    assert found["dataset"] == "missing"
    assert found["dataset/"] == "no card"
    assert found["teacher"] == "stale"


CHANGES = {
    "{times: 24, samples: 64}": ("{times: 24, samples: 65}", {"coefficients", "student analytic seed 0"}, "teacher"),
    "seeds: [0, 1]": ("seeds: [0]", {"student ctm seed 1", "scores analytic seed 1", "report"}, "student ctm seed 0"),
    "title: A small study": ("title: Another", {"report"}, "scores ctm seed 1"),
    "  ctm: {preconditioning: ctm}": ("  ctm: {preconditioning: bcm}", {"student ctm seed 0"}, "dataset"),
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_changed_study_file_makes_stale_what_depends_on_it(root: Path, line: str) -> None:
    new, stale, fresh = CHANGES[line]
    changed = make_study(root.parents[1], text=SMALL.replace(line, new))
    found = states(root, changed)
    assert set(found.values()) == {"stale"}
    assert stale <= found.keys()
    assert fresh not in found
    assert states(root) == {}


def test_a_further_seed_of_the_study_file_is_missing(root: Path) -> None:
    more = make_study(root.parents[1], text=SMALL.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    found = states(root, more)
    assert found["student analytic seed 2"] == found["scores ctm seed 2"] == "missing"
    make_student(more, Layout("small", root.parent), "ctm", 2)
    assert "student ctm seed 2" not in states(root, more)


# --- missing, without a card, damaged


def test_what_was_not_pulled_is_missing(root: Path) -> None:
    shutil.rmtree(root / "dataset")
    (root / "samples/teacher/heun.npy").unlink()
    shutil.rmtree(root / "report")
    assert states(root) == {"dataset": "missing", "samples of the teacher": "missing", "report": "missing"}


def test_one_card_alone_is_no_crash(root: Path) -> None:
    for path in [path for path in root.rglob("*") if path.is_file() and path != root / "teacher/card.json"]:
        path.unlink()
    found = states(root)
    assert set(found.values()) == {"missing"}
    assert len(found) == 19


def test_a_file_that_nobody_made_is_named(root: Path) -> None:
    for k in range(5):
        (root / f"teacher/extra{k}.txt").write_text("x")
    (root / "odd.bin").write_bytes(b"x")
    assert states(root) == {"teacher/": "no card", "./": "no card"}
    assert "extra0.txt, extra1.txt, extra2.txt and 2 more" in notes(root, "teacher/")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"x"', "{}", "\x00"])
def test_a_damaged_card_is_one_line(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "teacher/card.json").write_text(text)
    findings = verify(root)
    assert {finding.artifact: finding.state for finding in findings}["teacher/card.json"] == "damaged"
    print_findings(findings)
    assert len([line for line in capsys.readouterr().out.splitlines() if "teacher/card.json" in line]) == 1


def test_settings_nested_without_end_are_no_crash(root: Path) -> None:
    depth = 900  # as deep as JSON is still read
    nested = json.loads('{"a":' * depth + "1" + "}" * depth)
    path = root / "teacher/card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": nested}))
    assert {"teacher", "teacher/card.json"} & states(root).keys()


def test_a_file_that_cannot_be_read_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consistency.verification import Folder

    opened = Folder.open

    def refuse(self: Folder, name: str) -> Any:
        if name == "teacher/teacher.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(self, name)

    monkeypatch.setattr(Folder, "open", refuse)
    assert states(root) == {"teacher": "damaged"}
    assert "Permission denied" in notes(root, "teacher")


# --- hostile


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "snapshots/../../x"])
@pytest.mark.parametrize("files", ["inputs", "outputs"])
def test_a_name_that_leads_outside_is_refused(
    root: Path, name: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))
    edit_card(root / "students/ctm/seed0/card.json", lambda card: card[files].update({name: "0" * 64}))
    opened.clear()
    assert states(root)["students/ctm/seed0/card.json"] == "refused"
    assert not [path for path in opened if "passwd" in path or ".." in path]


def test_links_are_refused_and_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(root / "teacher/teacher.safetensors", outside)
    (root / "teacher/teacher.safetensors").symlink_to(outside)
    (root / "elsewhere").symlink_to("/etc")
    assert states(root) == {"teacher": "refused", "elsewhere": "refused"}
    assert "is a link to" in notes(root, "teacher")


def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "teacher/pipe")
    assert states(root) == {"teacher/pipe": "refused"}


def test_names_and_cards_write_no_control_characters(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / os.fsdecode(b"teacher/\x1b[2J\xff.txt")).write_text("x")
    edit_card(root / "dataset/card.json", lambda card: card["outputs"].update({"\x1b[2J": "bad"}))
    print_findings(verify(root))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    printed.encode()


# --- what is no study


def test_what_is_no_study_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no card of any stage: give a study's folder"):
        verify(root.parent)
    with pytest.raises(UserError, match="is not there"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a whole archive"):
        verify(root / "report/report.html")


def test_the_error_counts_what_is_wrong() -> None:
    require_consistent("x", [Finding("a")])
    findings = [Finding("a"), Finding("b", [("stale", "")]), Finding("c", [("stale", ""), ("tampered", "")])]
    with pytest.raises(UserError, match=r"^x: 1 tampered, 1 stale of 3; "):
        require_consistent("x", findings)


def test_the_verb_ends_with_0_only_if_all_is_consistent(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from consistency.__main__ import main

    file = root.parents[1] / "small.yaml"
    assert main(["verify", str(root), "--study", str(file)]) == 0
    assert capsys.readouterr().out.count("consistent") == 19
    flip(root / "report/report.html")
    assert main(["verify", str(root)]) == 2
    said = capsys.readouterr()
    assert "report                   tampered    report/report.html has sha256" in said.out
    assert said.err == f"error: {root}: 1 tampered of 19; the table says what and why\n"


def test_the_study_file_may_say_more_than_the_card_did(root: Path) -> None:
    # Cards outlive the code: a card whose study has no longer a valid form is judged by what it says all the same.
    edit_card(root / "report/card.json", lambda card: card.update(resolved=None))
    for path in root.rglob("*card.json"):
        edit_card(path, lambda card: card.update(resolved=None))
    assert states(root) == {}
    assert yaml.safe_load(SMALL)["name"] == root.name
