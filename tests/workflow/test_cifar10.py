"""cifar10-uncond in miniature: archive, official teacher, Inception, LPIPS, calibration, all from a loopback server."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from cleanfid.fid import frechet_distance as FRECHET
from tests.edm_writer import write_edm_pickle
from tests.evaluation.test_features import Inception
from tests.image_sources import cifar10_archive, cifar10_files
from tests.workflow.checkout import Checkout
from tests.workflow.conftest import RunVerbs
from tests.workflow.miniatures import Site, miniature, teacher

from consistency.nets.checkpoint import load_denoiser


def of_64_features(*statistics: np.ndarray) -> float:
    """The Fréchet distance of the first features: that of all 2048 takes half a minute."""
    return float(FRECHET(*(each[tuple([slice(64)] * each.ndim)] for each in statistics)))


@pytest.fixture
def cifar10(checkout: Checkout, site: Site, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """cifar10-uncond with everything but its size: archive, EDM checkpoint, Inception, LPIPS, calibration, bfloat16."""
    monkeypatch.setattr("cleanfid.fid.frechet_distance", of_64_features)
    cifar10_archive(site.folder / "cifar-10-python.tar.gz", cifar10_files(6))
    network = {"img_resolution": 32, "channel_mult": [1, 1], "augment_dim": 9}
    write_edm_pickle(site.folder / "edm-cifar10-32x32-uncond-vp.pkl", teacher(network="songunet", **network))
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(str(site.folder / "inception-2015-12-05.pt"))
    weights = torchvision.models.vgg16(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in weights.items()}, site.folder / "vgg16-397923af.pth")
    site.publish(checkout)
    changes = {"students": {"analytic": {"preconditioning": "analytic"}}, "report.baseline": {}}
    changes |= {"sampling.nfe": [1], "report.grid_nfe": [1], "calibration.tolerance": 1e-6}
    return miniature(checkout, "cifar10-uncond", changes)


def test_cifar10_runs_with_an_official_teacher(
    cifar10: Checkout, site: Site, run_verbs: RunVerbs, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher whose FID is off stops the study before a student is trained; a larger tolerance lets it go on."""
    cifar10.done(*(f"resources/{path.name}" for path in site.folder.iterdir()))
    assert run_verbs(cifar10) == 2
    assert "error: the teacher's FID is" in capsys.readouterr().err
    results = cifar10.path / "results/cifar10-uncond"
    assert not (results / "students").exists()
    samples = (results / "samples/teacher/heun.npy").stat()

    cifar10.change({"calibration.tolerance": 1e9}, "cifar10-uncond")
    assert run_verbs(cifar10) == 0
    assert (results / "samples/teacher/heun.npy").stat() == samples
    assert set(site.asked) == {path.name for path in site.folder.iterdir()}
    assert set(site.asked.values()) == {1}
    assert "edm-cifar10-32x32-uncond-vp.pkl" in (cifar10.path / "config/resources.lock").read_text()

    converted, _ = load_denoiser(results / "teacher/teacher.safetensors")
    assert converted.architecture["augment_dim"] == 9
    student, metadata = load_denoiser(results / "students/analytic/seed0/student.safetensors")
    assert metadata["parents"].keys() == {"teacher.safetensors", "images.npy", "coefficients.npz"}
    assert student.architecture["augment_dim"] == 0
    images = np.load(results / "dataset/images.npy")
    assert images.shape == (30, 32, 32, 3)
    calibration = pd.read_csv(results / "scores/calibration.csv")
    assert set(calibration["extractor"]) == {"inception-legacy_tensorflow"}
    page = (results / "report/report.html").read_text()
    assert "published 1.97" in page
    line = (results / "students/analytic/seed0/history.jsonl").read_text().splitlines()[-1]
    assert {"dsm_balance", "time_teacher", "time_backward", "peak_memory_mib"} <= json.loads(line).keys()
    assert cifar10.planned() == {"track"}
