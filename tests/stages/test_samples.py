"""The samples stage: image i comes from seed i, the same in whatever batch, however many others are drawn."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import ABSENT, Tiny, WriteStudy
from tests.dangers import refused
from tests.nets.small import make_denoiser
from tests.processes import start_python
from tests.stages.conftest import save_students
from torch.utils._python_dispatch import TorchDispatchMode

from consistency.base.errors import UserError
from consistency.base.files import read_json
from consistency.base.seeding import ImageNoise
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.samplers import student_samplers
from consistency.config.study import Study
from consistency.data.prepared import to_bytes
from consistency.evaluation.features import Statistics, frechet_distance
from consistency.evaluation.samplers import Sampler, draw, heun_sampler, jump_sampler, prepared
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import Denoiser, student_from_teacher
from consistency.nets.mlp import MLP
from consistency.provenance import graph
from consistency.provenance.card import read_card
from consistency.provenance.inputs import read_label_weights
from consistency.runtime.stopping import Interrupted
from consistency.stages.samples import make_samples
from consistency.theory.preconditioning import build_preconditioning

CPU = torch.device("cpu")
CTM = build_preconditioning("ctm", 0.5)


def images(study: Study, model: Denoiser, sampler: Sampler, count: int) -> torch.Tensor:
    classes = [1] * model.label_dim
    return torch.cat(
        [batch for _, batch in draw(study.sampling.batch, model, sampler, count, classes, study.sampling.first_seed)]
    )


def of_ctm(study: Study) -> Job:
    """The student ctm of the tiny study."""
    return Job(study, StudyPaths("tiny"), "ctm", 0)


SAMPLERS: dict[str, Callable[[Study, Denoiser], Sampler]] = {
    "heun": lambda study, model: heun_sampler(study, model),
    "churn": lambda study, model: heun_sampler(study, model),
    "nfe1": lambda study, model: jump_sampler(of_ctm(study), model, CTM, 1),
    "nfe3": lambda study, model: jump_sampler(of_ctm(study), model, CTM, 3),
    "gamma": lambda study, model: jump_sampler(of_ctm(study), model, CTM, 3, 0.8),
}
CHURN = {"s_churn": 3.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("label_dim", [0, 10])
def test_images_do_not_depend_on_the_batch_nor_on_the_count(tiny: Tiny, name: str, label_dim: int) -> None:
    model = make_denoiser(0, label_dim=label_dim).eval()
    if name not in ("heun", "churn"):
        model = student_from_teacher(model).eval()
    churn = {"calibration.churn": CHURN} if name == "churn" else {}
    # The last bits of the network grow where noise is added to values near 80.
    tolerance = 1e-4 if churn else 1e-5

    def drawn(batch: int, count: int, first: int = 0) -> torch.Tensor:
        study = tiny({"sampling.batch": batch, "sampling.count": 80, "sampling.first_seed": first, **churn})
        return images(study, model, SAMPLERS[name](study, model), count)

    reference = drawn(64, 64)
    assert torch.isfinite(reference).all()
    for batch, count in ((1, 9), (7, 64), (64, 20), (64, 64)):
        same = drawn(batch, count)
        assert len(same) == count
        torch.testing.assert_close(same, reference[:count], rtol=tolerance, atol=tolerance)
        difference = to_bytes(same).astype(int) - to_bytes(reference[:count])
        assert np.abs(difference).max() <= 1
    assert torch.equal(drawn(64, 64), reference)
    torch.testing.assert_close(drawn(64, 9, first=20), reference[20:29], rtol=tolerance, atol=tolerance)


class NoNumberRead(TorchDispatchMode):
    """Fails where a tensor's value is read by Python: on a GPU that waits for all the work before it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        read = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default)
        assert func not in read, "a value was read back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_reads_a_number_back(tiny: Tiny, name: str) -> None:
    model = make_denoiser().eval()
    study = tiny({"calibration.churn": CHURN} if name == "churn" else {})
    sampler = SAMPLERS[name](study, model if name in ("heun", "churn") else student_from_teacher(model).eval())
    noise = ImageNoise(range(4), (1, 4, 4))
    with torch.inference_mode(), NoNumberRead():
        sampler(noise)
        with pytest.raises(AssertionError, match="read back"):
            bool((noise.latents == 0).all())


