"""Final students as models in MLflow's registry: one version per content, with its checkpoint."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.provenance.card import read_card
from consistency.provenance.environment import versions
from consistency.tracking.records import digest_of
from consistency.tracking.server import DIGEST


def register_students(client: Any, job: Job, runs: dict[str, str]) -> dict[str, str]:
    """Register each student as the model `<study>~<student>`: always the study's first seed, so that none is selected.
    Content that is registered keeps its version. runs: the ids of the runs by name.

    Returns each student's model address, such as models:/digits~analytic/1. Raises UserError for a missing checkpoint.
    """
    first = [job.of(name, job.study.seeds[0]) for name in job.study.students]
    return {str(student.student): _register(client, student, runs[student.label]) for student in first}


def _register(client: Any, job: Job, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    # No study or student has a ~ in its name, so no two pairs make one model.
    study, name, files = job.study, f"{job.study.name}~{job.student}", _files(job)
    digest = digest_of([job.key("samples"), *files.values()])[:16]
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST) == digest:
            return f"models:/{name}/{version.version}"
    about = (
        f"Student `{job.student}` of the study `{study.name}`. "
        '`mlflow.pyfunc.load_model(...).predict({"count": 8, "seed": 0, "nfe": 2})` samples uint8 images [N, H, W, C].'
    )
    try:
        client.create_registered_model(name, {"study": study.name, "student": str(job.student)}, about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with TemporaryDirectory() as folder:
        _save(job, Path(folder), list(files))
        # mlflow.pyfunc.log_model writes only to the active run, and reactivating a finished run changes its end. The
        # name follows the content, so that a killed upload is overwritten, not duplicated.
        client.log_artifacts(run_id, f"{folder}/model", f"model-{digest}")
    tags = {DIGEST: digest, "seed": str(job.seed), "sha256": files[job.weights()]}
    seeds = ", ".join(map(str, study.seeds))
    which = f"Seed {job.seed}: the first of the study's seeds ({seeds}), not the best of them."
    source = f"runs:/{run_id}/model-{digest}"
    made = client.create_model_version(name, source, run_id, tags=tags, description=which)
    return f"models:/{name}/{made.version}"


def _files(job: Job) -> dict[Path, str]:
    """Return the files that the student's images depend on, with the sha256 in their cards."""
    cards = {job.weights(): read_card(job, "student")}
    if job.settings.needs_coefficients:
        cards[job.paths.fit] = read_card(job, "coefficients")
    return {path: card["outputs"][path.name] for path, card in cards.items()}


def _save(job: Job, folder: Path, files: list[Path]) -> None:
    """Write folder/model in MLflow's format: the files and their cards, placed as in the results folder; no code."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing, needed for the registered model: run `dvc pull`, or its stage again")
        linked = folder / "results" / path.relative_to(job.paths.results)
        linked.parent.mkdir(parents=True)
        linked.symlink_to(path.resolve())
        linked.with_name("card.json").symlink_to(path.with_name("card.json").resolve())
    size, channels = job.study.dataset.resolution, job.study.dataset.channels
    required = {"count": True, "nfe": True, "seed": False, "label": False}
    inputs = Schema([ColSpec("long", name, required=needed) for name, needed in required.items()])
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, channels), "images")])
    packages = {name: versions()[name] for name in ("torch", "numpy", "safetensors")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for an example although the signature is given
        mlflow.pyfunc.save_model(
            str(folder / "model"),
            loader_module="consistency.tracking.model",
            data_path=str(folder / "results"),
            signature=ModelSignature(inputs, images),
            pip_requirements=[f"{name}=={version}" for name, version in packages.items()],
        )
