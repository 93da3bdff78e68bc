"""Stage samples: images of the teacher and of each student, image i from seed i."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from consistency.base.arrays import write_array
from consistency.base.errors import UserError
from consistency.base.files import link_file, require_output, sha256
from consistency.base.locks import only_one
from consistency.base.progress import Progress
from consistency.config.job import Job
from consistency.config.samplers import student_samplers
from consistency.data.prepared import to_bytes
from consistency.evaluation.parts import Parts
from consistency.evaluation.samplers import Sampler, draw, heun_sampler, jump_sampler, prepared
from consistency.nets.denoiser import Denoiser
from consistency.provenance import graph
from consistency.provenance.card import Card
from consistency.provenance.inputs import read_label_weights, read_preconditioning, read_student, read_teacher
from consistency.runtime.distributed import ALONE, Ranks
from consistency.runtime.stopping import Interrupted, stop_requests


def make_samples(job: Job, device: torch.device, ranks: Ranks = ALONE) -> None:
    """Write one uint8 array [count, H, W, C] per sampler, and card.json. Without a student: the teacher's.

    Resumes an interrupted sampling; several processes (ranks) share the batches. Raises Interrupted when a signal asks
    to stop; finished rows stay in the state folder.
    """
    card, study, size = Card(job, "samples"), job.study, job.study.dataset.resolution
    if job.student is None and not study.taught:
        path = job.samples / "heun.npy"
        write_array(path, np.zeros((0, size, size, study.dataset.channels), np.uint8))
        card.write()
        return
    label = "samples " + ("teacher" if job.student is None else job.label)
    names = ["heun"] if job.student is None else [sampler.name for sampler in student_samplers(job)]
    state = job.sampling_state
    with only_one(state, "is working") if ranks.first else contextlib.nullcontext(), stop_requests() as requests:
        parents = graph.inputs_made_by("samples", job).items()
        digests = {path: sha256(require_output(path, graph.verb_of(*parent))) for path, parent in parents}
        made_from = {"key": job.key("samples")} | {path.name: digests[path] for path in digests}
        parts = Parts(state, made_from, (study.sampling.count, size, size, study.dataset.channels), ranks)
        done = sum(parts.done(name) for name in names)
        progress = Progress(label, study.sampling.count * len(names), done, shown=ranks.first)
        work = _Work(job, label, parts, ranks, requests, progress)
        for name, model, sampler in _samplers(job, device):
            work.draw(name, model, sampler)
        progress.close()
        if ranks.first:
            outputs = [job.samples / f"{name}.npy" for name in names]
            for name, output in zip(names, outputs, strict=True):
                link_file(parts.path(name), output)
            card.write(known=digests)
    if ranks.first:
        shutil.rmtree(state)


def _samplers(job: Job, device: torch.device) -> Iterator[tuple[str, Denoiser, Sampler]]:
    """Yield (name, model, sampler) of everything to draw, one model at a time."""
    study = job.study
    if job.student is None:
        teacher = prepared(study, read_teacher(job, device))
        yield "heun", teacher, heun_sampler(study, teacher)
        return
    for rate in job.settings.rates:
        model = prepared(study, read_student(job, device, rate))
        preconditioning = read_preconditioning(job, model)
        for one in (sampler for sampler in student_samplers(job) if sampler.rate == rate):
            yield one.name, model, jump_sampler(job, model, preconditioning, one.nfe, one.gamma or 0.0)


@dataclass
class _Work:
    """State that the samplers of a stage share."""

    job: Job
    label: str
    parts: Parts
    ranks: Ranks
    requests: Callable[[], int]
    progress: Progress

    def draw(self, name: str, model: Denoiser, sampler: Sampler) -> None:
        """Draw the missing rows of an array. Raises Interrupted when asked to stop."""
        sampling, done = self.job.study.sampling, self.parts.done(name)
        count = sampling.count
        if done == count:
            return
        images = self.parts.open(name)
        classes = read_label_weights(self.job, model)
        batches = draw(sampling.batch, model, sampler, count, classes, sampling.first_seed, done, self.ranks)
        hook = model.model.register_forward_pre_hook(self._leave)
        try:
            while done < count:
                batch = next(batches, None)
                if batch is not None:  # none is left for some processes in the last round
                    images[batch[0]] = to_bytes(batch[1])
                # Rows count as done once all processes are here; all stop at the same round.
                stop = self.ranks.largest(self.requests())
                before, done = done, min(done + sampling.batch * self.ranks.world, count)
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
                f"{self.label}: the time limit came before the first batch: increase `runtime` for this rule"
            )
        where = f"stopped at image {self.progress.n} of {self.progress.total}"
        return Interrupted(f"{self.label}: {where}, state saved", signum)
