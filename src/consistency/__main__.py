"""The commands: `consistency VERB --study config/studies/digits.yaml`, one per stage and a few tools."""

import argparse
import io
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import shtab

from consistency import __version__
from consistency.base.errors import UserError, user_error
from consistency.base.progress import SUPERVISOR
from consistency.runtime import launch, slurm_job
from consistency.runtime.stopping import Interrupted, heeded
from consistency.runtime.supervision import watch_supervisor

Arguments = argparse.Namespace


class Option:
    """An option of a verb: what argparse's add_argument takes."""

    def __init__(self, *flags: str, **settings: Any) -> None:
        self.flags, self.settings = flags, settings


@dataclass(frozen=True)
class Verb:
    """A command. function: "module:name", imported when it runs, so that --help does not wait for torch. Its parameters
    name the parsed arguments that it takes; it may return an exit code."""

    help: str
    function: str
    options: tuple[Option, ...] = ()

    @property
    def computes(self) -> bool:
        """True if the verb uses a device."""
        return DEVICE in self.options

    def run(self, args: Arguments) -> int:
        """Import the function and call it."""
        function = resolve_name(f"consistency.{self.function}")
        return function(**{each: getattr(args, each) for each in signature(function).parameters}) or 0


STUDY = Option("--study", required=True, metavar="FILE", help="study file, or the name of a study")
RESULTS = Option("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
STATE = Option("--state", type=Path, default=Path("state"), metavar="DIR", help="default: state")
ARCHIVES = Option("--archives", type=Path, default=Path("archives"), metavar="DIR", help="default: archives")
PAGES = Option("--pages", type=Path, default=Path("docs/results"), metavar="DIR", help="default: docs/results")
RELEASES = Option("--releases", type=Path, default=Path("release"), metavar="DIR", help="default: release")
STUDENT = Option("--student", required=True, metavar="NAME", help="student")
SEED = Option("--seed", type=int, required=True, help="seed of the student")
ANY_STUDENT = Option("--student", metavar="NAME", help="student (default: the teacher)")
ANY_SEED = Option("--seed", type=int, help="seed of the student")
DEVICE = Option(
    "--device",
    default=os.environ.get("CONSISTENCY_DEVICE", "auto"),
    help="auto, cpu, cuda or cuda:N (default: CONSISTENCY_DEVICE, or auto: a GPU if there is one or one is asked for)",
)
GPU = Option("--gpu", type=int, default=0, help="1: without a GPU the verb ends with an error (default: 0)")
THREADS = Option("--threads", type=int, default=1, help="CPU threads (default: 1)")
READERS = Option("--threads", dest="workers", type=int, default=1, help="threads that read images (default: 1)")
TIME_LIMIT = Option("--time-limit", type=float, metavar="MINUTES", help="save, stop and exit with 142 after this time")
JOB_MINUTES = Option(
    "--job-minutes", type=float, metavar="MINUTES", help="time limit of its own Slurm job: save, requeue"
)
PROCESSES = Option("--processes", type=int, default=0, help="processes, one GPU each (default: one, on a GPU or not)")
NODES = Option("--nodes", type=int, default=1, help="nodes of the Slurm job, which share the processes evenly")
GRES = Option("--gres", default="", help="GPUs per node, gpu:4 or gpu:a100:4: a process each, instead of --processes")
SNAPSHOTS = Option("--snapshots", action="store_true", help="include the students' snapshots")
TFLOPS = Option("--tflops", type=float, default=100.0, help="sustained TFLOP/s per GPU (default: 100)")
FOLDER = Option("root", type=Path, metavar="FOLDER", help="results/NAME, or a page docs/results/NAME")
STUDY_FILE = Option("--study", dest="study_file", type=Path, metavar="FILE", help="default: config/studies/NAME.yaml")
UNUSED = Option("--unused", type=int, default=0, help="number of empty files for dvc.yaml (default: 0)")
STUDIES = Option("studies", nargs="+", metavar="NAME", help="studies, each config/studies/NAME.yaml")
RULES = Option("--rules", nargs="+", metavar="RULE", help="rules of workflow/rules that may run (default: all)")
TARGETS = Option("targets", nargs="*", metavar="FILE", help="files to make (default: all)")
STUDENT_FILE = Option(
    "--student",
    dest="student_file",
    required=True,
    type=Path,
    metavar="FILE",
    help="its file, or digits: a shipped one",
)
NFE = Option("--nfe", type=int, default=1, help="number of jumps (default: 1)")
COUNT = Option("--count", type=int, default=64, help="number of images (default: 64)")
OUT = Option("--out", required=True, type=Path, metavar="FILE", help="a grid (.png), or the uint8 array (.npy)")
FIRST_SEED = Option("--seed", dest="first_seed", type=int, default=0, help="seed of the first image (default: 0)")
LABEL = Option("--label", type=int, help="class of all images (default: each seed draws its own)")
LABELS = Option(
    "--labels",
    choices=("data", "balanced"),
    default="data",
    help="draw classes in the proportions of the student's data (default) or uniformly",
)
IMAGES = Option("--images", required=True, type=Path, metavar="FOLDER", help="a folder of png or jpg, or a .npy")
DENOISER = Option("--denoiser", required=True, metavar="MODULE:NAME", help="a callable, or a function that returns one")
FIT = Option("--out", required=True, type=Path, metavar="FILE", help="the fit (.npz)")
SIGMA_MIN = Option("--sigma-min", type=float, default=0.002, help="smallest noise level (default: 0.002)")
SIGMA_MAX = Option("--sigma-max", type=float, default=80.0, help="largest noise level (default: 80)")
TIMES = Option("--times", type=int, default=40, help="noise levels of the fit (default: 40)")
SAMPLES = Option("--samples", type=int, help="images to use (default: all)")
TOLERANCE = Option("--tolerance", type=float, default=0.0, help="take more images until f, g are known to this")
PROBES = Option("--probes", type=int, default=1, help="random vectors an image (default: 1)")
BATCH = Option("--batch", type=int, default=64, help="images an evaluation (default: 64)")
NAMES = Option("names", nargs="*", metavar="NAME", help="file of config/resources.yaml")

HERE = (STUDY, RESULTS, STATE)
COMPUTES = (*HERE, DEVICE, GPU, THREADS, TIME_LIMIT)
RESUMES = (*COMPUTES, JOB_MINUTES)
SHARED = (*RESUMES, PROCESSES, NODES, GRES)
ALONE = (STUDENT_FILE, NFE, COUNT, OUT, FIRST_SEED, LABEL, LABELS, DEVICE, THREADS, TIME_LIMIT)
OF_OWN = (DENOISER, IMAGES, FIT, SIGMA_MIN, SIGMA_MAX, TIMES, SAMPLES, PROBES, BATCH, TOLERANCE, FIRST_SEED)

VERBS = {
    "check": Verb("check a study and print it with all defaults", "config.reading:print_study", HERE),
    "estimate": Verb("estimate operations, GPU-hours and disk", "evaluation.estimate:print_estimate", (*HERE, TFLOPS)),
    "dataset": Verb("prepare the images", "stages.dataset:make_dataset", (*HERE, READERS)),
    "teacher": Verb("train or convert the EDM teacher (resumes)", "stages.teacher:make_teacher", SHARED),
    "coefficients": Verb("fit l_t and s_t (resumes)", "stages.coefficients:make_coefficients", SHARED),
    "student": Verb("train one student (resumes)", "stages.student:make_student", (*SHARED, STUDENT, SEED)),
    "samples": Verb("sample a student or the teacher", "stages.samples:make_samples", (*SHARED, ANY_STUDENT, ANY_SEED)),
    "extractor": Verb("prepare the extractor and the data's features", "stages.extractor:make_extractor", COMPUTES),
    "calibration": Verb("score the data's halves and the teacher", "stages.scores:make_calibration", COMPUTES),
    "scores": Verb("score one student", "stages.scores:make_scores", (*COMPUTES, STUDENT, SEED)),
    "flows": Verb("measure what each coupling does to the flow", "stages.flows:make_flows", RESUMES),
    "report": Verb("write tables, figures and report.html", "stages.report:make_report", HERE),
    "sample": Verb("sample a student from its file alone", "api:write_samples", ALONE),
    "score": Verb("score images of your own by a study's measure", "api:print_score", (*COMPUTES, IMAGES)),
    "fit": Verb("fit l_t and s_t of a denoiser of your own", "api:write_fit", (*OF_OWN, DEVICE, THREADS, TIME_LIMIT)),
    "track": Verb("upload the results to MLflow (idempotent)", "tracking.upload:track_study", HERE),
    "summary": Verb("print the score table and the report's path", "report.summary:print_summary", HERE),
    "archive": Verb("pack a study as a zip", "provenance.archive:make_archive", (*HERE, ARCHIVES, SNAPSHOTS)),
    "verify": Verb("check results against their cards", "report.verification:print_verified", (FOLDER, STUDY_FILE)),
    "publish": Verb("write a study's page of results", "report.publish:publish", (*HERE, ARCHIVES, PAGES)),
    "release": Verb("write students with a model card", "report.release:release", (*HERE, ARCHIVES, RELEASES)),
    "plan": Verb("write the files that DVC compares", "provenance.dvc:write_plan", (*HERE, UNUSED)),
    "dvc": Verb("print dvc.yaml of some studies", "provenance.dvc:print_pipeline", (STUDIES,)),
    "reproduce": Verb("run Snakemake for a study (resumes)", "runtime.snakemake:reproduce", (*HERE, RULES, TARGETS)),
    "fetch": Verb("download and check files of resources/, or list them", "data.resources:fetch_all", (NAMES,)),
    "doctor": Verb("say what is right and wrong on this machine", "stages.doctor:doctor"),
    "validate": Verb("check this machine against the method's closed-form oracles", "evaluation.validate:validate"),
    "reference": Verb("write the reference of the configuration", "config.reference:write_reference"),
}

# Completed by the shell from the files that are there, by the option's placeholder.
COMPLETED = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY, "FOLDER": shtab.DIRECTORY}

