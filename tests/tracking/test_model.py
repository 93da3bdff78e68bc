"""A registered student samples what the stage samples, from the files that its model holds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import Tiny
from tests.fake_results import edit_card

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths, sampler_name
from consistency.config.study import Study
from consistency.runtime.machine import Machine
from consistency.stages.samples import make_samples
from consistency.stages.student import make_student
from consistency.tracking import registry, server

CPU = torch.device("cpu")
SEED = 0


@pytest.fixture(scope="module")
def trained(
    tiny: Tiny, first_results: StudyPaths, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> StudyPaths:
    """Two trained students of the tiny study and their samples; the database beside them is empty."""
    study, folder = tiny(), tmp_path_factory.mktemp("trained")
    layout = StudyPaths(study.name, folder / "results", folder / "state")
    shutil.copytree(first_results.results, layout.results)
    shutil.copy(empty_database, folder)
    for job in Job(study, layout).trainings:
        make_student(job, Machine(CPU))
        make_samples(job, CPU)
    return layout


@pytest.fixture
def layout(trained: StudyPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPaths:
    """Results of one's own, in the working directory."""
    shutil.copytree(trained.results.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return StudyPaths("tiny")


@pytest.fixture
def client(layout: StudyPaths, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the database in the working directory, where mlflow.pyfunc looks too."""
    uri = server.tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return server.connect(uri)


def register(client: Any, study: Study, layout: StudyPaths) -> dict[str, str]:
    experiment = server.open_experiment(client, study.name, study.title)
    run = client.create_run(experiment)
    runs = {f"{name} seed {SEED}": run.info.run_id for name in study.students}
    return registry.register_students(client, Job(study, layout), runs)


def load(address: str) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(address)


def test_a_registered_student_samples_what_the_stage_samples(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    study = tiny()
    addresses = register(client, study, layout)
    assert addresses == {run: f"models:/tiny~{run}/1" for run in study.students}
    layout.results.rename("results-of-old")  # the models need nothing of it
    for run, address in addresses.items():
        model = load(address)
        for nfe in study.sampling.nfe:
            whole = np.load(Path("results-of-old/tiny/samples", run, f"seed{SEED}", f"{sampler_name(nfe)}.npy"))
            found = model.predict({"count": len(whole), "seed": 0, "nfe": nfe})
            assert found.dtype == np.uint8 and np.array_equal(found, whole), (run, nfe)
    rows = pd.DataFrame({"count": [2, 3], "seed": [5, 40], "nfe": [nfe, nfe]})
    assert np.array_equal(model.predict(rows), np.concatenate([whole[5:7], whole[40:43]]))
    assert np.array_equal(model.predict(pd.DataFrame({"count": [2], "nfe": [nfe]})), whole[:2])


def test_a_model_holds_the_checkpoint_and_no_code(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    register(client, tiny(), layout)
    kept = {path for path in Path("mlruns").rglob("*") if path.is_file() and not path.is_symlink()}
    held = {"student.safetensors", "coefficients.npz", "card.json"}
    described = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    assert {path.name for path in kept} == held | described
    assert (layout.root / "students/ctm/seed0/student.safetensors").read_bytes() in [path.read_bytes() for path in kept]


def test_a_content_has_one_version(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    study = tiny()
    first = register(client, study, layout)
    assert register(client, study, layout) == first
    moved = StudyPaths("tiny", Path("elsewhere"))
    shutil.copytree(layout.results, moved.results)
    assert register(client, study, moved) == first
    assert register(client, tiny({"report.grid_nfe": [1]}), layout) == first
    card = layout.root / "students/ctm/seed0/card.json"
    edit_card(card, lambda content: content["outputs"].update({"student.safetensors": 64 * "0"}))
    assert register(client, study, layout) == first | {"ctm": "models:/tiny~ctm/2"}
    version = client.get_model_version("tiny~ctm", "2")
    assert (version.tags["seed"], version.tags["sha256"]) == ("0", 64 * "0")
    assert "Seed 0: the first of the study's seeds" in version.description


def test_a_label_can_be_chosen(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    model = load(register(client, tiny(), layout)["analytic"])
    wanted = {"count": 8, "nfe": 2}
    drawn, chosen = model.predict(wanted), [model.predict(wanted | {"label": label}) for label in range(10)]
    # Every image is the one of the label that its seed draws.
    assert all(any(np.array_equal(drawn[i], images[i]) for images in chosen) for i in range(8))
    assert not np.array_equal(chosen[0], chosen[1])
    for given, message in {
        ("count", 0): "count and nfe must be 1 or more, seed 0 or more; got 0, 2 and 0",
        ("nfe", 0): "got 8, 0 and 0",
        ("seed", -1): "got 8, 2 and -1",
        ("label", 10): "label 10 is not one of the student's: 0 to 9",
    }.items():
        with pytest.raises(UserError, match=message):
            model.predict(wanted | dict([given]))


def test_a_missing_checkpoint_is_one_line(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    (layout.root / "students/ctm/seed0/student.safetensors").unlink()
    with pytest.raises(UserError, match=r"student.safetensors is missing, .*: run `dvc pull`, or its stage again"):
        register(client, tiny(), layout)


def test_another_versions_study_is_one_line(tiny: Tiny, client: Any, layout: StudyPaths) -> None:
    card = layout.root / "students/analytic/seed0/card.json"
    edit_card(card, lambda content: content["resolved"]["student"].update(stepz=1))
    addresses = register(client, tiny(), layout)
    with pytest.raises(UserError, match=r"study is of another version of this project: .*stepz"):
        load(addresses["analytic"])
