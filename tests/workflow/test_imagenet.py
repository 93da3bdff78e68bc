"""imagenet64 in miniature: from its tar of tars and a loopback server to the report, on two processes."""

import json
import shutil

from tests.edm_writer import write_edm_pickle
from tests.image_sources import imagenet_files, imagenet_tar
from tests.workflow.checkout import Checkout
from tests.workflow.conftest import RunVerbs
from tests.workflow.miniatures import BY_CLASSIFIER, Site, miniature, teacher


def test_imagenet_runs_from_its_tar_on_two_processes(checkout: Checkout, site: Site, run_verbs: RunVerbs) -> None:
    """imagenet64: the tar of tars, an ADM teacher with labels, churn, and torchrun as the student rule starts it."""
    imagenet_tar(checkout.path / "train.tar", imagenet_files(6))
    network = {"network": "adm", "img_resolution": 8, "label_dim": 3, "model_channels": 8, "attn_resolutions": []}
    write_edm_pickle(site.folder / "edm-imagenet-64x64-cond-adm.pkl", teacher(**network))
    site.publish(checkout)
    students = {"analytic": {"preconditioning": "analytic"}}
    changes = {"dataset.path": "train.tar", "dataset.resolution": 8, "students": students, "report.baseline": {}}
    imagenet = miniature(checkout, "imagenet64", {**changes, **BY_CLASSIFIER})
    assert run_verbs(imagenet) == 0
    results = imagenet.path / "results/imagenet64"
    assert (results / "report/report.html").exists()
    shutil.rmtree(results / "students")
    imagenet.done("results/imagenet64/students/analytic/seed0/student.safetensors", "--set-resources", "student:gpu=2")
    assert json.loads((results / "dataset/dataset.json").read_text())["count"] == 22
    log = (imagenet.path / "logs/imagenet64/student/analytic-seed0.log").read_text()
    assert "Traceback" not in log
    card = json.loads((results / "students/analytic/seed0/card.json").read_text())
    assert "--processes 2" in card["command"]
