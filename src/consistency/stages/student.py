"""Stage student: distil the teacher, or train without one. Students differ only in the keys that the study declares."""

import shutil

from consistency.config.job import Job
from consistency.nets.checkpoint import save_denoiser
from consistency.provenance import graph
from consistency.provenance.card import Card, digest_of
from consistency.provenance.environment import git_state
from consistency.provenance.inputs import read_dataset
from consistency.runtime.machine import Machine
from consistency.tracking.live import followed
from consistency.training.folder import publish_training, read_identity
from consistency.training.loop import Training, train
from consistency.training.students import student_training


def make_student(job: Job, machine: Machine) -> None:
    """Write student.safetensors (EMA weights), one more file for each further EMA rate, history.jsonl, snapshots/
    and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges.
    """
    card = Card(job, "student")
    training = student_training(job, read_dataset(job), machine)
    with followed(job, training.folder) as start:
        measured = train(training, start)
        if machine.ranks.first:
            _publish(card, training, measured)
            shutil.rmtree(training.folder)


def _publish(card: Card, training: Training, measured: dict[str, float]) -> None:
    """Write the outputs of a finished training, and its card."""
    job = card.job
    digests = {path: digest_of(path, job.paths) for path in graph.inputs("student", job)}
    metadata = {"study": job.study.name, "stage": "student", "run": job.student, "seed": job.seed, "key": training.key}
    metadata |= training.metadata
    parents = {path.name: digest for path, digest in digests.items()}
    made = {"step": training.steps, "git": git_state(), "parents": parents}
    checkpoints = [job.weights(rate) for rate in job.settings.rates]
    for path, ema in zip(checkpoints, training.emas, strict=True):
        save_denoiser(path, ema.model, {**metadata, **made, "ema": ema.constant})
    publish_training(training.folder, job.folder)
    card.write(measured=measured, known=digests, training=read_identity(training.folder))
