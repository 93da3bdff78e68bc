"""What DVC compares before it runs a stage: for each job of a study a small file that changes exactly when its
settings, its code or the downloads it opens do.

A study file says more than a job depends on (a title, a batch that only takes memory, the other students), and so does
a folder of code. The stages of dvc.yaml therefore depend on these files, which one cheap stage writes.
"""

import shutil
from pathlib import Path
from typing import Any

from consistency.code import code_digest
from consistency.errors import UserError
from consistency.files import made, sha256, write_json
from consistency.layout import Layout
from consistency.provenance import artifacts
from consistency.resources import downloads, find
from consistency.study import Study, parse_yaml

PIPELINE = Path("dvc.yaml")
# Sections that dvc.yaml names as parameters; DVC refuses a parameter that the file leaves to its default.
_NAMED = ("noise", "coefficients", "report")


def write_plan(study: Study, layout: Layout) -> None:
    """Write results/<study>/plan/: a JSON file a job with the key of its settings, the digest of its code, and the
    sha256 of its downloads.

    Raises UserError when the study leaves out a section that dvc.yaml names, or dvc.yaml does not say which students
    are made from which.
    """
    check_order(study)
    for section in _NAMED:
        if section not in study.model_fields_set:
            raise UserError(f"study {study.name} has no section {section}, which dvc.yaml reads: add `{section}: {{}}`")
    folder = layout.root / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    # dvc.yaml has the same stages for every study.
    for stage, run, seed in artifacts(study, also=("coefficients", "flows")).values():
        place = folder / stage if run is None else folder / stage / run / f"seed{seed}"
        content = {
            "settings": study.key(stage, run, seed),
            "code": code_digest(stage),
            "downloads": {name: find(name).sha256 for name in downloads(study, stage, run)},
        }
        write_json(place.with_suffix(".json"), content)


def write_inputs(
    study: Study, layout: Layout, of: str | None = None, run: str | None = None, seed: int | None = None
) -> None:
    """Write results/<study>/inputs/: the sha256 of what a job reads of other results, null where it reads nothing, and
    so is not run again when they change.

    of: `coefficients` and `predictor` of a student (the latter for one made from another), files of these names in
    <run>/seed<k>/, or `flows`, one file; without: all. run, seed: one student alone. Raises UserError when something
    that is read is missing.
    """
    folder = layout.root / "inputs"
    if of is None:
        shutil.rmtree(folder, ignore_errors=True)
    runs = study.trainings if run is None or seed is None else [(run, seed)]
    for each, k in runs if of != "flows" else []:
        place, student = folder / each / f"seed{k}", study.students[each]
        if of in (None, "coefficients"):
            read = _coefficients(layout, student.needs_coefficients)
            write_json(place / "coefficients.json", _digests(layout, read))
        if not student.frozen:
            # DVC leaves there what a stage made that is no more.
            (place / "predictor.json").unlink(missing_ok=True)
        elif of in (None, "predictor"):
            write_json(place / "predictor.json", _digests(layout, _predictor(study, layout, each, k)))
    if of in (None, "flows"):
        write_json(folder / "flows.json", _digests(layout, _measured(study, layout) if study.flows else {}))


def _coefficients(layout: Layout, read: bool) -> dict[Path, str]:
    """The file, if it is read, and the verb that makes it."""
    return {layout.coefficients / "coefficients.npz": "coefficients"} if read else {}


def _predictor(study: Study, layout: Layout, run: str, seed: int) -> dict[Path, str]:
    """The weights that make a student's endpoints, if another student's do, and the verb that makes them."""
    frozen = study.students[run].frozen
    if frozen is None:
        return {}
    path = layout.student_file(frozen.run, seed, step=frozen.step)
    return {path: f"student --run {frozen.run} --seed {seed}"}


def _measured(study: Study, layout: Layout) -> dict[Path, str]:
    """What the stage flows reads, and the verbs that make it."""
    # dataset.json holds the digest of the images, which may be 16 GB.
    found = {layout.dataset / "dataset.json": "dataset", layout.dataset / "labels.npy": "dataset"}
    found |= {layout.teacher / "teacher.safetensors": "teacher"}
    for run, student in study.coupled.items():
        found |= _coefficients(layout, student.needs_coefficients)
        for seed in study.seeds:
            found[layout.student_file(run, seed)] = f"student --run {run} --seed {seed}"
            found |= _predictor(study, layout, run, seed)
    return found


def _digests(layout: Layout, files: dict[Path, str]) -> dict[str, str] | None:
    """The sha256 of files by name, below the study's folder; null without any. Raises UserError, naming the verb that
    makes it, when one is missing."""
    return {path.relative_to(layout.root).as_posix(): sha256(made(path, verb)) for path, verb in files.items()} or None


def check_order(study: Study) -> None:
    """Raises UserError unless `frozen`, under `vars` in dvc.yaml, says which students are made from which."""
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
