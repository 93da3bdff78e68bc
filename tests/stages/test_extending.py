"""docs/extending.md, followed: each of its blocks goes where it says, and the tiny study runs with all of them."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from tests.made import make_all

from consistency.config.dataset import KINDS
from consistency.config.distances import DISTANCES
from consistency.config.job import Job
from consistency.config.objectives import OBJECTIVES
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.evaluation.estimate import print_estimate

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"```python\n# (?:(\w+) in )?src/(\S+)\.py\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package with every block of the page in its place."""
    added: dict[str, dict[str, Any]] = defaultdict(dict)  # by folder: a line of a registry may import from beside it
    for registry, path, code in BLOCKS:
        name, folder = path.replace("/", "."), path.rpartition("/")[0]
        if registry:
            namespace = vars(import_module(name))
            for key, value in eval(f"{{{code}}}", namespace | added[folder]).items():
                monkeypatch.setitem(namespace[registry], key, value)
            continue
        if not (ROOT / f"src/{path}.py").exists():
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = import_module(name)
        defined = dict(vars(module))
        postponed = defined.get("annotations")  # from __future__
        exec(compile(code, f"{path}.py", "exec", postponed.compiler_flag if postponed else 0, True), defined)
        for key in defined.keys() - vars(module).keys():
            added[folder][key] = defined[key]
            monkeypatch.setattr(module, key, defined[key], raising=False)


@pytest.mark.usefixtures("extended")
def test_the_tiny_study_runs_with_what_the_page_adds(
    tiny: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tiny(
        {
            "dataset.kind": "stripes",
            "teacher.network": {"kind": "shallow", "width": 16},
            "student": {"steps": 6, "batch": 16, "snapshot_every": 3, "log_every": 3, "distance": "manhattan"},
            "student.objective": "reconstruction",
            "students": {"plain": {"largest": 5.0}, "root": {"preconditioning": "root"}},
            "varies": ["largest", "preconditioning"],
            "report.baseline": {"reconstruction": "plain"},
        }
    )
    job = Job(study, StudyPaths(study.name, tmp_path / "results", tmp_path / "state"))
    make_all(job)

    assert "The paper on" not in (job.paths.report / "report.html").read_text()
    assert (job.paths.report / "figures/losses.svg").exists()
    assert {"reconstruction", "loss"} <= set(pd.read_json(job.of("plain", 0).folder / "history.jsonl", lines=True))
    assert set(pd.read_csv(job.of("plain", 0).scores).sampler) == {"multistep"}
    print_estimate(job, 1.0)
    assert "students" in capsys.readouterr().out
    card = pd.read_json(job.of("plain", 0).card("student"), typ="series")
    assert card["measured"]["network_evaluations"] == 6 * 16 * study.students["plain"].evaluations


def test_the_page_adds_to_every_registry() -> None:
    named = {registry for registry, _, _ in BLOCKS if registry}
    assert named == {"OBJECTIVES", "FORMS", "DISTANCES", "NETWORKS", "KINDS"}
    assert "reconstruction" not in OBJECTIVES
    assert "manhattan" not in DISTANCES
    assert "stripes" not in KINDS
