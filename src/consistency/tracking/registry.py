"""The final students as models in MLflow's registry: a version for each content, which holds the checkpoint."""

import hashlib
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.provenance import read_card, versions
from consistency.study import Study
from consistency.tracking.server import DIGEST

_LOADER = "consistency.tracking.model"
_PACKAGES = ("torch", "numpy", "safetensors")


def register_students(client: Any, study: Study, layout: Layout, runs: dict[str, str]) -> dict[str, str]:
    """Register the study's first seed of each student as the model `<study>-<student>`; the first, so that nobody has
    chosen it. A content that was registered keeps its version. runs: the ids of the runs by name.

    Returns the address of each student's model, such as models:/digits-analytic/1. Raises UserError when a checkpoint
    is missing.
    """
    return {run: _register(client, study, layout, run, runs[f"{run} seed {study.seeds[0]}"]) for run in study.students}


def _register(client: Any, study: Study, layout: Layout, run: str, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    name, seed = f"{study.name}-{run}", study.seeds[0]
    files = _files(study, layout, run, seed)
    content = [study.key("samples", run, seed), *files.values()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST) == digest:
            return f"models:/{name}/{version.version}"
    about = (
        f"Student `{run}` of the study `{study.name}`. "
        '`mlflow.pyfunc.load_model(...).predict({"count": 8, "seed": 0, "nfe": 2})` samples uint8 images [N, H, W, C].'
    )
    try:
        client.create_registered_model(name, {"study": study.name, "student": run}, about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with TemporaryDirectory() as folder:
        _save(study, layout, Path(folder), list(files))
        # Not mlflow.pyfunc.log_model: it goes to the active run alone, and a finished run that is made active again
        # gets another end. Named by the content: what a killed upload left is written again, not twice.
        client.log_artifacts(run_id, f"{folder}/model", f"model-{digest}")
    tags = {DIGEST: digest, "seed": str(seed), "sha256": files[layout.student_file(run, seed)]}
    which = f"Seed {seed}: the first of the study's seeds ({', '.join(map(str, study.seeds))}), not the best of them."
    source = f"runs:/{run_id}/model-{digest}"
    made = client.create_model_version(name, source, run_id, tags=tags, description=which)
    return f"models:/{name}/{made.version}"


def _files(study: Study, layout: Layout, run: str, seed: int) -> dict[Path, str]:
    """Return the files that the student's images depend on, and the sha256 that their cards say."""
    cards = {layout.student_file(run, seed): read_card(layout.student(run, seed), study, "student", run, seed)}
    if study.students[run].needs_coefficients:
        cards[layout.coefficients / "coefficients.npz"] = read_card(layout.coefficients, study, "coefficients")
    return {path: card["outputs"][path.name] for path, card in cards.items()}


def _save(study: Study, layout: Layout, folder: Path, files: list[Path]) -> None:
    """Write folder/model in MLflow's form: the files and their cards, placed as in the folder of results; no code."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing, and a registered model holds it: run `dvc pull`, or its stage again")
        linked = folder / "results" / path.relative_to(layout.results)
        linked.parent.mkdir(parents=True)
        linked.symlink_to(path.resolve())
        linked.with_name("card.json").symlink_to(path.with_name("card.json").resolve())
    size, channels = study.dataset.resolution, study.dataset.channels
    required = {"count": True, "nfe": True, "seed": False, "label": False}
    inputs = Schema([ColSpec("long", name, required=needed) for name, needed in required.items()])
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, channels), "images")])
    found = versions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's advice to give an example; the signature is given
        mlflow.pyfunc.save_model(
            str(folder / "model"),
            loader_module=_LOADER,
            data_path=str(folder / "results"),
            signature=ModelSignature(inputs, images),
            pip_requirements=[f"{package}=={found[package]}" for package in _PACKAGES],
        )
