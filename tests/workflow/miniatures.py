"""The full-size studies in miniature, and a server on the loopback for all that they download.

Networks, images and numbers are tiny, and what is scored means nothing.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml
from tests.conftest import Changes
from tests.nets.small import UNET
from tests.tracking.servers import web_server
from tests.workflow.checkout import Checkout

from consistency.nets.denoiser import Denoiser, init_denoiser

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
    "calibration.steps": 3,
    "sampling.batch": 16,
    "scores.curve_nfe": [1],
    "scores.curve_count": 16,
    "scores.kid_subsets": 2,
    "scores.kid_subset_size": 10,
    "scores.alignment_count": 4,
    "scores.alignment_nodes": 4,
    "report.grid_nfe": [1, 2],
    "compute.batch_per_device": 2,
}
#: instead of Inception, whose 2048 features take a quarter of a minute a score
BY_CLASSIFIER = {
    "scores.extractor": "classifier",
    "scores.classifier": {"features": 8, "steps": 5, "batch": 8},
    "calibration.published_fid": None,
    "student.distance": "pseudo_huber",
}


@dataclass
class Site:
    """A place where the files of a checkout's registry are published, and what was asked for."""

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


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """A server of the files in a folder."""
    asked = Counter[str]()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            asked[self.path.lstrip("/")] += 1

    with web_server(functools.partial(Handler, directory=str(folder))) as url:
        yield Site(folder, url, asked)


def teacher(**architecture: Any) -> Denoiser:
    """A small network of an official kind."""
    return init_denoiser(UNET | {"img_channels": 3, "model_channels": 8} | architecture, 0).eval()


def miniature(checkout: Checkout, study: str, changes: Changes) -> Checkout:
    return Checkout(checkout.path, study).change({**SMALL, **changes}, study)
