"""What a study costs, against what its stages really count."""

from collections.abc import Callable

import pytest
import torch

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.nets.denoiser import build_denoiser
from consistency.nets.official import official_architecture
from consistency.resources import registry
from consistency.stages.estimate import (
    Job,
    estimate,
    forward_operations,
    makespan,
    print_days,
    print_estimate,
    training_operations,
)
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
    student = tiny().students["ctm"]
    assert training_operations(student, 1.0) == pytest.approx(6 * 16 * (2 * 5 / 3 + 11))
    endpoint = tiny(
        {"students": {"cm": {}}, "student.objective": "endpoint", "student.preconditioning": "cm", "report": {}}
    )
    assert training_operations(endpoint.students["cm"], 1.0) == 6 * 16 * 6


def test_the_fit_is_a_small_part_of_a_full_size_training(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's claim: under 1 %."""
    for name in ("cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64"):
        study = load_study(f"config/studies/{name}.yaml")
        found = estimate(study, Layout(name))
        assert found.operations("coefficients") < 0.01 * found.operations("students") / 15
        print_estimate(study, Layout(name), 100.0)
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
    found = estimate(study, Layout(name))
    assert found.disk["teacher"] == 4 * parameters
    assert found.disk["dataset"] == images * study.dataset.resolution**2 * 3
    assert [found.disk[stage] for stage in ("teacher's samples", "calibration")] == [0, 0]
    assert [found.operations(stage) for stage in ("teacher", "teacher's samples", "calibration")] == [0, 0, 0]
    assert found.operations("flows") < 0.05 * found.operations("students")
    print_estimate(study, Layout(name), 30.0)
    assert "coefficient fit" not in capsys.readouterr().out


def test_a_student_that_starts_from_its_teacher_has_a_second_time() -> None:
    """REFERENCE B1: CTM's student, 60,395,267 parameters."""
    name = "cifar10-ect"
    assert estimate(load_study(f"config/studies/{name}.yaml"), Layout(name)).disk["teacher"] == 4 * 60_395_267


def test_a_study_with_its_data_at_hand_is_counted_with_it(tiny: Tiny, first_results: Layout) -> None:
    found = estimate(tiny(), first_results)
    assert found.disk["dataset"] == 200 * 64
    assert found.operations("teacher") > 0


def test_the_disk_is_that_of_the_files(tiny: Tiny, first_results: Layout) -> None:
    """Two students of one rate: 1 final network and 3 snapshots each; 3 samplers and, for gamma 1, one more."""
    study = tiny()
    found = estimate(study, first_results)
    network = found.disk["teacher"]
    assert found.disk["students"] == 2 * 4 * network
    assert found.snapshots == 2 * 3 * network
    assert found.disk["samples"] == 2 * 4 * 80 * 64
    assert found.state == 4 * network
    assert estimate(tiny({"student.evaluation_ema": [0.9]}), first_results).state == 5 * network


def test_the_jobs_wait_for_what_the_rules_ask_for(tiny: Tiny, first_results: Layout) -> None:
    jobs = estimate(tiny({"seeds": [0, 7]}), first_results).jobs
    assert len(jobs) == 6 + 3 * 2 * 2
    assert jobs["student ctm seed 7"].after == ("dataset", "teacher", "calibration")
    assert jobs["student analytic seed 0"].after == ("dataset", "teacher", "coefficients", "calibration")
    assert jobs["scores analytic seed 7"].after == ("samples analytic seed 7", "calibration")
    assert {after for job in jobs.values() for after in job.after} <= set(jobs)


def test_jobs_that_do_not_wait_fill_the_gpus() -> None:
    """Three jobs of 2 on two GPUs: 4; with a third GPU 2."""
    jobs = {name: Job("students", 2.0) for name in "abc"}
    assert makespan(jobs, gpus=2, sharing=1) == 4
    assert makespan(jobs, gpus=3, sharing=1) == 2


def test_a_chain_takes_the_sum_of_its_jobs_however_many_gpus_there_are() -> None:
    jobs = {"a": Job("teacher", 3.0), "b": Job("students", 4.0, ("a",)), "c": Job("scores", 5.0, ("a", "b"))}
    assert makespan(jobs, gpus=64, sharing=1) == 12


def test_shared_jobs_take_their_gpus_and_are_that_much_faster() -> None:
    """Two trainings of 8 on 6 GPUs, 4 each: one after the other, 2 + 2; a score of 3 runs beside the first."""
    jobs = {"a": Job("students", 8.0, shared=True), "b": Job("students", 8.0, shared=True), "s": Job("scores", 3.0)}
    assert makespan(jobs, gpus=6, sharing=4) == 4
    assert makespan(jobs, gpus=8, sharing=4) == 5  # the score waits for both
    assert makespan(jobs, gpus=9, sharing=4) == 3


def test_a_job_without_operations_takes_no_gpu() -> None:
    jobs = {"a": Job("students", 2.0), "dataset": Job("dataset"), "b": Job("students", 1.0, ("dataset",))}
    assert makespan(jobs, gpus=1, sharing=1) == 3


def test_more_gpus_for_a_job_than_there_are_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="8 GPUs never starts on 4"):
        makespan({"a": Job("students", 1.0, shared=True)}, gpus=4, sharing=8)
    print_days({"a": Job("students", 96.0, shared=True)}, hour=1.0, gpus=[2])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["2", "4", "2"]  # a job of 4 or 8: empty


def test_no_schedule_beats_the_work_or_the_longest_chain(tiny: Tiny, first_results: Layout) -> None:
    jobs = estimate(tiny({"seeds": [0, 1, 2]}), first_results).jobs
    work = sum(job.operations for job in jobs.values())
    chain = ("teacher", "coefficients", "student analytic seed 2", "samples analytic seed 2", "scores analytic seed 2")
    for gpus, sharing in ((2, 1), (8, 1), (64, 4)):
        found = makespan(jobs, gpus, sharing)
        assert found >= work / gpus
        assert found >= sum(jobs[name].operations / (sharing if jobs[name].shared else 1) for name in chain)
    assert makespan(jobs, 1, 1) == pytest.approx(work)
