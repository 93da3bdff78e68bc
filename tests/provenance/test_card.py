"""Cards: what one says, where it lies, and that it says the same of the same study anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fake_results import make_study

from consistency.base.errors import UserError
from consistency.base.files import sha256, write_bytes
from consistency.config.job import Job
from consistency.config.keys import key_of, settings_key
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.config.study import Study
from consistency.data.resources import registry
from consistency.provenance.card import Card, read_card


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


@pytest.fixture
def layout(study: Study, tmp_path: Path) -> StudyPaths:
    return StudyPaths(study.name, tmp_path / "results", tmp_path / "state")


Write = Callable[..., dict[str, Any]]


@pytest.fixture
def write(study: Study, layout: StudyPaths) -> Write:
    """Write the card of a student whose checkpoint and parent are a few bytes; returns it."""

    def written(**options: Any) -> dict[str, Any]:
        job = Job(study, layout, "ctm", 1)
        made = job.weights(step=20)
        write_bytes(made, b"weights")
        write_bytes(layout.teacher_weights, b"teacher")
        inputs = [layout.teacher_weights]
        Card(job, "student").write(**{"inputs": inputs, "outputs": [made], **options})
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


def test_files_have_their_names_on_any_machine(write: Write, layout: StudyPaths) -> None:
    card = write()
    assert card["inputs"] == {"teacher/teacher.safetensors": sha256(layout.teacher_weights)}
    assert card["outputs"].keys() == {"snapshots/step-000020.safetensors"}
    assert str(layout.results) not in json.dumps({key: card[key] for key in ("inputs", "outputs", "resolved")})


def test_a_download_has_its_name_and_the_digest_it_was_checked_against(write: Write) -> None:
    name = "edm-cifar10-32x32-uncond-vp.pkl"
    card = write(inputs=[], downloads=[name])
    assert card["inputs"] == {f"resources/{name}": registry()[name].sha256}


def test_a_known_digest_is_not_taken_again(write: Write, layout: StudyPaths) -> None:
    images = layout.images  # it is not even there
    assert write(inputs=[images], known={images: "b" * 64})["inputs"] == {"dataset/images.npy": "b" * 64}


def test_another_studys_card_is_refused_with_the_first_difference(
    study: Study, layout: StudyPaths, tiny: Callable[..., Study]
) -> None:
    Card(Job(study, layout), "dataset").write([], [])
    with pytest.raises(UserError, match=r"\(dataset\.limit: there None, here 20\): run `dataset` again"):
        read_card(Job(tiny(), layout), "dataset")
