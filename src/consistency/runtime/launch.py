"""GPUs and processes of a verb: it claims free GPUs and starts one process per GPU, on one or more nodes."""

import fcntl
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from stat import S_IWOTH

from consistency.base.errors import UserError
from consistency.runtime import slurm_job
from consistency.runtime.stopping import heeded

#: set for each node's task to "nodes host:port": the number of nodes and the rendezvous address
_RENDEZVOUS = "CONSISTENCY_RENDEZVOUS"
#: seconds to save before torchrun kills a process
_TO_SAVE = 600
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_POLL = 1.0  # seconds
#: folder of the GPUs' locks: one place for all users, whatever their TMPDIR; /tmp is cleaned now and then
LOCKS = next((each for each in [Path("/run/lock")] if each.is_dir() and each.stat().st_mode & S_IWOTH), Path("/tmp"))
# Locks of the claimed GPUs, held while this process, or one that it started, is alive.
_held: list[int] = []


def is_worker() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_task() -> bool:
    """Tell whether this process is one node's task of a multi-node job."""
    return _RENDEZVOUS in os.environ


def gpus_of_gres(gres: str) -> int:
    """Return the GPUs per node of a request such as gpu:4 or gpu:a100:4; 0 if it names none."""
    found = re.fullmatch(r"gpu(?::[A-Za-z]\w*)?(?::(\d+))?", gres)
    return int(found[1] or 1) if found else 0


def per_node(processes: int, nodes: int, gres: str) -> int:
    """Return the processes of each node. Raises UserError if the nodes cannot share them evenly."""
    if processes > 1 and processes % nodes:
        raise UserError(f"--processes {processes} cannot be shared evenly by --nodes {nodes}")
    return max(processes // nodes, gpus_of_gres(gres), 1)


def whose() -> str:
    """Return ' (process k)' for messages of process k of a training, '' for the first."""
    rank = os.environ.get("RANK", "0") if is_worker() else "0"
    return "" if rank == "0" else f" (process {rank})"


def claim_gpus(count: int) -> None:
    """Claim GPUs that no other job of this project holds, whoever runs it on this machine, waiting if need be, and let
    CUDA see only those.

    Does nothing without GPUs. Those of a Slurm job that this process owns need no lock. Raises UserError if there are
    fewer than count, and if a lock of another user cannot be opened.
    """
    gpus = visible_gpus()
    if not gpus:
        return
    if len(gpus) < count:
        there = f"this job sees {len(gpus)} ({', '.join(gpus)})"
        raise UserError(f"--processes {count} needs {count} GPUs, {there}: lower it or request more GPUs")
    mine = gpus[:count] if slurm_job.owned() else _free(gpus, count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)


def visible_gpus() -> list[str]:
    """Return CUDA's names of the GPUs in CUDA_VISIBLE_DEVICES, or of all GPUs, without starting CUDA: that would fix
    the devices that this process sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(k) for k, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _free(gpus: Sequence[str], count: int) -> list[str]:
    """Wait until count of the GPUs are free, and lock them."""
    # Within cgroups every allocation counts its GPUs from 0; Slurm also tells their numbers on the machine.
    given = (os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS", "")).split(",")
    numbers = dict(zip(gpus, given if len(given) == len(gpus) and all(given) else gpus, strict=True))
    told = False
    while True:
        free = ((name, lock) for name in gpus if (lock := _try_lock(LOCKS / f"consistency-gpu-{numbers[name]}.lock")))
        locks = dict(islice(free, count))
        if len(locks) == count:
            for lock in locks.values():
                os.set_inheritable(lock, True)
            _held.extend(locks.values())
            return list(locks)
        # Two jobs that each hold some GPUs and wait for more would deadlock.
        for lock in locks.values():
            os.close(lock)
        if not told:
            print(f"waiting for {count} of {len(gpus)} GPUs: other jobs hold {len(gpus) - len(locks)}", flush=True)
            told = True
        time.sleep(_POLL)


def _try_lock(path: Path) -> int | None:
    """Lock a file, made for every user where it is missing; None if it is locked. Another user's is only read."""
    try:
        umask = os.umask(0)
        try:
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
        finally:
            os.umask(umask)
        lock = os.open(path, os.O_RDONLY)
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    except PermissionError:
        raise UserError(f"no permission to open {path}, the lock of a GPU: remove it, or ask its owner to") from None
    except OSError as error:
        raise UserError(f"cannot lock {path}, the lock of a GPU: {error.strerror}; mend that disk or mount") from None
    os.close(lock)
    return None


def run_on_nodes(nodes: int, words: Sequence[str]) -> int:
    """Run the same verb once on each node of this Slurm job with srun. Forwards the signals that ask to save and exit.
    Returns srun's exit code."""
    if not slurm_job.in_job():
        raise UserError(f"--nodes {nodes} needs a Slurm job of {nodes} nodes: run it in one, or without --nodes")
    # When a task fails, the others get the time to save before they are killed.
    patience = ["--kill-on-bad-exit=0", f"--wait={_TO_SAVE}"]
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", *patience]
    # Since 22.05 srun does not take --cpus-per-task over from sbatch, and binds a task that asks for none to one CPU.
    command.append(f"--cpus-per-task={cpus}" if (cpus := slurm_job.cpus_per_task()) else "--cpu-bind=none")
    command += ["--export=ALL", sys.executable, "-m", "consistency", *words]
    with socket.create_server(("", 0)) as unused:
        port = unused.getsockname()[1]
    # The other nodes must be able to reach this node by its name.
    meeting = {_RENDEZVOUS: f"{nodes} {platform.node()}:{port}"}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **meeting})
    except FileNotFoundError:
        raise UserError(f"--nodes {nodes} needs Slurm's srun: put it on the PATH") from None
    for signum in heeded(*_FORWARDED):
        signal.signal(signum, lambda signum, frame: process.send_signal(signum))
    return process.wait()


def run_processes(processes: int, words: Sequence[str]) -> int:
    """Run the same verb in that many processes on this node with torchrun, which forwards the signals that ask to save
    and exit. The processes of all nodes form one group. Returns the exit code of the first failure, or 0."""
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The processes report their errors; torchrun would add a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting = ["--standalone"]
    if is_task():
        nodes, endpoint = os.environ[_RENDEZVOUS].split()
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        meeting += [f"--rdzv-id={slurm_job.number()}"]
    options = [*meeting, f"--nproc-per-node={processes}", f"--shutdown-timeout={_TO_SAVE}"]
    options += [f"--signals-to-handle={','.join(each.name for each in heeded(*_FORWARDED))}"]
    try:
        # torchrun does not parse options after the dashes.
        torchrun.main([*options, "-m", "--", "consistency", *words])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
            return 128 - failure.exitcode
        return int(failure.exitcode)
    return 0
