"""Files that DVC compares before it runs a stage: one small file per job, which changes exactly when the job's
settings, its code or its downloads change.

A study file holds more than one job depends on (a title, a batch that affects only memory, the other students), and so
does a source folder. The stages of dvc.yaml therefore depend on these files, which one cheap stage writes.
"""

import shutil
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError
from consistency.base.files import made, sha256, write_json
from consistency.config.job import Job
from consistency.config.reading import parse_yaml
from consistency.config.study import Study
from consistency.data.resources import find
from consistency.provenance.code_digest import code_digest
from consistency.provenance.graph import artifacts, downloads

PIPELINE = Path("dvc.yaml")
# Sections that dvc.yaml names as parameters; DVC refuses a parameter that the file leaves to its default.
_NAMED = ("noise", "coefficients", "report")


def write_plan(job: Job) -> None:
    """Write results/<study>/plan/: one JSON file per job with the key of its settings, the digest of its code, and the
    sha256 of its downloads.

    Raises UserError if the study leaves out a section that dvc.yaml names, or dvc.yaml does not say which students are
    made from which.
    """
    study, folder = job.study, job.paths.root / "plan"
    check_order(study)
    for section in _NAMED:
        if section not in study.model_fields_set:
            raise UserError(f"study {study.name} has no section {section}, which dvc.yaml reads: add `{section}: {{}}`")
    shutil.rmtree(folder, ignore_errors=True)
    # dvc.yaml has the same stages for every study.
    for stage, each in artifacts(job, also=("coefficients", "flows")).values():
        content = {
            "settings": each.key(stage),
            "code": code_digest(stage),
            "downloads": {name: find(name).sha256 for name in downloads(each, stage)},
        }
        place = folder / stage if each.run is None else folder / stage / each.run / f"seed{each.seed}"
        write_json(place.with_suffix(".json"), content)


def write_inputs(job: Job, of: str | None = None) -> None:
    """Write results/<study>/inputs/: the sha256 of a job's inputs among the results, null for a job that reads none and
    is not run again when they change.

    of: `coefficients` and `predictor` of a student (the latter for one made from another), files of these names in
    <run>/seed<k>/, or `flows`, one file; None: all. job: of all students, or of one. Raises UserError if an input is
    missing.
    """
    folder = job.paths.root / "inputs"
    if of is None:
        shutil.rmtree(folder, ignore_errors=True)
    for each in [] if of == "flows" else job.trainings if job.run is None else [job]:
        place = folder / str(each.run) / f"seed{each.seed}"
        if of in (None, "coefficients"):
            write_json(place / "coefficients.json", _digests(job, _coefficients(each)))
        if not each.student.frozen:
            # DVC keeps the output of a stage that no longer exists.
            (place / "predictor.json").unlink(missing_ok=True)
        elif of in (None, "predictor"):
            write_json(place / "predictor.json", _digests(job, _predictor(each)))
    if of in (None, "flows"):
        write_json(folder / "flows.json", _digests(job, _measured(job) if job.study.flows else {}))


def _coefficients(job: Job) -> dict[Path, str]:
    """Return the fitted coefficients, if a student reads them, and the verb that makes them."""
    read = job.student.needs_coefficients
    return {job.paths.fit: "coefficients"} if read else {}


def _predictor(job: Job) -> dict[Path, str]:
    """Return the weights that make a student's endpoints, if another student's do, and the verb that makes them."""
    frozen, path = job.student.frozen, job.predictor
    return {path: f"student{job.of(frozen.run, job.seed).options}"} if frozen and path else {}


def _measured(job: Job) -> dict[Path, str]:
    """Return the inputs of the stage flows, and the verbs that make them."""
    # dataset.json holds the digest of the images, which may be 16 GB.
    found = {job.paths.dataset / name: "dataset" for name in ("dataset.json", "labels.npy")}
    found |= {job.paths.teacher_weights: "teacher"}
    for each in (each for each in job.trainings if each.run in job.study.coupled):
        found |= {**_coefficients(each), each.weights(): f"student{each.options}", **_predictor(each)}
    return found


def _digests(job: Job, files: dict[Path, str]) -> dict[str, str] | None:
    """Return the sha256 of files by name, below the study's folder; None without any. Raises UserError, naming the
    verb, if one is missing."""
    root = job.paths.root
    return {path.relative_to(root).as_posix(): sha256(made(path, verb)) for path, verb in files.items()} or None


def check_order(study: Study) -> None:
    """Raise UserError unless `frozen`, under `vars` in dvc.yaml, says which students are made from which."""
    try:
        content = parse_yaml(PIPELINE.read_text(), PIPELINE)
    except FileNotFoundError:
        raise UserError(f"no {PIPELINE} here: run this in the project's folder") from None
    items: list[Any] = (content.get("vars") if isinstance(content, dict) else None) or []
    said = [item["frozen"] for item in items if isinstance(item, dict) and "frozen" in item]
    order = [{"run": run, "predictor": s.frozen.run} for run, s in study.students.items() if s.frozen]
    if said != [order]:
        text = ", ".join(f"{{run: {pair['run']}, predictor: {pair['predictor']}}}" for pair in order)
        raise UserError(
            f"{PIPELINE} must say which students of {study.name} are made from which: "
            f"under vars, write `- frozen: [{text}]`"
        )