def test_a_label_changes_the_image(tiny: Tiny) -> None:
    model = make_denoiser(0, label_dim=10).eval()
    noise = ImageNoise(range(4), (1, 4, 4), [1] * 10)
    sampler = heun_sampler(tiny(), model)
    first = sampler(noise)
    assert noise.labels is not None
    noise.labels = (noise.labels + 1) % 10
    assert not torch.equal(first, sampler(noise))


def test_the_teachers_sampler_ends_with_the_denoiser_at_eps(tiny: Tiny) -> None:
    """The endpoint of the ODE at eps and the sampler differ by that last evaluation alone."""
    study, model = tiny({"calibration.steps": 6}), make_denoiser().eval()
    noise = ImageNoise(range(4), (1, 4, 4))
    with torch.inference_mode():
        endpoint = heun_sampler(study, model, 6)(noise)
        torch.testing.assert_close(heun_sampler(study, model)(noise), model(endpoint, 0.002))


def test_one_jump_is_the_consistency_function(tiny: Tiny) -> None:
    model = student_from_teacher(make_denoiser()).eval()
    noise = ImageNoise(range(4), (1, 4, 4))
    t, s = (torch.full((4,), v, dtype=torch.float64) for v in (80.0, 0.002))
    with torch.inference_mode():
        expected = CTM.jump(model, 80 * noise.latents, t, s)
        assert torch.equal(jump_sampler(of_ctm(tiny()), model, CTM, 1)(noise), expected)


def test_churn_changes_the_images_but_not_the_endpoints_of_the_ode(tiny: Tiny) -> None:
    model, noise = make_denoiser().eval(), lambda: ImageNoise(range(4), (1, 4, 4))
    plain, churned = tiny(), tiny({"calibration.churn": CHURN})
    assert not torch.equal(heun_sampler(plain, model)(noise()), heun_sampler(churned, model)(noise()))
    assert torch.equal(heun_sampler(plain, model, 6)(noise()), heun_sampler(churned, model, 6)(noise()))


def test_with_churn_the_state_is_float64_and_the_network_is_not(tiny: Tiny) -> None:
    model, seen = make_denoiser().eval(), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    end = heun_sampler(tiny({"calibration.churn": CHURN}), model)(ImageNoise(range(4), (1, 4, 4)))
    assert (end.dtype, set(seen)) == (torch.float64, {torch.float32})


def test_the_precision_is_the_networks_alone(tiny: Tiny) -> None:
    noise = ImageNoise(range(16), (1, 4, 4))
    exact, coarse = (
        heun_sampler(study, prepared(study, make_denoiser().eval()))(noise)
        for study in (tiny(), tiny({"sampling.precision": "bfloat16"}))
    )
    assert coarse.dtype == torch.float32
    assert 1e-5 < (exact - coarse).abs().max() < 0.2


