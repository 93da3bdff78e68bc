"""The full-size studies in miniature: the real rules from the download to the report, with files of the true form.

Everything that is downloaded comes from a server on the loopback; networks, images and numbers are tiny, and what is
scored means nothing.
"""

import functools
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import yaml
from tests.edm_writer import write_edm_pickle
from tests.image_sources import cifar10_archive, cifar10_files, ffhq_files, imagenet_files, imagenet_tar, write_zip
from tests.test_features import Inception
from tests.workflow.checkout import Checkout

from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.training.checkpoint import load_denoiser, read_metadata

FULL_SIZE = ["cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64"]
#: what makes any of the studies a matter of seconds
SMALL: dict[str, Any] = {
    "coefficients.times": 8,
    "coefficients.samples": 8,
    "coefficients.probes": 1,
    "coefficients.batch": 8,
    "student.nodes": 5,
    "student.steps": 2,
    "student.batch": 4,
    "student.snapshot_every": 2,
    "student.log_every": 1,
    "student.evaluation_ema": [],
    "seeds": [0],
    "sampling.count": 16,
    "sampling.nfe": [1, 2],
    "sampling.gamma": [],
    "sampling.teacher_steps": 3,
    "sampling.batch": 16,
    "scores.curve_nfe": [1],
    "scores.curve_count": 16,
    "scores.kid_subsets": 2,
    "scores.kid_subset_size": 10,
    "scores.alignment_count": 4,
    "scores.alignment_nodes": 4,
    "report.grid_nfe": [1, 2],
    "report.bootstrap": 20,
    "compute.batch_per_device": 2,
}
#: instead of Inception, whose 2048 features take a quarter of a minute a score
BY_CLASSIFIER = {
    "scores.extractor": "classifier",
    "scores.classifier": {"features": 8, "steps": 5, "batch": 8},
    "scores.teacher_fid": None,
    "student.distance": "pseudo_huber",
}


@dataclass
class Site:
    """Where the files of a checkout's registry are published, and what was asked for."""

    folder: Path
    url: str
    asked: Counter[str]

    def publish(self, checkout: Checkout) -> None:
        """Let the checkout's registry point here, with the digests of what lies here."""
        path = checkout.path / "config/resources.yaml"
        registry = yaml.safe_load(path.read_text())
        for name, entry in registry.items():
            file = self.folder / name
            digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
            # The teachers keep the digest they have in the real registry: none, but for one.
            known = None if name.endswith(".pkl") else digest
            registry[name] = {key: entry[key] for key in ("about", "licence")}
            registry[name] |= {"url": f"{self.url}/{name}", "sha256": known, "digest_source": "the test"}
        path.write_text(yaml.safe_dump(registry, sort_keys=False))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server of the files in a folder."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder, asked = tmp_path / "site", Counter[str]()
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            asked[self.path.lstrip("/")] += 1

    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{http.server_port}", asked)
    http.shutdown()
    thread.join()
    http.server_close()


def teacher(**architecture: Any) -> Denoiser:
    """A small network of an official kind."""
    small = {"img_channels": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    return init_denoiser({**small, **architecture}, 0).eval()


def miniature(checkout: Checkout, study: str, changes: dict[str, Any]) -> Checkout:
    return Checkout(checkout.path, study).change({**SMALL, **changes}, study)


# --- without any data


@pytest.mark.parametrize("study", FULL_SIZE)
def test_a_dry_run_shows_every_job_of_the_study(checkout: Checkout, study: str) -> None:
    """With neither data nor teacher at hand."""
    text = Checkout(checkout.path, study).done("-n", "--quiet", "rules")
    jobs = {name: int(count) for name, count in re.findall(r"(?m)^(\w+) +(\d+)$", text)}
    downloads = {"resource": 4 if study.startswith("cifar10") else 3}
    one = {"dataset": 1, "teacher": 1, "coefficients": 1, "teacher_samples": 1, "calibration": 1, "report": 1}
    each = {"student": 15, "samples": 15, "scores": 15}
    assert {name: jobs[name] for name in (one | each | downloads)} == one | each | downloads


# --- from the download to the report


@pytest.fixture
def cifar10(checkout: Checkout, site: Site) -> Checkout:
    """cifar10-uncond with everything but its size: archive, EDM checkpoint, Inception, LPIPS, calibration, bfloat16."""
    cifar10_archive(site.folder / "cifar-10-python.tar.gz", cifar10_files(6))
    network = {"img_resolution": 32, "channel_mult": [1, 1], "augment_dim": 9}
    write_edm_pickle(site.folder / "edm-cifar10-32x32-uncond-vp.pkl", teacher(network="songunet", **network))
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(str(site.folder / "inception-2015-12-05.pt"))
    weights = torchvision.models.vgg16(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in weights.items()}, site.folder / "vgg16-397923af.pth")
    site.publish(checkout)
    students = {"ctm": {"preconditioning": "ctm"}, "analytic": {"preconditioning": "analytic"}}
    changes = {"students": students, "sampling.nfe": [1], "report.grid_nfe": [1], "scores.teacher_fid_tolerance": 1e-6}
    return miniature(checkout, "cifar10-uncond", changes)


