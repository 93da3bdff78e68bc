"""All results of a study, made by its stages in this process, where the imports are paid once."""

import torch

from consistency.config.job import Job
from consistency.runtime.machine import Machine
from consistency.stages.coefficients import make_coefficients
from consistency.stages.dataset import make_dataset
from consistency.stages.extractor import make_extractor
from consistency.stages.flows import make_flows
from consistency.stages.report import make_report
from consistency.stages.samples import make_samples
from consistency.stages.scores import make_calibration, make_scores
from consistency.stages.student import make_student
from consistency.stages.teacher import make_teacher

CPU = torch.device("cpu")


def make_all(job: Job) -> None:
    """Make every artifact of the job's study, parents first."""
    machine = Machine(CPU)
    make_dataset(job)
    make_teacher(job, machine)
    if job.study.needs_coefficients:
        make_coefficients(job, CPU)
    make_extractor(job, CPU)
    make_samples(job, CPU)
    make_calibration(job, CPU)
    for student in job.trainings:
        make_student(student, machine)
        make_samples(student, CPU)
        make_scores(student, CPU)
    if job.study.flows:
        make_flows(job, machine)
    make_report(job)
