"""Stage coefficients: fit l_t and s_t from the teacher, once, before any student."""

import time

import torch

from consistency.base.arrays import write_arrays
from consistency.base.errors import UserError
from consistency.base.progress import track
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.evaluation.forecast import forecast
from consistency.provenance.card import Card
from consistency.provenance.inputs import read_dataset, read_teacher, require_classes
from consistency.theory.estimators import fit_coefficients
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.fits import fitted_images, fitted_times, study_jumps
from consistency.training.objective import with_labels


def make_coefficients(job: Job, device: torch.device) -> None:
    """Write card.json and coefficients.npz: times, l, l_se, s, s_se, determined; s_centred, s_centred_se and
    determined_centred, of the fit around the mean image of the training data; and that image, centre.

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
    centre = torch.from_numpy(data.mean())
    try:
        fit = fit_coefficients(
            lambda part: with_labels(teacher, None if labels is None else labels[part]),
            images,
            noise,
            fitted_times(study),
            probes,
            generator(settings.seed, "probes", device=device),
            min(settings.batch, study.compute.batch_per_device or settings.batch),
            track(f"coefficients {study.name}"),
            centre.to(device, images.dtype),
            settings.mode,
            study_jumps(study),
            settings.tolerance,
        )
    except ValueError as error:
        raise UserError(f"coefficients: {error}; train the teacher longer or use precision: float64") from None
    around = fit.centred
    assert around is not None
    # Every jump between fitted times must have finite coefficients.
    for each in (fit, around):
        if not GeneralizedODE(*each.nodes).is_regular():
            raise UserError(
                "coefficients: the fitted l_t, s_t give a singular jump; raise coefficients.samples or probes"
            )
    arrays = {**fit.arrays(), "centre": centre.numpy()}
    write_arrays(path, arrays)
    print(*forecast(arrays, data.facts["sigma_data"], study.noise, study.sampling.nfe), sep="\n")
    evaluations, seconds = settings.evaluations(images[0].numel(), fit.images), round(time.time() - card.started, 3)
    measured = {"network_evaluations": evaluations, "seconds": seconds, "images": fit.images, "error": fit.error}
    card.write(measured=measured)
