"""The training loop: interrupted anywhere it gives the same bits, and it never trains on from a bad state."""

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.nets.small import make_denoiser
from tests.repeatable import assert_same, repeatable

from consistency.base import locks
from consistency.base.errors import UserError
from consistency.base.seeding import generator
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.runtime.stopping import Interrupted
from consistency.training import folder as files
from consistency.training import loop
from consistency.training.ema import Ema
from consistency.training.loop import Training, train
from consistency.training.objective import Draws, Shape, Term
from consistency.training.state import load_state
from consistency.training.update import Stream, Update

# hook(step) is called inside the loss of that step (from 0) and may return another loss.
Hook = Callable[[int], torch.Tensor | None]
STEPS, LOG_EVERY, SNAPSHOT_EVERY = 6, 3, 3


def nothing(step: int) -> None:
    """The hook of a training that nobody disturbs."""


def at(step: int, action: Callable[[], Any]) -> Hook:
    """A hook that acts in one step."""
    return lambda now: action() if now == step else None


def signal_self(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@dataclass(frozen=True)
class Noise(Draws):
    step: int
    sigma: torch.Tensor


@dataclass
class Disturbed:
    """A denoising loss that a hook may disturb; it knows its step by counting."""

    model: Denoiser
    hook: Hook
    step: int = 0

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Noise:
        return Noise(self.step, torch.exp(torch.randn(shape[0], generator=device)))

    def terms(self, images: torch.Tensor, labels: torch.Tensor | None, draws: Noise) -> Iterator[Term]:
        error = self.model(images + draws.sigma[:, None, None, None], draws.sigma) - images
        disturbed = self.hook(draws.step)
        value = error.square().mean() if disturbed is None else disturbed
        yield Term("error", value, 1.0, 24)
        yield Term("largest", self.model(images, draws.sigma).abs().max(), 0.0, 0)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Training]:
    """job(folder name, hook, ...): a training with all that has a state: RAdam, averages, dropout if asked for."""

    def make(folder: str = "seed0", hook: Hook = nothing, *, dropout: float = 0.0, **changes: Any) -> Training:
        model = make_denoiser(0, dropout=dropout).train()
        objective = Disturbed(model, hook)

        def batches(step: int) -> tuple[torch.Tensor, None]:
            objective.step = step
            return torch.randn(8, 1, 4, 4, generator=generator(0, "images", step)), None

        optimizer = torch.optim.RAdam(model.parameters(), lr=1e-2)
        update = Update(model, optimizer, objective, Stream(batches, 8, 8, 0, "test"))
        settings: dict[str, Any] = {
            "label": "test",
            "key": "key",
            "update": update,
            "emas": [Ema(model, lambda step: 1 - 1 / (step + 1)), Ema(model, 0.5)],
            "steps": STEPS,
            "log_every": LOG_EVERY,
            "folder": tmp_path / folder,
            "snapshot_every": SNAPSHOT_EVERY,
        }
        return Training(**{**settings, **changes})

    return make


Job = Callable[..., Training]


def interrupted(training: Training, on_start: Callable[[], None] = lambda: None) -> Interrupted:
    """Train until the training's hook asks it to stop."""
    with pytest.raises(Interrupted) as stopped:
        train(training, on_start)
    return stopped.value


def saved_step(folder: Path) -> int:
    """The step of the saved state."""
    state = load_state(folder / "state.pt")
    return 0 if state is None else int(state["clock"]["step"])


def result(folder: Path) -> dict[str, Any]:
    """All that a training leaves, but for what the clock on the wall decides."""
    state = load_state(folder / "state.pt")
    assert state is not None
    del state["key"], state["clock"]["seconds"], state["window"]["seconds"]
    snapshots = {path.name: np.fromfile(path, np.uint8) for path in (folder / "snapshots").iterdir()}
    return {**state, "history": history(folder), "snapshots": snapshots}


def history(folder: Path) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = repeatable(folder / "history.jsonl")
    return lines


# --- resuming


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(
    job: Job, tmp_path: Path, stop_after: int, dropout: float
) -> None:
    """At the end of a log window (3) and in the middle of one (1, 2, 4, 5)."""
    train(job("whole", dropout=dropout))
    stopped = interrupted(job("parts", at(stop_after - 1, signal_self), dropout=dropout))
    assert f"stopped at step {stop_after} of {STEPS}" in str(stopped)
    assert stopped.signum == signal.SIGTERM
    measured = train(job("parts", dropout=dropout))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "parts"))
    assert measured["network_evaluations"] == 24 * STEPS
    assert measured["images"] == 8 * STEPS


