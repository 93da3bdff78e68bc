"""The student that comes with the code: it is the published one, and scores as its page says."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import mistake
from tests.processes import ROOT

from consistency import api
from consistency.base.files import sha256
from consistency.config.job import Job
from consistency.config.paths import SHIPPED, StudyPaths
from consistency.stages.dataset import make_dataset
from consistency.stages.extractor import make_extractor

PAGE = ROOT / "docs/results/digits"


def test_it_is_the_published_one_and_samples_alike_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads((PAGE / "cards.json").read_text(encoding="utf-8"))["cards"]["student analytic seed 0"]["outputs"]
    assert sha256(SHIPPED / "students/digits.safetensors") == made["students/analytic/seed0/student.safetensors"]
    monkeypatch.chdir(tmp_path)
    first, again = (api.load_student("digits", "cpu").sample(16, nfe=3) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (16, 8, 8, 1)
    assert "digit is missing" in mistake(api.load_student, "digit")


@pytest.mark.slow
def test_it_has_the_published_score(tmp_path: Path) -> None:
    """With room: processors differ, in the extractor's training too."""
    study = api.load_study("digits")
    job = Job(study, StudyPaths("digits", tmp_path, tmp_path / "state"))
    make_dataset(job, 1)
    make_extractor(job, torch.device("cpu"))
    images = api.load_student("digits", "cpu").sample(1797, nfe=3)
    scores = pd.read_csv(PAGE / "scores.csv").query("kind == 'final' and sampler == 'jumps' and nfe == 3")
    published = scores.query("run == 'analytic' and seed == 0").fd.item()
    assert api.score_images(study, images, tmp_path, "cpu").fd == pytest.approx(published, rel=0.03)
