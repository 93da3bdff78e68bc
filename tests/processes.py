"""Processes of the tests: what they inherit, how they are started, and how one waits for what they do."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = str(ROOT / "src")
OUTSIDE = ("CONSISTENCY_", "SNAKEMAKE_", "MLFLOW_", "PYTEST_", "SLURM_", "TORCHELASTIC_", "MAKE", "MFLAGS")
OUTSIDE += ("PYTHONDONTWRITEBYTECODE",)  # each process would compile torch again, 3 s
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
#: an installed Slurm is asked at every start of Snakemake, and one that is not running answers after 9 seconds
OWN = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
OWN |= {"CONSISTENCY_LIVE": "0", "SLURM_CONF": os.devnull}
#: for git: somebody, and none of the machine's settings
GIT = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
GIT |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


#: a verb after which nothing heavy has been imported
LIGHT = """
import os, sys
from consistency.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert code == 0
heavy = {"torch", "numpy", "scipy", "mlflow", "matplotlib", "pandas", "PIL", *os.environ["HEAVY"].split()}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def environment(**more: str) -> dict[str, str]:
    """The outside's variables, without what would lead a child elsewhere: one thread, no telemetry, no proxy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE) and name not in PROXIES}
    return kept | OWN | more


def start_python(
    *words: object, folder: Path | None = None, stderr: int | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Start this Python on the source tree, with pipes for its input and output. stderr: as of Popen."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment(**{"PYTHONPATH": SOURCE, **variables}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run_python(*words: object, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python on the source tree to its end, which must be a good one."""
    with start_python(*words, folder=folder, stderr=subprocess.PIPE, **variables) as process:
        try:
            output, errors = process.communicate(timeout=300)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, output + errors
    return subprocess.CompletedProcess(process.args, 0, output, errors)


def run_light(*words: str, more: str = "") -> str:
    """Run a verb, which must end well and import nothing slow, nor more modules. Returns what it printed."""
    return run_python("-c", LIGHT, *words, HEAVY=more).stdout


def start_in(
    folder: Path, words: Sequence[str], variables: dict[str, str], output: Path, mode: str = "w"
) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a shell starts it. mode: of the file that its output goes to."""
    with output.open(mode) as file:
        return subprocess.Popen(
            words,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def free_port() -> int:
    """A port of the loopback at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], what: str, patience: float = 600) -> None:
    """Wait until the condition holds; fail saying what never came."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)
