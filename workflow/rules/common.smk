import getpass
import os
import platform
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import DeploymentMethod

# The code lies beside this file in a clone, whichever file of it is the main one. Jobs run it with this interpreter, even
# if no environment is active. A module that is read from its address has no code beside it: the package is installed.
HERE = workflow.current_basedir
SOURCE = Path(HERE.get_path_or_uri(secret_free=True)).parents[1] / "src"
if SOURCE.is_dir():
    sys.path.insert(0, str(SOURCE))
    os.environ.update(PYTHONPATH=str(SOURCE))
# A training whose Snakemake is killed (kill -9) saves and exits, and does not run beside the next one.
SUPERVISOR = f"{platform.node()}:{os.getpid()}"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
os.environ.update(PATH=PATH, CONSISTENCY_SUPERVISOR=SUPERVISOR)
try:
    getpass.getuser()
except (KeyError, OSError):  # a uid without a name, as in a container: Snakemake and its Slurm plugin ask for one
    os.environ.update(LOGNAME=f"uid{os.getuid()}")

try:
    from consistency.base.errors import UserError, user_error
    from consistency.config.job import Job
    from consistency.config.paths import StudyPaths
    from consistency.config.reading import load_studies
    from consistency.data.resources import registry, resource_path
    from consistency.provenance import graph
    from consistency.provenance.due import due_mark, is_due, mark_due
    from consistency.runtime.cluster import require_cluster
    from consistency.runtime.launch import per_node
    from consistency.runtime.slurm_job import note_own
    from consistency.runtime.snakemake import TAKEN, join_run
    from consistency.tracking.server import tracking_uri
except ModuleNotFoundError as error:
    origin = f"git+https://{HERE.host}/{HERE.repo}@{HERE.ref}" if hasattr(HERE, "repo") else SOURCE.parent
    raise SystemExit(
        f"error: {error}: install this workflow's package where Snakemake runs, pip install '{origin}'"
    ) from None

join_run()
note_own()


@contextmanager
def in_one_line():
    """Turn a UserError into one line; Snakemake would print a WorkflowError within a traceback."""
    try:
        yield
    except (UserError, PermissionError) as error:
        raise SystemExit(f"error: {user_error(error)}") from None


# SIGTERM asks a job to save and exit; its shell and tee must outlive it. The first half is Snakemake's default.
shell.prefix("set -euo pipefail; trap '' TERM; ")

with in_one_line():
    for name in set(config) - {"studies", "container"}:
        raise UserError(f"unknown key {name!r} in config/config.yaml or --config: there are 'studies' and 'container'")
    # The jobs of a run read a copy of the study; edits take effect in the next run.
    STUDIES = load_studies(config.get("studies"), keep=workflow.is_main_process)
    if workflow.is_main_process:
        tracking_uri()  # the rule track would refuse a wrong address only after all other work
    RESOURCES = "|".join(map(re.escape, registry()))
    # DVC decides what is made again; everything else is up to date.
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
    """Return the Job of a rule's wildcards. Raises WorkflowError for an unknown study, student or seed."""
    study = STUDIES.get(wildcards.study)
    if study is None:
        raise WorkflowError(
            f"{wildcards.study} is not among the studies to run: use --config studies=[{wildcards.study}]"
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
    """Return an input function: the files that the graph lists for a job of the stage, its downloads and given files,
    and the mark that makes it run again when its settings or code change."""

    def needed(wildcards):
        job = job_of(wildcards)
        # The gate is the calibration's table, because results of earlier versions have no calibration.passed.
        gate, mark = job.of().scores, due_mark(stage, job)
        files = [*graph.needed(stage, job, gate), *map(resource_path, graph.fetched(stage, job))]
        files += graph.given(stage, job)
        if DECIDED:
            return [ancient(str(path)) for path in files]
        settled = graph.settled(stage, job)
        # Snakemake ignores a mark if any ancestor runs, and takes the job to run because of it; it does not beyond an
        # ancient file. So what is due beyond the gate waits for the gate itself.
        if is_due(mark) and graph.beyond_gate(stage, job):
            files, settled = [*files, gate], []
        return [ancient(str(path)) if path in settled else str(path) for path in files] + [str(mark)]

    return needed


def verb(stage: str):
    """Return a params function: the verb of a job of the stage, with its options; a GPU of the job must be there."""

    def words(wildcards, resources):
        return graph.verb_of(stage, job_of(wildcards)) + (" --gpu 1" if resources.get("gpu") else "")

    return words


def require_shares_of_jobs():
    """Raise UserError before any job runs if the batch of a training that is to come cannot be divided over its rule's
    processes: a student's would be found only after the teacher was trained."""
    for each in workflow.dag.needrun_jobs():
        job = job_of(each.wildcards) if each.rule.name in ("teacher", "student") else None
        if job and (each.resources.gpu > 1 or each.resources.gres or job.study.compute.batch_per_device):
            from consistency.training.shares import require_shares  # torch takes seconds

            nodes = each.resources.nodes
            require_shares(job, nodes * per_node(each.resources.gpu, nodes, each.resources.gres))


def environment(wildcards) -> str | None:
    """Return the environment that environment.yml makes with `--sdm conda`, None (that of Snakemake) without."""
    wanted = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    return "consistency-distillation" if wanted else None
