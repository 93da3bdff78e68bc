"""Two compared students start from the same weights and see the same images, times and noise."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Changes, Tiny, mistake
from tests.nets.small import make_denoiser
from tests.repeatable import assert_same
from tests.stages.conftest import OWN

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.prepared import load_images
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.jumps import JUMPS, Jumps
from consistency.provenance.inputs import read_preconditioning
from consistency.runtime.machine import Machine
from consistency.runtime.stopping import Interrupted
from consistency.stages.student import make_student
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training import students
from consistency.training.consistency_training import ConsistencyTraining
from consistency.training.loop import Training, train
from consistency.training.objective import Term
from consistency.training.trajectory import Trajectory

CPU = Machine(torch.device("cpu"))


def training(study: Study, layout: StudyPaths, run: str, seed: int = 0) -> Training:
    return students.student_training(Job(study, layout, run, seed), load_images(layout.dataset), CPU)


def weights(*models: torch.nn.Module) -> torch.Tensor:
    """All of them in one row."""
    return torch.cat([value.flatten() for model in models for value in model.state_dict().values()])


@dataclass
class Seen:
    """Images, labels and draws that the objective of a step is given."""

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: Any


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """A list that every step's objective adds to."""
    steps: list[Seen] = []

    def watch(objective: type[Any]) -> None:
        whole = objective.terms

        def note(self: Any, images: torch.Tensor, labels: torch.Tensor | None, draws: Any) -> Iterator[Term]:
            steps.append(Seen(images, labels, draws))
            return whole(self, images, labels, draws)

        monkeypatch.setattr(objective, "terms", note)

    watch(Trajectory)
    watch(ConsistencyTraining)
    return steps


def test_students_of_a_seed_share_weights_images_times_and_noise(
    tiny: Tiny, first_results: StudyPaths, seen: list[Seen]
) -> None:
    study = tiny({"students.bcm": {"preconditioning": "bcm"}})
    jobs = [training(study, first_results, run) for run in study.students]
    first = weights(jobs[0].update.model)
    for job in jobs:
        assert torch.equal(weights(job.update.model), first)
        assert torch.equal(weights(job.emas[0].model), first)
    for step in range(4):
        for job in jobs:
            job.update.step(step)
    for a, b, c in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        for other in (b, c):
            assert torch.equal(a.images, other.images)
            assert a.draws.steps == other.draws.steps
            for name in ("first", "to", "z", "sigma", "z_dsm"):
                assert torch.equal(getattr(a.draws, name), getattr(other.draws, name)), name
    assert not torch.equal(seen[0].images, seen[3].images)
    assert not torch.equal(seen[0].draws.z, seen[3].draws.z)


def test_a_centred_student_jumps_around_the_mean_image_and_its_file_says_so(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path
) -> None:
    centred = {"preconditioning": "analytic-midpoint-centred", "theta": 0.4}
    study = tiny({"varies": ["preconditioning", "theta"], "students.centred": centred})
    job, data = Job(study, first_results, "centred", 0), load_images(first_results.dataset)
    begun = training(study, first_results, "centred")
    settings, model = Jumps.model_validate_json(json.dumps(begun.metadata[JUMPS])), begun.emas[0].model
    x, t = data.take(range(4))[0], torch.full((4,), 60.0)
    s, labels = torch.full((4,), 2.0), torch.arange(4)
    jump, read = (each.jump(model, x, t, s, labels) for each in (settings.of(model), read_preconditioning(job, model)))
    assert torch.equal(jump, read)
    fit = np.load(first_results.fit)
    ode = GeneralizedODE(*(torch.from_numpy(fit[name]) for name in ("times", "l", "s_centred")))
    f, g = (value.float()[:, None, None, None] for value in ode.step(t.double(), s.double(), 0.4))
    mean = data.take(range(len(data)))[0].mean(0)
    torch.testing.assert_close(jump, mean + f * (x - mean) + g * (model(x, t, s, labels) - mean), rtol=1e-4, atol=1e-4)
    older = StudyPaths("tiny", tmp_path / "results", tmp_path / "state")
    shutil.copytree(first_results.results, older.results)
    np.savez(older.fit, **{name: fit[name] for name in ("times", "l", "s")})
    assert "has no array" in mistake(training, study, older, "centred")


