"""Cards: what one says, where it lies, and that it says the same of the same study anywhere."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Tiny, changed
from tests.fake_results import make_study

from consistency.base.errors import UserError
from consistency.base.files import sha256, write_bytes
from consistency.config.job import Job
from consistency.config.keys import key_of, settings_key
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.config.study import Study
from consistency.data.resources import registry
from consistency.provenance.card import Card, other_settings, read_card
from consistency.provenance.graph import outputs


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


@pytest.fixture
def layout(study: Study, tmp_path: Path) -> StudyPaths:
    return StudyPaths(study.name, tmp_path / "results", tmp_path / "state")


Write = Callable[..., dict[str, Any]]


@pytest.fixture
def write(study: Study, layout: StudyPaths) -> Write:
    """Write the card of a student whose checkpoint and parents are a few bytes; returns it."""

    def written(run: str = "ctm", **options: Any) -> dict[str, Any]:
        job = Job(study, layout, run, 1)
        for stage in ("dataset", "teacher", "coefficients"):
            for path in outputs(stage, job):
                write_bytes(path, b'{"sha256": "of the images"}' if path == layout.facts else path.name.encode())
            Card(job.of(), stage).write()
        made = job.weights(step=20)
        write_bytes(made, b"weights")
        Card(job, "student").write([made], **options)
        card: dict[str, Any] = json.loads(job.card("student").read_text())
        return card

    return written


def test_a_card_says_what_made_it_from_what_and_where(write: Write, study: Study) -> None:
    card = write()
    assert card["command"].startswith("python -m consistency")
    assert card["git"].keys() == {"commit", "dirty"}
    assert build_study(card["resolved"]) == study
    assert card["key"] == key_of(study, "student", "ctm", 1) == settings_key("student", 1, card["settings"])
    assert card["seeds"] == {"student": 1}
    assert {"python", "torch", "numpy"} <= card["versions"].keys()
    assert {"host", "processor", "gpus"} <= card["hardware"].keys()
    assert card["seconds"] >= 0


def test_a_card_is_silent_about_the_machines_name_if_the_study_says_so(tiny: Tiny, layout: StudyPaths) -> None:
    job = Job(tiny({"compute": {"name_host": False}}), layout)
    for path in outputs("dataset", job):
        write_bytes(path, b'{"sha256": "of the images"}')
    Card(job, "dataset").write()
    card = json.loads(job.card("dataset").read_text(encoding="utf-8"))
    assert card["hardware"]["host"] == ""
    assert platform.node() not in json.dumps(card["hardware"])


def test_files_have_their_names_on_any_machine(write: Write, layout: StudyPaths) -> None:
    card = write()
    weights = {"teacher/teacher.safetensors": sha256(layout.teacher_weights)}
    assert card["inputs"] == weights | {"dataset/images.npy": "of the images"}
    assert card["outputs"].keys() == {"snapshots/step-000020.safetensors"}
    assert str(layout.results) not in json.dumps({key: card[key] for key in ("inputs", "outputs", "resolved")})


def test_only_a_student_that_reads_the_coefficients_names_them(write: Write, layout: StudyPaths) -> None:
    assert "coefficients/coefficients.npz" not in write()["inputs"]
    assert write("analytic")["inputs"]["coefficients/coefficients.npz"] == sha256(layout.fit)


def test_a_download_has_its_name_and_the_digest_it_was_checked_against(tmp_path: Path) -> None:
    name = "edm-cifar10-32x32-uncond-vp.pkl"
    official = {"teacher": {"kind": "edm", "checkpoint": name}, "noise.sigma_data": 0.5}
    job = Job(build_study(changed(official)), StudyPaths("tiny", tmp_path / "results"))
    Card(job, "teacher").write([])
    assert read_card(job, "teacher")["inputs"] == {f"resources/{name}": registry()[name].sha256}


def test_a_known_digest_is_not_taken_again(write: Write, layout: StudyPaths) -> None:
    known = {layout.teacher_weights: "b" * 64}
    assert write(known=known)["inputs"]["teacher/teacher.safetensors"] == "b" * 64


@pytest.mark.parametrize("parent", ["teacher", "coefficients"])
def test_nothing_begins_on_what_was_made_with_other_settings(
    write: Write, study: Study, layout: StudyPaths, parent: str
) -> None:
    write()
    section = getattr(study, parent)
    update = {"learning_rate": 0.5} if parent == "teacher" else {"probes": 2}
    other = study.model_copy(update={parent: section.model_copy(update=update)})
    key = f"{parent}.{next(iter(update))}: there"
    with pytest.raises(
        UserError, match=rf"results/small/{parent} was made by study 'small' with other settings \({key}"
    ):
        Card(Job(other, layout, "analytic", 1), "student")


def test_what_only_another_name_changes_is_said_to_be_that(study: Study, layout: StudyPaths) -> None:
    card = {"key": "another", "study": "tiny", "settings": Job(study, layout).depends_on("report") | {"name": "tiny"}}
    assert other_settings(card, Job(study, layout), "report") == "made for the study 'tiny', not 'small'"


def test_another_studys_card_is_refused_with_the_first_difference(study: Study, layout: StudyPaths, tiny: Tiny) -> None:
    Card(Job(study, layout), "dataset").write([])
    with pytest.raises(
        UserError,
        match=r"\(dataset\.limit: there None, here 20\): run `python -m consistency dataset --study FILE` again",
    ):
        read_card(Job(tiny(), layout), "dataset")
