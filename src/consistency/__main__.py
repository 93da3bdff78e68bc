"""The verbs: `python -m consistency <verb> --study config/studies/digits.yaml`, one a stage, and a few to look."""

import argparse
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from consistency import __version__, energy, launch, slurm_job
from consistency.errors import UserError
from consistency.layout import Layout
from consistency.supervision import SUPERVISOR, watch_supervisor

# torch, mlflow and matplotlib are imported inside the verbs that use them: --help must not wait for them.
Arguments = argparse.Namespace


def _dataset(args: Arguments) -> None:
    """images to one memory-mapped array"""
    from consistency.stages.dataset import make_dataset

    make_dataset(args.study, args.layout, args.threads)


def _teacher(args: Arguments) -> None:
    """train the EDM denoiser (resumes)"""
    from consistency.stages.teacher import make_teacher

    make_teacher(args.study, args.layout, args.machine)


def _coefficients(args: Arguments) -> None:
    """fit l_t and s_t from the teacher"""
    from consistency.stages.coefficients import make_coefficients

    make_coefficients(args.study, args.layout, args.device)


def _student(args: Arguments) -> None:
    """distil one student (resumes)"""
    from consistency.stages.student import make_student

    make_student(args.study, args.layout, args.run, args.seed, args.machine)


def _samples(args: Arguments) -> None:
    """draw images of a student, or of the teacher without --run"""
    from consistency.stages.samples import make_samples

    make_samples(args.study, args.layout, args.run, args.seed, args.device, args.machine.ranks)


def _extractor(args: Arguments) -> None:
    """train the classifier (or open Inception) and extract the data's features"""
    from consistency.stages.extractor import make_extractor

    make_extractor(args.study, args.layout, args.device)


def _calibration(args: Arguments) -> None:
    """score data against data and the teacher against data"""
    from consistency.stages.scores import make_calibration

    make_calibration(args.study, args.layout, args.device)


def _scores(args: Arguments) -> None:
    """score one student"""
    from consistency.stages.scores import make_scores

    make_scores(args.study, args.layout, args.run, args.seed, args.device)


def _flows(args: Arguments) -> None:
    """measure what the couplings of consistency training do to the flow"""
    from consistency.stages.flows import make_flows

    make_flows(args.study, args.layout, args.machine)


def _report(args: Arguments) -> None:
    """tables, figures and report.html"""
    from consistency.stages.report import make_report

    make_report(args.study, args.layout)


def _track(args: Arguments) -> None:
    """upload the results to MLflow (idempotent)"""
    from consistency.tracking.upload import track_study

    track_study(args.study, args.layout)


def _plan(args: Arguments) -> None:
    """write what DVC compares before it runs a stage"""
    from consistency.plan import write_plan

    write_plan(args.study, args.layout)


def _inputs(args: Arguments) -> None:
    """write what students and flows read of other results, for DVC"""
    from consistency.plan import write_inputs

    write_inputs(args.study, args.layout, args.of, args.run, args.seed)


def _reproduce(args: Arguments) -> None:
    """let Snakemake make some files by some rules, for DVC (goes on after a killed run)"""
    from consistency.plan import check_order
    from consistency.workflow import run_rules

    if args.run is not None:
        check_order(args.study)
    sys.exit(run_rules(args.study.name, args.rules, args.targets, args.run))


def _summary(args: Arguments) -> None:
    """print the score table and where the report is"""
    from consistency.stages.report import print_summary

    print_summary(args.study, args.layout)


def _estimate(args: Arguments) -> None:
    """what the whole study costs: operations, GPU-hours, days, disk"""
    from consistency.stages.estimate import print_estimate

    print_estimate(args.study, args.layout, args.tflops, args.gpus)


def _archive(args: Arguments) -> None:
    """pack a finished study into one checksummed file"""
    from consistency.archive import make_archive

    make_archive(args.study, args.layout, args.study_file, args.archives, args.snapshots)