def test_another_seed_is_another_order_and_other_second_time_weights(
    tiny: Tiny, first_results: StudyPaths, seen: list[Seen]
) -> None:
    study = tiny({"seeds": [0, 1]})
    first, second = (training(study, first_results, "ctm", seed).update for seed in (0, 1))
    drawn, others = ({n: v.clone() for n, v in one.model.state_dict().items()} for one in (first, second))
    first.step(0)
    second.step(0)
    assert not torch.equal(seen[0].images, seen[1].images)
    changed = {name for name, value in drawn.items() if not torch.equal(others[name], value)}
    assert changed
    assert all("_s." in name for name in changed)


@pytest.mark.parametrize("conditional", [True, False])
def test_labels_are_given_to_conditional_students_alone(
    tiny: Tiny, first_results: StudyPaths, seen: list[Seen], monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    teacher = make_denoiser(0, img_resolution=8, label_dim=10 * conditional)
    monkeypatch.setattr(students, "read_teacher", lambda *_: teacher)
    training(tiny({"teacher.conditional": conditional}), first_results, "ctm").update.step(0)
    labels = seen[0].labels
    assert (labels is not None) == conditional
    assert labels is None or labels.shape == (16,)


# --- consistency training: the arms differ in the coupling, and no weight of the teacher is needed


def test_the_arms_of_a_seed_share_weights_images_levels_and_noise(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths, seen: list[Seen]
) -> None:
    study = tiny(couplings | {"student.start": "teacher", "students.half": {"coupling": "gc", "mu": 0.25}})
    arms = [training(study, first_results, run) for run in ("ic", "gc", "half", "ot")]
    for arm in arms[1:]:
        assert torch.equal(weights(arm.update.model), weights(arms[0].update.model))
    for step in range(3):
        for arm in arms:
            arm.update.step(step)
    replaced = []
    for ic, gc, half, ot in zip(*(seen[k::4] for k in range(4)), strict=True):
        for other in (gc, half, ot):
            assert torch.equal(other.images, ic.images)
            for name in ("t", "u", "weight"):
                assert torch.equal(getattr(other.draws, name), getattr(ic.draws, name)), name
        assert torch.equal(gc.draws.z, ic.draws.z) and torch.equal(half.draws.z, ic.draws.z)
        assert not ic.draws.generated.any() and not ot.draws.generated.any()
        assert not (half.draws.generated & ~gc.draws.generated).any()
        replaced.append(gc.draws.generated)
        # The same noise, paired with other images: a permutation of its rows.
        assert not torch.equal(ot.draws.z, ic.draws.z)
        rows = (ot.draws.z.flatten(1)[:, None] == ic.draws.z.flatten(1)[None]).all(2)
        assert (rows.sum(0) == 1).all() and (rows.sum(1) == 1).all()
    share = torch.cat(replaced).float().mean()
    assert 0.2 < share < 0.8


def test_the_first_weights_are_the_seeds_and_no_teachers(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny(couplings | {"seeds": [0, 1]})
    drawn = [weights(training(study, first_results, "gc", seed).update.model) for seed in (0, 1)]
    other = make_denoiser(5, img_resolution=8, label_dim=10, width=32, depth=1, embedding=16)
    monkeypatch.setattr(students, "read_teacher", lambda *_: other)
    again = weights(training(study, first_results, "gc").update.model)
    assert torch.equal(again, drawn[0])
    assert not torch.equal(drawn[1], drawn[0])


def test_a_student_that_starts_from_its_teacher_is_its_denoiser(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths
) -> None:
    teacher = load_denoiser(first_results.teacher / "teacher.safetensors")[0]
    x, t, s = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.full((4,), 0.1)
    for study, run in ((tiny(), "analytic"), (tiny(couplings | {"student.start": "teacher"}), "gc")):
        assert torch.equal(training(study, first_results, run).update.model(x, t, s), teacher(x, t))


def trained(
    study: Study, layout: StudyPaths, run: str, seen: list[Seen], stops: tuple[int, ...] = ()
) -> tuple[Training, dict[int, Any]]:
    """A training that SIGTERM stopped in each of these steps, and what each of its steps started from."""
    starts: dict[int, Any] = {}
    for stop in (*stops, None):
        job = training(study, layout, run)
        job.update.step = noting(job, seen, starts, stop)  # type: ignore[method-assign]
        with pytest.raises(Interrupted) if stop is not None else nullcontext():
            train(job)
    return job, starts


def noting(job: Training, seen: list[Seen], starts: dict[int, Any], stop: int | None) -> Callable[[int], Any]:
    """The step of a training that notes what decides it; that of one number sends SIGTERM."""
    step = job.update.step

    def noted(k: int) -> Any:
        networks = [job.update.model, *(average.model for average in job.emas)]
        starts[k] = copy.deepcopy([job.update.optimizer.state_dict(), *(each.state_dict() for each in networks)])
        if k == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        taken = step(k)
        starts[k] += [vars(seen[-1]) | {"draws": vars(seen[-1].draws)}, torch.get_rng_state()]
        return taken

    return noted


def warming_up(optimizer: str, predictor: Any) -> Changes:
    """Averages that warm up, a further one among them; the levels change while the training is stopped."""
    averages = {"student.ema_rate": 0.999, "student.evaluation_ema": [0.9], "student.ema_warm_up": 0.75}
    gc = {"coupling": "gc", "mu": 1.0, "predictor": predictor}
    varies = ["coupling", "mu", "predictor"]
    return averages | {"student.optimizer": optimizer, "students.gc": gc, "varies": varies}


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        *((run, OWN) for run in ("ic", "ot", "gc", "own")),
        *(
            ("gc", warming_up(optimizer, predictor))
            for optimizer in ("radam", "lion")
            for predictor in ("average", {"run": "ic"}, {"run": "ic", "step": 3})
        ),
    ],
)
def test_an_interrupted_arm_starts_every_step_as_an_uninterrupted_one(
    tiny: Tiny, couplings: Changes, results: StudyPaths, tmp_path: Path, seen: list[Seen], run: str, changes: Changes
) -> None:
    """Weights, averages, the optimiser's tensors, images, draws and dropout's random state are the same before each
    update, and so are the results. The student own is stopped between two refits of its coefficients."""
    study = tiny(couplings | changes)
    if study.students[run].frozen:
        make_student(Job(study, results, "ic", 0), CPU)
    whole, expected = trained(study, StudyPaths("tiny", results.results, tmp_path / "whole"), run, seen)
    parts, found = trained(study, StudyPaths("tiny", results.results, tmp_path / "parts"), run, seen, stops=(0, 3))
    assert list(found) == list(expected) == list(range(6))
    for step, start in expected.items():
        assert_same(found[step], start, msg=lambda said, step=step: f"before update {step}: {said}")
    names = ["step-000000.safetensors", "step-000003.safetensors", "step-000006.safetensors"]
    for name in names:
        assert (parts.folder / "snapshots" / name).read_bytes() == (whole.folder / "snapshots" / name).read_bytes()
    assert torch.equal(weights(parts.update.model), weights(whole.update.model))
    if run == "own":
        fits = [load_denoiser(parts.folder / "snapshots" / name)[0].fit for name in names]
        assert not torch.equal(fits[0], fits[1]) and not torch.equal(fits[1], fits[2])


