"""The training loop: one screen, resumable at any step, the same bits however often it is interrupted."""

import fcntl
import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from consistency.errors import UserError
from consistency.files import write_bytes
from consistency.nets.denoiser import Denoiser
from consistency.progress import Progress
from consistency.seeding import derived_seed
from consistency.training.checkpoint import load_state, save_denoiser, save_state
from consistency.training.ema import Ema
from consistency.training.objectives import Losses

SAVE_EVERY = 20.0  # seconds between two saved states
LOCK_PATIENCE = 60.0  # seconds to wait for the trainer of a killed workflow to notice and leave
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(Exception):
    """The training was asked to stop; its state is saved. signum says by what."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class Training:
    """What is trained and how long. loss(step): the terms of that step; ema_rate(step): the average's rate;
    learning_rate(step): None keeps the optimiser's own. snapshot_every: None for no snapshots."""

    label: str
    key: str
    model: Denoiser
    average: Ema
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Losses]
    ema_rate: Callable[[int], float]
    steps: int
    batch: int
    log_every: int
    seed: int
    folder: Path
    learning_rate: Callable[[int], float] | None = None
    snapshot_every: int | None = None


@dataclass
class _Window:
    """Means since the last line of the history; they are part of the state, so that a resumed line is the same."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double()
        self.steps += 1


@dataclass
class _Clock:
    """Where the training stands."""

    step: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    first_bad: Tensor = field(default_factory=lambda: torch.tensor(math.inf))


def train(job: Training) -> dict[str, float]:
    """Train from the saved state, or from the start, to the last step.

    Leaves history.jsonl and snapshots/ in job.folder and the trained weights in job.model and job.average. Returns
    what it cost: seconds, network_evaluations, images. Raises Interrupted after saving when a signal asks it to stop,
    and UserError when a loss is not finite or another process trains in the folder.
    """
    with _only_trainer(job.folder), _stop_requests() as requests:
        clock, window = _resume(job)
        if job.snapshot_every and clock.step == 0:
            _snapshot(job, 0)
        progress = Progress(job.label, job.steps, clock.step, lambda: _loss_note(window))
        mark = saved = time.monotonic()
        while clock.step < job.steps:
            terms = _step(job, clock)
            window.add(terms)
            now = time.monotonic()
            window.seconds, mark = window.seconds + now - mark, now
            progress.advance()
            if clock.step % job.log_every == 0 or clock.step == job.steps:
                _require_finite(job, clock)
                _log(job, clock, window)
                window = _Window()
            if job.snapshot_every and clock.step % job.snapshot_every == 0:
                _snapshot(job, clock.step)
            stop = requests() if clock.step < job.steps else None
            if stop or now - saved > SAVE_EVERY:
                _require_finite(job, clock)
                _save(job, clock, window)
                saved = time.monotonic()
            if stop:
                raise Interrupted(f"{job.label}: stopped at step {clock.step} of {job.steps}, state saved", stop)
        progress.close()
        _save(job, clock, window)
    return {
        "seconds": round(clock.seconds, 3),
        "network_evaluations": clock.evaluations,
        "images": job.steps * job.batch,
    }


def _step(job: Training, clock: _Clock) -> dict[str, Tensor]:
    """One optimiser step. Returns its terms and the gradient norm."""
    torch.manual_seed(derived_seed(job.seed, "dropout", clock.step))
    if job.learning_rate is not None:
        for group in job.optimizer.param_groups:
            group["lr"] = job.learning_rate(clock.step)
    losses = job.loss(clock.step)
    job.optimizer.zero_grad(set_to_none=True)
    losses.terms["loss"].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters() if p.grad is not None])
    job.optimizer.step()
    clock.step += 1
    job.average.update(job.ema_rate(clock.step))
    clock.evaluations += losses.evaluations
    # Noticed at every step, read only at log points: reading it here would stall a GPU.
    bad = ~torch.isfinite(norm + losses.terms["loss"].detach())
    here = torch.where(bad, float(clock.step), math.inf)
    clock.first_bad = torch.minimum(clock.first_bad.to(here.device), here)
    return {**losses.terms, "grad_norm": norm}


def _require_finite(job: Training, clock: _Clock) -> None:
    first = clock.first_bad.item()
    if not math.isinf(first):
        state = job.folder / "state.pt"
        kept = f"the last good state is kept in {state}" if state.exists() else "no state had been saved yet"
        raise UserError(
            f"{job.label}: loss or gradient is not finite at step {int(first)}; {kept}. "
            "Lower the learning rate (or mend the data) in the study and run the same command again"
        )


def _log(job: Training, clock: _Clock, window: _Window) -> None:
    """Append a line to history.jsonl: means over the window that ends here."""
    clock.seconds += window.seconds
    line = {"step": clock.step, **{name: (value / window.steps).item() for name, value in window.sums.items()}}
    line["images_per_second"] = round(window.steps * job.batch / max(window.seconds, 1e-9), 1)
    line["seconds"] = round(clock.seconds, 3)
    with (job.folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _loss_note(window: _Window) -> str:
    return f"loss {(window.sums['loss'] / window.steps).item():.4g}" if window.steps else ""


def _snapshot(job: Training, step: int) -> None:
    path = job.folder / "snapshots" / f"step-{step:06d}.safetensors"
    save_denoiser(path, job.average.model, {"key": job.key, "step": step})


def _save(job: Training, clock: _Clock, window: _Window) -> None:
    state = {
        "key": job.key,
        "clock": {"step": clock.step, "seconds": clock.seconds, "evaluations": clock.evaluations},
        "window": {"sums": window.sums, "steps": window.steps, "seconds": window.seconds},
        "model": job.model.state_dict(),
        "average": job.average.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
    }
    save_state(job.folder / "state.pt", state)


def _resume(job: Training) -> tuple[_Clock, _Window]:
    """Load the saved state into the job, and cut the history back to it; a state of other settings is set aside."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path, history = job.folder / "state.pt", job.folder / "history.jsonl"
    state = load_state(path)
    if state is not None and state.get("key") != job.key:
        aside = job.folder.with_name(f"{job.folder.name}.{state.get('key')}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(job.folder, aside)
        print(f"{job.label}: the settings changed, so this starts over; the old state is in {aside}", flush=True)
        state = None
    if state is None:
        path.unlink(missing_ok=True)
        shutil.rmtree(job.folder / "snapshots", ignore_errors=True)
        write_bytes(history, b"")
        return _Clock(), _Window()
    job.model.load_state_dict(state["model"])
    job.average.model.load_state_dict(state["average"])
    job.optimizer.load_state_dict(state["optimizer"])
    step = state["clock"]["step"]
    written = history.read_text().splitlines() if history.exists() else []
    lines = [line for line in written if _line_step(line) <= step]
    write_bytes(history, "".join(line + "\n" for line in lines).encode())
    print(f"{job.label}: continues from step {step}", flush=True)
    return _Clock(**state["clock"]), _Window(**state["window"])


def _line_step(line: str) -> float:
    """The step of a history line; a line cut off by a kill comes after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


@contextmanager
def _only_trainer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two runs cannot train in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"another process ({file.read().strip()}) is training in {folder}: wait for it or stop it"
                    ) from None
                time.sleep(0.5)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int | None]]:
    """A function that returns the signal that asked to stop, if any."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    old: dict[int, Any] = {signum: signal.signal(signum, note) for signum in _SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
