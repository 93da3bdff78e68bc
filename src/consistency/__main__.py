"""The verbs: `python -m consistency <verb> --study config/studies/digits.yaml`, one a stage, and a few to look."""

import argparse
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

from consistency import __version__
from consistency.base.errors import UserError
from consistency.base.progress import SUPERVISOR
from consistency.runtime import launch, slurm_job
from consistency.runtime.supervision import watch_supervisor

Arguments = argparse.Namespace


class Option:
    """An option of a verb: what argparse's add_argument takes."""

    def __init__(self, *flags: str, **settings: Any) -> None:
        self.flags, self.settings = flags, settings


@dataclass(frozen=True)
class Verb:
    """A command. function: "module:name", imported when it runs, so that --help does not wait for torch. It is called
    with the parsed arguments that its parameters name and may return an exit code."""

    help: str
    function: str
    options: tuple[Option, ...] = ()

    @property
    def computes(self) -> bool:
        """True if the verb uses the device."""
        return DEVICE in self.options

    def run(self, args: Arguments) -> int:
        """Import the function and call it."""
        module, name = self.function.split(":")
        function = getattr(import_module(f"consistency.{module}"), name)
        return function(**{each: getattr(args, each) for each in signature(function).parameters}) or 0


STUDY = Option("--study", required=True, metavar="FILE", help="the study, config/studies/NAME.yaml")
RESULTS = Option("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
STATE = Option("--state", type=Path, default=Path("state"), metavar="DIR", help="default: state")
ARCHIVES = Option("--archives", type=Path, default=Path("archives"), metavar="DIR", help="default: archives")
STUDENT = Option("--student", required=True, metavar="NAME", help="the student")
SEED = Option("--seed", type=int, required=True, help="its seed")
ANY_STUDENT = Option("--student", metavar="NAME", help="the student")
ANY_SEED = Option("--seed", type=int, help="its seed")
DEVICE = Option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
THREADS = Option("--threads", type=int, default=1, help="CPU threads (default: 1)")
READERS = Option("--threads", dest="workers", type=int, default=1, help="threads that read images (default: 1)")
TIME_LIMIT = Option("--time-limit", type=float, metavar="MINUTES", help="save, stop and exit with 142 then")
JOB_MINUTES = Option(
    "--job-minutes",
    type=float,
    metavar="MINUTES",
    help="the Slurm job's time limit: save before it, and ask Slurm to go on later (elsewhere: nothing)",
)
PROCESSES = Option("--processes", type=int, default=1, help="by torchrun, a GPU each; 0 and 1: none")
NODES = Option("--nodes", type=int, default=1, help="of the Slurm job, to share the processes evenly")
GRES = Option("--gres", default="", help="gpu:4 or gpu:a100:4: the processes of each node, instead")

HERE = (STUDY, RESULTS, STATE)
COMPUTES = (*HERE, DEVICE, THREADS, TIME_LIMIT)
RESUMES = (*COMPUTES, JOB_MINUTES)
SHARED = (*RESUMES, PROCESSES, NODES, GRES)

VERBS = {
    "check": Verb("check a study and print it with every default written out", "config.reading:print_study", HERE),
    "estimate": Verb(
        "what the whole study costs: operations, GPU-hours, disk",
        "evaluation.estimate:print_estimate",
        (*HERE, Option("--tflops", type=float, default=100.0, help="sustained TFLOP/s a GPU (default: 100)")),
    ),
    "dataset": Verb("images to one memory-mapped array", "stages.dataset:make_dataset", (*HERE, READERS)),
    "teacher": Verb("train the EDM denoiser (resumes)", "stages.teacher:make_teacher", SHARED),
    "coefficients": Verb("fit l_t and s_t from the teacher", "stages.coefficients:make_coefficients", COMPUTES),
    "student": Verb("distil one student (resumes)", "stages.student:make_student", (*SHARED, STUDENT, SEED)),
    "samples": Verb(
        "draw images of a student, or of the teacher without --student",
        "stages.samples:make_samples",
        (*SHARED, ANY_STUDENT, ANY_SEED),
    ),
    "extractor": Verb(
        "train the classifier (or open Inception) and extract the data's features",
        "stages.extractor:make_extractor",
        COMPUTES,
    ),
    "calibration": Verb(
        "score data against data and the teacher against data", "stages.scores:make_calibration", COMPUTES
    ),
    "scores": Verb("score one student", "stages.scores:make_scores", (*COMPUTES, STUDENT, SEED)),
    "flows": Verb(
        "measure what the couplings of consistency training do to the flow", "stages.flows:make_flows", RESUMES
    ),
    "report": Verb("tables, figures and report.html", "stages.report:make_report", HERE),
    "track": Verb("upload the results to MLflow (idempotent)", "tracking.upload:track_study", HERE),
    "summary": Verb("print the score table and where the report is", "report.summary:print_summary", HERE),
    "archive": Verb(
        "pack a finished study into one zip with SHA256SUMS",
        "provenance.archive:make_archive",
        (*HERE, ARCHIVES, Option("--snapshots", action="store_true", help="with the snapshots of the students too")),
    ),
    "verify": Verb(
        "check a study's results against their cards, their parents and the study file, file by file",
        "provenance.verification:print_verified",
        (
            Option("root", type=Path, metavar="FOLDER", help="results/NAME, of a checkout or an unzipped archive"),
            Option("--study", dest="study_file", type=Path, metavar="FILE", help="default: config/studies/NAME.yaml"),
        ),
    ),
    "plan": Verb(
        "write what DVC compares before it runs a stage",
        "provenance.dvc:write_plan",
        (*HERE, Option("--unused", type=int, default=0, help="empty files for dvc.yaml (default: 0)")),
    ),
    "dvc": Verb(
        "print dvc.yaml of some studies",
        "provenance.dvc:print_pipeline",
        (Option("studies", nargs="+", metavar="NAME", help="a study, config/studies/NAME.yaml"),),
    ),
    "reproduce": Verb(
        "let Snakemake make a study, or some files of it by some rules (goes on after a killed run)",
        "runtime.snakemake:reproduce",
        (
            *HERE,
            Option("--rules", nargs="+", metavar="RULE", help="of workflow/rules (default: all)"),
            Option("targets", nargs="*", metavar="FILE", help="what they are to make (default: all)"),
        ),
    ),
    "fetch": Verb(
        "download files into resources/ and check their sha256; without a name, list which are there",
        "data.resources:fetch_all",
        (Option("names", nargs="*", metavar="NAME", help="a file of config/resources.yaml"),),
    ),
    "validate": Verb("hold this machine against the closed-form oracles of the method", "evaluation.validate:validate"),
    "reference": Verb("write the field reference of a study", "config.reference:write_reference"),
}

# Exit code of a verb that reached its time limit and saved its state.
_OUT_OF_TIME = 128 + signal.SIGALRM


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser("consistency", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        command = commands.add_parser(name, help=verb.help, description=verb.help)
        for option in verb.options:
            command.add_argument(*option.flags, **option.settings)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 2 for a mistake the user can mend, 128 + signal when interrupted."""
    args = build_parser().parse_args(words)
    args.words = sys.argv[1:] if words is None else words
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGALRM, _too_late)
    watch_supervisor()
    if launch.is_worker():
        return _as_worker(args)
    if SUPERVISOR in os.environ and not launch.is_task():
        # The first line of a log.
        job = f", Slurm job {slurm_job.number()}" if slurm_job.in_job() else ""
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}{job}", flush=True)
    code = _run(args)
    if code == _OUT_OF_TIME and _job_minutes(args) and not launch.is_task():
        _ask_for_more(code)
    return code


def _job_minutes(args: Arguments) -> float | None:
    """Return the Slurm job's time limit in minutes for a resumable verb, else None."""
    return getattr(args, "job_minutes", None) if slurm_job.in_job() else None


def _ask_for_more(code: int) -> None:
    # Slurm signals this process too, which is exiting already.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    refused = slurm_job.requeue()
    if refused:
        print(f"Slurm does not start this job again by itself ({refused}): its exit code is {code}", file=sys.stderr)
    else:
        print("the job's time is over: Slurm starts it again when there is room, and it goes on", flush=True)


def _as_worker(args: Arguments) -> int:
    """Run the verb in one of several processes. A failing process exits at once: leaving the group would wait for the
    others, which wait for it. torchrun then stops them."""
    code: int | str | None = 1
    try:
        code = _run(args)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        traceback.print_exc()
    if code == 0:
        from consistency.runtime.distributed import leave

        leave()
        return 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _run(args: Arguments) -> int:
    """Run the verb. Every expected error becomes one line and an exit code."""
    try:
        verb = VERBS[args.verb]
        if STUDY in verb.options:
            args.study_file, args.job = Path(args.study), _job_of(args)
            args.study = args.job.study
        if verb.computes:
            processes, nodes = _shares(args)
            if nodes > 1 and not launch.is_task():
                return launch.run_on_nodes(nodes, args.words)
            if args.device in ("auto", "cuda") and not launch.is_worker():  # its node has claimed the GPUs
                launch.claim_gpus(processes)
            if (processes > 1 or nodes > 1) and not launch.is_worker():
                return launch.run_processes(processes, args.words)
            _prepare(args)
        return verb.run(args)
    except UserError as error:
        print(f"error{launch.whose()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Interrupted is defined beside torch, which is not imported for the error of a verb without it.
        signum = getattr(error, "signum", None)
        if signum is None:
            raise
        print(f"{error}{launch.whose()}", file=sys.stderr)
        return 128 + int(signum)


def _job_of(args: Arguments) -> Any:
    """Return the study's Job; --student and --seed, given together, name one of its students."""
    from consistency.config.job import Job
    from consistency.config.paths import StudyPaths
    from consistency.config.reading import load_study

    study, student, seed = load_study(args.study), getattr(args, "student", None), getattr(args, "seed", None)
    if student is not None and seed is not None:
        study.require(student, seed)
    elif (student, seed) != (None, None):
        raise UserError("--student and --seed go together: give both for a student, neither for the teacher")
    return Job(study, StudyPaths(study.name, args.results, args.state), student, seed)


def _terminated(signum: int, frame: FrameType | None) -> None:
    """Exit on SIGTERM as on any error, so that temporary files are removed; a training saves its state instead."""
    sys.exit(128 + signum)


def _too_late(signum: int, frame: FrameType | None) -> None:
    """Exit at the time limit if there is no state to save: not yet, or never for verbs that do not train or draw."""
    print("error: the time was over before there was anything to go on from: give the job more", file=sys.stderr)
    sys.exit(2)


def _shares(args: Arguments) -> tuple[int, int]:
    """Check the options of computing verbs. Returns the processes per node and the number of nodes."""
    for option in ("threads", "time_limit", "nodes", "job_minutes"):
        if getattr(args, option, None) is not None and getattr(args, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} must be positive, got {getattr(args, option):g}")
    nodes = getattr(args, "nodes", 1)
    processes = max(getattr(args, "processes", 1), 1)
    if processes > 1 and processes % nodes:
        raise UserError(f"--processes {processes} cannot be shared evenly by --nodes {nodes}")
    return max(processes // nodes, launch.gpus_of_gres(getattr(args, "gres", "")), 1), nodes


def _prepare(args: Arguments) -> None:
    """Set up device and threads. The default is one thread: the number of threads affects the last bit of a result."""
    limits = [args.time_limit, None if _job_minutes(args) is None else slurm_job.working_minutes(args.job_minutes)]
    if minutes := min((limit for limit in limits if limit is not None), default=None):
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

    import torch

    from consistency.runtime.distributed import join
    from consistency.runtime.machine import Machine, pick_device

    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # float32 excludes TF32, except for LPIPS beside lower-precision networks, where it is a third of the step's time.
    low = args.verb == "student" and args.job.settings.precision != "float32"
    torch.backends.cudnn.allow_tf32 = low
    if launch.is_worker() and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks, args.device = join(pick_device(args.device))
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    args.ranks, args.machine = ranks, Machine(args.device, ranks)


if __name__ == "__main__":
    sys.exit(main())
