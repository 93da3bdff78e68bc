"""The digest of code changes with what can change a result, and with nothing else."""

import ast
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Tiny, WriteStudy
from tests.processes import run_python

from consistency.config.paths import StudyPaths
from consistency.provenance.code_digest import ENTRIES, INERT, SOURCE, code_digest, is_inert, parse, reached

STAGES = set(ENTRIES)
TRAINING = {"teacher", "student", "flows"}
#: they ask torch for the machine's name or clock, or read what was measured
ASK_TORCH = {"provenance.environment", "runtime.launch", "training.stopwatch", "tracking"}


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """Modules that a copy leaves as they are are parsed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "parse", functools.cache(ast.parse))
        yield


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    """The digests of this checkout's code."""
    return digests(SOURCE)


def digests(source: Path) -> dict[str, str]:
    # The parsed modules are remembered by the package's folder.
    for remembered in (code_digest, reached, parse):
        remembered.cache_clear()
    return {stage: code_digest(stage, source) for stage in ENTRIES}


def test_a_copy_has_the_same_digests(package: Path, here: dict[str, str]) -> None:
    assert digests(package) == here
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in here.values())


def test_comments_docstrings_and_layout_change_nothing(package: Path, here: dict[str, str]) -> None:
    for file in package.rglob("*.py"):
        text = re.sub(r'(?m)^( *)"""(?=\w)', r'\1"""Otherwise said: ', file.read_text())
        file.write_text("# A comment.\n\n" + text.replace("\n\n\n", "\n\n\n\n") + "\n# Another.\n")
    assert digests(package) == here


def test_a_definition_may_move_to_another_module_and_may_not_change(package: Path, here: dict[str, str]) -> None:
    ema, noise, teacher = (package / name for name in ("training/ema.py", "theory/noise.py", "training/teachers.py"))
    before, rate, after = re.split(r"(?ms)^(def half_life_rate.*?)(?=^def )", ema.read_text())
    ema.write_text(before + after)
    noise.write_text(noise.read_text() + "\n\n" + rate)
    old, new = "import Ema, half_life_rate\n", "import Ema\nfrom consistency.theory.noise import half_life_rate\n"
    assert old in teacher.read_text()
    teacher.write_text(teacher.read_text().replace(old, new))
    assert digests(package) == here
    noise.write_text(noise.read_text().replace("0.5 ** (batch", "0.25 ** (batch"))
    assert {stage for stage, digest in digests(package).items() if digest != here[stage]} == {"teacher"}


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("data/sources.py", "def open_source(", "def open_source(*,\n    ", {"dataset"}),
        ("training/ema.py", "def half_life_rate(", "def half_life_rate(_=0, *,\n    ", {"teacher"}),
        # An effect of its import.
        ("training/ema.py", "def half_life_rate(", "torch.set_num_threads(2)\n\n\ndef half_life_rate(", TRAINING),
        ("training/loop.py", "def train(", "def train(*,\n    ", TRAINING),
        ("training/trajectory.py", "class Trajectory(", "class Trajectory(object, ", {"student"}),
        ("training/denoising.py", "class Denoising", "class Denoising(object, )", {"teacher"}),
        ("theory/estimators.py", "def fit_coefficients(", "def fit_coefficients(*,\n    ", {"coefficients"}),
        ("nets/layers.py", "class Linear", "class Linear(object, )", STAGES - {"dataset", "extractor"}),
        ("nets/classifier.py", "class Classifier", "class Classifier(object, )", {"extractor", "scores"}),
        ("report/wording.py", "def varied(", "def varied(*,\n    ", {"report"}),
        ("report/templates/report.html.j2", "<", "<!-- -->\n<", {"report"}),
        ("__main__.py", "allow_tf32 = False", "allow_tf32 = True", STAGES - {"dataset", "report"}),
        ("__main__.py", "def _open_study(", "def _open_study(_=0, *,\n    ", set()),
        ("base/progress.py", "LINE_EVERY = 5.0", "LINE_EVERY = 6.0", set()),
        ("provenance/environment.py", "def git_state(", "def git_state(*,\n    ", set()),
        ("tracking/__init__.py", '"', '"Other', set()),
    ],
)
def test_a_change_concerns_the_stages_that_reach_it(
    package: Path, here: dict[str, str], name: str, old: str, new: str, expected: set[str]
) -> None:
    text = (package / name).read_text()
    if new.endswith("(object, )"):  # a class, with or without bases
        old, new = re.search(rf"{old}\b.*:", text)[0], f"{old}(object):"
    assert old in text
    (package / name).write_text(text.replace(old, new, 1))
    after = digests(package)
    assert {stage for stage in ENTRIES if here[stage] != after[stage]} == expected


def test_inert_modules_do_no_arithmetic() -> None:
    for module in INERT - ASK_TORCH:
        place = SOURCE / module.replace(".", "/")
        files = place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.name.split(".")[0] for node in imports if isinstance(node, ast.Import) for name in node.names}
        names |= {(node.module or "").split(".")[0] for node in imports if isinstance(node, ast.ImportFrom)}
        assert not names & {"torch", "numpy", "scipy", "pandas", "sklearn"}, module


# Run apart: a profiler sees every function of the package that a stage enters.
ENTERED = """
import sys
from pathlib import Path
entered = set()
def see(frame, event, argument):
    # The body of a class is no function, and runs when its module is imported.
    if event == "call" and frame.f_code.co_flags & 1 and "/consistency/" in frame.f_code.co_filename:
        module = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_qualname.split(".")[0]
        entered.add((module, name))
    return None
from consistency.__main__ import main
sys.setprofile(see)
import threading
threading.setprofile(see)
code = main(sys.argv[2:])
sys.setprofile(None)
Path(sys.argv[1]).write_text("\\n".join(f"{module} {name}" for module, name in sorted(entered)))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["student", "samples"])
def test_what_a_stage_enters_was_reached(
    stage: str, first_results: StudyPaths, write_study: WriteStudy, tiny: Tiny, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(first_results.results, results)
    words = [stage, "--study", str(write_study()), "--results", str(results), "--state", str(tmp_path / "state")]
    words += ["--student", "analytic", "--seed", "0"] if stage == "student" else []
    run_python("-c", ENTERED, tmp_path / "entered.txt", *words)
    found = reached(stage)
    entered = [line.split() for line in (tmp_path / "entered.txt").read_text().splitlines()]
    entered = [(module.removeprefix("consistency").removeprefix("."), name) for module, name in entered]
    ours = {(module, name) for module, name in entered if not is_inert(module) and not name.startswith("<")}
    ours = {(module, name) for module, name in ours if module not in ("", "__main__")}
    assert len(ours) > 30
    assert ours - found == set()