def test_gamma_samplers_are_of_the_main_rate_of_trajectory_students(tiny: Tiny) -> None:
    gamma = {"sampling.gamma": [0.5, 1.0], "sampling.gamma_nfe": [2, 4], "student.evaluation_ema": [0.9, 0.9999]}
    names = [*(f"ema{rate}-nfe{n}" for rate in (0.9, 0.9999) for n in (1, 2, 5)), "nfe1", "nfe2", "nfe5"]
    gammas = [f"gamma{g}-nfe{n}" for g in (0.5, 1.0) for n in (2, 4)]
    changes = {"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "report": {}}
    trajectory, endpoint = tiny(gamma), tiny(gamma | changes)
    found = [[sampler.name for sampler in student_samplers(of_ctm(study))] for study in (trajectory, endpoint)]
    assert found == [[*names[:6], *gammas, *names[6:]], names]


# --- the stage


def drawn(job: Job) -> dict[str, bytes]:
    """The samples of the teacher or a student."""
    return {path.name: path.read_bytes() for path in job.samples.glob("*.npy")}


def test_the_stage_writes_every_sampler_as_bytes(tiny: Tiny, results: StudyPaths) -> None:
    job = Job(tiny(), results)
    make_samples(job, CPU)
    by_teacher = np.load(job.samples / "heun.npy")
    assert by_teacher.shape == (80, 8, 8, 1)
    assert by_teacher.dtype == np.uint8
    student = job.of("analytic", 0)
    save_students(student)
    make_samples(student, CPU)
    names = {"nfe1.npy", "nfe2.npy", "nfe5.npy", "gamma1.0-nfe2.npy", "card.json"}
    assert {entry.name for entry in student.samples.iterdir()} == names
    card = read_card(student, "samples")
    assert {Path(path).name for path in card["inputs"]} == {"student.safetensors", "coefficients.npz", "labels.npy"}
    assert not student.sampling_state.exists()


def test_each_rates_samples_come_from_its_own_weights(tiny: Tiny, results: StudyPaths) -> None:
    job = Job(tiny({"student.evaluation_ema": [0.9]}), results, "analytic", 0)
    save_students(job)
    make_samples(job, CPU)
    found = drawn(job)
    assert set(found) == {"nfe1.npy", "nfe2.npy", "nfe5.npy", "gamma1.0-nfe2.npy"} | {
        f"ema0.9-nfe{n}.npy" for n in (1, 2, 5)
    }
    assert found["nfe1.npy"] != found["ema0.9-nfe1.npy"]
    alone = Job(tiny(), results, "analytic", 0)
    save_students(alone)
    make_samples(alone, CPU)
    assert drawn(alone)["nfe2.npy"] == found["nfe2.npy"]


def test_labels_are_the_datas_or_balanced_in_every_sampler(tiny: Tiny, results: StudyPaths) -> None:
    """On data of which one class in ten is missing, none of its images are drawn, unless they are balanced."""
    jobs = {labels: Job(tiny({"sampling.labels": labels}), results, "ctm", 0) for labels in ("data", "balanced")}
    dataset = np.load(results.labels)
    np.save(results.labels, np.where(dataset == 3, 4, dataset))
    save_students(jobs["data"])
    drawn: dict[str, torch.Tensor] = {}
    for labels, job in jobs.items():
        model = load_denoiser(job.weights())[0]
        weights = read_label_weights(job, model)
        assert weights == ([20, 20, 20, 0, 40, 20, 20, 20, 20, 20] if labels == "data" else [1] * 10)
        seen: list[torch.Tensor] = []

        def keep(noise: ImageNoise, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            assert noise.labels is not None
            seen.append(noise.labels)
            return noise.latents

        for _ in draw(16, model, keep, 80, weights, 0):
            pass
        drawn[labels] = torch.cat(seen)
        stages = ("samples", "scores")
        for each in (job, job.of()):
            assert {results.labels in graph.inputs(stage, each) for stage in stages} == {labels == "data"}
    assert 3 not in drawn["data"] and 3 in drawn["balanced"]
    keys = {stage: [job.key(stage) for job in jobs.values()] for stage in ("student", "samples", "scores")}
    assert [len(set(found)) for found in keys.values()] == [1, 2, 2]
    unconditional = [Job(tiny({"sampling.labels": x, "teacher.conditional": False}), results) for x in jobs]
    assert len({job.key("samples") for job in unconditional}) == 1


def test_a_perfect_generator_is_perfect_only_in_the_datas_proportions() -> None:
    """Two classes 90 to 10, whose features are apart: uniform labels alone make a distance."""
    counts, draws = [9000, 1000], np.random.default_rng(0)

    def features(labels: Any) -> Statistics:
        labels = np.asarray(labels)
        return Statistics.of(draws.normal(size=(len(labels), 2)) + 5.0 * labels[:, None])

    data = features(np.repeat([0, 1], counts))
    right, wrong = (features(ImageNoise(range(4000), (1, 1, 1), classes).labels) for classes in (counts, [1, 1]))
    assert frechet_distance(right, data) < 0.2
    assert frechet_distance(wrong, data) > 5


SMALL_BATCHES = {"sampling.batch": 7}  # 80 images in 12 batches, of 7 evaluations for the teacher


def evaluations(job: Job, stop_at: int = 0, signum: int = signal.SIGTERM) -> int:
    """Draw the samples, and count the evaluations of any network; a signal comes before the one of that number."""
    count = 0

    def before(module: torch.nn.Module, _: object) -> None:
        nonlocal count
        if isinstance(module, MLP):
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), signum)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        make_samples(job, CPU)
    finally:
        hook.remove()
    return count


