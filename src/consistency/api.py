"""The Python interface: open studies, networks and results, sample, and score images.

    from consistency import api

    student = api.load_student("results/tiny/students/analytic/seed0/student.safetensors")
    images = student.sample(64, nfe=3)

Every error that its caller can mend is a `UserError` with a message of one line. `import consistency` alone is quick;
this module imports PyTorch.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.utils import make_grid

from consistency.base.arrays import read_table, write_array
from consistency.base.errors import UserError
from consistency.base.files import atomic
from consistency.config import reading
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.given import open_given
from consistency.evaluation.scores import Distances, Measures
from consistency.evaluation.trained import BATCH, TrainedStudent, open_student
from consistency.nets.denoiser import Denoiser
from consistency.provenance.card import read_card
from consistency.provenance.graph import REPORT_FILES
from consistency.provenance.inputs import read_teacher
from consistency.report.results import TEXT
from consistency.runtime.machine import as_in_a_stage, pick_device

__all__ = [
    "Denoiser",
    "Distances",
    "Study",
    "TrainedStudent",
    "UserError",
    "load_student",
    "load_study",
    "load_teacher",
    "read_tables",
    "save_images",
    "score_images",
]

Images = np.ndarray[Any, np.dtype[np.uint8]]


def load_study(study: str | Path) -> Study:
    """Read and check a study, with every default filled in.

    study: a file, or a name: config/studies/NAME.yaml of the working directory, else the study of that name that the
    package ships. Raises UserError for a missing file and for the first thing that is wrong in it.

    Examples:
        >>> study = load_study("tiny")
        >>> study.students["analytic"].preconditioning
        'analytic'
    """
    return reading.load_study(study)


def load_teacher(
    study: Study | str | Path, results: str | Path = "results", device: str | torch.device = "auto"
) -> Denoiser:
    """Load the EDM teacher of a study, frozen: teacher(x, t, labels=labels) is its denoiser D(x,t).

    x: float [N, C, H, W], images in [-1, 1] units with noise of standard deviation t; t: a number or [N]; labels: of a
    conditional teacher, int64 [N] (`Denoiser` says more). results: the folder that has <study>/teacher/; device: auto,
    cpu, cuda or cuda:N. Raises UserError if the study has no teacher, and if its file is missing, damaged or of other
    settings.

    Examples:
        >>> teacher = load_teacher("tiny")
        >>> x = 80 * torch.randn(4, 1, 8, 8, device=next(teacher.parameters()).device)
        >>> denoised = teacher(x, 80.0)
    """
    job = _job(study, results)
    if not job.study.taught:
        raise UserError(f"the study {job.study.name} has no teacher")
    return read_teacher(job, _device(device))


def load_student(
    file: str | Path, device: str | torch.device = "auto", precision: str = "float32", batch: int = BATCH
) -> TrainedStudent:
    """Load a student from its file alone, final weights or a snapshot; no study and no results folder are needed.

    The student is a function, student(x, t, s), and has a method `sample`. device: auto, cpu, cuda or cuda:N;
    precision: arithmetic of its network, float32, bfloat16 or float16; batch: images an evaluation. To repeat the
    images of a study's stage bit for bit, give the study's sampling.precision and sampling.batch here, and its
    sampling.labels to `sample`. No code of the file is ever run. Raises UserError for a missing, damaged or foreign
    file, for a teacher, and for a student of an earlier version, whose file does not say how it jumps.

    Examples:
        >>> student = load_student("results/tiny/students/analytic/seed0/student.safetensors")
        >>> images = student.sample(16, nfe=2, seed=100)
    """
    if precision not in ("float32", "bfloat16", "float16") or batch < 1:
        raise UserError(f"precision is float32, bfloat16 or float16, batch 1 or more; got {precision} and {batch}")
    return open_student(Path(file), _device(device), precision, batch)


def score_images(
    study: Study | str | Path,
    images: Images | str | Path,
    results: str | Path = "results",
    device: str | torch.device = "auto",
    threads: int = 1,
) -> Distances:
    """Compare images with a study's dataset, as its stage scores does: the same features, FD and KID.

    images: uint8 [N, H, W, C] of the study's size, a .npy file of that, or a folder of such images (*.png, *.jpg,
    folders below it too, in sorted order). results: where the study's dataset and extractor are prepared; threads: CPU
    threads. With the features of a classifier, FD is not Inception FID. Compare distances at equal N only. Raises
    UserError for fewer than two images or images of another size, and if dataset or extractor are missing.

    Examples:
        >>> found = score_images("tiny", images)
        >>> found.images, found.extractor, found.fd, found.kid
    """
    job = _job(study, results)
    with as_in_a_stage(threads):
        measures = Measures(job, _device(device))
        count, chunks = open_given(images, job.study.dataset)
        if count < 2:
            raise UserError("a score needs at least two images")
        found = measures.statistics(measures.extractor.pieces(chunks), count)
        return measures.distances(found, measures.data, count)


def read_tables(study: Study | str | Path, results: str | Path = "results") -> dict[str, pd.DataFrame]:
    """Read the tables of a study's report.

    Returns scores (every score), table (each student at the end of training, mean and interval over seeds), speedup
    and paired (students against their baselines). Raises UserError if the report is missing or of other settings.

    Examples:
        >>> read_tables("tiny")["table"][["run", "nfe", "fd"]]
    """
    job = _job(study, results)
    read_card(job, "report")
    paths = [job.paths.report / name for name in REPORT_FILES if name.endswith(".csv")]
    return {path.stem: read_table(path, "report", TEXT) for path in paths}


def save_images(images: Images, file: str | Path) -> None:
    """Write images: a square grid for .png, the array itself for .npy.

    images: uint8 [N, H, W, C] with 1 or 3 channels, row by row in the grid, with 1 white pixel between them. Raises
    UserError for another suffix and if the file cannot be written.

    Examples:
        >>> save_images(student.sample(64, nfe=3), "grid.png")
    """
    path = _writable(file)
    if path.suffix == ".npy":
        write_array(path, images)
        return
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    grid = make_grid(pixels, math.ceil(math.sqrt(len(images))), padding=1, pad_value=255)
    with atomic(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def _job(study: Study | str | Path, results: str | Path) -> Job:
    study = study if isinstance(study, Study) else load_study(study)
    return Job(study, StudyPaths(study.name, Path(results)))


def _device(device: str | torch.device) -> torch.device:
    return device if isinstance(device, torch.device) else pick_device(device)


def _writable(file: str | Path) -> Path:
    if Path(file).suffix not in (".png", ".npy"):
        raise UserError(f"{file}: images are written to a .png (a grid) or a .npy (the array)")
    return Path(file)


# --- the verbs sample and score


def write_samples(
    student_file: Path,
    out: Path,
    count: int,
    nfe: int,
    first_seed: int,
    label: int | None,
    labels: Literal["data", "balanced"],
    device: torch.device,
    threads: int,
) -> None:
    """Sample a student from its file and write the images."""
    _writable(out)  # before the work
    student = load_student(student_file, device)
    save_images(student.sample(count, nfe, first_seed, label, threads=threads, labels=labels), out)
    print(f"{out}: {count} images, {nfe} jumps each, seeds {first_seed} to {first_seed + count - 1}")


def print_score(study: Study, results: Path, images: Path, device: torch.device, threads: int) -> None:
    """Score a folder of images and print the distances."""
    found = score_images(study, images, results, device, threads)
    name = "FID" if found.extractor.startswith("inception") else "FD (classifier features, not Inception FID)"
    print(f"{name} {found.fd:.6g}, KID {found.kid:.6g}, N = {found.images:,}, extractor {found.extractor}, ", end="")
    print(f"against the dataset of {study.name}")
