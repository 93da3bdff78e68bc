"""The verb doctor: right and wrong on this machine, on one screen, without a credential."""

import fcntl
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import psutil

from consistency.base.errors import UserError, user_error
from consistency.base.urls import masked
from consistency.data.resources import registry, state_of
from consistency.provenance.environment import find_commit
from consistency.runtime.cluster import partition_limits
from consistency.runtime.snakemake import AT_WORK, LOCKS
from consistency.tracking.server import sqlite_file, tracking_uri, without_secrets

#: "ok", "note" or "wrong", and a fact, which says for "wrong" what to change
Finding = tuple[str, str]

_PATIENCE = 3.0  # seconds for a server, and for the digests of the downloads
_ROOM = 1.0  # GiB below which a disk is too full
_LOCK = Path("requirements.lock")


def doctor() -> None:
    """Print the findings. Raises UserError if something is wrong."""
    wrong = 0
    for name, check in CHECKS.items():
        for status, fact in _found(check):
            clear = without_secrets(" ".join(fact.split()), os.environ.get("MLFLOW_TRACKING_URI", ""))
            print(f"{status:6}{name:10} {clear}", flush=True)
            wrong += status == "wrong"
    if wrong:
        raise UserError(f"{wrong} wrong: each line above that begins with `wrong` says what to change")


def _found(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield a check's findings, the last of them the error that ended it, if one did."""
    try:
        yield from check()
    except UserError as error:
        yield "wrong", str(error)
    except Exception as error:  # whatever is wrong here, the other checks are made too
        yield "wrong", f"{user_error(error)} ({type(error).__name__}): correct that, or install {_LOCK} again"


def _python() -> Iterator[Finding]:
    yield "ok", f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    if not _LOCK.is_file():
        yield "note", f"no {_LOCK} here: the packages are not compared"
        return
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    there = {canonicalize_name(each.name): each.version for each in distributions()}
    text = _LOCK.read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^([A-Za-z0-9][^\s;]*==[^\s;]+(?: ; [^\\\n]+)?)", text)
    asked = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()]
    found = [
        (f"{each.name}{each.specifier}", each.specifier, there.get(canonicalize_name(each.name), "")) for each in asked
    ]
    others = [f"{name} (here {here or 'missing'})" for name, wanted, here in found if not here or here not in wanted]
    if others:
        few = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        yield "wrong", f"{len(others)} packages are not those of {_LOCK}: {few}; run `uv pip sync {_LOCK}`"
    else:
        yield "ok", f"the {len(asked)} packages of {_LOCK}"


def _gpu() -> Iterator[Finding]:
    import torch

    from consistency.runtime.machine import pick_device

    built = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone")
    driver, names = _nvidia()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    said = f"{built}; " + (f"driver {driver}: {', '.join(names)}" if driver else "no driver of NVIDIA's")
    said += "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible}"
    if torch.cuda.is_available():
        yield "ok", said
    elif visible is not None and not visible.strip("-1 "):
        yield "note", f"{said} hides every GPU: the CPU is used"
    elif names or any(Path("/dev").glob("nvidia[0-9]*")):
        try:
            pick_device("cuda")
        except UserError as error:
            said += f"; {error}"
        yield "wrong", f"{said}: mend the driver, or install the torch of {_LOCK} (docs/cluster.md)"
    else:
        yield "note", f"{said}: the CPU is used"


def _nvidia() -> tuple[str, list[str]]:
    """Return the driver's version and the names of its GPUs, '' and none without one."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return str(pynvml.nvmlSystemGetDriverVersion()), [str(pynvml.nvmlDeviceGetName(each)) for each in handles]
    return "", []


def _cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [words.split() for words in _cgroup("cpu.max")]
    quota = min((int(most) / int(period) for most, period in limits if most != "max"), default=cores)
    said = f"{cores} of {os.cpu_count()} cores may be used"
    less = f", but a quota allows {quota:.1f}: give make and snakemake {max(int(quota), 1)} cores"
    yield ("note", said + less) if quota < cores else ("ok", said)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    limits = [int(words) for words in _cgroup("memory.max", "memory.limit_in_bytes") if words.strip().isdigit()]
    limit = min([memory.total, *limits])
    less = f"; a limit allows {limit / 2**30:.1f}" if limit < memory.total else ""
    yield "ok", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free{less}"


def _cgroup(*names: str) -> Iterator[str]:
    """Yield the contents of these files in the control groups of this process and in those around them."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            own = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            for file in (folder / name for folder in (own, *own.parents) for name in names):
                with suppress(OSError):
                    yield file.read_text(encoding="utf-8")


