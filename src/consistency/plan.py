"""What DVC compares before it runs a stage: for each job of a study a small file that changes exactly when its
settings, its code or the downloads it opens do.

A study file says more than a job depends on (a title, a batch that only takes memory, the other students), and so does
a folder of code. The stages of dvc.yaml therefore depend on these files, which one cheap stage writes.
"""

import shutil
from collections.abc import Iterator

from consistency.code import code_digest
from consistency.errors import UserError
from consistency.files import sha256, write_json
from consistency.layout import Layout
from consistency.resources import find
from consistency.study import OfficialTeacher, Study

# Sections that dvc.yaml names as parameters; DVC refuses a parameter that the file leaves to its default.
_NAMED = ("noise", "coefficients", "report")


def write_plan(study: Study, layout: Layout) -> None:
    """Write results/<study>/plan/: a JSON file a job with the key of its settings, the digest of its code, and the
    sha256 of its downloads.

    Raises UserError when the study leaves out a section that dvc.yaml names, has no teacher, or has students made from
    students.
    """
    if not study.taught:
        raise UserError(
            f"study {study.name} has no teacher, and dvc.yaml fits coefficients from one: "
            f"run `snakemake --config studies={study.name}` instead"
        )
    if frozen := [run for run in study.students if study.resolved(run).frozen]:
        raise UserError(
            f"students.{frozen[0]} is made from another student, and dvc.yaml knows no order among students: "
            f"run `snakemake --config studies={study.name}` instead"
        )
    for section in _NAMED:
        if section not in study.model_fields_set:
            raise UserError(f"study {study.name} has no section {section}, which dvc.yaml reads: add `{section}: {{}}`")
    folder = layout.root / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    for stage in ("dataset", "teacher", "coefficients", "extractor", "samples", "scores", "flows", "report"):
        write_json(folder / f"{stage}.json", _job(study, stage))
    for run, seed in _runs(study):
        for stage in ("student", "samples", "scores"):
            write_json(folder / stage / run / f"seed{seed}.json", _job(study, stage, run, seed))


def write_inputs(study: Study, layout: Layout) -> None:
    """Write results/<study>/inputs/<run>.json: the sha256 of the coefficients for a student that reads them, null for
    one that does not, and so is not trained again when they change. Raises UserError without coefficients."""
    folder, coefficients = layout.root / "inputs", layout.coefficients / "coefficients.npz"
    if not coefficients.is_file():
        raise UserError(f"{coefficients} is missing: run `python -m consistency coefficients` first")
    shutil.rmtree(folder, ignore_errors=True)
    for run in study.students:
        fitted = study.resolved(run).needs_coefficients
        write_json(folder / f"{run}.json", {coefficients.name: sha256(coefficients) if fitted else None})


def _runs(study: Study) -> Iterator[tuple[str, int]]:
    return ((run, seed) for run in study.students for seed in study.seeds)


def _job(study: Study, stage: str, run: str | None = None, seed: int | None = None) -> dict[str, object]:
    return {
        "settings": study.key(stage, run, seed),
        "code": code_digest(stage),
        "downloads": {name: find(name).sha256 for name in _downloads(study, stage, run)},
    }


def _downloads(study: Study, stage: str, run: str | None) -> Iterator[str]:
    """The resources that a job opens."""
    if stage == "dataset" and study.dataset.kind == "cifar10" and study.dataset.path is None:
        yield "cifar-10-python.tar.gz"
    if stage == "teacher" and isinstance(study.teacher, OfficialTeacher):
        yield study.teacher.checkpoint
    if stage == "extractor" and study.scores.extractor == "inception":
        yield "inception-2015-12-05.pt"
    if stage == "student" and run is not None and study.resolved(run).distance == "lpips":
        yield "vgg16-397923af.pth"
