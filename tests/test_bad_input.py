"""Bad input through the command line: one clear line, exit code 2, and nothing that was finished is lost."""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml
from tests.conftest import Changes, changed
from tests.processes import ROOT

from consistency.__main__ import main
from consistency.base.progress import Progress

pytestmark = pytest.mark.usefixtures("handlers")

STUDENT = ("--student", "ctm", "--seed", "0")
ANALYTIC = ("--student", "analytic", "--seed", "0")
VERBS = [
    ("dataset",),
    ("extractor",),
    ("teacher",),
    ("coefficients",),
    ("samples",),
    ("calibration",),
    *((verb, *student) for student in (STUDENT, ANALYTIC) for verb in ("student", "samples", "scores")),
]


class Project:
    """The tiny study with its results in a folder of one's own, run in this process."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str] | None = None) -> None:
        self.home, self.capsys, self.study = home, capsys, home / "tiny.yaml"

    def path(self, name: str) -> Path:
        return self.home / "results/tiny" / name

    def change(self, changes: Changes) -> None:
        """Set dotted keys of the study."""
        self.study.write_text(yaml.safe_dump(changed(changes), sort_keys=False))

    def run(self, verb: str, *words: str) -> int:
        folders = ("--results", str(self.home / "results"), "--state", str(self.home / "state"))
        return main([verb, "--study", str(self.study), *folders, *words])

    def kept(self) -> dict[Path, str]:
        """Every finished file and its digest."""
        files = [path for path in (self.home / "results").rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def error(self, verb: str, *words: str) -> str:
        """The one line that a verb fails with."""
        assert self.capsys is not None
        before = self.kept()
        self.capsys.readouterr()
        assert self.run(verb, *words) == 2
        lines = self.capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
        assert "Traceback" not in "".join(lines)
        assert self.kept() == before
        assert not list(self.home.rglob("*.tmp"))
        return lines[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every result of the tiny study up to the scores."""
    home = tmp_path_factory.mktemp("whole")
    shutil.copy(ROOT / "config/studies/tiny.yaml", home)
    project = Project(home)
    for words in VERBS:
        assert project.run(*words) == 0
    return home