def done(job: Job) -> dict[str, int]:
    """The images of each sampler that a stopped sampling has drawn."""
    found: dict[str, int] = read_json(job.sampling_state / "progress.json", "samples")["done"]
    return found


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_sampling_goes_on_where_it_was(tiny: Tiny, results: StudyPaths, signum: int) -> None:
    job = Job(tiny(SMALL_BATCHES), results)
    make_samples(job, CPU)
    expected = drawn(job)
    shutil.rmtree(job.samples)
    with pytest.raises(Interrupted, match="samples teacher: stopped at image 35 of 80, state saved") as caught:
        evaluations(job, stop_at=40, signum=signum)
    # In the middle of the sixth batch: it leaves at the next evaluation.
    assert caught.value.signum == signum
    assert not job.samples.exists()
    assert evaluations(job) == 7 * (12 - 5)
    assert drawn(job) == expected
    assert not job.sampling_state.exists()


def test_a_stopped_student_keeps_the_samplers_that_are_done(tiny: Tiny, results: StudyPaths) -> None:
    job = Job(tiny({**SMALL_BATCHES, "student.evaluation_ema": [0.9]}), results, "analytic", 0)
    save_students(job)
    whole = evaluations(job)
    expected = drawn(job)
    shutil.rmtree(job.samples)
    with pytest.raises(Interrupted):
        evaluations(job, stop_at=whole - 100)
    assert 100 <= evaluations(job) <= 100 + 5
    assert drawn(job) == expected


def test_what_other_weights_or_settings_drew_is_not_used(tiny: Tiny, results: StudyPaths) -> None:
    job, other = (Job(tiny(SMALL_BATCHES | more), results) for more in ({}, {"calibration.churn": CHURN}))
    with pytest.raises(Interrupted):
        evaluations(job, stop_at=40)
    assert done(job) == {"heun": 35}
    assert evaluations(other) == 7 * 12
    with pytest.raises(Interrupted):
        evaluations(other, stop_at=40)
    model, metadata = load_denoiser(results.teacher_weights)
    save_denoiser(results.teacher_weights, model, {"key": metadata["key"], "study": "of another day"})
    assert evaluations(other) == 7 * 12


def test_a_disk_that_is_too_small_is_said_before_anything_is_drawn(
    tiny: Tiny, results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refused(errno.ENOSPC))
    monkeypatch.setattr(MLP, "forward", lambda *_: pytest.fail("it draws"))
    with pytest.raises(UserError, match=r"cannot write .*heun\.npy: No space left on device"):
        make_samples(Job(tiny(), results), CPU)


def test_where_no_space_can_be_reserved_it_is_drawn_all_the_same(
    tiny: Tiny, results: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    monkeypatch.setattr(MLP, "forward", refused(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        make_samples(Job(tiny(), results), CPU)


PROCESS = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.evaluation import parts
from consistency.stages.samples import make_samples
from consistency.config.reading import load_study
from consistency.runtime.distributed import Ranks, leave

folder, rank, world, kill_at = Path(sys.argv[1]), *map(int, sys.argv[2:])
torch.set_num_threads(1)
parts.RECORD_EVERY = 0.0
ranks = Ranks(rank, world)
if world > 1:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
seen = 0

def count(module, _):
    global seen
    seen += type(module).__name__ == "MLP"
    if seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_pre_hook(count)
study = load_study(folder / "tiny.yaml")
make_samples(Job(study, StudyPaths("tiny", folder / "results", folder / "state")), torch.device("cpu"), ranks)
leave()
print("evaluations", seen)
"""


def test_a_killed_sampling_and_a_shared_one_have_the_same_bits(
    write_study: WriteStudy, tiny: Tiny, results: StudyPaths, tmp_path: Path
) -> None:
    """kill -9 in the middle; then two processes do the rest between them."""
    write_study(SMALL_BATCHES)
    job = Job(tiny(SMALL_BATCHES), results)
    make_samples(job, CPU)
    expected = drawn(job)
    shutil.rmtree(job.samples)
    killed = start_python("-c", PROCESS, tmp_path, 0, 1, 31)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert done(job) == {"heun": 28}
    both = [start_python("-c", PROCESS, tmp_path, rank, 2, -1) for rank in (0, 1)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    # 8 batches are left: 4 a process.
    assert said == ["evaluations 28\n"] * 2
    assert drawn(job) == expected
    read_card(job, "samples")