@pytest.mark.slow
def test_cifar10_with_an_official_teacher(cifar10: Checkout, site: Site) -> None:
    """A teacher whose FID is off stops the study before a student is trained; a larger tolerance lets it go on."""
    assert cifar10.run() != 0
    assert "error: the teacher's FID is" in cifar10.output
    results = cifar10.path / "results/cifar10-uncond"
    assert not (results / "students").exists()
    samples = (results / "samples/teacher/heun.npy").stat()

    cifar10.change({"scores.teacher_fid_tolerance": 1e9}, "cifar10-uncond")
    cifar10.done()
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
    history = [json.loads(line) for line in (results / "students/ctm/seed0/history.jsonl").read_text().splitlines()]
    assert {"dsm_balance", "time_teacher", "time_backward", "peak_memory_mib"} <= history[-1].keys()
    assert "Nothing to be done" in cifar10.done("-n")


def test_ffhq_from_a_zip_with_every_student(checkout: Checkout, site: Site) -> None:
    """ffhq64: a zip of images, the five students, two EMA rates."""
    files = {f"images1024x1024/{name}": content for name, content in ffhq_files(24, size=20).items()}
    write_zip(checkout.path / "ffhq.zip", files)
    write_edm_pickle(site.folder / "edm-ffhq-64x64-uncond-vp.pkl", teacher(network="songunet", img_resolution=8))
    site.publish(checkout)
    changes = {"dataset.path": "ffhq.zip", "dataset.resolution": 8, "student.evaluation_ema": [0.5], **BY_CLASSIFIER}
    ffhq = miniature(checkout, "ffhq64", changes)
    ffhq.done()
    results = ffhq.path / "results/ffhq64"
    scores = pd.concat(pd.read_csv(file) for file in (results / "scores").glob("*/seed0.csv"))
    assert set(scores["run"]) == {"ctm", "bcm", "analytic", "analytic-forward", "cm"}
    assert set(scores["ema"]) == {0.999, 0.5}
    assert read_metadata(results / "students/cm/seed0/student-ema0.5.safetensors")["ema"] == 0.5
    assert (results / "report/report.html").exists()


def test_imagenet_from_its_tar_on_two_processes(checkout: Checkout, site: Site) -> None:
    """imagenet64: the tar of tars, an ADM teacher with labels, churn, and torchrun as the student rule starts it."""
    imagenet_tar(checkout.path / "train.tar", imagenet_files(6))
    network = {"network": "adm", "img_resolution": 8, "label_dim": 3, "model_channels": 8, "attn_resolutions": []}
    write_edm_pickle(site.folder / "edm-imagenet-64x64-cond-adm.pkl", teacher(**network))
    site.publish(checkout)
    students = {"analytic": {"preconditioning": "analytic"}}
    changes = {"dataset.path": "train.tar", "dataset.resolution": 8, "students": students, "report.baseline": {}}
    imagenet = miniature(checkout, "imagenet64", {**changes, **BY_CLASSIFIER})
    imagenet.done("--set-resources", "student:gpu=2")
    results = imagenet.path / "results/imagenet64"
    assert json.loads((results / "dataset/dataset.json").read_text())["count"] == 22
    log = (imagenet.path / "logs/imagenet64/student/analytic-seed0.log").read_text()
    assert "Traceback" not in log
    card = json.loads((results / "students/analytic/seed0/card.json").read_text())
    assert "--processes 2" in card["command"]
    assert (results / "report/report.html").exists()