def _disk() -> Iterator[Finding]:
    places = {"this folder": ".", "results": "results", "state": "state", "home": os.path.expanduser("~")}
    seen = set[Path]()
    for name, path in (places | {"temporary": tempfile.gettempdir(), "shared memory": "/dev/shm"}).items():
        shared = name == "shared memory"  # only several GPUs need it
        try:
            whole = Path(path).resolve(strict=shared or Path(path).is_symlink())
            place = next(each for each in (whole, *whole.parents) if each.exists())
            if place in seen:
                continue
            seen.add(place)
            free = shutil.disk_usage(place).free / 2**30
            if name != "home":  # a node's may be read-only
                with tempfile.TemporaryFile(dir=place) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told, advice = f"{name}: {place}, {free:.1f} GiB free", "make room (a container: --shm-size)"
            failed = free < _ROOM
        except OSError as error:
            told, failed = f"{name}: {Path(path).absolute()} cannot be written or locked ({error.strerror})", True
            advice = "mend that, or work on a disk that has file locks"
        yield ("note" if shared else "wrong", f"{told}: {advice}") if failed else ("ok", told)


def _git() -> Iterator[Finding]:
    state, reason = find_commit()
    if reason:
        yield "note", f"results will name no commit of the code: {reason}"
    else:
        yield "ok", f"{state['commit']}{', and changes that it does not have' if state['dirty'] else ''}"


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield "note", "no sbatch on the PATH: this machine submits no jobs"
    else:
        yield "ok", f"partitions {', '.join(partition_limits(_PATIENCE))}"


def _mlflow() -> Iterator[Finding]:
    uri = tracking_uri()
    where = masked(uri)
    try:
        if uri.startswith("http"):
            from requests import get

            get(f"{uri.rstrip('/')}/health", timeout=_PATIENCE).raise_for_status()
        elif not uri.startswith("sqlite:"):
            from sqlalchemy import create_engine

            os.environ.setdefault("PGCONNECT_TIMEOUT", f"{_PATIENCE:.0f}")
            create_engine(uri).connect().close()
        elif not (file := sqlite_file(uri)).exists():
            yield "note", f"{where} is not there yet: the first run makes it"
            return
        else:
            sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_PATIENCE).execute("PRAGMA schema_version")
        yield "ok", f"{where} answers"
    except Exception as error:  # of any of these libraries
        reason = without_secrets(" ".join(str(error).split()), uri)[:200]
        yield "wrong", f"{where} cannot be used ({reason}): start it, or set MLFLOW_TRACKING_URI to another"


def _dvc() -> Iterator[Finding]:
    from dvc.config import Config

    known = Config(str(Path(".dvc").absolute())) if Path(".dvc").is_dir() else {"remote": {}}
    for name, remote in known["remote"].items():
        yield "ok", f"remote {name}: {masked(str(remote['url']))}"
    if not known["remote"]:
        yield "note", "no remote here (docs/dvc.md): `make pull` and `dvc push` have none to use"
    elif (default := known["core"].get("remote")) not in known["remote"]:
        yield "note", f"the default remote is {default or 'not set'}: run `dvc remote default NAME`"


def _resources() -> Iterator[Finding]:
    until, right, absent, unread = time.monotonic() + _PATIENCE, list[str](), list[str](), list[str]()
    for name in registry():
        late = time.monotonic() > until
        state = "unread" if late else state_of(name)
        if state.startswith("damaged"):
            yield "wrong", f"resources/{name} is {state}: run `python -m consistency fetch {name}`"
        else:
            {"missing": absent, "unread": unread}.get(state, right).append(name)
    yield "ok", f"{len(right)} files of resources/ are right: {', '.join(right)}" if right else "none is wrong"
    if absent:
        yield "note", f"{len(absent)} files are missing: the studies that need them fetch them"
    if unread:
        yield "note", f"{len(unread)} files were not read, to save time: `python -m consistency fetch` lists them"


def _runs() -> Iterator[Finding]:
    with suppress(FileNotFoundError), AT_WORK.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield "note", "Snakemake is at work in this folder"
            return
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        yield "note", "a run was killed: `make` resumes it; for snakemake run `snakemake --unlock` first"
    else:
        yield "ok", "no Snakemake at work here, and no lock of one"


_ALL = (_python, _gpu, _cores, _memory, _disk, _git, _slurm, _mlflow, _dvc, _resources, _runs)
CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {each.__name__[1:]: each for each in _ALL}