# Exit code of a verb that reached its time limit and saved its state.
_OUT_OF_TIME = 128 + signal.SIGALRM


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser("consistency", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    shtab.add_argument_to(parser)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        command = commands.add_parser(name, help=verb.help, description=verb.help)
        for option in verb.options:
            argument = command.add_argument(*option.flags, **option.settings)
            if (placeholder := option.settings.get("metavar")) in COMPLETED:
                argument.complete = COMPLETED[placeholder]  # type: ignore[attr-defined]
    return parser


def main(words: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 2 for an error the user can correct, 128 + signal when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file or pipe gets UTF-8, a terminal what it can show
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="backslashreplace")
    os.environ["MPLBACKEND"] = "Agg"  # a terminal of Jupyter names a backend that may not be installed here
    args = build_parser().parse_args(words)
    args.words = sys.argv[1:] if words is None else words
    if SUPERVISOR in os.environ or heeded(signal.SIGTERM):  # the workflow's shell ignores it, for its tee
        signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGALRM, _too_late)
    watch_supervisor()
    if launch.is_worker():
        return _as_worker(args)
    if SUPERVISOR in os.environ and not launch.is_task():
        # First line of the log.
        job = f", Slurm job {slurm_job.number()}" if slurm_job.in_job() else ""
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}{job}", flush=True)
    code = _run(args)
    if code == _OUT_OF_TIME and _job_minutes(args) and not launch.is_task():
        _ask_for_more(code)
    return code


