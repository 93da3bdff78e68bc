"""Stage flows: the effect of a coupling on the flow, on the study's images, in the plane and in closed form (GC)."""

import shutil
from pathlib import Path

from consistency.base.arrays import write_arrays, write_table
from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.evaluation.flows import (
    COLUMNS,
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
    """Write the tables, toy.npz and card.json.

    transport.csv: E ||f(x + t z, t, eps) - z||^2 of every student's average (kind student), and E ||x - z||^2 of the
    pairs themselves, the same at all t (kind pairs). discrepancy.csv: R_t of the couplings that the study names, each
    as at the end of its student's training, and of independent noise by the teacher. toy.npz: `train_toy` for each of
    TOYS. plane.csv: R_t and E ||x - z||^2 of each coupling on the toy's data, with the exact endpoint as gc's
    generator. limit.csv: L_CT and L_CD of the mixture on grids, and the limits of N^2 L. Raises UserError if a student
    is missing or has other settings, or the study has no section flows; Interrupted when asked to stop while a
    denoiser is trained.
    """
    settings, study = job.study.flows, job.study
    if settings is None:
        raise UserError(f"study {study.name} has no section flows: add one, which says what is measured")
    card, data = Card(job, "flows"), read_dataset(job)
    images = ImageMeasurements(job, settings, machine.device, independent_pairs(study, settings, data))
    discrepancies: list[Row] = []
    states: list[Path] = []
    tables = {"transport.csv": images.transport(), "discrepancy.csv": discrepancies}
    if settings.discrepancy and study.taught:
        discrepancies += images.by_teacher()
    for name in settings.discrepancy:
        student = job.of(name, study.seeds[0])
        measure = discrepancy_of(student, settings, data, machine)
        discrepancies += images.discrepancy(student, measure)
        states.append(measure.training.folder)
    toys = train_toys(study, settings)
    tables |= {"plane.csv": plane_rows(settings), "limit.csv": limit_rows(settings)}
    for name, rows in tables.items():
        write_table(job.paths.flows / name, rows, COLUMNS[name])
    write_arrays(job.paths.flows / "toy.npz", toys)
    card.write()
    for state in states:
        shutil.rmtree(state)
