"""Stage samples: images of the teacher and of each student, image i from seed i."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.arrays import write_array
from consistency.errors import UserError
from consistency.files import link_file, made, sha256
from consistency.job import Job
from consistency.layout import sampler_name
from consistency.locks import only_one
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.provenance import Card
from consistency.seeding import ImageNoise
from consistency.stages.inputs import read_preconditioning, read_student, read_teacher, time_grid
from consistency.stages.parts import Parts
from consistency.stages.trainer import place
from consistency.study import Study
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.sampler import Churn, Fresh, multistep, stochastic_heun
from consistency.theory.solver import heun_solve
from consistency.training.data import to_bytes
from consistency.training.distributed import ALONE, Ranks
from consistency.training.loop import Interrupted, stop_requests
from consistency.training.objectives import with_labels

# Maps the noise of a batch of images to their endpoints, float [N, C, H, W].
Sampler = Callable[[ImageNoise], Tensor]


@dataclass(frozen=True)
class StudentSampler:
    """A sampler of a student. gamma: None for its own sampler; rate: a further EMA rate."""

    nfe: int
    gamma: float | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Name of its file, without .npy."""
        return sampler_name(self.nfe, self.gamma, self.rate)


def student_samplers(job: Job) -> list[StudentSampler]:
    """Return every sampler of a student, in the order of their names.

    Students that jump only to eps have CM's multistep sampler alone. Further EMA rates are drawn without gamma.
    """
    settings, sampling = job.student, job.study.sampling
    chosen = [StudentSampler(nfe, None, rate) for rate in settings.rates for nfe in sampling.nfe]
    if not settings.to_the_end:
        chosen += [StudentSampler(nfe, gamma) for gamma in sampling.gamma for nfe in sampling.gamma_nfe]
    return sorted(chosen, key=lambda sampler: sampler.name)


def make_samples(job: Job, device: torch.device, ranks: Ranks = ALONE) -> None:
    """Write one uint8 array [count, H, W, C] per sampler, and card.json. Without a student: the teacher's.

    Resumes an interrupted sampling; several processes (ranks) share the batches. Raises Interrupted when a signal asks
    to stop; finished rows stay in the state folder.
    """
    card, study, size = Card(job, "samples"), job.study, job.study.dataset.resolution
    if job.run is None and not study.taught:
        path = job.samples / "heun.npy"
        write_array(path, np.zeros((0, size, size, study.dataset.channels), np.uint8))
        card.write([job.paths.teacher / "teacher.safetensors"], [path])
        return
    label = "samples " + ("teacher" if job.run is None else job.label)
    names = ["heun"] if job.run is None else [sampler.name for sampler in student_samplers(job)]
    state = job.sampling_state
    with only_one(state, "is working") if ranks.first else contextlib.nullcontext(), stop_requests() as requests:
        digests = {path: sha256(made(path, verb)) for path, verb in _inputs(job).items()}
        made_from = {"key": job.key("samples")} | {path.name: digests[path] for path in digests}
        parts = Parts(state, made_from, (study.sampling.count, size, size, study.dataset.channels), ranks, label)
        done = sum(parts.done(name) for name in names)
        progress = Progress(label, study.sampling.count * len(names), done, shown=ranks.first)
        work = _Work(study, label, parts, ranks, requests, progress)
        for name, model, sampler in _samplers(job, device):
            work.draw(name, model, sampler)
        progress.close()
        if ranks.first:
            outputs = [job.samples / f"{name}.npy" for name in names]
            for name, output in zip(names, outputs, strict=True):
                link_file(parts.path(name), output)
            card.write(digests, outputs, known=digests)
    if ranks.first:
        shutil.rmtree(state)


def _inputs(job: Job) -> dict[Path, str]:
    """Return the files that the images depend on, and the verbs that make them."""
    if job.run is None:
        return {job.paths.teacher / "teacher.safetensors": "teacher"}
    verbs = {job.weights(rate): f"student{job.options}" for rate in job.student.rates}
    if job.student.needs_coefficients:
        verbs[job.paths.coefficients / "coefficients.npz"] = "coefficients"
    return verbs


def _samplers(job: Job, device: torch.device) -> Iterator[tuple[str, Denoiser, Sampler]]:
    """Yield (name, model, sampler) of everything to draw, one model at a time."""
    study = job.study
    if job.run is None:
        teacher = prepared(study, read_teacher(job, device))
        yield "heun", teacher, heun_sampler(study, teacher)
        return
    for rate in job.student.rates:
        model = prepared(study, read_student(job, device, rate))
        preconditioning = read_preconditioning(job, model)
        for one in (sampler for sampler in student_samplers(job) if sampler.rate == rate):
            yield one.name, model, jump_sampler(job, model, preconditioning, one.nfe, one.gamma or 0.0)


