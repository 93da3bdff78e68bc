"""Stage coefficients: fit l_t and s_t from the teacher, once, before any student."""

import time

import torch

from consistency.base.arrays import write_arrays
from consistency.base.errors import UserError
from consistency.base.progress import track
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.provenance.card import Card
from consistency.provenance.inputs import read_dataset, read_teacher, require_classes
from consistency.theory.estimators import fit_coefficients
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.fits import fitted_images, fitted_times
from consistency.training.objective import with_labels


def make_coefficients(job: Job, device: torch.device) -> None:
    """Write coefficients.npz (times, l, l_se, s, s_se, determined) and card.json.

    Raises UserError if the teacher returns NaN or the fit gives a singular jump.
    """
    study = job.study
    if not study.needs_coefficients:
        raise UserError(
            f"no student of {study.name} reads coefficients: use preconditioning analytic with fit: teacher"
        )
    card, path = Card(job, "coefficients"), job.paths.fit
    data, settings = read_dataset(job), study.coefficients
    images, labels, noise = fitted_images(study, data, device)
    teacher = read_teacher(job, device).to(images.dtype)
    require_classes(study, data, teacher)
    probes = None if settings.probes == "exact" else settings.probes
    try:
        fit = fit_coefficients(
            lambda part: with_labels(teacher, None if labels is None else labels[part]),
            images,
            noise,
            fitted_times(study),
            probes,
            generator(settings.seed, "probes", device=device),
            settings.batch,
            track(f"coefficients {study.name}"),
        )
    except ValueError as error:
        raise UserError(f"coefficients: {error}; train the teacher longer or use precision: float64") from None
    # Every jump between fitted times must have finite coefficients.
    times, l, s = map(torch.from_numpy, (fit.times, fit.l, fit.s))
    if not GeneralizedODE(times, l, s).is_regular():
        raise UserError("coefficients: the fitted l_t, s_t give a singular jump; raise coefficients.samples or probes")
    write_arrays(path, vars(fit))
    # An evaluation with its derivative along one direction counts 2; a residual, 1.
    passes = settings.times * settings.samples * (2 * ((probes or images[0].numel()) + 1) + 1)
    measured = {"network_evaluations": passes, "seconds": round(time.time() - card.started, 3)}
    card.write(measured=measured)
