"""Live tracking, the follower's side: new lines of history.jsonl and the machine's figures, every few seconds.

What cannot be sent now is sent later: by this process, by the follower of the resumed training, or by track.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from consistency.errors import UserError
from consistency.tracking.plan import STUDENT, TRAINING, Data, Point, Upload, history_points
from consistency.tracking.server import (
    BATCH,
    DIGEST,
    FOLDER,
    be_quiet,
    connect,
    create_run,
    describe,
    find_runs,
    lock_file,
    one_at_a_time,
    open_experiment,
    points_there,
    readable_errors,
    send_points,
    set_tags,
    tracking_uri,
    without_secrets,
)

#: seconds between two messages to MLflow
EVERY = "CONSISTENCY_LIVE_EVERY"
#: so begin the lines of the log that say what is wrong, and that nothing is wrong (any more)
TROUBLE, WELL = "trouble: ", "up to step "
GRACE = 30.0  # seconds that the rest may take when the training is over
_RETRY = 1.0  # seconds between two attempts then
_KEPT = 20_000  # points about the machine, at most, that wait for a server that is away
# One request does not try for long: the next attempt comes anyway.
_PATIENCE = {"PGCONNECT_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def follow(messages: TextIO = sys.stdin) -> None:
    """Follow one training: the first message says which, the second how it ended; an end without it is a kill.

    Returns, or ends the process, at most GRACE seconds after the training ended.
    """
    os.nice(10)
    # A scheduler sends its signals to all processes of a job: this one leaves when the training has.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(signum, signal.SIG_IGN)
    # Whatever libraries would say may hold the address, and with it a password.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    be_quiet()
    try:
        _follow(messages)
    except Exception as error:
        print(f"{TROUBLE}{type(error).__name__}: {without_secrets(str(error), tracking_uri())}", flush=True)
        raise SystemExit(1) from None


def _follow(messages: TextIO) -> None:
    opening = json.loads(messages.readline())
    ending = _Ending(messages)
    sender = _Sender(opening)
    every = float(os.environ[EVERY])
    while not ending.over.wait(every):
        sender.measure()
        sender.attempt()
    sender.measure(least=1.0)
    while not sender.attempt(ending.status):
        time.sleep(_RETRY)


class _Ending:
    """Notices the end of the training, whatever this process is waiting for."""

    def __init__(self, messages: TextIO) -> None:
        self.over = threading.Event()
        self.status = "KILLED"
        self._messages = messages
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        last = self._messages.readline()
        if last.endswith("\n"):
            self.status = json.loads(last)["status"]
        self.over.set()
        time.sleep(GRACE)
        print(f"gave up {GRACE:g} s after the training's end", flush=True)
        os._exit(1)


class _History:
    """The lines of a history as they are written; those of its published copy when the state is gone."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.read = 0  # bytes

    def new_lines(self) -> list[dict[str, Any]]:
        """What was added since the last call; a line that is being written comes with the next."""
        for path in self.paths:
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self.read)
                text = file.read()
                whole = text[: text.rfind(b"\n") + 1]
                self.read += len(whole)
                return [json.loads(line) for line in whole.splitlines()]
        return []


class _Machine:
    """CPU, memory, disk, network and GPUs of the machine, as MLflow measures them; what could not be sent waits."""

    def __init__(self) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

        self.every = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10)  # seconds
        self.monitors = _monitors()
        self.step = 0
        self.waiting: list[Point] = []
        self._collect()  # the first figure of a processor says nothing
        self._forget()

    def measure(self, least: float | None = None) -> None:
        """Note the means since the last time, if that was long ago (seconds; default: MLflow's interval)."""
        if time.monotonic() - self.measured < (self.every if least is None else least):
            return
        self._collect()
        at = round(1000 * time.time())
        found = {name: value for monitor in self.monitors for name, value in monitor.aggregate_metrics().items()}
        self.waiting += [Point(f"system/{name}", float(value), at, self.step) for name, value in found.items()]
        self.waiting = self.waiting[-_KEPT:]
        self.step += 1
        self._forget()

    def go_on_after(self, step: int) -> None:
        """Number what waits, and what comes, from after that step: an earlier follower's figures stand before it."""
        self.waiting = [point._replace(step=point.step + step + 1) for point in self.waiting]
        self.step += step + 1

    def _collect(self) -> None:
        for monitor in self.monitors:
            monitor.collect_metrics()

    def _forget(self) -> None:
        self.measured = time.monotonic()
        for monitor in self.monitors:
            monitor.clear_metrics()


