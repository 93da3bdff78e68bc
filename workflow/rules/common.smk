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

from consistency.runtime.cluster import require_cluster
from consistency.provenance.code_digest import code_digest
from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.provenance.graph import downloads
from consistency.data.resources import registry, resource_path
from consistency.config.networks import OfficialTeacher
from consistency.config.study import Study
from consistency.config.reading import load_study
from consistency.runtime.snakemake import join_run

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


def job_of(wildcards) -> Job:
    """The study of a job, and its student if it has one."""
    run, seed = wildcards.get("run"), int(wildcards.get("seed") or 0)
    try:
        study = STUDIES[wildcards.study]
        if run:
            study.require(run, seed)
    except KeyError:
        raise WorkflowError(
            f"{wildcards.study} is not among the studies to run: use --config studies={wildcards.study}"
        ) from None
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return Job(study, StudyPaths(study.name), run, seed) if run else Job(study, StudyPaths(study.name))


def made_by(stage: str, verb: str | None = None) -> dict:
    """The parameters of a rule: the words of its command, and two that change, and make its jobs run again, exactly when
    a setting or code does that the stage depends on."""
    return {
        "key": lambda w: job_of(w).key(stage),
        "code": lambda w: code_digest(stage),
        "verb": verb or stage,
        "student": lambda w: job_of(w).options.lstrip(),
    }


def environment(wildcards) -> str | None:
    """With `--sdm conda`, the environment that environment.yml made; without, the one that runs Snakemake."""
    wanted = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    return "consistency-distillation" if wanted else None


def downloads_of(stage: str):
    """Input function: the downloads that a job of the stage opens."""
    return lambda w: [str(resource_path(name)) for name in downloads(job_of(w), stage)]


def teacher_data(wildcards) -> list[str]:
    """The dataset, for a teacher that is trained and not converted."""
    if isinstance(job_of(wildcards).study.teacher, OfficialTeacher):
        return []
    return expand(rules.dataset.output[:3], study=wildcards.study)


def coefficients_if_read(wildcards) -> list[str]:
    """The coefficients, for a student that reads them, or for a study that has one."""
    job = job_of(wildcards)
    reader = job.student if job.run else job.study
    return expand(rules.coefficients.output[0], study=wildcards.study) if reader.needs_coefficients else []


def predictor_if_frozen(wildcards) -> list[str]:
    """The student of the same seed that makes gc's endpoints, for one that does not make its own: its final weights or
    its snapshots."""
    frozen = job_of(wildcards).student.frozen
    if frozen is None:
        return []
    made = rules.student.output[0 if frozen.step is None else 3]
    return expand(made, study=wildcards.study, run=frozen.run, seed=wildcards.seed)


def every_coupled_student(wildcards) -> list[str]:
    """The students of consistency training, for a study that measures what their couplings do."""
    study = job_of(wildcards).study
    runs = study.coupled if study.flows else []
    return expand(rules.student.output[0], study=study.name, run=runs, seed=study.seeds)
