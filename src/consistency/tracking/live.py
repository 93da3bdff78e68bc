"""Live tracking: a thread of the training's first process sends new lines of history.jsonl and system metrics.

The training waits for it only at its end, for at most GRACE seconds, and reports its failures only then. Unsent points
are sent later: by this thread, by that of the resumed training, or by track.
"""

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from consistency.base.errors import UserError, command_of
from consistency.config.job import Job
from consistency.provenance.environment import git_state, hardware
from consistency.runtime import slurm_job
from consistency.tracking import server
from consistency.tracking.records import TRAINING, Point, history_points, plan_live
from consistency.training.folder import read_identity

#: 0 turns live tracking off
LIVE = "CONSISTENCY_LIVE"
#: seconds between two messages to MLflow
EVERY = "CONSISTENCY_LIVE_EVERY"
GRACE = 5.0  # seconds that a training waits, at its end, for the rest to be sent


@contextmanager
def followed(job: Job, state: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that starts the MLflow follower of the training in a state folder. On exit MLflow learns how the
    training ended.

    A job without a student is the teacher's training. In a Slurm job only a tracking server is used. Raises UserError
    if CONSISTENCY_LIVE_EVERY is not a positive number.
    """
    every = _every()
    threads: list[Follower] = []

    def start() -> None:
        # A SQLite file on a network disk breaks under writers on several machines; after cluster jobs, `track` on the
        # head node sends everything.
        wanted = os.environ.get(LIVE, "") != "0"
        if wanted and not (slurm_job.in_job() and server.tracking_uri().startswith("sqlite:")):
            server.be_quiet()
            thread = Follower(job, state, every)
            with suppress(RuntimeError):  # no thread can be started: `track` sends everything
                thread.start()
                threads.append(thread)

    status = "FAILED"
    try:
        yield start
        status = "FINISHED"
    except BaseException as error:
        # A signal, Ctrl-C or the end of the supervisor, else a failure.
        if hasattr(error, "signum") or not isinstance(error, Exception):
            status = "KILLED"
        raise
    finally:
        for thread in threads:
            thread.end(status)


def _every() -> float:
    text = os.environ.get(EVERY, "10")
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f"{EVERY} must be a positive number of seconds, got {text!r}")


class Follower(threading.Thread):
    """A thread that keeps an MLflow run up to date with a training, in attempts that may fail. trouble: the last one's
    error. The thread does not print it: holding a stream's lock when Python exits would crash."""

    def __init__(self, job: Job, state: Path, every: float) -> None:
        super().__init__(name="live tracking", daemon=True)
        command = shlex.join(["python", "-m", "consistency", *sys.argv[1:]])
        machine = hardware(job.study.compute.name_host)
        made = {"git": git_state(), "hardware": machine, "command": command, "training": read_identity(state)}
        self.job, self.every = job, every
        self.records = plan_live(job, made)
        self.own = self.records[-1]
        published = job.paths.teacher if job.student is None else job.folder
        # The state is removed once its history is published.
        self.histories = [folder / "history.jsonl" for folder in (state, published)]
        self.read = 0  # bytes of the history
        self.points: list[Point] = []
        self.over, self.status = threading.Event(), ""
        self.client: Any = None
        self.run_id = ""
        self.there: set[tuple[str, int]] = set()
        self.sent = 0  # of the points
        self.monitor: Any = None
        self.trouble = ""

    def run(self) -> None:
        """Send new points now, every few seconds, and when the training is over."""
        self.attempt()
        while not self.over.wait(self.every):
            self.attempt()
        self.attempt()

    def end(self, status: str) -> None:
        """Report how the training ended and wait at most GRACE seconds; print the trouble, if any."""
        self.status = status
        self.over.set()
        self.join(GRACE)
        late = f"the tracking server did not take all within {GRACE:g} s; {command_of('track')} sends what is missing"
        trouble = self.trouble or (late if self.is_alive() else "")
        if trouble:
            # The reader of a pipe may be gone.
            with suppress(BrokenPipeError):
                print(f"live tracking: {trouble}", file=sys.stderr, flush=True)

    def attempt(self) -> None:
        """Send new points; end the run if the training is over."""
        uri = ""
        try:
            self._read_history()
            uri = server.tracking_uri()
            with server.readable_errors(uri):
                if self.client is None:
                    self._open(uri)
                server.send_points(self.client, self.run_id, self.points[self.sent :], self.there)
                self.sent = len(self.points)
                if self.over.is_set():
                    ended = max((point.time for point in self.points), default=self.own.started)
                    self.client.set_terminated(self.run_id, self.status, ended)
                elif self.monitor is not None:
                    self.monitor.collect_metrics()
                    self.monitor.publish_metrics(self.monitor.aggregate_metrics())
                    self.monitor.mlflow_logger.flush()
            self.trouble = ""
        except Exception as error:
            self.client = None  # reconnect: the server may have changed
            self.trouble = server.without_secrets(str(error), uri) or type(error).__name__

    def _read_history(self) -> None:
        """Read the lines added since the last call."""
        for path in self.histories:
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self.read)
                text = file.read()
                whole = text[: text.rfind(b"\n") + 1]  # an incomplete line is read next time
                lines = [json.loads(line) for line in whole.splitlines()]
                self.points += history_points(lines, self.own.started)
                self.read += len(whole)
                return

    def _open(self, uri: str) -> None:
        """Create or find the training's run and a student's parent run, whose curves only `track` sends."""
        with server.session(self.job, uri, quiet=True) as (client, experiment):
            parent = None
            for record in self.records:
                tags = server.tags_of(record, self.job, parent, "live")
                found = server.find_runs(client, experiment, **{TRAINING: tags[TRAINING], server.STATE: "live"})
                run = found[0] if found else server.create_run(client, experiment, record, tags)
                client.update_run(run.info.run_id, status="RUNNING" if record is self.own else "SCHEDULED")
                parent = run.info.run_id
            server.set_tags(client, run, tags)
            server.describe(client, run, self.own)
        self.run_id, self.there, self.sent = run.info.run_id, server.points_there(client, run), 0
        self.monitor = self._monitors(uri)
        self.client = client

    def _monitors(self, uri: str) -> Any:
        """Return MLflow's monitors of CPU, memory, disk, network and GPUs, which this thread calls: MLflow's own thread
        ends at the first failure, and Python waits for it without limit."""
        import psutil
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if ENABLED.is_set() and not ENABLED.get():
            return None
        psutil.cpu_percent()  # the first CPU figure is meaningless
        return SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