@pytest.fixture
def spoilt(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Project:
    """A copy of the whole study, to spoil it."""
    return Project(Path(shutil.copytree(whole, tmp_path / "copy")), capsys)


# --- files of the stages before ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "words", "verb"),
    [
        ("dataset", ("teacher",), "dataset"),
        ("dataset", ("coefficients",), "dataset"),
        ("teacher", ("coefficients",), "teacher"),
        ("teacher", ("student", *STUDENT), "teacher"),
        ("teacher", ("samples",), "teacher"),
        ("coefficients", ("student", *ANALYTIC), "coefficients"),
        ("coefficients", ("scores", *ANALYTIC), "coefficients"),
        ("students/ctm/seed0", ("samples", *STUDENT), "student --student ctm --seed 0"),
        ("students/ctm/seed0", ("scores", *STUDENT), "student --student ctm --seed 0"),
        ("samples/teacher", ("calibration",), "samples"),
        ("samples/ctm/seed0", ("scores", *STUDENT), "samples --student ctm --seed 0"),
        ("scores/extractor", ("calibration",), "extractor"),
        (
            "students/ctm/seed0/snapshots/step-000003.safetensors",
            ("scores", *STUDENT),
            "student --student ctm --seed 0",
        ),
        ("scores/endpoints.npy", ("scores", *STUDENT), "calibration"),
        ("scores/calibration.csv", ("report",), "calibration"),
        ("scores/analytic/seed0.csv", ("report",), "scores --student analytic --seed 0"),
        ("students/analytic/seed0/card.json", ("report",), "student --student analytic --seed 0"),
        ("coefficients/coefficients.npz", ("report",), "coefficients"),
        ("samples/ctm/seed0/nfe2.npy", ("report",), "samples --student ctm --seed 0"),
        ("samples/teacher/heun.npy", ("report",), "samples"),
    ],
)
def test_a_missing_file_names_the_verb_that_makes_it(
    spoilt: Project, gone: str, words: tuple[str, ...], verb: str
) -> None:
    path = spoilt.path(gone)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = spoilt.error(*words)
    assert "is missing" in error and f"run `python -m consistency {verb} --study FILE` first" in error


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves a damaged archive open
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dataset/images.npy", ("teacher",)),
        ("dataset/dataset.json", ("teacher",)),
        ("dataset/card.json", ("teacher",)),
        ("teacher/teacher.safetensors", ("coefficients",)),
        ("coefficients/coefficients.npz", ("student", *ANALYTIC)),
        ("coefficients/coefficients.npz", ("samples", *ANALYTIC)),
        ("students/ctm/seed0/student.safetensors", ("samples", *STUDENT)),
        ("students/ctm/seed0/snapshots/step-000003.safetensors", ("scores", *STUDENT)),
        ("samples/teacher/heun.npy", ("calibration",)),
        ("samples/ctm/seed0/nfe1.npy", ("scores", *STUDENT)),
        ("scores/extractor/features.npy", ("calibration",)),
        ("scores/extractor/classifier.safetensors", ("calibration",)),
        ("scores/endpoints.npy", ("scores", *STUDENT)),
    ],
)
def test_a_damaged_file_is_named(spoilt: Project, name: str, words: tuple[str, ...]) -> None:
    path = spoilt.path(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = spoilt.error(*words)
    assert str(spoilt.path(name)) in error or str(spoilt.path(name).parent) in error
    assert "again" in error


def test_a_changed_score_table_is_named(spoilt: Project) -> None:
    table = spoilt.path("scores/ctm/seed0.csv")
    table.write_text(table.read_text() + "\n")
    error = spoilt.error("report")
    assert str(table) in error and "scores --student ctm --seed 0 --study FILE` again" in error


@pytest.mark.parametrize(
    ("changes", "words", "difference"),
    [
        ({"dataset.limit": 10}, ("teacher",), "dataset.limit: there 20, here 10"),
        ({"coefficients.probes": 2}, ("student", *ANALYTIC), "coefficients.probes: there 1, here 2"),
        ({"sampling.count": 81}, ("scores", *STUDENT), "sampling.count: there 80, here 81"),
        ({"scores.classifier.steps": 5}, ("calibration",), "classifier.steps: there 20, here 5"),
        ({"student.learning_rate": 0.5}, ("scores", *STUDENT), "student.learning_rate: there 0.0004, here 0.5"),
        ({"teacher.seed": 5}, ("student", *STUDENT), "teacher.seed: there 0, here 5"),
        ({"scores.kid_subsets": 3}, ("report",), "scores.kid_subsets: there 2, here 3"),
    ],
    ids=str,
)
def test_results_of_other_settings_name_the_key(
    spoilt: Project, changes: Changes, words: tuple[str, ...], difference: str
) -> None:
    spoilt.change(changes)
    assert difference in spoilt.error(*words)


# --- training ------------------------------------------------------------------------------------


def test_a_training_that_diverges_says_at_which_step(spoilt: Project) -> None:
    spoilt.change({"teacher.learning_rate": 1e30})
    error = spoilt.error("teacher")
    assert "not finite at step" in error and "Lower the learning rate" in error


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("dataset",), ("coefficients",), ("samples",), ("samples", *STUDENT), ("extractor",), ("scores", *STUDENT)],
)
def test_ctrl_c_leaves_no_litter_and_the_old_results(
    spoilt: Project, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(self: Progress, steps: int = 1) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", pressed)
    before = spoilt.kept()
    assert spoilt.run(*words) == 130
    assert spoilt.kept() == before
    assert not list(spoilt.home.rglob("*.tmp"))