def _check(args: Arguments) -> None:
    """check a study and print it with every default written out"""
    import yaml

    print(yaml.safe_dump(args.study.model_dump(mode="json"), sort_keys=False).rstrip())
    for run in args.study.students:
        print(f"# {run}: {args.study.resolved(run).model_dump(mode='json')}")


# verb: (function, whether it uses the device, how it takes --run and --seed)
_VERBS: dict[str, tuple[Callable[[Arguments], None], bool, str]] = {
    "check": (_check, False, "none"),
    "estimate": (_estimate, False, "none"),
    "dataset": (_dataset, False, "none"),
    "teacher": (_teacher, True, "none"),
    "coefficients": (_coefficients, True, "none"),
    "student": (_student, True, "required"),
    "samples": (_samples, True, "optional"),
    "extractor": (_extractor, True, "none"),
    "calibration": (_calibration, True, "none"),
    "scores": (_scores, True, "required"),
    "flows": (_flows, True, "none"),
    "report": (_report, False, "none"),
    "track": (_track, False, "none"),
    "summary": (_summary, False, "none"),
    "archive": (_archive, False, "none"),
    "plan": (_plan, False, "none"),
    "inputs": (_inputs, False, "optional"),
    "reproduce": (_reproduce, False, "optional"),
}

# The exit code of a verb whose time was over and whose state is saved.
_OUT_OF_TIME = 128 + signal.SIGALRM
# The verbs whose work several processes can share, and those that save what they have done and can go on later.
_SHARED = ("teacher", "student", "samples")
_RESUMED = (*_SHARED, "flows")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("consistency", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (function, computes, student) in _VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        verb.set_defaults(function=function, computes=computes)
        verb.add_argument("--study", required=True, metavar="FILE", help="the study, config/studies/NAME.yaml")
        verb.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        verb.add_argument("--state", type=Path, default=Path("state"), metavar="DIR", help="default: state")
        if name == "inputs":
            verb.add_argument("--of", choices=["coefficients", "predictor", "flows"], help="default: all")
        if name == "reproduce":
            verb.add_argument("--rules", nargs="+", required=True, metavar="RULE", help="of workflow/rules")
            verb.add_argument("targets", nargs="+", metavar="FILE", help="what they are to make")
        if name == "archive":
            verb.add_argument(
                "--archives", type=Path, default=Path("archives"), metavar="DIR", help="default: archives"
            )
            verb.add_argument("--snapshots", action="store_true", help="with the snapshots of the students too")
        if name == "dataset":
            verb.add_argument("--threads", type=int, default=1, help="processes that read images (default: 1)")
        if computes:
            verb.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
            verb.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
            verb.add_argument("--time-limit", type=float, metavar="MINUTES", help="save, stop and exit with 142 then")
        if name in _SHARED:
            verb.add_argument("--processes", type=int, default=1, help="by torchrun, a GPU each; 0 and 1: none")
            verb.add_argument("--nodes", type=int, default=1, help="of the Slurm job, to share the processes evenly")
            verb.add_argument("--gres", default="", help="gpu:4 or gpu:a100:4: the processes of each node, instead")
        if name in _RESUMED:
            verb.add_argument(
                "--job-minutes",
                type=float,
                metavar="MINUTES",
                help="the Slurm job's time limit: save before it, and ask Slurm to go on later (elsewhere: nothing)",
            )
        if name == "estimate":
            verb.add_argument("--tflops", type=float, default=100.0, help="sustained TFLOP/s a GPU (default: 100)")
            verb.add_argument("--gpus", type=_positive, nargs="+", default=[8, 64], help="for how many (default: 8 64)")
        if student != "none":
            verb.add_argument("--run", required=student == "required", metavar="NAME", help="the student")
            verb.add_argument("--seed", type=int, required=student == "required", help="its seed")
    jobs = verbs.add_parser("jobs", help=_jobs.__doc__, description=_jobs.__doc__)
    jobs.set_defaults(function=_jobs, computes=False, study=None)
    validate = verbs.add_parser("validate", help=_validate.__doc__, description=_validate.__doc__)
    validate.set_defaults(function=_validate, computes=False, study=None)
    schema = verbs.add_parser("schema", help=_schema.__doc__, description=_schema.__doc__)
    schema.set_defaults(function=_schema, computes=False, study=None)
    fetch = verbs.add_parser("fetch", help=_fetch.__doc__, description=_fetch.__doc__)
    fetch.set_defaults(function=_fetch, computes=False, study=None)
    fetch.add_argument("names", nargs="*", metavar="NAME", help="a file of config/resources.yaml")
    follow = verbs.add_parser("follow", help=_follow.__doc__, description=_follow.__doc__)
    follow.set_defaults(function=_follow, computes=False, study=None)
    follow.add_argument("training", help="its name, for those who look at the processes")
    verify = verbs.add_parser("verify", help=_verify.__doc__, description=_verify.__doc__)
    verify.set_defaults(function=_verify, computes=False, study=None)
    verify.add_argument("path", type=Path, metavar="PATH", help="results/NAME, or an archive")
    verify.add_argument("--study", dest="against", metavar="FILE", help="compare with the settings of this study too")
    unpack = verbs.add_parser("unpack", help=_unpack.__doc__, description=_unpack.__doc__)
    unpack.set_defaults(function=_unpack, computes=False, study=None)
    unpack.add_argument("archive", type=Path, metavar="FILE", help="what `archive` made")
    unpack.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    return parser


def _jobs(args: Arguments) -> None:
    """list the jobs of this folder in Slurm's queue"""
    from consistency.cluster import print_jobs

    print_jobs(Path.cwd())


def _positive(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _validate(args: Arguments) -> None:
    """hold this machine against the closed-form oracles of the method"""
    from consistency.stages.validate import validate

    validate()


def _schema(args: Arguments) -> None:
    """write the JSON schema and the field reference of a study"""
    from consistency.schema import write_schema

    write_schema()


def _fetch(args: Arguments) -> None:
    """download files into resources/ and check their sha256; without a name, list which are there"""
    from consistency.resources import fetch, find, print_states

    for name in args.names:
        find(name)
    for name in args.names:
        fetch(name)
    if not args.names:
        print_states()


def _verify(args: Arguments) -> None:
    """say of each artifact whether it is consistent with its card and its parents, stale or tampered with"""
    from consistency.archive import verify
    from consistency.study import load_study
    from consistency.verification import print_findings, require_consistent

    findings = verify(args.path, load_study(args.against) if args.against else None)
    print_findings(findings)
    require_consistent(str(args.path), findings)


def _unpack(args: Arguments) -> None:
    """check an archive and put its results where the workflow expects them"""
    from consistency.archive import unpack

    folder = unpack(args.archive, args.results)
    print(f"{folder}: open {folder / 'report/report.html'}; `python -m consistency verify {folder}` checks it any time")


def _follow(args: Arguments) -> None:
    """send a training's new points to MLflow while it goes on (a training starts this)"""
    from consistency.tracking.follow import follow

    follow(sys.stdin)


def main(words: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 2 for a mistake the user can mend, 128 + signal when interrupted."""
    args = _parser().parse_args(words)
    args.words = sys.argv[1:] if words is None else words
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGALRM, _too_late)
    watch_supervisor()
    if launch.is_worker():
        return _as_worker(args)
    if SUPERVISOR in os.environ and not launch.is_task():
        # The first line of a log.
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}{slurm_job.header()}", flush=True)
    code = _run(args)
    if code == _OUT_OF_TIME and _job_minutes(args) and not launch.is_task():
        _ask_for_more(code)
    return code


def _job_minutes(args: Arguments) -> float | None:
    """The time limit of the Slurm job, for a verb that can go on later."""
    return getattr(args, "job_minutes", None) if slurm_job.in_job() else None


def _ask_for_more(code: int) -> None:
    # Slurm ends this process too, while it leaves by itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    refused = slurm_job.requeue()
    if refused:
        print(f"Slurm does not start this job again by itself ({refused}): its exit code is {code}", file=sys.stderr)
    else:
        print("the job's time is over: Slurm starts it again when there is room, and it goes on", flush=True)


def _as_worker(args: Arguments) -> int:
    """The verb in one of several processes. One that fails ends at once: leaving the group would wait for the others,
    which wait for it; torchrun then stops them."""
    code: int | str | None = 1
    try:
        code = _run(args)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        traceback.print_exc()
    if code == 0:
        from consistency.training.distributed import leave

        leave()
        return 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _run(args: Arguments) -> int:
    """Run the verb; every error that is foreseen becomes one line and an exit code."""
    try:
        if args.study is not None:
            from consistency.study import load_study

            args.study_file, args.study = Path(args.study), load_study(args.study)
            args.layout = Layout(args.study.name, args.results, args.state)
            _require_student(args)
        if args.computes:
            processes, nodes = _shares(args)
            if nodes > 1 and not launch.is_task():
                return launch.run_on_nodes(nodes, args.words)
            _claim(args, processes)
            if (processes > 1 or nodes > 1) and not launch.is_worker():
                return launch.run_processes(processes, args.words)
            _prepare(args)
        with energy.metering(_gpus(args)):
            args.function(args)
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
        # Interrupted lives beside torch, which is not imported for the error of a verb that never used it.
        signum = getattr(error, "signum", None)
        if signum is None:
            raise
        print(f"{error}{launch.whose()}", file=sys.stderr)
        return 128 + int(signum)
    return 0


def _gpus(args: Arguments) -> list[str]:
    """The GPUs that the verb computes on; of several processes, each counts those of all."""
    if not args.computes or args.device.type != "cuda":
        return []
    return energy.gpu_uuids(None if launch.is_worker() else args.device.index)


def _require_student(args: Arguments) -> None:
    """--run and --seed go together, and are the study's."""
    run, seed = getattr(args, "run", None), getattr(args, "seed", None)
    if (run is None) != (seed is None):
        raise UserError("--run and --seed go together: give both for a student, neither for the teacher")
    if run is not None:
        args.study.require(run, seed)


def _terminated(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like any error, so that temporary files are removed; a training saves its state instead."""
    sys.exit(128 + signum)


def _too_late(signum: int, frame: FrameType | None) -> None:
    """The time is over and there is nothing to save: yet, or at all in a verb that does not train or draw."""
    print("error: the time was over before there was anything to go on from: give the job more", file=sys.stderr)
    sys.exit(2)


def _shares(args: Arguments) -> tuple[int, int]:
    """Check the options of computing verbs. Returns the processes of a node, and the nodes."""
    for option in ("threads", "time_limit", "nodes", "job_minutes"):
        if getattr(args, option, None) is not None and getattr(args, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} must be positive, got {getattr(args, option):g}")
    nodes = getattr(args, "nodes", 1)
    processes = max(getattr(args, "processes", 1), 1)
    if processes > 1 and processes % nodes:
        raise UserError(f"--processes {processes} cannot be shared evenly by --nodes {nodes}")
    return max(processes // nodes, launch.gpus_of_gres(getattr(args, "gres", "")), 1), nodes


def _claim(args: Arguments, processes: int) -> None:
    """Take the GPUs of this node's processes; a worker's are its node's."""
    if args.device in ("auto", "cuda") and not launch.is_worker():
        launch.claim_gpus(processes)


def _prepare(args: Arguments) -> None:
    """Device and threads. One thread by default: the number of threads is part of what decides the last bit."""
    limits = [args.time_limit, None if _job_minutes(args) is None else slurm_job.working_minutes(args.job_minutes)]
    if minutes := min((limit for limit in limits if limit is not None), default=None):
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

    import torch

    from consistency.stages.inputs import pick_device
    from consistency.stages.trainer import Machine
    from consistency.training.distributed import join

    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # float32 means float32, but for LPIPS beside networks in lower precision, where TF32 is a third of the step's time.
    low = args.verb == "student" and args.study.resolved(args.run).precision != "float32"
    torch.backends.cudnn.allow_tf32 = low
    if launch.is_worker() and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks, args.device = join(pick_device(args.device))
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    args.machine = Machine(args.device, ranks)


if __name__ == "__main__":
    sys.exit(main())
