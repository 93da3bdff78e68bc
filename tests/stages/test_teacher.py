"""The teacher stage with an official checkpoint or a given file: taken as it is, or one clear error. Training:
tests/training."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.conftest import Changes, Tiny, mistake, vouch_for
from tests.edm_writer import write_edm_pickle
from tests.nets.small import ARCHITECTURES, make_denoiser

from consistency.base.errors import UserError
from consistency.base.files import sha256
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.prepared import load_images
from consistency.data.resources import REGISTRY, recorded
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.nets.official import OPENAI
from consistency.provenance.card import read_card
from consistency.provenance.verification import CheckedCard, stale
from consistency.runtime.machine import Machine
from consistency.stages.teacher import make_teacher
from consistency.training import students

CPU = Machine(torch.device("cpu"))
NAME = "edm-cifar10-32x32-uncond-vp.pkl"


@pytest.fixture
def official() -> Denoiser:
    """A small network of the official kind, for the digits' shape."""
    return init_denoiser(ARCHITECTURES["ddpmpp"] | {"model_channels": 8, "augment_dim": 9}, 0).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official: Denoiser) -> Path:
    """That network's file in resources/, for which the working directory's registry vouches."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "resources" / NAME
    file.parent.mkdir()
    write_edm_pickle(file, official)
    vouch_for(file)
    return file


def study_of(tiny: Tiny, **changes: Any) -> Study:
    teacher = {"kind": "edm", "checkpoint": NAME}
    return tiny({"teacher": teacher, "noise.sigma_data": 0.5, **changes})


def test_a_checkpoint_is_converted_with_its_provenance(tiny: Tiny, checkpoint: Path, official: Denoiser) -> None:
    study, layout = study_of(tiny), StudyPaths("tiny")
    make_teacher(Job(study, layout), CPU)
    found, metadata = load_denoiser(layout.teacher_weights, key_of(study, "teacher"))
    torch.testing.assert_close(found.state_dict(), official.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(found(x, 3.0), official(x, 3.0))
    assert metadata["parents"] == {NAME: sha256(checkpoint)}
    card = read_card(Job(study, layout), "teacher")
    assert card["measured"]["parameters"] == sum(p.numel() for p in official.parameters())
    assert (layout.teacher / "history.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.conditional": True}, "teacher.conditional is True, the checkpoint's is False"),
        ({"noise.sigma_data": 0.4}, "noise.sigma_data is 0.4, the checkpoint's is 0.5"),
        (
            {"dataset": {"kind": "image_folder", "path": "x", "resolution": 16, "channels": 1}},
            "dataset.resolution is 16, the checkpoint's is 8",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_study_is_refused(
    tiny: Tiny, checkpoint: Path, changes: Changes, message: str
) -> None:
    with pytest.raises(UserError, match=f"{NAME} does not fit the study: {message}"):
        make_teacher(Job(study_of(tiny, **changes), StudyPaths("tiny")), CPU)
    assert not Path("results").exists()


def test_a_file_that_is_no_checkpoint_does_not_keep_the_right_one_out(tiny: Tiny, checkpoint: Path) -> None:
    """It was put by hand under a name whose digest nobody publishes: what was recorded of it is taken back."""
    entries = yaml.safe_load(REGISTRY.read_text())
    entries[NAME]["sha256"] = None
    REGISTRY.write_text(yaml.safe_dump(entries))
    right = checkpoint.read_bytes()
    checkpoint.write_bytes(right[: len(right) // 2])
    with pytest.raises(UserError, match=f"{NAME} is not an official EDM checkpoint"):
        make_teacher(Job(study_of(tiny), StudyPaths("tiny")), CPU)
    checkpoint.write_bytes(right)
    make_teacher(Job(study_of(tiny), StudyPaths("tiny")), CPU)
    assert recorded() == {NAME: sha256(checkpoint)}


def test_openais_file_has_its_own_reader(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resources").mkdir()
    torch.save({"out.2.bias": torch.zeros(3)}, tmp_path / "resources" / OPENAI)
    vouch_for(tmp_path / "resources" / OPENAI)
    with pytest.raises(UserError, match="is not OpenAI's network"):
        make_teacher(Job(study_of(tiny, **{"teacher.checkpoint": OPENAI}), StudyPaths("tiny")), CPU)


def test_an_official_teachers_key_does_not_depend_on_the_data(tiny: Tiny) -> None:
    assert key_of(study_of(tiny), "teacher") == key_of(study_of(tiny, **{"dataset.limit": 7}), "teacher")
    assert key_of(study_of(tiny), "coefficients") != key_of(study_of(tiny, **{"dataset.limit": 7}), "coefficients")


def test_classes_of_data_and_teacher_must_agree(
    tiny: Tiny, first_results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_denoiser(0, img_resolution=8, label_dim=1000)
    monkeypatch.setattr(students, "read_teacher", lambda *_: teacher)
    data = load_images(first_results.dataset)
    with pytest.raises(UserError, match="conditioned on 1000 classes, the dataset has 10"):
        students.student_training(Job(tiny(), first_results, "ctm", 0), data, CPU)


def test_an_official_networks_classes_are_compared_once_the_dataset_is_there(
    tiny: Tiny, checkpoint: Path, first_results: StudyPaths, tmp_path: Path
) -> None:
    conditional = init_denoiser(ARCHITECTURES["ddpmpp"] | {"model_channels": 8, "augment_dim": 9, "label_dim": 7}, 0)
    write_edm_pickle(checkpoint, conditional)
    shutil.rmtree(REGISTRY.parent)
    vouch_for(checkpoint)
    study = study_of(tiny, **{"teacher.conditional": True})
    layout = StudyPaths("tiny", tmp_path / "there")
    make_teacher(Job(study, layout), CPU)
    shutil.copytree(first_results.dataset, layout.dataset)
    assert "conditioned on 7 classes, the dataset has 10" in mistake(make_teacher, Job(study, layout), CPU)


# --- a given file

MLP = {"kind": "mlp", "width": 16, "depth": 1, "embedding": 8}
SHAPE = {"img_resolution": 8, "img_channels": 1, "sigma_data": 0.5}


def given(tiny: Tiny, path: Path, **changes: Any) -> Study:
    return tiny({"teacher": {"kind": "safetensors", "path": str(path)}, "noise.sigma_data": 0.5, **changes})


@pytest.mark.parametrize("described", [False, True], ids=["by its metadata", "by the study"])
def test_a_given_file_is_taken_with_its_digest(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path, described: bool
) -> None:
    teacher, file = make_denoiser(3, label_dim=10, **SHAPE), tmp_path / "mine.safetensors"
    save_denoiser(file, teacher, {})
    changes: Changes = {"teacher.conditional": True, "teacher.sha256": sha256(file)}
    if described:
        save_file(teacher.state_dict(), file)
        changes |= {"teacher.network": MLP, "teacher.sha256": sha256(file)}
    layout = StudyPaths("tiny", tmp_path / "results")
    shutil.copytree(first_results.dataset, layout.dataset)
    job = Job(given(tiny, file, **changes), layout)
    make_teacher(job, CPU)
    found, metadata = load_denoiser(layout.teacher_weights, job.key("teacher"))
    torch.testing.assert_close(found.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    assert found.architecture == teacher.architecture
    assert metadata["parents"] == {file.name: sha256(file)}
    card = read_card(job, "teacher")
    assert card["inputs"][f"given/{file.name}"] == sha256(file)
    made = {name: digest for name, digest in card["inputs"].items() if name.startswith("dataset/")}
    assert list(stale(CheckedCard.model_validate(card), "teacher", job, made)) == []


def test_a_given_file_is_hashed_once(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hashed = tmp_path / "mine.safetensors", list[Path]()
    save_denoiser(file, make_denoiser(3, **SHAPE), {})
    study = given(tiny, file, **{"teacher.sha256": sha256(file)})

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    for module in ("provenance.card", "stages.teacher"):
        monkeypatch.setattr(f"consistency.{module}.sha256", noted, raising=False)
    layout = StudyPaths("tiny", tmp_path / "results")
    shutil.copytree(first_results.dataset, layout.dataset)
    make_teacher(Job(study, layout), CPU)
    assert hashed.count(file) == 1


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"teacher.path": "none.safetensors"}, "none.safetensors is missing: correct teacher.path"),
        ({}, {"teacher.path": __file__}, "is not a whole safetensors file"),
        ({}, {"teacher.sha256": "0" * 64}, "not teacher.sha256: get the right file"),
        ({}, {"teacher.network": {**MLP, "depth": 2}}, r"tensors differ, first 'model.blocks.1.* the file has none"),
        ({}, {"teacher.network": {**MLP, "width": 24}}, r"the file has \[16\], the network \[24\]"),
        ({"second_time": True}, {}, "is a student, which no other can be distilled from"),
        ({"img_resolution": 4}, {}, "dataset.resolution is 8, the checkpoint's is 4"),
        ({"img_channels": 3}, {}, "dataset.channels is 1, the checkpoint's is 3"),
        ({"sigma_data": 0.4}, {}, "noise.sigma_data is 0.5, the checkpoint's is 0.4"),
        ({"label_dim": 10}, {}, "teacher.conditional is False, the checkpoint's is True"),
        ({"label_dim": 7}, {"teacher.conditional": True}, "conditioned on 7 classes, the dataset has 10"),
    ],
)
def test_a_given_file_that_does_not_fit_is_refused(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path, options: Changes, changes: Changes, message: str
) -> None:
    file = tmp_path / "mine.safetensors"
    save_denoiser(file, make_denoiser(0, **SHAPE | options), {})
    assert re.search(message, mistake(make_teacher, Job(given(tiny, file, **changes), first_results), CPU))


def test_a_given_file_without_an_architecture_asks_for_one(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    save_file(make_denoiser(0, **SHAPE).state_dict(), file)
    message = mistake(make_teacher, Job(given(tiny, file), first_results), CPU)
    assert "does not say what its network is: describe it in teacher.network" in message
