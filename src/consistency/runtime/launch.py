"""GPUs and processes of a verb: free GPUs of this machine, and a process for each, on one or more nodes."""

import fcntl
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import IO

from consistency.base.errors import UserError
from consistency.runtime import slurm_job

#: set for the task of each node to "nodes host:port": the number of nodes and the rendezvous address
_RENDEZVOUS = "CONSISTENCY_RENDEZVOUS"
#: seconds that torchrun gives its processes to save before it kills them
_TO_SAVE = 600
_POLL = 1.0  # seconds
# Locks of this process's GPUs, held while it, or a process that it became or started, is alive.
_held: list[IO[str]] = []


def is_worker() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_task() -> bool:
    """Tell whether this process is one node's task of a multi-node job."""
    return _RENDEZVOUS in os.environ


def gpus_of_gres(gres: str) -> int:
    """Return the GPUs per node that a request such as gpu:4 or gpu:a100:4 names; 0 if it names none."""
    found = re.fullmatch(r"gpu(?::[A-Za-z]\w*)?(?::(\d+))?", gres)
    return int(found[1] or 1) if found else 0


def whose() -> str:
    """Return ' (process k)' for the messages of every process of a training but the first, else ''."""
    rank = os.environ.get("RANK", "0") if is_worker() else "0"
    return "" if rank == "0" else f" (process {rank})"


def claim_gpus(count: int) -> None:
    """Claim that many GPUs that no other job of ours on this machine holds, waiting for them if need be, and let CUDA
    see only those.

    Does nothing on a machine without GPUs. Under Slurm the GPUs of CUDA_VISIBLE_DEVICES already belong to the job.
    Raises UserError if there are fewer than count.
    """
    gpus = visible_gpus()
    if not gpus:
        return
    if len(gpus) < count:
        raise UserError(f"--processes {count} needs {count} GPUs, this job sees {len(gpus)} ({', '.join(gpus)})")
    mine = gpus[:count] if slurm_job.in_job() else _free(gpus, count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)


def visible_gpus() -> list[str]:
    """Return CUDA's names of the GPUs: those in CUDA_VISIBLE_DEVICES, else all of the machine. CUDA is not started,
    which would fix the devices that this process sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(k) for k, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _free(gpus: Sequence[str], count: int) -> list[str]:
    """Lock count of the GPUs, in order; wait until that many are free."""
    folder = Path(tempfile.gettempdir()) / f"consistency-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    told = False
    while True:
        free = ((name, lock) for name in gpus if (lock := _try_lock(folder / f"{name}.lock")))
        locks = dict(islice(free, count))
        if len(locks) == count:
            for lock in locks.values():
                os.set_inheritable(lock.fileno(), True)
            _held.extend(locks.values())
            return list(locks)
        # Holding some while waiting for others could deadlock two jobs.
        for lock in locks.values():
            lock.close()
        if not told:
            print(f"waiting for {count} of {len(gpus)} GPUs: other jobs hold {len(gpus) - len(locks)}", flush=True)
            told = True
        time.sleep(_POLL)


def _try_lock(path: Path) -> IO[str] | None:
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def run_on_nodes(nodes: int, words: Sequence[str]) -> int:
    """Run the same verb once on each node of this Slurm job with srun, and return its exit code. Signals that ask to
    save and exit are forwarded, and srun is waited for."""
    if not slurm_job.in_job():
        raise UserError(f"--nodes {nodes} needs a Slurm job of {nodes} nodes")
    # All tasks exit together with one code; a task left alone is killed, but only after the time needed to save.
    patience = ["--kill-on-bad-exit=0", f"--wait={_TO_SAVE}"]
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", *patience]
    command += ["--export=ALL", sys.executable, "-m", "consistency", *words]
    with socket.create_server(("", 0)) as unused:
        port = unused.getsockname()[1]
    # The other nodes must be able to reach the first node's process under this name.
    meeting = {_RENDEZVOUS: f"{nodes} {platform.node()}:{port}"}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **meeting})
    except FileNotFoundError:
        raise UserError(f"--nodes {nodes} needs Slurm's srun on the PATH") from None
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: process.send_signal(signum))
    return process.wait()


def run_processes(processes: int, words: Sequence[str]) -> int:
    """Run the same verb in that many processes on this node with torchrun, and return the exit code of the first
    failure. The processes of all nodes of a job form one group. torchrun forwards signals that ask to save and exit,
    and waits for the processes."""
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The processes report their own errors; torchrun would add a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting = ["--standalone"]
    if is_task():
        # The rendezvous of the processes of all nodes.
        nodes, endpoint = os.environ[_RENDEZVOUS].split()
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        meeting += [f"--rdzv-id={slurm_job.number()}"]
    options = [*meeting, f"--nproc-per-node={processes}", f"--shutdown-timeout={_TO_SAVE}"]
    options += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1"]
    try:
        # After the dashes torchrun does not parse our options.
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