def prepared(study: Study, model: Denoiser) -> Denoiser:
    """Return a model in the precision and the memory layout of the study's sampling."""
    device = next(model.parameters()).device
    return place(study, model, device).compute_in(study.sampling.precision)


@dataclass
class _Work:
    """State that the samplers of a stage share."""

    study: Study
    label: str
    parts: Parts
    ranks: Ranks
    requests: Callable[[], int]
    progress: Progress

    def draw(self, name: str, model: Denoiser, sampler: Sampler) -> None:
        """Draw the missing rows of an array. Raises Interrupted when asked to stop."""
        count, done = self.study.sampling.count, self.parts.done(name)
        if done == count:
            return
        images = self.parts.open(name)
        batches = draw(self.study, model, sampler, count, done, self.ranks)
        hook = model.model.register_forward_pre_hook(self._leave)
        try:
            while done < count:
                batch = next(batches, None)
                if batch is not None:  # none is left for some processes in the last round
                    images[batch[0]] = to_bytes(batch[1])
                # Rows count as done once all processes are here; all stop at the same round.
                stop = self.ranks.largest(self.requests())
                before, done = done, min(done + self.study.sampling.batch * self.ranks.world, count)
                self.parts.record(name, done, images)
                self.progress.update(done - before)
                if stop:
                    raise self._interrupted(stop)
        finally:
            hook.remove()
            self.parts.record(name, done, images, now=True)

    def _leave(self, *_: Any) -> None:
        """Stop before an evaluation, if asked to: a batch of a large teacher may take minutes. Single process only."""
        if self.ranks.world == 1 and self.requests():
            raise self._interrupted(self.requests())

    def _interrupted(self, signum: int) -> Interrupted:
        if signum == signal.SIGALRM and self.progress.n == self.progress.initial:
            raise UserError(
                f"{self.label}: the time was over before a single batch was drawn: give the job more (runtime)"
            )
        where = f"stopped at image {self.progress.n} of {self.progress.total}"
        return Interrupted(f"{self.label}: {where}, state saved", signum)


@torch.inference_mode()
def draw(
    study: Study, model: Denoiser, sampler: Sampler, count: int, start: int = 0, ranks: Ranks = ALONE
) -> Iterator[tuple[slice, Tensor]]:
    """Yield this process's images of seeds start to count-1 in batches: (rows, float [n, C, H, W])."""
    shape = (model.img_channels, model.img_resolution, model.img_resolution)
    size = study.sampling.batch
    for first in range(start + ranks.rank * size, count, ranks.world * size):
        rows = slice(first, min(first + size, count))
        noise = ImageNoise(range(rows.start, rows.stop), shape, model.label_dim)
        yield rows, sampler(noise)


def heun_sampler(study: Study, teacher: Denoiser, nodes: int | None = None) -> Sampler:
    """Return EDM's sampler with the study's settings; with nodes, the ODE's endpoint at eps through that many nodes."""
    device = next(teacher.parameters()).device
    times = _times(study, nodes or study.calibration.steps) + ([0.0] if nodes is None else [])
    settings = study.calibration.churn if nodes is None else None

    def sample(noise: ImageNoise) -> Tensor:
        x = _to(noise.latents, device) * times[0]
        denoiser = with_labels(teacher, _labels(noise, device))
        if settings is None:
            return heun_solve(denoiser, x, times)
        added = Churn(settings.s_churn, settings.s_min, settings.s_max, settings.s_noise)

        def in_float32(x: Tensor, t: Tensor) -> Tensor:
            """Evaluate the network on a float64 state, whose rounding does not add up over hundreds of steps."""
            return denoiser(x.float(), t).double()

        return stochastic_heun(in_float32, x.double(), times, added, _fresh(noise, device))

    return sample


def jump_sampler(job: Job, model: Denoiser, preconditioning: Preconditioning, nfe: int, gamma: float = 0.0) -> Sampler:
    """Return a sampler of nfe jumps along the rho grid from sigma_max to sigma_min."""
    device = next(model.parameters()).device
    times = _times(job.study, nfe + 1)
    gamma = 1.0 if job.student.to_the_end else gamma

    def sample(noise: ImageNoise) -> Tensor:
        labels = _labels(noise, device)

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return preconditioning.jump(model, x, t, s, labels)

        return multistep(jump, _to(noise.latents, device) * times[0], times, gamma, _fresh(noise, device))

    return sample


def _times(study: Study, nodes: int) -> list[float]:
    """Return the study's rho grid as numbers: reading each back from a GPU would stall it."""
    return time_grid(study, nodes, torch.device("cpu")).tolist()


def _labels(noise: ImageNoise, device: torch.device) -> Tensor | None:
    return None if noise.labels is None else _to(noise.labels, device)


def _fresh(noise: ImageNoise, device: torch.device) -> Fresh:
    return lambda: _to(noise.fresh(), device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device. Only copies from pinned memory do not wait for a GPU's queue."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