def _monitors() -> list[Any]:
    """MLflow's, without the thread around them: that ends with the first failure, and loses what it could not send."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    if ENABLED.is_set() and not ENABLED.get():
        return []
    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for gpus in (GPUMonitor, ROCMMonitor):
        with suppress(ImportError, RuntimeError):  # none of this kind
            return [*found, gpus()]
    return found


@dataclass
class _Run:
    """An MLflow run that is at hand. there: the points it has; whole: track was here already."""

    client: Any
    id: str
    there: dict[tuple[str, int], float]
    whole: bool


class _Sender:
    """Brings an MLflow run to the state of a training, in attempts that may fail."""

    def __init__(self, opening: dict[str, Any]) -> None:
        self.opening = opening
        self.uploads = [Upload(**{**upload, "data": Data(**upload["data"])}) for upload in opening["uploads"]]
        self.own = self.uploads[-1]
        self.history = _History([Path(path) for path in opening["histories"]])
        self.points: list[Point] = []
        self.sent = 0  # of the points
        self.step = 0  # of the last line
        self.run: _Run | None = None
        self.machine = _Machine()
        self.numbered = False  # whether the machine's figures stand after an earlier follower's
        self.said = ""

    def attempt(self, status: str | None = None) -> bool:
        """Send what is new; with a status, end the run. Returns whether that was possible."""
        for line in self.history.new_lines():
            added = history_points([line], self.own.started)
            self.points += [point for point in added if math.isfinite(point.value)]
            self.step = line["step"]
        try:
            uri = tracking_uri()
            with readable_errors(uri):
                self.run = self.run or self._open(uri)
                self._send(self.run)
                if status is not None:
                    self._end(self.run, uri, status)
        except UserError as error:
            self.run = None  # all that was known of the server may be wrong now
            self._say(TROUBLE + str(error).replace(" The results are safe: run track again afterwards", ""))
            return False
        self._say(f"{WELL}{self.step}")
        return True

    def measure(self, least: float | None = None) -> None:
        """Note the machine's figures, whether or not they can be sent."""
        self.machine.measure(least)

    def _send(self, run: _Run) -> None:
        while self.sent < len(self.points):
            batch = self.points[self.sent : self.sent + BATCH]
            self._points(run, [point for point in batch if (point.key, point.step) not in run.there])
            self.sent += len(batch)
        while self.machine.waiting:
            self._points(run, self.machine.waiting[:BATCH])
            del self.machine.waiting[:BATCH]

    def _points(self, run: _Run, points: list[Point]) -> None:
        if points and not run.whole:
            send_points(run.client, run.id, points)

    def _end(self, run: _Run, uri: str, status: str) -> None:
        """The last time of the history is the run's end, as track will set it."""
        with self._alone(uri):
            if DIGEST not in run.client.get_run(run.id).data.tags:
                ended = max((point.time for point in self.points), default=self.own.started)
                run.client.set_terminated(run.id, status, ended)

    # --- the run

    def _open(self, uri: str) -> _Run:
        """The run, made or found again, and running."""
        with self._alone(uri):
            client = connect(uri, _PATIENCE)
            experiment = open_experiment(client, self.opening["study"], self.opening["title"], uri)
            tags = self.own.tags | self._common(self.own)
            found = find_runs(client, experiment, **{TRAINING: tags[TRAINING]})
            run = found[0] if found else None
            if run is None or DIGEST not in run.data.tags:
                if self.own.parent is not None:
                    tags["mlflow.parentRunId"] = self._parent(client, experiment)
                run = run or create_run(client, experiment, self.own, tags)
                set_tags(client, run, tags)
                describe(client, run, self.own)
                client.update_run(run.info.run_id, status="RUNNING")
        self.sent = 0
        if not self.numbered:
            steps = [metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")]
            self.machine.go_on_after(max(steps, default=-1))
            self.numbered = True
        return _Run(client, run.info.run_id, points_there(client, run), DIGEST in run.data.tags)

    def _parent(self, client: Any, experiment: str) -> str:
        """The id of the run that holds the student's seeds, made by the first of them. Its own curves, means over
        them, come with track: until then it is scheduled."""
        parent = self.uploads[0]
        tags = parent.tags | self._common(parent)
        for run in find_runs(client, experiment, **{STUDENT: tags[STUDENT]}):
            if run.data.tags.get(FOLDER) == tags[FOLDER] and DIGEST not in run.data.tags:
                return run.info.run_id
        run_id: str = create_run(client, experiment, parent, tags).info.run_id
        client.update_run(run_id, status="SCHEDULED")
        return run_id

    def _common(self, upload: Upload) -> dict[str, str]:
        opening = self.opening
        return {"study_hash": opening["study_hash"], FOLDER: opening["folder"], "role": upload.role, "state": "live"}

    def _alone(self, uri: str) -> AbstractContextManager[None]:
        return one_at_a_time(lock_file(uri, Path(self.opening["track"])))

    def _say(self, line: str) -> None:
        if line != self.said:
            print(line, flush=True)
            self.said = line
