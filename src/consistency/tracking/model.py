"""A registered student as MLflow loads it. It samples the same images as the stage samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.base.errors import UserError
from consistency.base.files import read_json
from consistency.base.seeding import ImageNoise
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.data.prepared import to_bytes
from consistency.evaluation.samplers import Sampler, draw, jump_sampler, prepared
from consistency.nets.denoiser import Denoiser
from consistency.provenance.inputs import read_preconditioning, read_student
from consistency.runtime.machine import pick_device
from consistency.theory.preconditioning import Preconditioning


@dataclass(frozen=True)
class RegisteredStudent:
    """A student ready to sample."""

    job: Job
    model: Denoiser
    preconditioning: Preconditioning

    def predict(self, rows: Any) -> np.ndarray[Any, Any]:
        """Sample each row of a table with count and nfe and, optionally, seed and label. Returns uint8 [N, H, W, C]."""
        wanted = (
            {name: int(value) for name, value in row.items() if value is not None and value == value}
            for row in rows.to_dict("records")
        )
        return np.concatenate([self.draw(**given) for given in wanted])

    def draw(self, count: int, nfe: int, seed: int = 0, label: int | None = None) -> np.ndarray[Any, Any]:
        """Sample uint8 [count, H, W, C]: image i comes from seed + i, through nfe jumps.

        label: the class of all images of a conditional student; by default each seed draws its own. Raises UserError
        for values out of range.
        """
        classes = self.model.label_dim
        if count < 1 or nfe < 1 or seed < 0:
            raise UserError(f"count and nfe must be 1 or more, seed 0 or more; got {count}, {nfe} and {seed}")
        if label is not None and not 0 <= label < classes:
            allowed = f"0 to {classes - 1}" if classes else "none, since it is not conditional"
            raise UserError(f"label {label} is not one of the student's: {allowed}")
        sampler = jump_sampler(self.job, self.model, self.preconditioning, nfe)
        sampler = sampler if label is None else _labelled(sampler, label)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the stages' default; the number affects the last bit on a CPU
        try:
            batches = draw(self.job.study, self.model, sampler, seed + count, seed)
            return np.concatenate([to_bytes(images) for _, images in batches])
        finally:
            torch.set_num_threads(threads)


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
    model = prepared(study, read_student(job, pick_device("auto")))
    return RegisteredStudent(job, model, read_preconditioning(job, model))


def _labelled(sampler: Sampler, label: int) -> Sampler:
    def sample(noise: ImageNoise) -> torch.Tensor:
        # Labels are drawn, then replaced, so that the noise after them stays the same.
        assert noise.labels is not None
        noise.labels = torch.full_like(noise.labels, label)
        return sampler(noise)

    return sample
