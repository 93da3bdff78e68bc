import os
import platform
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import DeploymentMethod

# The jobs run this checkout's code with this interpreter, whether or not an environment is active.
SOURCE = str(Path(workflow.basedir) / "src")
sys.path.insert(0, SOURCE)
# A trainer whose Snakemake was killed (kill -9) saves and leaves, instead of training on beside the next run.
SUPERVISOR = f"{platform.node()}:{os.getpid()}"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
os.environ.update(PYTHONPATH=SOURCE, PATH=PATH, CONSISTENCY_SUPERVISOR=SUPERVISOR)

from consistency.cluster import require_cluster
from consistency.code import code_digest
from consistency.errors import UserError
from consistency.resources import registry, resource_path
from consistency.study import OfficialTeacher, Student, Study, load_study
from consistency.workflow import join_run

join_run()


@contextmanager
def in_one_line():
    """Stop with one line; Snakemake would print a WorkflowError between the lines of a traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def load_studies() -> dict[str, Study]:
    """The studies of the configuration by name; a mistake in any stops before any work."""
    names = config.get("studies")
    names = [names] if isinstance(names, str) else names
    for name in set(config) - {"studies", "student"}:
        raise UserError(f"unknown key {name!r} in the configuration (config/config.yaml, --config): there is studies")
    if not names:
        raise UserError("studies in the configuration is empty: --config studies=digits, or studies=[digits,tiny]")
    return {name: load_study(f"config/studies/{name}.yaml") for name in names}


# SIGTERM asks a job to save and leave: its shell, and tee, have to live on until that is done. The first half is what
# Snakemake begins with of itself.
shell.prefix("set -euo pipefail; trap '' TERM; ")

with in_one_line():
    STUDIES = load_studies()
    RESOURCES = "|".join(map(re.escape, registry()))
# Under DVC one student is trained at a time (`student` in the configuration), and the one that it is made from is taken
# as it is.
TRAINED = re.escape(str(config["student"])) if "student" in config else "[a-z0-9][a-z0-9._-]*"


wildcard_constraints:
    study="[a-z0-9][a-z0-9._-]*",
    run="[a-z0-9][a-z0-9._-]*",
    seed="[0-9]+",


def study_of(wildcards) -> Study:
    """The study of a job."""
    try:
        return STUDIES[wildcards.study]
    except KeyError:
        raise WorkflowError(
            f"{wildcards.study} is not among the studies to run: use --config studies={wildcards.study}"
        ) from None


def student_of(wildcards) -> Student:
    """The student of a job."""
    study = study_of(wildcards)
    try:
        study.require(wildcards.run, int(wildcards.seed))
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return study.students[wildcards.run]


def key(stage: str):
    """A parameter that changes, and makes its job run again, exactly when a setting the stage depends on does."""

    def of(wildcards) -> str:
        seed = wildcards.get("seed")
        return study_of(wildcards).key(stage, wildcards.get("run"), None if seed is None else int(seed))

    return of


def code(stage: str):
    """A parameter that changes exactly when code does that the stage's result depends on."""

    def of(wildcards) -> str:
        return code_digest(stage)

    return of


def environment(wildcards) -> str | None:
    """With `--sdm conda`, the environment that environment.yml made; without, the one that runs Snakemake."""
    wanted = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    return "consistency-distillation" if wanted else None


def archive_if_used(wildcards) -> list[str]:
    """CIFAR-10's archive, for a study that reads it and does not say where it is."""
    dataset = study_of(wildcards).dataset
    used = dataset.kind == "cifar10" and dataset.path is None
    return [str(resource_path("cifar-10-python.tar.gz"))] if used else []


def teacher_sources(wildcards) -> list[str]:
    """The dataset, for a teacher that is trained; the official checkpoint, for one that is converted."""
    study = study_of(wildcards)
    if isinstance(study.teacher, OfficialTeacher):
        return [str(resource_path(study.teacher.checkpoint))]
    return [f"results/{study.name}/dataset/{name}" for name in ("images.npy", "labels.npy", "dataset.json")]


def vgg_if_used(wildcards) -> list[str]:
    """VGG16's weights, for a student whose distance is LPIPS."""
    used = student_of(wildcards).distance == "lpips"
    return [str(resource_path("vgg16-397923af.pth"))] if used else []


def coefficients_if_fitted(wildcards) -> list[str]:
    """The coefficients, for a student whose preconditioning reads them."""
    fitted = student_of(wildcards).needs_coefficients
    return [f"results/{wildcards.study}/coefficients/coefficients.npz"] if fitted else []


def predictor_if_frozen(wildcards) -> list[str]:
    """The student of the same seed that makes gc's endpoints, for one that does not make its own: its final weights or
    its snapshots."""
    frozen = student_of(wildcards).frozen
    if frozen is None:
        return []
    folder = f"results/{wildcards.study}/students/{frozen.run}/seed{wildcards.seed}"
    return [f"{folder}/student.safetensors" if frozen.step is None else f"{folder}/snapshots"]


def inception_if_used(wildcards) -> list[str]:
    """Inception's weights, for a study that scores with them."""
    used = study_of(wildcards).scores.extractor == "inception"
    return [str(resource_path("inception-2015-12-05.pt"))] if used else []


def every_score(wildcards) -> list[str]:
    """The score tables of all students and seeds."""
    study = study_of(wildcards)
    return [f"results/{study.name}/scores/{run}/seed{seed}.csv" for run in study.students for seed in study.seeds]


def every_coupled_student(wildcards) -> list[str]:
    """The students of consistency training, for a study that measures what their couplings do."""
    study = study_of(wildcards)
    runs = study.coupled if study.flows else []
    return [
        f"results/{study.name}/students/{run}/seed{seed}/student.safetensors" for run in runs for seed in study.seeds
    ]


def snapshots_that_carry(wildcards) -> list[str]:
    """The snapshots whose own coefficients the report shows."""
    study = study_of(wildcards)
    folder = f"results/{study.name}/students"
    return [f"{folder}/{run}/seed{study.seeds[0]}/snapshots" for run in study.carrying]


def flows_if_measured(wildcards) -> list[str]:
    """The measures of the couplings, for a study that asks for them."""
    names = (
        ("transport.csv", "discrepancy.csv", "toy.npz", "plane.csv", "limit.csv") if study_of(wildcards).flows else ()
    )
    return [f"results/{wildcards.study}/flows/{name}" for name in names]


def coefficients_if_needed(wildcards) -> list[str]:
    """The coefficients, for a study with an analytically preconditioned student."""
    needed = study_of(wildcards).needs_coefficients
    return [f"results/{wildcards.study}/coefficients/coefficients.npz"] if needed else []


def before_start() -> None:
    """Under Slurm, what would leave jobs waiting for ever stops this before any is submitted."""
    if workflow.executor_plugin.name == "slurm":
        with in_one_line():
            require_cluster()
