"""A real Slurm of two nodes on this machine, in a folder of its own, beside whatever Slurm the machine may have.

Nothing in /etc or /run is touched: the daemons are told of the folder's slurm.conf, and so are the commands, by
wrappers on PATH. SLURM_CONF alone would not do: the job step plugin of Snakemake strips it before it calls srun.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.processes import ROOT, environment, free_port, start_in, wait_until
from tests.tracking.debian import needs_debian

NODES = ("one", "two")
#: the programs that a cluster needs, and the packages they are in
DAEMONS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd"}
COMMANDS = ("sbatch", "srun", "scancel", "squeue", "scontrol", "sinfo", "sacct", "sacctmgr")
#: a device file for each of a node's GPUs: Slurm drops a GPU without one
GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
#: jobs that are gone from a node for so many seconds start again there; 120 by default
REQUEUED_AFTER = 5

# OverTimeLimit: Slurm lets a job of a minute be, where that passes before the job has begun; it is to end by itself.
SETTINGS = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeued_after}
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
KillWait=20
OverTimeLimit=10
MinJobAge=7200
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=7-0
PartitionName=gpu Nodes=ALL MaxTime=7-0
PartitionName=short Nodes=ALL MaxTime=2
"""


@dataclass
class Cluster:
    """Two nodes with four GPUs each, and the partitions cpu, gpu and short (two minutes). Use it as a context."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="consistency-slurm-", dir="/tmp")))
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Cluster":
        words = [sys.executable, "-m", "tests.workflow.slurm.cluster", str(self.folder)]
        self.guard = subprocess.Popen(words, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._configure()
            self._start("munged", *self._munge())
            wait_until((self.folder / "munge.socket").exists, "munge")
            self.start("slurmctld")
            for node in NODES:
                self.start(node)
            wait_until(lambda: self.idle() == set(NODES), "idle nodes", 60)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """The PATH on which the commands speak with this cluster."""
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(self, name: str) -> None:
        """Start slurmctld or the slurmd of a node, once more too: it goes on from its saved state."""
        program = ["slurmctld", "-D"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        self._start(name, *program)

    def stop(self, name: str) -> None:
        """Stop a daemon. The jobs of a stopped slurmd go on."""
        process = self.processes.pop(name)
        process.terminate()
        process.wait(60)

    def ask(self, *words: str) -> str:
        """Ask one of Slurm's commands. Returns what it says."""
        done = subprocess.run(
            [str(self.folder / "bin" / words[0]), *words[1:]], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def answers(self) -> bool:
        """Tell whether the controller is there."""
        with suppress(subprocess.CalledProcessError):
            return "UP" in self.ask("scontrol", "ping")
        return False

    def idle(self) -> set[str]:
        """The nodes on which nothing runs."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %T").splitlines()
        return {node for node, state in map(str.split, lines) if state == "idle"}

    def jobs(self) -> list[dict[str, str]]:
        """The fields that `scontrol show job` has of all that ran in the last two hours, oldest first."""
        lines = self.ask("scontrol", "--oneliner", "show", "job").splitlines()
        fields = [dict(re.findall(r"(\S+?)=(.*?) *(?= \S+=|$)", line)) for line in lines]
        return sorted((job for job in fields if "JobId" in job), key=lambda job: int(job["JobId"]))

    def queued(self) -> list[str]:
        """The jobs that wait or run."""
        return self.ask("squeue", "--noheader", "--format=%i %T %k").splitlines()

    @contextmanager
    def drained(self, node: str) -> Iterator[None]:
        """Let no job start on a node, within the block."""
        self.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=a test")
        try:
            yield
        finally:
            self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def close(self) -> None:
        """Cancel every job and stop every daemon; the guard does the rest."""
        try:
            if set(NODES) <= set(self.processes):
                self.ask("scancel", "--user=root")
                wait_until(lambda: not self.queued(), "the end of cancelled jobs", 60)
            for name in reversed(list(self.processes)):
                self.stop(name)
        finally:
            assert self.guard is not None and self.guard.stdin is not None
            self.guard.stdin.close()
            self.guard.wait(60)

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        nodes = [
            f"NodeName={node} NodeHostname={os.uname().nodename} NodeAddr=127.0.0.1 Port={free_port()} CPUs=16 "
            f"RealMemory=200000 Gres=gpu:{len(GPUS)}"
            for node in NODES
        ]
        settings = {"folder": self.folder, "host": os.uname().nodename, "requeued_after": REQUEUED_AFTER}
        text = SETTINGS.format(**settings, controller=free_port(), nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        devices = [f"NodeName={','.join(NODES)} Name=gpu File={device}" for device in GPUS]
        (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *devices, ""]))
        (self.folder / "bin").mkdir()
        for command in COMMANDS:
            wrapper = self.folder / "bin" / command
            program = needs_debian("slurm-client", command)
            wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {program} "$@"\n')
            wrapper.chmod(0o755)

    def _munge(self) -> list[str]:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        return ["munged", "--foreground", "--force", f"--key-file={key}", *options]

    def _start(self, name: str, program: str, *words: str) -> None:
        # In a group of its own: a Ctrl-C at the tests is not meant for it, which is needed to end the jobs.
        command = [needs_debian(DAEMONS[program], program), *words]
        variables = environment(SLURM_CONF=str(self.folder / "slurm.conf"))
        self.processes[name] = start_in(self.folder, command, variables, Path(os.devnull))


def guard(folder: Path) -> None:
    """Wait for the end of the tests that started this, even by kill -9; then end what is left of their cluster, and
    remove its folder. Daemons, jobs and Snakemakes all have its path in their environment."""
    sys.stdin.read()
    while left := [each for each in psutil.process_iter(["environ"]) if f"{folder}/" in str(each.info["environ"])]:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
