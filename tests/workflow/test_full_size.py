"""The full-size studies, planned without any data; the files beside this one run miniatures of four of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.workflow.checkout import Checkout

from consistency.config.networks import NoTeacher
from consistency.config.reading import load_study

#: downloads and trainings
FIRST_PAPER = {"cifar10-uncond": (4, 18), "cifar10-cond": (4, 18), "ffhq64": (3, 18)}
FIRST_PAPER |= {"imagenet64": (3, 18), "imagenet64-openai": (3, 18)}
SECOND_PAPER = {"cifar10-gc": (2, 27), "imagenet32-gc": (1, 12), "celeba64-gc": (1, 12), "cifar10-ect": (3, 12)}
#: of the released GC and ECT configurations: rate, batch, steps, blocks, attention, baseline's dropout
RELEASED = {
    "cifar10-gc": (1e-4, 512, 100_000, 3, [], 0.3),
    "imagenet32-gc": (8e-5, 512, 150_000, [3, 5, 7], [16], [0.0, 0.2, 0.2]),
    "celeba64-gc": (8e-5, 128, 150_000, [3, 3, 4, 5], [], [0.0, 0.0, 0.2, 0.2]),
}
PROFILE = Path("workflow/profiles/slurm/config.yaml")


@pytest.mark.parametrize("study", FIRST_PAPER | SECOND_PAPER)
def test_a_dry_run_shows_every_job_of_the_study(checkout: Checkout, study: str) -> None:
    """It needs neither data nor teacher."""
    downloads, trainings = (FIRST_PAPER | SECOND_PAPER)[study]
    text = Checkout(checkout.path, study).done("-n", "--quiet", "rules")
    jobs = {name: int(count) for name, count in re.findall(r"(?m)^(\w+) +(\d+)$", text)}
    once = ["dataset", "teacher", "extractor", "teacher_samples", "calibration", "report", "track", "all"]
    once += ["coefficients"] if study in FIRST_PAPER else ["flows"]
    each = dict.fromkeys(("student", "samples", "scores"), trainings)
    total = len(once) + 3 * trainings + downloads
    assert jobs == dict.fromkeys(once, 1) | each | {"resource": downloads, "total": total}


@pytest.mark.parametrize("name", RELEASED)
def test_the_second_papers_studies_are_those_of_the_released_configurations(name: str) -> None:
    study = load_study(f"config/studies/{name}.yaml")
    assert isinstance(study.teacher, NoTeacher)
    network: Any = study.teacher.network
    arms = study.students
    for student in arms.values():
        found = (student.learning_rate, student.batch, student.steps, network.num_blocks, network.attn_resolutions)
        assert found == RELEASED[name][:5]
        assert (student.optimizer, student.curriculum.model_dump()["last"]) == ("lion", 1280)
    assert arms["ic-as-released"].dropout == RELEASED[name][5]
    # All others share the dropout of gc's configuration.
    assert {arm.dropout for run, arm in arms.items() if run != "ic-as-released"} == {0.0}
    assert arms["gc"].mu == 0.5


@pytest.mark.parametrize("name", SECOND_PAPER)
def test_the_couplings_that_are_compared_differ_in_nothing_else(name: str) -> None:
    study = load_study(f"config/studies/{name}.yaml")
    gc = "gc-mu0.3" if name == "cifar10-ect" else "gc"
    dumps = [study.students[run].model_dump(exclude={"coupling", "mu"}) for run in ("ic", "ot", gc)]
    assert dumps[0] == dumps[1] == dumps[2]
    assert study.flows is not None
    assert study.flows.discrepancy == ["ic", "ot", gc]
    assert len(study.seeds) == 3


def test_every_rule_that_computes_has_a_gpu_on_the_cluster() -> None:
    resources = yaml.safe_load(PROFILE.read_text(encoding="utf-8"))["set-resources"]
    computing = {"teacher", "coefficients", "student", "teacher_samples", "samples", "extractor", "calibration"}
    for rule in computing | {"scores", "flows"}:
        assert resources[rule]["slurm_partition"] == "gpu"
        assert resources[rule].get("gpu") or resources[rule].get("gres")