def test_a_warm_up_of_the_averages_changes_them(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths, tmp_path: Path
) -> None:
    jobs = []
    for warm_up in (0.75, None):
        study = tiny(couplings | {"student.ema_rate": 0.999, "student.ema_warm_up": warm_up})
        job = training(study, StudyPaths("tiny", first_results.results, tmp_path / str(warm_up)), "gc")
        train(job)
        jobs.append(job)
    assert not torch.equal(weights(jobs[0].emas[0].model), weights(jobs[1].emas[0].model))


def test_a_frozen_predictor_is_the_other_students_and_stays_what_it_is(
    tiny: Tiny, couplings: Changes, results: StudyPaths
) -> None:
    arms = {
        "own": {"coupling": "gc", "mu": 1.0},
        "full": {"coupling": "gc", "mu": 1.0, "predictor": {"run": "ic"}},
        "weak": {"coupling": "gc", "mu": 1.0, "predictor": {"run": "ic", "step": 3}},
    }
    changes = couplings | {"varies": ["coupling", "mu", "predictor"], "students": couplings["students"] | arms}
    study = tiny(changes)
    with pytest.raises(UserError, match="run `python -m consistency student --student ic --seed 0 --study FILE` first"):
        training(study, results, "full")
    make_student(Job(study, results, "ic", 0), CPU)
    ended = weights(load_denoiser(Job(study, results, "ic", 0).weights())[0])
    halfway = weights(load_denoiser(Job(study, results, "ic", 0).weights(step=3))[0])
    trained = []
    for run, expected in (("full", ended), ("weak", halfway), ("own", None)):
        job = training(study, results, run)
        predictor = job.update.objective.predictor  # type: ignore[attr-defined]
        train(job)
        trained.append(weights(job.update.model))
        # The student's own average moves away from where it began; a frozen predictor is what it was.
        assert expected is None or torch.equal(weights(predictor), expected)
        assert (predictor is job.emas[0].model) == (expected is None)
    assert not torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])
    make_student(Job(study, results, "weak", 0), CPU)
    card = json.loads((Job(study, results, "weak", 0).folder / "card.json").read_text())
    assert "students/ic/seed0/snapshots/step-000003.safetensors" in card["inputs"]
    with pytest.raises(UserError, match="made by study 'tiny' with other settings"):
        training(tiny(changes | {"student.learning_rate": 1e-3}), results, "full")


