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

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_studies
from consistency.data.resources import registry, resource_path
from consistency.provenance import graph
from consistency.provenance.due import due_mark, mark_due
from consistency.runtime.cluster import require_cluster
from consistency.runtime.snakemake import TAKEN, join_run

join_run()


@contextmanager
def in_one_line():
    """Stop with one line; Snakemake would print a WorkflowError between the lines of a traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


# SIGTERM asks a job to save and leave: its shell, and tee, have to live on until that is done. The first half is what
# Snakemake begins with of itself.
shell.prefix("set -euo pipefail; trap '' TERM; ")

with in_one_line():
    for name in set(config) - {"studies"}:
        raise UserError(f"unknown key {name!r} in the configuration (config/config.yaml, --config): there is studies")
    # A study that is edited while its jobs run is read again by the next run, not by the next job.
    STUDIES = load_studies(config.get("studies"), keep=workflow.is_main_process)
    RESOURCES = "|".join(map(re.escape, registry()))
    # DVC has decided what is made again: everything else is taken as it is.
    DECIDED = TAKEN in os.environ
    if workflow.is_main_process and not DECIDED:
        for study in STUDIES.values():
            for name, reason in mark_due(Job(study, StudyPaths(study.name))).items():
                print(f"{study.name}, {name}: {reason}", file=sys.stderr)


wildcard_constraints:
    study="[a-z0-9][a-z0-9._-]*",
    student="[a-z0-9][a-z0-9._-]*",
    seed="[0-9]+",


def job_of(wildcards) -> Job:
    """The study of a job, and its student if it has one."""
    study = STUDIES.get(wildcards.study)
    if study is None:
        raise WorkflowError(
            f"{wildcards.study} is not among the studies to run: use --config studies={wildcards.study}"
        )
    job = Job(study, StudyPaths(study.name))
    if wildcards.get("student") is None:
        return job
    try:
        study.require(wildcards.student, int(wildcards.seed))
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return job.of(wildcards.student, int(wildcards.seed))


def inputs(stage: str):
    """Input function: what the graph says that a job of the stage needs, its downloads, and the mark that makes it run
    again when its settings or its code are others."""

    def needed(wildcards):
        job = job_of(wildcards)
        settled = graph.settled(stage, job)
        # Results of earlier versions have the table, and no calibration.passed.
        files = [*graph.needed(stage, job, job.of().scores), *map(resource_path, graph.fetched(stage, job))]
        marks = [] if DECIDED else [str(due_mark(stage, job))]
        return [ancient(str(path)) if DECIDED or path in settled else str(path) for path in files] + marks

    return needed


def made_by(stage: str) -> dict:
    """The parameters of a rule: the words of its command."""
    return {
        "verb": lambda w: graph.verb_of(stage, job_of(w)),
    }


def environment(wildcards) -> str | None:
    """With `--sdm conda`, the environment that environment.yml made; without, the one that runs Snakemake."""
    wanted = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    return "consistency-distillation" if wanted else None
