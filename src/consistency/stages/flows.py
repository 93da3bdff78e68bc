"""Stage flows: the effect of a coupling on the flow, on the study's images, in the plane and in closed form (GC)."""

import shutil
from pathlib import Path

import numpy as np

from consistency.base.arrays import write_arrays, write_table
from consistency.config.job import Job
from consistency.evaluation.flows import (
    COLUMNS,
    FILES,
    ImageMeasurements,
    Row,
    independent_pairs,
    limit_rows,
    plane_rows,
    train_toys,
)
from consistency.provenance.card import Card
from consistency.provenance.inputs import read_dataset
from consistency.runtime.machine import Machine
from consistency.training.discrepancy import discrepancy_of


def make_flows(job: Job, machine: Machine) -> None:
    """Write FILES and card.json; the tables are empty if the study asks for no flows.

    transport.csv: E ||f(x + t z, t, eps) - z||^2 of every student's average (kind student), and E ||x - z||^2 of the
    pairs themselves, the same at all t (kind pairs). discrepancy.csv: R_t of the couplings that the study names, each
    as at the end of its student's training, and of independent noise by the teacher. toy.npz: `train_toy` for each of
    TOYS. plane.csv: R_t and E ||x - z||^2 of each coupling on the toy's data, with the exact endpoint as gc's
    generator. limit.csv: L_CT and L_CD of the mixture on grids, and the limits of N^2 L. Raises UserError if a student
    is missing or has other settings, Interrupted when asked to stop while a denoiser is trained.
    """
    card, study, settings = Card(job, "flows"), job.study, job.study.flows
    tables: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    toys: dict[str, np.ndarray] = {}
    inputs: list[Path] = []
    states: list[Path] = []
    if settings is not None:
        data = read_dataset(job)
        images = ImageMeasurements(job, settings, machine.device, independent_pairs(study, settings, data))
        tables["transport.csv"], inputs = images.transport()
        if settings.discrepancy and study.taught:
            tables["discrepancy.csv"] += images.by_teacher()
            inputs.append(job.paths.teacher_weights)
        for run in settings.discrepancy:
            student = job.of(run, study.seeds[0])
            measure = discrepancy_of(student, settings, data, machine)
            tables["discrepancy.csv"] += images.discrepancy(student, measure)
            inputs += [path for path in measure.inputs if path not in inputs]
            states.append(measure.training.folder)
        toys, tables["plane.csv"], tables["limit.csv"] = (
            train_toys(study, settings),
            plane_rows(settings),
            limit_rows(settings),
        )
    for name, rows in tables.items():
        write_table(job.paths.flows / name, rows, COLUMNS[name])
    write_arrays(job.paths.flows / "toy.npz", toys)
    card.write(inputs, [job.paths.flows / name for name in FILES])
    for state in states:
        shutil.rmtree(state)
