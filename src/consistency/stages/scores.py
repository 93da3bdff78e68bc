"""Stage scores: first a calibration (data against data, teacher against data), then every student."""

from dataclasses import asdict, replace

import numpy as np
import torch

from consistency.base.arrays import read_array, write_array
from consistency.base.errors import UserError
from consistency.base.files import write_bytes, write_json
from consistency.config.job import Job
from consistency.config.measures import HEUN
from consistency.config.samplers import student_samplers
from consistency.evaluation.samplers import prepared
from consistency.evaluation.scores import Score, Scorer, StudentScorer, teacher_endpoints
from consistency.provenance.inputs import read_fit, read_student, read_teacher


def make_calibration(job: Job, device: torch.device) -> None:
    """Write calibration.csv (data halves; teacher; teacher at the size of the halves), endpoints.npy (the teacher's ODE
    endpoints, none without a teacher), and their card.

    Raises UserError, and leaves no calibration.csv, if the teacher's FID is not the published one.
    """
    study, samples = job.study, job.samples / "heun.npy"
    images = read_array(samples, "samples")
    scorer = Scorer(job, device, f"calibration {study.name}", len(images))
    scorer.warn_of_singular(study.sampling.count)
    scores = scorer.calibration(images if study.taught else None)
    ends = np.zeros((0, study.dataset.channels, *[study.dataset.resolution] * 2), np.float32)
    if study.taught:
        teacher = prepared(study, read_teacher(job, device))
        scores = [_published(job, score) if score.sampler == HEUN else score for score in scores]
        ends = teacher_endpoints(job, teacher)
    write_array(job.paths.endpoints, ends)
    write_bytes(job.paths.passed, b"The teacher passed its calibration.\n")
    scorer.write(scores)
    job.paths.measured_calibration.unlink(missing_ok=True)


def make_scores(job: Job, device: torch.device) -> None:
    """Write the score table of one student at each of its EMA rates, and its card: the final samples and, from the
    snapshots, the learning curve."""
    study, settings, scores, samplers = job.study, job.settings, job.study.scores, student_samplers(job)
    curve_images = len(settings.rates) * len(settings.snapshots) * len(scores.curve_nfe) * scores.curve_count
    scorer = Scorer(job, device, f"scores {job.label}", len(samplers) * study.sampling.count + curve_images)
    endpoints, fit = read_array(job.paths.endpoints, "calibration"), read_fit(job)
    rows = []
    for rate in settings.rates:
        student = prepared(study, read_student(job, device, rate))
        scored = StudentScorer(scorer, rate, endpoints, fit)
        own = [sampler for sampler in samplers if sampler.rate == rate]
        rows += [scored.final(student, sampler) for sampler in own]
        for step in settings.snapshots:
            model = prepared(study, read_student(job, device, rate, step))
            rows += [scored.curve(model, step, nfe) for nfe in scores.curve_nfe]
    scorer.write(rows)


def _published(job: Job, score: Score) -> Score:
    """Return the teacher's score with the published FID beside it. Raises UserError if they do not agree."""
    published, tolerance = job.study.calibration.published_fid, job.study.calibration.tolerance
    if published is None:
        return score
    score = replace(score, published=published, tolerance=tolerance)
    if abs(score.fd - published) <= tolerance:
        return score
    measured = job.paths.measured_calibration
    write_json(measured, asdict(score))
    for path in (job.scores, job.card("scores"), job.paths.passed):
        path.unlink(missing_ok=True)
    raise UserError(
        f"the teacher's FID is {score.fd:.4g}, not the published {published:g} within {tolerance:g} "
        f"(calibration.published_fid, calibration.tolerance), from {score.images:,} images in clean-fid's mode "
        f"{job.study.scores.mode}. Usual causes: data prepared in another way, another scores.mode, sampling.count "
        f"below 50,000, another sampler. The samples are kept and {measured} says what was measured: mend the cause or "
        "raise the tolerance, and run the same command again"
    )
