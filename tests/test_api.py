"""The Python interface: what it samples and scores is what the stages do, and its pages run as they are written."""

import doctest
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import Tiny, mistake
from tests.made import make_all
from tests.processes import ROOT

from consistency import api
from consistency.__main__ import main
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.nets.jumps import JUMPS
from consistency.provenance.inputs import read_dataset, read_preconditioning

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FILE = "results/tiny/students/analytic/seed0/student.safetensors"


@pytest.fixture(scope="module")
def finished_tiny(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the tiny study."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job(tiny(), StudyPaths("tiny", folder / "results", folder / "state"))
    make_all(job)
    return folder


@pytest.fixture(autouse=True)
def results(finished_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These results in a working directory of one's own."""
    shutil.copytree(finished_tiny / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)


# --- sampling


@pytest.mark.parametrize("run", ["ctm", "analytic"])
def test_a_student_samples_from_its_file_alone_what_the_stage_samples(run: str) -> None:
    shutil.move(FILE.replace("analytic", run), "alone.safetensors")
    staged = {path.stem: np.load(path) for path in Path("results/tiny/samples", run, "seed0").glob("*.npy")}
    shutil.rmtree("results")
    student = api.load_student("alone.safetensors", "cpu")
    assert staged.keys() == {"nfe1", "nfe2", "nfe5", "gamma1.0-nfe2"}
    for name, whole in staged.items():
        found = student.sample(len(whole), nfe=int(name[-1]), gamma=float(name.startswith("gamma")))
        assert found.dtype == np.uint8 and np.array_equal(found, whole), name
    assert np.array_equal(student.sample(3, nfe=5, seed=40), staged["nfe5"][40:43])


def test_the_last_snapshot_is_the_student() -> None:
    last = FILE.replace("student.safetensors", "snapshots/step-000006.safetensors")
    images, same = (api.load_student(file, "cpu").sample(4, nfe=2) for file in (FILE, last))
    assert np.array_equal(images, same)


def test_the_coefficients_in_the_file_are_those_of_the_fit_to_the_bit(tiny: Tiny) -> None:
    student = api.load_student(FILE, "cpu")
    ode = read_preconditioning(Job(tiny(), StudyPaths("tiny"), "analytic", 0), student.model)
    t = torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    for s in (t / 2, t / 1.01):
        found, expected = student.preconditioning.coefficients(t, s), ode.coefficients(t, s)
        assert torch.equal(torch.stack(found), torch.stack(expected))


def test_the_fit_of_a_study_is_opened_as_one_s_own(tiny: Tiny) -> None:
    student = api.load_student(FILE, "cpu")
    ode = api.FittedODE.load(Job(tiny(), StudyPaths("tiny")).paths.fit)
    t = torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    assert torch.equal(torch.stack(ode.backward(t, t / 2)), torch.stack(student.preconditioning.coefficients(t, t / 2)))


def test_a_jump_to_the_same_time_is_the_identity_and_times_have_a_range() -> None:
    student = api.load_student(FILE, "cpu")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(student(x, 2.0, 2.0), x)
    labels = torch.tensor([1, 2, 3])
    expected = student.preconditioning.jump(student.model, x, torch.full((3,), 2.0), torch.full((3,), 0.5), labels)
    assert torch.equal(student(x, 2.0, torch.full((3,), 0.5), labels), expected)
    for t, s in ((2.0, 3.0), (81.0, 1.0), (1.0, 0.001), (float("nan"), 1.0)):
        assert "0.002 <= s <= t <= 80" in mistake(student, x, t, s)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count and nfe must be 1 or more"),
        ({"nfe": 0}, "count and nfe must be 1 or more"),
        ({"seed": -1}, "seed 0 or more"),
        ({"label": 10}, "label 10 is not one of the student's: 0 to 9"),
        ({"labels": "odd"}, "labels are drawn as data or balanced, got 'odd'"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1, got 1.5"),
    ],
)
def test_values_out_of_range_are_said(given: dict[str, Any], said: str) -> None:
    assert said in mistake(api.load_student(FILE, "cpu").sample, **{"count": 1, "nfe": 1, **given})


def test_labels_are_drawn_in_the_proportions_of_the_data_or_uniformly(tiny: Tiny) -> None:
    student, job = api.load_student(FILE, "cpu"), Job(tiny(), StudyPaths("tiny"), "analytic", 0)
    assert student.class_counts == read_dataset(job).class_counts and sum(student.class_counts) == 200
    balanced = student.sample(8, 1, labels="balanced")
    assert not np.array_equal(student.sample(8, 1), balanced)
    assert np.array_equal(replace(student, class_counts=[1] * 10).sample(8, 1), balanced)
    rewrite(lambda metadata: metadata[JUMPS].pop("class_counts"))
    earlier = api.load_student(FILE, "cpu")
    assert "does not say how frequent each class is" in mistake(earlier.sample, 8, 1)
    assert np.array_equal(earlier.sample(8, 1, labels="balanced"), balanced)
    assert np.array_equal(earlier.sample(2, 1, label=3), student.sample(2, 1, label=3))


def test_a_label_is_for_all_images() -> None:
    student = api.load_student(FILE, "cpu")
    assert not np.array_equal(student.sample(4, 1, label=3), student.sample(4, 1, label=4))


def rewrite(change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metadata of the student's file."""
    with safe_open(FILE, "pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    change(metadata)
    save_file(load_file(FILE), FILE, {name: json.dumps(value) for name, value in metadata.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda metadata: metadata.pop(JUMPS),
            r"does not say how it jumps: it is a teacher, whose images `python .* samples --study FILE` draws",
        ),
        (lambda metadata: metadata[JUMPS].update(preconditioning="x"), r"rightly how it jumps \(preconditioning: "),
        (lambda metadata: metadata[JUMPS].update(fit=None), "holds no usable coefficients"),
        (lambda metadata: metadata[JUMPS]["fit"].update(l=[1.0]), "not equally long"),
        (lambda metadata: metadata[JUMPS]["fit"].update(times=[-1.0] * 16), "holds no usable coefficients"),
        (lambda metadata: metadata[JUMPS].update(more=1), r"rightly how it jumps \(more: "),
    ],
    ids=["earlier", "name", "no fit", "length", "times", "unknown"],
)
def test_a_file_that_does_not_say_how_it_jumps_is_refused(change: Callable[[Any], object], said: str) -> None:
    rewrite(change)
    assert re.search(said, mistake(api.load_student, FILE, "cpu"))


def test_a_teacher_is_no_student() -> None:
    assert "it is a teacher" in mistake(api.load_student, "results/tiny/teacher/teacher.safetensors", "cpu")


def test_a_grid_has_the_images_row_by_row() -> None:
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
    api.save_images(images, "grid.png")
    grid = np.array(Image.open("grid.png"))
    assert grid.shape == (2 * 3 + 1, 3 * 3 + 1, 3)
    for k, image in enumerate(images):
        row, column = 1 + 3 * (k // 3), 1 + 3 * (k % 3)
        assert (grid[row : row + 2, column : column + 2] == image).all()
    api.save_images(images, "images.npy")
    assert np.array_equal(np.load("images.npy"), images)
    assert "a .png (a grid) or a .npy" in mistake(api.save_images, images, "images.jpg")


# --- scores


def given_as(kind: str, images: np.ndarray[Any, Any]) -> Any:
    """The images as an array, a file or a folder of pictures."""
    if kind == "array":
        return images
    if kind == "file":
        np.save("given.npy", images)
        return "given.npy"
    Path("given/below").mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(f"given/{'below/' if k >= 40 else ''}{k:03}.png")
    return Path("given")


@pytest.mark.parametrize("kind", ["array", "file", "folder"])
def test_the_score_of_the_stages_samples_is_the_row_of_its_table(kind: str) -> None:
    images = np.load("results/tiny/samples/analytic/seed0/nfe2.npy")
    found = api.score_images("tiny", given_as(kind, images), device="cpu")
    table = pd.read_csv("results/tiny/scores/analytic/seed0.csv")
    row = table[(table.kind == "final") & (table.sampler == "jumps") & (table.nfe == 2)].iloc[0]
    assert (found.fd, found.kid, found.images, found.extractor) == (row.fd, row.kid, row.images, row.extractor)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), r"the array is uint8 \[4, 8, 8, 3\], but .* uint8 \[N, 8, 8, 1\]"),
        (np.zeros((4, 8, 8, 1), np.float32), r"the array is float32 \[4, 8, 8, 1\]"),
        (np.zeros((1, 8, 8, 1), np.uint8), "at least two images"),
        ("nowhere", "neither a folder of images nor a .npy file"),
        (FILE, "neither a folder of images nor a .npy file"),
        ("results", r"has no \*\.png or \*\.jpg in it|has .* pixels of mode"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Any, said: str) -> None:
    assert re.search(said, mistake(api.score_images, "tiny", images, device="cpu"))


def test_pictures_of_another_size_are_refused_and_not_resized() -> None:
    Path("given").mkdir()
    Image.new("L", (16, 8)).save("given/a.png")
    Image.new("RGB", (8, 8)).save("given/b.png")
    assert "given/a.png has 16x8 pixels of mode L" in mistake(api.score_images, "tiny", "given", device="cpu")
    Path("given/a.png").unlink()
    Image.new("L", (8, 8)).save("given/c.png")
    assert "given/b.png has 8x8 pixels of mode RGB" in mistake(api.score_images, "tiny", "given", device="cpu")


def test_a_study_that_is_not_prepared_names_the_stage() -> None:
    images = np.zeros((4, 8, 8, 1), np.uint8)
    shutil.rmtree("results/tiny/scores/extractor")
    assert "run `python -m consistency extractor --study FILE`" in mistake(
        api.score_images, "tiny", images, device="cpu"
    )
    assert "missing" in mistake(api.read_tables, "tiny", "elsewhere")
    assert "missing" in mistake(api.load_teacher, "tiny", "elsewhere", "cpu")


# --- the verbs


@pytest.mark.usefixtures("handlers")
def test_the_verbs_are_the_interface(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--student", FILE, "--nfe", "2", "--count", "3", "--seed", "5", "--device", "cpu", "--out"]
    assert main([*words, "found.npy"]) == 0
    assert np.array_equal(np.load("found.npy"), np.load("results/tiny/samples/analytic/seed0/nfe2.npy")[5:8])
    assert capsys.readouterr().out == "found.npy: 3 images, 2 jumps each, seeds 5 to 7\n"
    assert main([*words, "grid.png"]) == 0
    assert np.array(Image.open("grid.png")).shape == (2 * 9 + 1, 2 * 9 + 1, 3)
    assert main([*words, "grid.jpg"]) == 2
    capsys.readouterr()
    score = ["score", "--images", "results/tiny/samples/analytic/seed0/nfe2.npy", "--study", "tiny", "--device", "cpu"]
    assert main(score) == 0
    found = api.score_images("tiny", "results/tiny/samples/analytic/seed0/nfe2.npy", device="cpu")
    said = f"FD (classifier features, not Inception FID) {found.fd:.6g}, KID {found.kid:.6g}, N = 80, "
    assert capsys.readouterr().out == f"{said}extractor classifier, against the dataset of tiny\n"


# --- the pages


def test_the_page_runs_as_it_is_written() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "python.md", "exec"), namespace)
    used = set(re.findall(r"(?:api\.|FittedODE, )(\w+)", "".join(blocks)))
    assert used == {name for name in api.__all__ if name[0].islower()}
    assert set(namespace["tables"]) == {"scores", "table", "speedup", "paired"}


def test_every_function_has_an_example_that_runs() -> None:
    namespace = dict(vars(api))
    names = ["load_study", "load_teacher", "load_student", "save_images", "score_images", "read_tables"]
    names.append("fit_preconditioning")
    assert sorted(names) == sorted(name for name in api.__all__ if name[0].islower())
    for name in names:
        examples = doctest.DocTestParser().get_examples(getattr(api, name).__doc__)
        assert examples, name
        for example in examples:
            exec(compile(example.source, name, "single"), namespace)