def _job_minutes(args: Arguments) -> float | None:
    """Return the time limit in minutes of a Slurm job that is a resumable verb's own, else None."""
    return getattr(args, "job_minutes", None) if slurm_job.owned() else None


def _ask_for_more(code: int) -> None:
    # Slurm signals this process too, although it is exiting already.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    refused = slurm_job.requeue()
    if refused:
        print(f"Slurm did not requeue this job ({refused}); its exit code is {code}", file=sys.stderr)
    else:
        print("time limit reached: Slurm has requeued the job, which will resume", flush=True)


def _as_worker(args: Arguments) -> int:
    """Run the verb in one of several processes. A failing process exits at once, and torchrun stops the others: leaving
    the group would wait for processes that wait for this one."""
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
            _open_study(args)
        if args.verb in ("check", "reproduce"):
            from consistency.tracking.server import tracking_uri

            tracking_uri()  # a wrong address is an error before the work, not in the verb track at its end
        if verb.computes:
            processes, nodes = _shares(args)
            if args.verb in ("teacher", "student") and not launch.is_worker():
                from consistency.training.shares import require_shares

                require_shares(args.job, processes * nodes)
            asked = _asked_gpu(args)  # before the claim, which names every GPU that there is
            if nodes > 1 and not launch.is_task():
                return launch.run_on_nodes(nodes, args.words)
            if args.device in ("auto", "cuda") and not launch.is_worker():  # its node has claimed the GPUs
                launch.claim_gpus(processes)
            if (processes > 1 or nodes > 1) and not launch.is_worker():
                from consistency.runtime.machine import require_device

                require_device(args.device, asked, processes)
                return launch.run_processes(processes, args.words)
            _prepare(args, asked)
        return verb.run(args)
    except (UserError, PermissionError) as error:
        print(f"error{launch.whose()}: {user_error(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        full = "this machine's memory is full" if isinstance(error, MemoryError) else "the GPU's memory is full"
        smaller = "halve compute.batch_per_device (training, fit) or sampling.batch (samples, scores) in the study"
        print(f"error{launch.whose()}: {full}: {smaller}, and run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Interrupted as error:
        print(f"{error}{launch.whose()}", file=sys.stderr)
        return 128 + error.signum


def _open_study(args: Arguments) -> None:
    """Add study_file, study and job to the arguments; --student and --seed together name a student of the study."""
    from consistency.config.job import Job
    from consistency.config.paths import StudyPaths
    from consistency.config.reading import find_study, load_study

    args.study_file, args.study = find_study(args.study), load_study(args.study)
    student, seed = getattr(args, "student", None), getattr(args, "seed", None)
    if student is not None and seed is not None:
        args.study.require(student, seed)
    elif (student, seed) != (None, None):
        raise UserError("--student and --seed go together: give both for a student, neither for the teacher")
    args.job = Job(args.study, StudyPaths(args.study.name, args.results, args.state), student, seed)


def _terminated(signum: int, frame: FrameType | None) -> None:
    """Exit on SIGTERM as on an error, so that temporary files are removed; a training saves its state instead."""
    sys.exit(128 + signum)


def _too_late(signum: int, frame: FrameType | None) -> None:
    """Exit at the time limit where there is no state to save: none yet, or none ever for verbs that do not resume."""
    message = "the time limit was reached before the first state was saved; increase `runtime` for this rule"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _shares(args: Arguments) -> tuple[int, int]:
    """Check the options of a computing verb. Returns the processes per node and the number of nodes."""
    for option in ("threads", "time_limit", "nodes", "job_minutes"):
        if getattr(args, option, None) is not None and getattr(args, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} must be positive, got {getattr(args, option):g}")
    nodes = getattr(args, "nodes", 1)
    return launch.per_node(getattr(args, "processes", 1), nodes, getattr(args, "gres", "")), nodes


def _asked_gpu(args: Arguments) -> str:
    """Return the option or variable that asks for a GPU, '' for none."""
    given, visible = vars(args), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    asks = {
        f"--processes {given.get('processes')}": given.get("processes", 0),
        f"--gpu {given.get('gpu')}": given.get("gpu", 0),
        f"--gres {given.get('gres')}": launch.gpus_of_gres(given.get("gres", "")),
        f"CUDA_VISIBLE_DEVICES={visible}": len(launch.visible_gpus()) if visible else 0,
    }
    return next((asked for asked, count in asks.items() if count > 0), "")


def _prepare(args: Arguments, asked: str) -> None:
    """Set up the device and threads, one by default: the number of threads affects the last bit of a result."""
    limits = [args.time_limit, None if _job_minutes(args) is None else slurm_job.working_minutes(args.job_minutes)]
    if minutes := min((limit for limit in limits if limit is not None), default=None):
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

    import torch

    from consistency.runtime.distributed import join
    from consistency.runtime.machine import Machine, described, limit_threads, pick_device

    limit_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # float32 excludes TF32, except for LPIPS beside lower-precision networks, where it is a third of the step's time.
    low = args.verb == "student" and args.job.settings.precision != "float32"
    torch.backends.cudnn.allow_tf32 = low
    if launch.is_worker() and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks, args.device = join(pick_device(args.device, asked))
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    if ranks.first:
        print(f"device: {described(args.device)}", file=sys.stderr, flush=True)
    args.ranks, args.machine = ranks, Machine(args.device, ranks)


if __name__ == "__main__":
    sys.exit(main())
