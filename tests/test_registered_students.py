"""A registered student samples what the stage samples, and nothing but the file that was registered."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from consistency.errors import UserError
from consistency.layout import Layout, sampler_name
from consistency.stages.samples import make_samples
from consistency.stages.student import make_student
from consistency.stages.trainer import Machine
from consistency.study import Study
from consistency.tracking import registry, server
from consistency.tracking.sampler import RESULTS, open_student

CPU = torch.device("cpu")
SEED = 0


@pytest.fixture(scope="module")
def trained(
    tiny: Callable[..., Study], first_results: Layout, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Layout:
    """Two trained students of the tiny study and their samples; the database beside them is empty."""
    study, folder = tiny(), tmp_path_factory.mktemp("trained")
    layout = Layout(study.name, folder / "results", folder / "state")
    shutil.copytree(first_results.results, layout.results)
    shutil.copy(empty_database, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the verbs do
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSISTENCY_LIVE", "0")
        for run in study.students:
            make_student(study, layout, run, SEED, Machine(CPU))
            make_samples(study, layout, run, SEED, CPU)
    torch.set_num_threads(threads)
    return layout


@pytest.fixture
def layout(trained: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Results of one's own, in the working directory."""
    shutil.copytree(trained.results.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RESULTS, raising=False)
    return Layout("tiny")


@pytest.fixture
def client(layout: Layout) -> Iterator[Any]:
    """A client of the database in the working directory, where mlflow.pyfunc looks too."""
    uri = server.tracking_uri()
    client = server.connect(uri)
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    yield client
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


def register(client: Any, study: Study, layout: Layout) -> dict[str, str]:
    experiment = server.open_experiment(client, study.name, study.title, server.tracking_uri())
    run = client.create_run(experiment)
    runs = {f"{name} seed {SEED}": run.info.run_id for name in study.students}
    return registry.register_students(client, study, layout, runs)


def load(address: str) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(address)


def config_of(study: Study, layout: Layout, run: str = "analytic") -> dict[str, Any]:
    """A configuration as MLflow hands it back."""
    config = registry.reference(study, layout, run, SEED) | {"results": str(layout.results.resolve())}
    return json.loads(json.dumps(config))


def test_a_registered_student_samples_what_the_stage_samples(
    tiny: Callable[..., Study], client: Any, layout: Layout
) -> None:
    study = tiny()
    addresses = register(client, study, layout)
    assert addresses == {run: f"models:/tiny-{run}/1" for run in study.students}
    for run, address in addresses.items():
        model = load(address)
        for nfe in study.sampling.nfe:
            expected = np.load(layout.samples(run, SEED) / f"{sampler_name(nfe)}.npy")
            found = model.predict({"count": len(expected), "seed": 0, "nfe": nfe})
            assert found.dtype == np.uint8 and np.array_equal(found, expected), (run, nfe)
    rows = pd.DataFrame({"count": [2, 3], "seed": [5, 40], "nfe": [2, 2]})
    whole = np.load(layout.samples(run, SEED) / "nfe2.npy")
    assert np.array_equal(model.predict(rows), np.concatenate([whole[5:7], whole[40:43]]))
    without_seed = model.predict(pd.DataFrame({"count": [2], "nfe": [2]}))
    assert np.array_equal(without_seed, whole[:2])


def test_a_model_holds_no_copy_of_a_checkpoint(tiny: Callable[..., Study], client: Any, layout: Layout) -> None:
    register(client, tiny(), layout)
    kept = [path for path in Path("mlruns").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if path.suffix in (".safetensors", ".pt", ".pkl")]
    assert sum(path.stat().st_size for path in kept) < 50_000


def test_a_content_has_one_version(tiny: Callable[..., Study], client: Any, layout: Layout) -> None:
    study = tiny()
    first = register(client, study, layout)
    assert register(client, study, layout) == first
    moved = Layout("tiny", Path("elsewhere"))
    shutil.copytree(layout.results, moved.results)
    assert register(client, study, moved) == first
    assert register(client, tiny({"report.bootstrap": 51}), layout) == first
    card = layout.student("ctm", SEED) / "card.json"
    content = json.loads(card.read_text())
    content["outputs"]["student.safetensors"] = 64 * "0"
    card.write_text(json.dumps(content))
    assert register(client, study, layout) == first | {"ctm": "models:/tiny-ctm/2"}
    version = client.get_model_version("tiny-ctm", "2")
    assert (version.tags["seed"], version.tags["sha256"]) == ("0", 64 * "0")
    assert "Seed 0: the first of the study's seeds" in version.description


def test_a_label_can_be_chosen(tiny: Callable[..., Study], layout: Layout) -> None:
    student = open_student(config_of(tiny(), layout))
    drawn, chosen = student.draw(8, 2), [student.draw(8, 2, label=label) for label in range(10)]
    # Every image is the one of the label that its seed draws.
    assert all(any(np.array_equal(drawn[i], images[i]) for images in chosen) for i in range(8))
    assert not np.array_equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0, "nfe": 1}, "count and nfe must be 1 or more, seed 0 or more; got 0, 1 and 0"),
        ({"count": 1, "nfe": 0}, "got 1, 0 and 0"),
        ({"count": 1, "nfe": 1, "seed": -1}, "got 1, 1 and -1"),
        ({"count": 1, "nfe": 1, "label": 10}, "label 10 is not one of the student's: 0 to 9"),
    ],
)
def test_values_out_of_range_are_one_line(
    tiny: Callable[..., Study], layout: Layout, given: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_student(config_of(tiny(), layout)).draw(**given)


def test_the_results_may_lie_elsewhere(
    tiny: Callable[..., Study], layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = config_of(tiny(), layout), open_student(config_of(tiny(), layout)).draw(2, 2)
    layout.results.rename("moved")
    with pytest.raises(
        UserError, match=r"missing: run `dvc pull`, or unpack the archive .* or set CONSISTENCY_RESULTS"
    ):
        open_student(config)
    monkeypatch.setenv(RESULTS, "moved")
    assert np.array_equal(open_student(config).draw(2, 2), expected)


def test_another_checkpoint_in_its_place_is_refused(tiny: Callable[..., Study], layout: Layout) -> None:
    config = config_of(tiny(), layout)
    path = layout.student_file("analytic", SEED)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"student.safetensors is not the registered file \(its sha256 is"):
        open_student(config)


def test_another_versions_study_is_one_line(tiny: Callable[..., Study], layout: Layout) -> None:
    config = config_of(tiny(), layout)
    config["study"]["student"]["stepz"] = 1
    with pytest.raises(UserError, match=r"study is of another version of this project: .*stepz"):
        open_student(config)
