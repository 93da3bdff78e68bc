"""A registered student as MLflow loads it. It samples the same images as the stage samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consistency.base.errors import UserError
from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.evaluation.samplers import prepared
from consistency.evaluation.trained import TrainedStudent
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.jumps import read_jumps
from consistency.provenance.inputs import read_preconditioning
from consistency.runtime.machine import pick_device


@dataclass(frozen=True)
class RegisteredStudent:
    """A student as MLflow calls it."""

    student: TrainedStudent

    def predict(self, rows: Any) -> np.ndarray[Any, Any]:
        """Sample each row of a table with count and nfe and, optionally, seed and label. Returns uint8 [N, H, W, C]."""
        wanted: Iterator[dict[str, Any]] = (
            {name: int(value) for name, value in row.items() if value is not None and value == value}
            for row in rows.to_dict("records")
        )
        return np.concatenate([self.student.sample(**given) for given in wanted])


def _load_pyfunc(path: str) -> RegisteredStudent:
    """Open the student of a model. MLflow calls this function by its name, with the model's folder.

    Raises UserError if this version of the project cannot read the study.
    """
    (card_file,) = Path(path).glob("*/students/*/*/card.json")
    card = read_json(card_file, "track")
    try:
        study = build_study(card["resolved"])
    except UserError as error:
        raise UserError(f"this model's study is of another version of this project: {error}") from None
    job = Job(study, StudyPaths(study.name, Path(path)), card["run"], card["seed"])
    student, metadata = load_denoiser(job.weights(), job.key("student"))
    model = prepared(study, student.to(pick_device("auto")))
    preconditioning, only_to_eps = read_preconditioning(job, model), job.settings.only_to_eps
    weighted = model.label_dim and study.sampling.labels == "data"
    classes = read_jumps(job.weights(), metadata).class_counts if weighted else [1] * model.label_dim
    return RegisteredStudent(
        TrainedStudent(model, preconditioning, study.noise, only_to_eps, study.sampling.batch, classes)
    )