def test_interrupted_at_every_step_it_still_ends_with_the_same_bits(job: Job, tmp_path: Path) -> None:
    train(job("whole", dropout=0.3))
    for step in range(STEPS - 1):
        interrupted(job("parts", at(step, signal_self), dropout=0.3))
    train(job("parts", dropout=0.3))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "parts"))


def test_a_training_keeps_its_identity_and_says_when_it_goes_on(job: Job, tmp_path: Path) -> None:
    """When it says so, the history ends at the saved step already."""
    said: list[tuple[str, int]] = []

    def on_start() -> None:
        said.append((files.read_identity(tmp_path / "seed0")["id"], len(history(tmp_path / "seed0"))))

    interrupted(job(hook=at(3, signal_self)), on_start)
    with (tmp_path / "seed0/history.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n')
    train(job(), on_start)
    train(job(key="other"), on_start)
    assert said[0] == (said[1][0], 0) and said[1][1] == 1
    assert said[2][0] != said[0][0] and said[2][1] == 0


def test_dropout_is_on_and_differs_from_step_to_step(job: Job, tmp_path: Path) -> None:
    """Or the bitwise tests above would show nothing about it."""
    train(job("with", dropout=0.3))
    train(job("without"))
    with_dropout, without = (history(tmp_path / name)[0]["loss"] for name in ("with", "without"))
    assert with_dropout != without


def test_a_killed_training_goes_on_from_the_last_saved_state(job: Job, tmp_path: Path) -> None:
    """No chance to save: what was logged after the saved state is logged once in the end, not twice."""

    train(job("whole"))
    interrupted(job("parts", at(1, signal_self)))
    with pytest.raises(SystemExit):
        train(job("parts", at(4, sys.exit)))
    assert [line["step"] for line in history(tmp_path / "parts")] == [3]
    with (tmp_path / "parts" / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\nnot json\n{"loss": 2.0}\n{"step": 5, "lo')
    train(job("parts"))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "parts"))


def test_the_state_is_saved_as_time_passes(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", math.inf)
    seen: list[int] = []

    train(job(hook=lambda step: seen.append(saved_step(tmp_path / "seed0"))))
    assert seen == list(range(STEPS))


def test_a_state_that_takes_long_to_save_is_saved_less_often(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour a state, say: one is saved in the middle, then none before the end."""
    saved: list[int] = []
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)

    def slow(training: Training, clock: Any, window: Any) -> float:
        saved.append(clock.step)
        return 3600.0

    monkeypatch.setattr(loop, "_save", slow)
    train(job())
    assert saved == [1, STEPS]


def test_a_finished_training_is_not_trained_again(job: Job, tmp_path: Path) -> None:
    train(job())
    before = result(tmp_path / "seed0")

    train(job(hook=lambda step: pytest.fail("it trained on")))
    assert_same(before, result(tmp_path / "seed0"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM])
def test_every_polite_signal_saves_and_is_named(job: Job, tmp_path: Path, signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    assert interrupted(job(hook=at(0, lambda: signal_self(signum)))).signum == signum
    assert signal.getsignal(signum) == before
    assert saved_step(tmp_path / "seed0") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_what_was_ignored_at_the_start_stays_ignored(job: Job, signum: signal.Signals) -> None:
    """As by nohup, or behind a shell's `&`."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        train(job(hook=at(0, lambda: signal_self(signum))))
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_signal_in_the_last_step_does_not_undo_it(job: Job, tmp_path: Path) -> None:
    train(job(hook=at(STEPS - 1, signal_self)))
    assert history(tmp_path / "seed0")[-1]["step"] == STEPS


# --- states that must not be used


def test_a_state_of_other_settings_is_set_aside(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(job("fresh"))
    interrupted(job(hook=at(3, signal_self), key="other"))
    old = (tmp_path / "seed0" / "state.pt").read_bytes()
    train(job())
    assert_same(result(tmp_path / "fresh"), result(tmp_path / "seed0"))
    assert (tmp_path / "seed0.other" / "state.pt").read_bytes() == old
    assert "the settings changed" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_state_is_a_clear_error(job: Job, tmp_path: Path, keep: int) -> None:
    interrupted(job(hook=at(1, signal_self)))
    path = tmp_path / "seed0" / "state.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"state\.pt is damaged .*: delete it to start over") as error:
        train(job())
    assert "\n" not in str(error.value)
    path.unlink()
    train(job())


# --- losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(job: Job, tmp_path: Path, bad: float) -> None:
    interrupted(job(hook=at(1, signal_self)))
    bad_loss = torch.tensor(bad, requires_grad=True)
    with pytest.raises(UserError, match=r"not finite at step 5; the last good state is kept in .*state\.pt"):
        train(job(hook=at(4, lambda: bad_loss)))
    assert saved_step(tmp_path / "seed0") == 2
    train(job("whole"))
    train(job())
    assert_same(result(tmp_path / "whole"), result(tmp_path / "seed0"))


def test_a_gradient_that_is_not_finite_stops_too(job: Job) -> None:
    def steep() -> torch.Tensor:
        weight = next(training.update.model.parameters())
        # The root's slope at 0 is infinite, its value is not.
        return torch.sqrt((weight - weight.detach()).sum())

    training = job(hook=at(0, steep))
    with pytest.raises(UserError, match="not finite at step 1; no state had been saved yet"):
        train(training)


def test_the_last_step_is_checked_and_logged_even_within_a_log_window(job: Job, tmp_path: Path) -> None:
    bad = torch.tensor(math.nan, requires_grad=True)
    with pytest.raises(UserError, match="not finite at step 6"):
        train(job(hook=at(STEPS - 1, lambda: bad), log_every=4, snapshot_every=None))
    train(job("good", log_every=4, snapshot_every=None))
    assert [line["step"] for line in history(tmp_path / "good")] == [4, 6]


def test_a_stop_does_not_save_a_bad_state(job: Job, tmp_path: Path) -> None:
    def spoil() -> torch.Tensor:
        signal_self()
        return torch.tensor(math.nan, requires_grad=True)

    with pytest.raises(UserError, match="not finite at step 2"):
        train(job(hook=at(1, spoil)))
    assert not (tmp_path / "seed0" / "state.pt").exists()


# --- one trainer a folder


def test_a_second_trainer_in_the_folder_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)

    def intrude() -> None:
        with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()} on .*\) is working"):
            train(job())

    train(job(hook=at(2, intrude)))


def test_the_folder_is_free_again_after_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        train(job(hook=at(2, fail)))
    train(job())


# --- what it leaves


def test_the_history_holds_means_over_its_windows(job: Job, tmp_path: Path) -> None:
    train(job("windows"))
    train(job("steps", log_every=1))
    windows, steps = history(tmp_path / "windows"), history(tmp_path / "steps")
    assert [line["step"] for line in windows] == [3, 6]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line, part in zip(windows, (steps[:3], steps[3:]), strict=True):
        for name in ("loss", "largest", "grad_norm"):
            assert line[name] == pytest.approx(sum(one[name] for one in part) / 3, rel=1e-12)


def test_snapshots_are_the_average_at_their_steps(job: Job, tmp_path: Path) -> None:
    start, training = job().emas[0].model.state_dict(), job()
    train(training)
    snapshots = tmp_path / "seed0" / "snapshots"
    names = [f"step-00000{n}{ema}.safetensors" for n in (0, 3, 6) for ema in ("-ema0.5", "")]
    assert sorted(path.name for path in snapshots.iterdir()) == names
    first, metadata = load_denoiser(snapshots / "step-000000.safetensors", "key")
    assert metadata["step"] == 0
    assert_same(first.state_dict(), start)
    last, _ = load_denoiser(snapshots / "step-000006.safetensors", "key")
    assert_same(last.state_dict(), training.emas[0].model.state_dict())
    other, metadata = load_denoiser(snapshots / "step-000006-ema0.5.safetensors", "key")
    assert metadata["ema"] == 0.5
    assert_same(other.state_dict(), training.emas[1].model.state_dict())


def test_the_learning_rate_is_that_of_the_step(job: Job) -> None:
    seen: list[float] = []
    training = job(
        hook=lambda step: seen.append(training.update.optimizer.param_groups[0]["lr"]),
        learning_rate=lambda step: 0.1 * (step + 1),
    )
    train(training)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_stale_snapshots_of_an_older_run_are_removed(job: Job, tmp_path: Path) -> None:
    train(job())
    (tmp_path / "seed0" / "state.pt").unlink()
    stale = tmp_path / "seed0" / "snapshots" / "step-000009.safetensors"
    shutil.copy(stale.with_name("step-000006.safetensors"), stale)
    train(job())
    assert not stale.exists()
