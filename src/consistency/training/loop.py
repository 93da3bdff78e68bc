"""The training loop. A run can be resumed at any step; on a CPU, interruptions do not change a bit of the result."""

import contextlib
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.base.locks import only_one
from consistency.base.progress import Progress
from consistency.config.paths import snapshot_name
from consistency.nets.checkpoint import save_denoiser
from consistency.runtime.stopping import Interrupted, stop_requests
from consistency.training import folder as files
from consistency.training.ema import Ema
from consistency.training.state import load_state, save_state
from consistency.training.update import Update

SAVE_EVERY = 20.0  # seconds between two saved states, at least
SAVE_SHARE = 0.02  # largest share of the time spent on saving


@dataclass
class Training:
    """A training run: model, length, schedule and folder. emas: EMA copies; the first names snapshots and results;
    learning_rate: maps a step to a rate, None keeps the optimiser's. snapshot_every: None for no snapshots.
    before_step: called before every step (from 0) on all ranks; returns the evaluations that it made.
    metadata: further metadata of its checkpoints."""

    label: str
    key: str
    update: Update
    emas: list[Ema]
    steps: int
    log_every: int
    folder: Path
    learning_rate: Callable[[int], float] | None = None
    snapshot_every: int | None = None
    before_step: Callable[[int], int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Window:
    """Means since the last line of the history; part of the state, so that a resumed line is the same."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def add(self, terms: dict[str, Tensor], overflows: bool) -> None:
        """Add a step. overflows: a gradient norm may be infinite without harm (float16) and then counts as 0."""
        for name, value in terms.items():
            added = value.detach().double()
            added = torch.where(torch.isfinite(added), added, 0.0) if overflows else added
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + added
        self.steps += 1


@dataclass
class _Clock:
    """Position of a training: step, time and evaluations."""

    step: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    first_bad: Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    loss: float | None = None  # of the last line of the history: reading a newer one would stall a GPU

    def note(self) -> str:
        """Return the loss as text beside the progress."""
        return "" if self.loss is None else f"loss {self.loss:.4g}"


def train(job: Training, on_start: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train from the saved state, or from the start, to the last step. on_start: called on rank 0 once the state is
    restored and the history truncated to the restored step.

    Leaves history.jsonl and snapshots/ in job.folder and the trained weights in the model and its EMAs. Returns the
    cost: seconds, network_evaluations, images. Raises Interrupted after saving when a signal asks any of the processes
    to stop, and UserError when a loss is not finite or another process trains in the folder.
    """
    ranks = job.update.ranks
    with only_one(job.folder, "is working") if ranks.first else contextlib.nullcontext(), stop_requests() as requests:
        clock, window = _resume(job)
        if ranks.first:
            on_start()
        if job.snapshot_every and clock.step == 0:
            _snapshot(job, 0)
        progress = Progress(job.label, job.steps, clock.step, clock.note, shown=ranks.first)
        mark = saved = time.monotonic()
        pause = SAVE_EVERY
        while clock.step < job.steps:
            window.add(_step(job, clock), job.update.scaler.is_enabled())
            now = time.monotonic()
            window.seconds, mark = window.seconds + now - mark, now
            progress.update()
            if clock.step % job.log_every == 0 or clock.step == job.steps:
                _require_finite(job, clock)
                _log(job, clock, window)
                window = _Window()
            if job.snapshot_every and clock.step % job.snapshot_every == 0:
                _snapshot(job, clock.step)
            # All processes must stop at the same step, and save at the same step.
            stop = ranks.largest(requests()) if clock.step < job.steps else 0
            if ranks.largest(int(stop > 0 or now - saved > pause)):
                _require_finite(job, clock)
                pause = max(SAVE_EVERY, _save(job, clock, window) / SAVE_SHARE)
                saved = time.monotonic()
            if stop:
                raise Interrupted(f"{job.label}: stopped at step {clock.step} of {job.steps}, state saved", stop)
        progress.close()
        _save(job, clock, window)
    return {
        "seconds": round(clock.seconds, 3),
        "network_evaluations": clock.evaluations,
        "images": job.steps * job.update.stream.batch,
    }


def _step(job: Training, clock: _Clock) -> dict[str, Tensor]:
    """Take one optimiser step and update the EMAs and the clock. Returns its terms and the gradient norm."""
    if job.learning_rate is not None:
        for group in job.update.optimizer.param_groups:
            group["lr"] = job.learning_rate(clock.step)
    if job.before_step is not None:
        clock.evaluations += job.before_step(clock.step) * job.update.ranks.world
    terms, evaluations = job.update.step(clock.step)
    clock.step += 1
    with job.update.stopwatch.part("optimizer"):
        for ema in job.emas:
            ema.update(clock.step)
    clock.evaluations += evaluations * job.update.ranks.world
    # Checked at every step, read only at log points: reading it here would stall a GPU. With float16, an infinite
    # gradient only means that the loss scale was too large: that step was skipped.
    watched = terms["loss"] if job.update.scaler.is_enabled() else terms["grad_norm"] + terms["loss"]
    here = torch.where(torch.isfinite(watched), math.inf, float(clock.step))
    clock.first_bad = torch.minimum(clock.first_bad.to(here.device), here)
    return terms


def _require_finite(job: Training, clock: _Clock) -> None:
    """Raise UserError if a loss or gradient was not finite, in any process."""
    first = clock.first_bad.item()
    # If float16's loss scale has fallen this far, no single gradient is at fault.
    hopeless = job.update.scaler.is_enabled() and job.update.scaler.get_scale() < 1e-3
    if not job.update.ranks.largest(int(not math.isinf(first) or hopeless)):
        return
    state = job.folder / files.STATE
    kept = f"the last good state is kept in {state}" if state.exists() else "no state had been saved yet"
    if math.isinf(first):
        raise UserError(
            f"{job.label}: by step {clock.step} the gradients overflow float16 at every scale, or another process has "
            f"a loss that is not finite; {kept}. Use precision: bfloat16 or lower the learning rate"
        )
    raise UserError(
        f"{job.label}: loss or gradient is not finite at step {int(first)}; {kept}. "
        "Lower the learning rate (or mend the data) in the study and run the same command again"
    )


def _log(job: Training, clock: _Clock, window: _Window) -> None:
    """Append a line to history.jsonl: means over the window that ends here, over all processes."""
    clock.seconds += window.seconds
    job.update.ranks.mean_(list(window.sums.values()))
    line = {"step": clock.step, **{name: (value / window.steps).item() for name, value in window.sums.items()}}
    line["images_per_second"] = round(window.steps * job.update.stream.batch / max(window.seconds, 1e-9), 1)
    line["seconds"] = round(clock.seconds, 3)
    clock.loss = line["loss"]
    timed = job.update.stopwatch.read()
    line |= {f"time_{name}": round(seconds / window.steps, 6) for name, seconds in timed.items()}
    # On a GPU the peak of PyTorch's allocations, else that of this process.
    device, resident = next(job.update.model.parameters()).device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident / 2**10
    line["peak_memory_mib"] = round(peak, 1)
    if job.update.ranks.first:
        files.append(job.folder, line)


def _snapshot(job: Training, step: int) -> None:
    if not job.update.ranks.first:
        return
    for k, ema in enumerate(job.emas):
        path = job.folder / "snapshots" / snapshot_name(step, ema.constant if k else None)
        save_denoiser(path, ema.model, {**job.metadata, "key": job.key, "step": step, "ema": ema.constant})


def _save(job: Training, clock: _Clock, window: _Window) -> float:
    """Write the state. Returns the seconds it took."""
    started = time.monotonic()
    update = job.update
    update.ranks.mean_(list(window.sums.values()))
    state = {
        "key": job.key,
        "clock": {"step": clock.step, "seconds": clock.seconds, "evaluations": clock.evaluations},
        "window": {"sums": window.sums, "steps": window.steps, "seconds": window.seconds},
        "model": update.model.state_dict(),
        "emas": [ema.model.state_dict() for ema in job.emas],
        "optimizer": update.optimizer.state_dict(),
        "scaler": update.scaler.state_dict(),
    }
    if update.ranks.first:
        save_state(job.folder / files.STATE, state)
    update.ranks.wait()
    return time.monotonic() - started


def _resume(job: Training) -> tuple[_Clock, _Window]:
    """Load the saved state into the job, on every process the same one."""
    first = job.update.ranks.first
    state = files.prepare(job.folder, job.key, job.label) if first else None
    job.update.ranks.wait()
    state = state if first else load_state(job.folder / files.STATE)
    if state is None:
        return _Clock(), _Window()
    job.update.model.load_state_dict(state["model"])
    for ema, weights in zip(job.emas, state["emas"], strict=True):
        ema.model.load_state_dict(weights)
    job.update.optimizer.load_state_dict(state["optimizer"])
    job.update.scaler.load_state_dict(state["scaler"])
    window = _Window(**state["window"])
    device = next(job.update.model.parameters()).device
    window.sums = {name: value.to(device) for name, value in window.sums.items()}
    return _Clock(**state["clock"]), window
