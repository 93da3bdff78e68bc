"""What a study costs, against what its stages really count."""

from collections.abc import Callable

import pytest
import torch

from consistency.layout import Layout
from consistency.nets.denoiser import build_denoiser
from consistency.nets.official import official_architecture
from consistency.resources import registry
from consistency.stages.estimate import estimate, forward_operations, print_estimate, training_operations
from consistency.study import Study, load_study

Tiny = Callable[..., Study]


def test_operations_are_those_of_the_layers() -> None:
    """A perceptron: two for each weight of each of its matrices."""
    architecture = {"network": "mlp", "img_resolution": 4, "img_channels": 1, "width": 16, "depth": 1, "embedding": 8}
    weights = [p for p in build_denoiser(architecture).parameters() if p.ndim == 2]
    assert forward_operations(architecture) == 2 * sum(p.numel() for p in weights)


@pytest.mark.parametrize("name", [name for name in registry() if name.startswith("edm-")])
def test_every_official_checkpoint_has_its_published_size(name: str) -> None:
    """REFERENCE A5: parameters of the official networks."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_denoiser(official_architecture(name)).parameters())
    assert parameters in {55_733_891, 55_735_299, 56_397_827, 56_400_643, 61_805_571, 62_761_091, 295_899_267}


def test_a_students_operations_are_the_evaluations_it_counts(tiny: Tiny) -> None:
    """n has mean 5/3 up to 2: 2 n Heun evaluations, 3 for the student, 3 and 2 for the outer jumps, 3 for DSM."""
    student = tiny().resolved("ctm")
    assert training_operations(student, 1.0) == pytest.approx(6 * 16 * (2 * 5 / 3 + 11))
    endpoint = tiny(
        {"students": {"cm": {}}, "student.objective": "endpoint", "student.preconditioning": "cm", "report": {}}
    )
    assert training_operations(endpoint.resolved("cm"), 1.0) == 6 * 16 * 6


def test_the_fit_is_a_small_part_of_a_full_size_training(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's claim: under 1 %."""
    for name in ("cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64"):
        study = load_study(f"config/studies/{name}.yaml")
        costs = {cost.stage: cost for cost in estimate(study, Layout(name))}
        assert costs["coefficients"].operations < 0.01 * costs["students"].operations / 15
        print_estimate(study, Layout(name), 100.0)
        assert "total" in capsys.readouterr().out


def test_a_study_with_its_data_at_hand_is_counted_with_it(tiny: Tiny, first_results: Layout) -> None:
    costs = {cost.stage: cost for cost in estimate(tiny(), first_results)}
    assert costs["dataset"].bytes == 200 * 64
    assert costs["teacher"].operations > 0
