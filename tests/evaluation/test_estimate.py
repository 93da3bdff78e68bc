"""What a study costs, against what its stages really count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import ABSENT

from consistency.config.dataset import KINDS
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.config.study import Study
from consistency.data.resources import registry
from consistency.evaluation.estimate import estimate, print_estimate, training_operations
from consistency.nets.denoiser import build_denoiser, forward_operations
from consistency.nets.official import official_architecture

Tiny = Callable[..., Study]


def test_operations_are_those_of_the_layers() -> None:
    """A perceptron: two for each weight of each of its matrices."""
    architecture = {"network": "mlp", "img_resolution": 4, "img_channels": 1, "width": 16, "depth": 1, "embedding": 8}
    weights = [p for p in build_denoiser(architecture).parameters() if p.ndim == 2]
    assert forward_operations(architecture) == 2 * sum(p.numel() for p in weights)


@pytest.mark.parametrize("name", [name for name in registry() if name.startswith("edm")])
def test_every_official_checkpoint_has_its_published_size(name: str) -> None:
    """The parameters of NVIDIA's networks; OpenAI's has those of its ADM."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_denoiser(official_architecture(name)).parameters())
    assert parameters in {55_733_891, 55_735_299, 56_397_827, 56_400_643, 61_805_571, 62_761_091, 295_899_267}


def test_a_students_operations_are_the_evaluations_it_counts(tiny: Tiny) -> None:
    """n has mean 5/3 up to 2: 2 n Heun evaluations, 3 for the student, 3 and 2 for the outer jumps, 3 for DSM."""
    study = tiny()
    assert training_operations(study, study.students["ctm"], 1.0) == pytest.approx(6 * 16 * (2 * 5 / 3 + 11))
    endpoint = tiny(
        {"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "student.preconditioning": "cm"}
        | {"students": {"cm": {}}, "report": {}}
    )
    assert training_operations(endpoint, endpoint.students["cm"], 1.0) == 6 * 16 * 6


def test_the_fit_is_a_small_part_of_a_full_size_training(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's claim: under 1 %."""
    for name in ("cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64"):
        study = load_study(f"config/studies/{name}.yaml")
        found = estimate(Job(study, StudyPaths(name)))
        assert found.operations["coefficients"] < 0.01 * found.operations["students"] / 15
        print_estimate(Job(study, StudyPaths(name)), 100.0)
        assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters", "images"),
    [
        ("cifar10-gc", 34_711_811, 50_000),
        ("imagenet32-gc", 39_479_683, 1_281_167),
        ("celeba64-gc", 59_582_723, 162_770),
    ],
)
def test_the_second_papers_studies_are_counted_without_data(
    name: str, parameters: int, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Students are the described network, without a second time; no teacher draws anything, none is fitted."""
    study = load_study(f"config/studies/{name}.yaml")
    found = estimate(Job(study, StudyPaths(name)))
    assert found.disk["teacher"] == 4 * parameters
    assert found.disk["dataset"] == images * study.dataset.resolution**2 * 3
    assert [found.disk[stage] for stage in ("teacher's samples", "calibration")] == [0, 0]
    assert [found.operations[stage] for stage in ("teacher", "teacher's samples", "calibration")] == [0, 0, 0]
    assert found.operations["flows"] < 0.05 * found.operations["students"]
    print_estimate(Job(study, StudyPaths(name)), 30.0)
    said = capsys.readouterr().out
    assert "counting the operations" in said and "calibration" not in said and "coefficient" not in said


@pytest.mark.parametrize(("name", "tflops"), [("cifar10-day", 50), ("ffhq64-day", 50), ("cifar10-gc-day", 30)])
def test_a_study_of_a_day_takes_less_and_says_how_long(name: str, tflops: float) -> None:
    file = Path(f"config/studies/{name}.yaml")
    found = estimate(Job(load_study(file), StudyPaths(name)))
    hours = sum(found.operations.values()) / (tflops * 1e12 * 3600)
    assert hours < 24
    assert f"--tflops {tflops}`: {hours:.0f} GPU-hours" in file.read_text(encoding="utf-8")
    scoring = sum(found.operations[stage] for stage in ("extractor", "calibration", "scores"))
    assert scoring < 0.05 * sum(found.operations.values())


@pytest.mark.parametrize("size", KINDS["photos"].sizes)
def test_photos_are_counted_without_data(tiny: Tiny, tmp_path: Path, size: int) -> None:
    study = tiny({"dataset": {"kind": "photos", "resolution": size, "channels": 1}})
    found = estimate(Job(study, StudyPaths("tiny", tmp_path, tmp_path)))
    assert found.disk["dataset"] == KINDS["photos"].sizes[size][0] * size**2


def test_a_student_that_starts_from_its_teacher_has_a_second_time() -> None:
    """CTM's released student has 60,395,267 parameters."""
    name = "cifar10-ect"
    assert estimate(Job(load_study(f"config/studies/{name}.yaml"), StudyPaths(name))).disk["teacher"] == 4 * 60_395_267


def test_the_disk_is_that_of_the_files(tiny: Tiny, first_results: StudyPaths) -> None:
    """Two students of one rate: 1 final network and 3 snapshots each; 3 samplers and, for gamma 1, one more."""
    study = tiny()
    found = estimate(Job(study, first_results))
    network = found.disk["teacher"]
    assert found.operations["teacher"] > 0
    assert found.disk["dataset"] == 200 * 64
    assert found.disk["students"] == 2 * 4 * network
    assert found.snapshots == 2 * 3 * network
    assert found.disk["samples"] == 2 * 4 * 80 * 64
    assert found.state == 4 * network
    assert estimate(Job(tiny({"student.evaluation_ema": [0.9]}), first_results)).state == 5 * network
