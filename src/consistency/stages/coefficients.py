"""Stage coefficients: fit l_t and s_t from the teacher, once, before any student."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # noqa: F401 - autograd imports it at its first product: half a second

from consistency.base.arrays import read_array, write_array, write_arrays
from consistency.base.errors import UserError
from consistency.base.locks import only_one
from consistency.base.progress import Progress
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.evaluation.forecast import forecast
from consistency.provenance import graph
from consistency.provenance.card import Card, digest_of
from consistency.provenance.code_digest import code_digest
from consistency.provenance.inputs import read_dataset, read_teacher, require_classes
from consistency.runtime.distributed import ALONE, Ranks
from consistency.runtime.stopping import Interrupted, stop_requests
from consistency.theory.estimators import fit_coefficients
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.fits import fitted_images, fitted_times, study_jumps
from consistency.training.objective import with_labels


def make_coefficients(job: Job, device: torch.device, ranks: Ranks = ALONE) -> None:
    """Write card.json and coefficients.npz: times, l, l_se, s, s_se, determined; s_centred, s_centred_se and
    determined_centred, of the fit around the mean image of the training data; and that image, centre.

    Resumes an interrupted fit; several processes (ranks) share the times. Raises Interrupted when a signal asks to
    stop, UserError if the teacher returns NaN or the fit gives a singular jump.
    """
    study = job.study
    if not study.needs_coefficients:
        raise UserError(
            f"no student of {study.name} reads coefficients: use preconditioning analytic with fit: teacher"
        )
    card, label = Card(job, "coefficients"), f"coefficients {study.name}"
    data, settings = read_dataset(job), study.coefficients
    images, labels, noise = fitted_images(study, data, device)
    teacher = read_teacher(job, device).to(images.dtype)
    require_classes(study, data, teacher)
    probes = None if settings.probes == "exact" else settings.probes
    centre = torch.from_numpy(data.mean())
    known = {path: digest_of(path, job.paths) for path in graph.inputs("coefficients", job)}
    made_from = repr((job.key("coefficients"), code_digest("coefficients"), *sorted(known.values())))
    state = job.paths.state / study.name / "coefficients"
    with only_one(state, "is working") if ranks.first else contextlib.nullcontext(), stop_requests() as requests:
        folder = state / hashlib.sha256(made_from.encode()).hexdigest()[:16]
        try:
            fit = fit_coefficients(
                lambda part: with_labels(teacher, None if labels is None else labels[part]),
                images,
                noise,
                fitted_times(study),
                probes,
                generator(settings.seed, "probes", device=device),
                min(settings.batch, study.compute.batch_per_device or settings.batch),
                KeptRows(folder, ranks, requests, label),
                centre.to(device, images.dtype),
                settings.mode,
                study_jumps(study),
                settings.tolerance,
            )
        except ValueError as error:
            raise UserError(f"coefficients: {error}; train the teacher longer or use precision: float64") from None
    if not ranks.first:
        return
    around = fit.centred
    assert around is not None
    # Every jump between fitted times must have finite coefficients.
    for each in (fit, around):
        if not GeneralizedODE(*each.nodes).is_regular():
            raise UserError(
                "coefficients: the fitted l_t, s_t give a singular jump; raise coefficients.samples or probes"
            )
    arrays = {**fit.arrays(), "centre": centre.numpy()}
    write_arrays(job.paths.fit, arrays)
    print(*forecast(arrays, data.facts["sigma_data"], study.noise, study.sampling.nfe), sep="\n")
    evaluations, seconds = settings.evaluations(images[0].numel(), fit.images), round(time.time() - card.started, 3)
    measured = {"network_evaluations": evaluations, "seconds": seconds, "images": fit.images, "error": fit.error}
    card.write(measured=measured, known=known)
    shutil.rmtree(state)


@dataclass(frozen=True)
class KeptRows:
    """Rows of a fit, one file each in the state folder: an interrupted fit goes on, and processes share the rows."""

    folder: Path
    ranks: Ranks
    requests: Callable[[], int]
    label: str

    def __call__(self, name: str, count: int, row: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return row(0) to row(count - 1), stacked. Raises Interrupted when asked to stop."""
        files = [self.folder / f"{name}-{k}.npy" for k in range(count)]
        missing = [k for k, file in enumerate(files) if not file.exists()]
        self.ranks.wait()  # no process writes before all have looked
        progress = Progress(self.label, count, count - len(missing), shown=self.ranks.first)
        # All processes take one row a round, and stop after the same one.
        for first in range(0, len(missing), self.ranks.world):
            together = missing[first : first + self.ranks.world]
            for k in together[self.ranks.rank :][:1]:
                write_array(files[k], row(k))
            stop = self.ranks.largest(self.requests())
            progress.update(len(together))
            if stop:
                where = f"stopped at time {progress.n} of {count}"
                raise Interrupted(f"{self.label}: {where}, which are kept", stop)
        progress.close()
        return np.stack([read_array(file, "coefficients") for file in files])
