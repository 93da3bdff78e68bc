"""The four full-size studies, planned without any data; the files beside this one run miniatures of three of them."""

import re

import pytest
from tests.workflow.checkout import Checkout

FULL_SIZE = ["cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64"]


@pytest.mark.parametrize("study", FULL_SIZE)
def test_a_dry_run_shows_every_job_of_the_study(checkout: Checkout, study: str) -> None:
    """With neither data nor teacher at hand."""
    text = Checkout(checkout.path, study).done("-n", "--quiet", "rules")
    jobs = {name: int(count) for name, count in re.findall(r"(?m)^(\w+) +(\d+)$", text)}
    downloads = {"resource": 4 if study.startswith("cifar10") else 3}
    one = {"dataset": 1, "teacher": 1, "coefficients": 1, "teacher_samples": 1, "calibration": 1, "report": 1}
    each = {"student": 15, "samples": 15, "scores": 15}
    assert {name: jobs[name] for name in (one | each | downloads)} == one | each | downloads