def test_lion_is_the_optimiser_that_the_study_asks_for(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths
) -> None:
    """Every weight that has a gradient moves by the learning rate, and not in the first step alone, as with Adam."""
    pytest.importorskip("lion_pytorch")
    job = training(tiny(couplings | {"student.optimizer": "lion"}), first_results, "gc")
    for step in range(3):
        before = weights(job.update.model)
        job.update.step(step)
        moved = (weights(job.update.model) - before).abs()
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 4e-4), rtol=0.01, atol=1e-7)


def test_the_levels_near_each_other_as_the_study_says(
    tiny: Tiny, couplings: Changes, first_results: StudyPaths
) -> None:
    objective: Any = training(tiny(couplings), first_results, "ic").update.objective
    drawn = [objective.schedule.levels(step, 4096, torch.Generator()).t for step in (0, 2, 5)]
    assert [len(t.unique()) for t in drawn] == [4, 8, 16]
    shrinking = {"student.curriculum": {"kind": "shrinking", "double_every": 3}}
    objective = training(tiny(couplings | shrinking), first_results, "ic").update.objective
    t, u, _ = objective.schedule.levels(0, 4096, torch.Generator())
    late, near, _ = objective.schedule.levels(3, 4096, torch.Generator())
    assert torch.equal(t, late)
    assert (near >= u).all() and (near > u).any()


# --- how the machine is used changes the last bits, no more


@pytest.mark.parametrize("compute", [{"channels_last": True}, {"data_on_device": True}, {"batch_per_device": 4}])
def test_compute_settings_change_the_last_bits_at_most(
    tiny: Tiny, first_results: StudyPaths, tmp_path: Path, compute: dict[str, Any]
) -> None:
    jobs = []
    for settings in ({}, compute):
        study = tiny({"compute": settings})
        assert key_of(study, "student", "ctm", 0) == key_of(tiny(), "student", "ctm", 0)
        layout = StudyPaths("tiny", first_results.results, tmp_path / str(len(jobs)))
        jobs.append(training(study, layout, "ctm"))
        train(jobs[-1])
    plain, same = (job.emas[0].model.state_dict() for job in jobs)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_compute_the_same(tiny: Tiny, first_results: StudyPaths) -> None:
    plain = training(tiny(), first_results, "ctm")
    compiled = training(tiny({"compute": {"compile": True}}), first_results, "ctm")
    for step in range(2):
        terms, same = (job.update.step(step)[0] for job in (plain, compiled))
        torch.testing.assert_close(same, terms, rtol=1e-4, atol=1e-6)
    assert plain.update.model.state_dict().keys() == compiled.update.model.state_dict().keys()


def test_a_lower_precision_is_that_of_all_three_networks(
    tiny: Tiny, first_results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of them alone: what the distance compares is float32."""
    compared: list[torch.dtype] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        compared.extend([a.dtype, b.dtype])
        return (a - b).square().flatten(1).mean(1)

    monkeypatch.setattr("consistency.theory.distance.squared_l2", distance)
    job = training(tiny({"student.precision": "bfloat16", "student.distance": "l2"}), first_results, "ctm")
    objective: Any = job.update.objective
    outputs: list[torch.dtype] = []
    for network in (objective.student, objective.ema, objective.teacher):
        network.model.register_forward_hook(lambda module, given, output: outputs.append(output.dtype))
    job.update.step(0)
    assert set(outputs) == {torch.bfloat16}
    assert set(compared) == {torch.float32}
