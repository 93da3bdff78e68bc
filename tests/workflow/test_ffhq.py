"""ffhq64 in miniature: from a zip of images and a loopback server to the report."""

import pandas as pd
from tests.edm_writer import write_edm_pickle
from tests.image_sources import ffhq_files, write_zip
from tests.workflow.checkout import Checkout
from tests.workflow.conftest import RunVerbs
from tests.workflow.miniatures import BY_CLASSIFIER, Site, miniature, teacher

from consistency.nets.checkpoint import read_metadata


def test_ffhq_runs_from_a_zip_with_every_student(checkout: Checkout, site: Site, run_verbs: RunVerbs) -> None:
    """ffhq64: a zip of images, the five students, two EMA rates."""
    files = {f"images1024x1024/{name}": content for name, content in ffhq_files(24, size=20).items()}
    write_zip(checkout.path / "ffhq.zip", files)
    write_edm_pickle(site.folder / "edm-ffhq-64x64-uncond-vp.pkl", teacher(network="songunet", img_resolution=8))
    site.publish(checkout)
    changes = {"dataset.path": "ffhq.zip", "dataset.resolution": 8, "student.evaluation_ema": [0.5], **BY_CLASSIFIER}
    ffhq = miniature(checkout, "ffhq64", changes)
    assert run_verbs(ffhq) == 0
    results = ffhq.path / "results/ffhq64"
    scores = pd.concat(pd.read_csv(file) for file in (results / "scores").glob("*/seed0.csv"))
    assert set(scores["run"]) == {"ctm", "bcm", "analytic", "analytic-forward", "analytic-centred", "cm"}
    assert set(scores["ema"]) == {0.999, 0.5}
    assert read_metadata(results / "students/cm/seed0/student-ema0.5.safetensors")["ema"] == 0.5
    assert (results / "report/report.html").exists()
