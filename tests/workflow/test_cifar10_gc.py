"""cifar10-gc in miniature: from a loopback server's archive, without any teacher, to the report."""

import json
import shutil

import pandas as pd
import pytest
import yaml
from tests.conftest import ABSENT
from tests.image_sources import cifar10_archive, cifar10_files
from tests.workflow.checkout import Checkout
from tests.workflow.conftest import RunVerbs
from tests.workflow.miniatures import BY_CLASSIFIER, Site, miniature

from consistency.nets.checkpoint import load_denoiser

RUNS = ["ic", "ot", "gc", "gc-weak"]
#: the flows in seconds
FLOWS = {"images": 8, "times": 3, "toy_steps": 10, "pairs": 64, "intervals": 20, "denoiser_steps": 2}


@pytest.fixture
def small(checkout: Checkout, site: Site) -> Checkout:
    """cifar10-gc with everything but its size and five of its arms; with dropout and blocks by level."""
    cifar10_archive(site.folder / "cifar-10-python.tar.gz", cifar10_files(6))
    site.publish(checkout)
    study = yaml.safe_load((checkout.path / "config/studies/cifar10-gc.yaml").read_text())
    students = {run: study["students"][run] for run in RUNS}
    students["gc-weak"]["predictor"]["step"] = 2
    changes = {
        "teacher.network.model_channels": 8,
        "teacher.network.num_blocks": [1, 1, 2],
        "students": students,
        "student.steps": 4,
        "student.nodes": ABSENT,
        "student.dropout": [0.0, 0.1, 0.3],
        "flows": study["flows"] | FLOWS | {"denoiser_batch": 4},
    }
    return miniature(checkout, "cifar10-gc", {**BY_CLASSIFIER, **changes})


def test_cifar10_runs_without_a_teacher(small: Checkout, site: Site, run_verbs: RunVerbs) -> None:
    """Only the archive is asked for; every arm is trained, scored and in the report. Snakemake takes what the verbs
    made, and makes what is missing."""
    assert run_verbs(small) == 0
    shutil.rmtree(small.path / "results/cifar10-gc/flows")
    small.done("results/cifar10-gc/flows/transport.csv")
    assert site.asked == {"cifar-10-python.tar.gz": 1}
    results = small.path / "results/cifar10-gc"
    architectures = {}
    for run in RUNS:
        student, metadata = load_denoiser(results / f"students/{run}/seed0/student.safetensors")
        architectures[run] = student.architecture
        predictor = {"step-000002.safetensors"} if run == "gc-weak" else set()
        assert metadata["parents"].keys() == {"teacher.safetensors", "images.npy"} | predictor
        table = pd.read_csv(results / f"scores/{run}/seed0.csv")
        assert table["fd"].notna().all()
        assert set(table["nfe"]) == {1, 2}
    levels = {"num_blocks": [1, 1, 2], "dropout": [0.0, 0.1, 0.3], "attn_resolutions": []}
    assert {key: architectures["ic"][key] for key in levels} == levels
    assert all(architectures[run] == architectures["ic"] for run in RUNS)

    measured = pd.read_csv(results / "flows/discrepancy.csv")
    assert set(measured["run"]) == {"ic", "ot", "gc"}
    page = (results / "report/report.html").read_text()
    assert all(run in page for run in RUNS)
    card = json.loads((results / "flows/card.json").read_text())
    assert "--job-minutes" in card["command"]
    assert small.planned() == {"report", "track"}
