"""Live tracking, the training's side: a follower process reads the history and speaks to MLflow, and the training
neither waits for it nor hears of its failures before its own end."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from consistency import slurm_job
from consistency.errors import UserError
from consistency.layout import Layout
from consistency.provenance import git_state, hardware
from consistency.study import Study
from consistency.supervision import SUPERVISOR
from consistency.tracking.follow import EVERY, TROUBLE, WELL
from consistency.tracking.plan import plan_live
from consistency.tracking.server import tracking_uri
from consistency.training.folder import read_identity

#: 0 turns live tracking off
LIVE = "CONSISTENCY_LIVE"
LOG = "live.log"
_TAIL = 65536  # bytes of the log that are looked at
_COMMAND = [sys.executable, "-m", "consistency", "follow"]
# torchrun's: the follower is none of its processes.
_NOT_INHERITED = (SUPERVISOR, "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@contextmanager
def followed(
    study: Study, layout: Layout, state: Path, run: str | None = None, seed: int | None = None
) -> Iterator[Callable[[], None]]:
    """Within the block, calling what is given starts a follower for the training whose state folder that is; at the
    end of the block the follower is told how the training ended, and left to itself.

    Without a run: the teacher's training. In a Slurm job there is a follower only if MLflow is a server.
    Raises UserError for a CONSISTENCY_LIVE_EVERY that is no positive number.
    """
    follower = _Follower()
    wanted, every = os.environ.get(LIVE, "") != "0" and _reachable(), _every()

    def start() -> None:
        if wanted:
            follower.start(_opening(study, layout, state, run, seed), state, every)

    try:
        yield start
    except BaseException as error:
        # Asked to stop (by a signal, Ctrl-C or the end of the supervisor), or failed.
        asked = hasattr(error, "signum") or not isinstance(error, Exception)
        follower.end("KILLED" if asked else "FAILED")
        raise
    follower.end("FINISHED")


def _reachable() -> bool:
    """Whether this machine may speak to MLflow: in a job of a cluster to a server only. A SQLite file on a
    network disk breaks under writers on several machines: there the head node's `track` sends everything."""
    return not slurm_job.in_job() or not tracking_uri().startswith("sqlite:")


def _every() -> float:
    text = os.environ.get(EVERY, "5")
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f"{EVERY} must be a positive number of seconds, got {text!r}")


def _opening(study: Study, layout: Layout, state: Path, run: str | None, seed: int | None) -> dict[str, Any]:
    """All that the follower needs to know."""
    command = shlex.join(["python", "-m", "consistency", *sys.argv[1:]])
    made = {"git": git_state(), "hardware": hardware(), "command": command, "training": read_identity(state)}
    published = layout.teacher if run is None or seed is None else layout.student(run, seed)
    return {
        "study": study.name,
        "title": study.title,
        "study_hash": study.key("report"),
        "folder": str(layout.root.resolve()),
        "track": str(layout.track),
        "histories": [str(folder / "history.jsonl") for folder in (state, published)],
        "uploads": [asdict(upload) for upload in plan_live(study, layout, run, seed, made)],
    }


class _Follower:
    """The process and the two ways to it: its standard input, whose end tells it that the training is over, and its
    log in the state folder."""

    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None

    def start(self, opening: dict[str, Any], state: Path, every: float) -> None:
        """Start it at low priority and out of reach of the terminal's Ctrl-C. That it cannot be started is no reason
        for a training to fail."""
        training = f"{opening['study']}: {opening['uploads'][-1]['name']}"
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        try:
            self.log = (state / LOG).open("w+b")
            self.process = subprocess.Popen(
                [*_COMMAND, training],
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=self.log,
                env=inherited | {EVERY: str(every), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except OSError as error:
            _say(f"could not be started ({error.strerror})")
            if self.log is not None:
                self.log.close()
            return
        # Some kilobytes into an empty pipe: this does not wait.
        self._tell(opening)

    def end(self, status: str) -> None:
        """Tell it how the training ended, without waiting for it; say what it has been struggling with."""
        if self.process is None or self.process.stdin is None or self.log is None:
            return
        self._tell({"status": status})
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with self.log as log:
            # Not by the file's position: it is the follower's too, and it writes there.
            end = os.fstat(log.fileno()).st_size
            text = os.pread(log.fileno(), _TAIL, max(end - _TAIL, 0))
        trouble = self._trouble(text.decode(errors="replace").splitlines())
        if trouble:
            _say(trouble)
        # It outlives this process; nobody will ask for its exit code.
        self.process.returncode = 0

    def _tell(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone; its log says why
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _trouble(self, lines: list[str]) -> str:
        """What it is struggling with now, by the lines of its log; nothing if all is well."""
        assert self.process is not None
        said = next((line for line in reversed(lines) if line.startswith((TROUBLE, WELL))), WELL)
        if said.startswith(TROUBLE):
            return said.removeprefix(TROUBLE)
        return "" if self.process.poll() is None else f"its process ended ({' '.join(lines[-1:])[:300]})"


def _say(what: str) -> None:
    # The reader of a pipe may be gone: a line less is no reason to fail.
    with suppress(BrokenPipeError):
        print(f"live tracking: {what}; `track` will complete it", file=sys.stderr, flush=True)
