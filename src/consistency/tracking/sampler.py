"""A registered student, opened by the digests of its files, and its images, the same as those of the stage samples."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from consistency.errors import UserError
from consistency.files import sha256
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.seeding import ImageNoise
from consistency.stages.inputs import pick_device, read_preconditioning, read_student
from consistency.stages.samples import Sampler, draw, jump_sampler, prepared
from consistency.study import Study, explain
from consistency.theory.preconditioning import Preconditioning
from consistency.training.data import to_bytes

#: names the folder that holds the studies' results, where they are not where they were when a model was registered
RESULTS = "CONSISTENCY_RESULTS"


@dataclass(frozen=True)
class OpenStudent:
    """A student ready to sample. threads: on a CPU their number decides the last bit, so by default the stages' one."""

    study: Study
    run: str
    model: Denoiser
    preconditioning: Preconditioning
    threads: int = 1

    def draw(self, count: int, nfe: int, seed: int = 0, label: int | None = None) -> np.ndarray[Any, Any]:
        """uint8 [count, H, W, C]: image i comes from seed + i, through nfe jumps.

        label: the class of all images of a conditional student, instead of the one that each seed draws. Raises
        UserError for values that are out of range.
        """
        classes = self.model.label_dim
        if count < 1 or nfe < 1 or seed < 0:
            raise UserError(f"count and nfe must be 1 or more, seed 0 or more; got {count}, {nfe} and {seed}")
        if label is not None and not 0 <= label < classes:
            allowed = f"0 to {classes - 1}" if classes else "none, for it is not conditional"
            raise UserError(f"label {label} is not one of the student's: {allowed}")
        sampler = jump_sampler(self.study, self.run, self.model, self.preconditioning, nfe)
        sampler = sampler if label is None else _labelled(sampler, label)
        with _threads(self.threads):
            batches = draw(self.study, self.model, sampler, seed + count, seed)
            return np.concatenate([to_bytes(images) for _, images in batches])


def open_student(config: dict[str, Any]) -> OpenStudent:
    """The student of a registered model's configuration.

    config: study (resolved), run, seed, results (the folder at registration), files (path below it, sha256),
    device (default: auto) and threads (default: 1). Raises UserError, saying what to do, when a file is missing or is
    another one.
    """
    try:
        study = Study.model_validate(config["study"])
    except ValidationError as error:
        raise UserError(f"this model's study is of another version of this project: {explain(error, Study)}") from None
    run, seed = config["run"], config["seed"]
    layout = Layout(study.name, _results(study, config))
    device = pick_device(config.get("device", "auto"))
    model = prepared(study, read_student(study, layout, run, seed, device))
    preconditioning = read_preconditioning(study, layout, run, model)
    return OpenStudent(study, run, model, preconditioning, int(config.get("threads", 1)))


def draw_rows(student: OpenStudent, rows: Any) -> np.ndarray[Any, Any]:
    """The images of all rows of a table with count and nfe, and if wanted seed and label."""
    drawn = []
    for row in rows.to_dict("records"):
        given = {name: int(value) for name, value in row.items() if value is not None and value == value}
        drawn.append(student.draw(**given))
    return np.concatenate(drawn)


def _results(study: Study, config: dict[str, Any]) -> Path:
    """The folder of results in which every file is the registered one."""
    named = os.environ.get(RESULTS)
    folders = [Path(folder) for folder in (named, "results", config.get("results")) if folder]
    problem = ""
    for folder in folders:
        problem = next((found for file in config["files"] if (found := _problem(folder, file))), "")
        if not problem:
            return folder
    raise UserError(
        f"{problem}: run `dvc pull`, or unpack the archive of study {study.name}, or set {RESULTS} to the folder "
        f"that holds {study.name}/"
    )


def _problem(folder: Path, file: dict[str, str]) -> str:
    """Why the folder's file is not the registered one; nothing if it is."""
    path = folder / file["path"]
    if not path.is_file():
        return f"{path} is missing"
    found = sha256(path)
    return "" if found == file["sha256"] else f"{path} is not the registered file (its sha256 is {found[:16]}...)"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _labelled(sampler: Sampler, label: int) -> Callable[[ImageNoise], torch.Tensor]:
    def sample(noise: ImageNoise) -> torch.Tensor:
        # The drawn labels are replaced, not left out: the noise after them stays the same.
        assert noise.labels is not None
        noise.labels = torch.full_like(noise.labels, label)
        return sampler(noise)

    return sample
