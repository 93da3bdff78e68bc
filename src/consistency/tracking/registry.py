"""The final students as models in MLflow's registry: a version for each content, the checkpoint by reference."""

import hashlib
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consistency.layout import Layout
from consistency.provenance import read_card, versions
from consistency.study import Study
from consistency.tracking.server import DIGEST

# Not imported here: it needs MLflow, which takes seconds.
_SCRIPT = Path(__file__).with_name("model.py")
_PACKAGES = ("torch", "numpy", "safetensors")


def register_students(client: Any, study: Study, layout: Layout, runs: dict[str, str]) -> dict[str, str]:
    """Register the study's first seed of each student as the model `<study>-<student>`; the first, so that nobody has
    chosen it. A content that was registered keeps its version. runs: the ids of the runs by name.

    Returns the address of each student's model, such as models:/digits-analytic/1.
    """
    return {run: _register(client, study, layout, run, runs[f"{run} seed {study.seeds[0]}"]) for run in study.students}


def _register(client: Any, study: Study, layout: Layout, run: str, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    name, config = f"{study.name}-{run}", reference(study, layout, run, study.seeds[0])
    content = [study.key("samples", run, study.seeds[0]), config["files"], _SCRIPT.read_text()]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST) == digest:
            return f"models:/{name}/{version.version}"
    try:
        client.create_registered_model(name, {"study": study.name, "student": run}, _description(study, run))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with TemporaryDirectory() as folder:
        _save(study, Path(folder) / "model", config | {"results": str(layout.results.resolve())})
        # Named by its content: a later version of the same run must not take its place.
        client.log_artifacts(run_id, f"{folder}/model", f"model-{digest}")
    tags = {DIGEST: digest, "seed": str(study.seeds[0]), "sha256": config["files"][0]["sha256"]}
    made = client.create_model_version(
        name, f"runs:/{run_id}/model-{digest}", run_id, tags=tags, description=_first_seed(study)
    )
    return f"models:/{name}/{made.version}"


def reference(study: Study, layout: Layout, run: str, seed: int) -> dict[str, Any]:
    """What the model's configuration says: the study, the student, and its files by path (below the folder of results)
    and sha256; their content is not in it."""
    paths = {layout.student_file(run, seed): read_card(layout.student(run, seed), study, "student", run, seed)}
    if study.resolved(run).needs_coefficients:
        paths[layout.coefficients / "coefficients.npz"] = read_card(layout.coefficients, study, "coefficients")
    files = [
        {"path": path.relative_to(layout.results).as_posix(), "sha256": card["outputs"][path.name]}
        for path, card in paths.items()
    ]
    return {"study": study.model_dump(mode="json"), "run": run, "seed": seed, "files": files}


def _save(study: Study, path: Path, config: dict[str, Any]) -> None:
    """A model folder in MLflow's form: our script, the configuration, and what goes in and out."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    size, channels = study.dataset.resolution, study.dataset.channels
    required = {"count": True, "nfe": True, "seed": False, "label": False}
    inputs = Schema([ColSpec("long", name, required=needed) for name, needed in required.items()])
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, channels), "images")])
    found = versions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's advice to give an example; the signature is given
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(_SCRIPT),
            model_config=config,
            signature=ModelSignature(inputs, images),
            pip_requirements=[f"{package}=={found[package]}" for package in _PACKAGES],
        )


def _description(study: Study, run: str) -> str:
    return (
        f"Student `{run}` of the study `{study.name}`. "
        '`mlflow.pyfunc.load_model(...).predict({"count": 8, "seed": 0, "nfe": 2})` samples uint8 images [N, H, W, C].'
    )


def _first_seed(study: Study) -> str:
    names = ", ".join(str(seed) for seed in study.seeds)
    return f"Seed {study.seeds[0]}: the first of the study's seeds ({names}), not the best of them."
