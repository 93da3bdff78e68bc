"""Where the time of a step goes: every second is counted once, to the innermost part."""

from types import SimpleNamespace

import pytest

from consistency.training import stopwatch as module
from consistency.training.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is moved by hand."""
    hand = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: hand.now)
    return hand


def test_an_inner_part_is_taken_out_of_the_outer_one(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("forward"):
            clock.now += 1
            with watch.part("teacher"):
                clock.now += 10
            clock.now += 2
        clock.now += 100  # between the parts
        with watch.part("backward"):
            clock.now += 5
    assert watch.read() == {"forward": 6, "teacher": 20, "backward": 10}


def test_a_reading_starts_anew(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    with watch.part("data"):
        clock.now += 1
    watch.read()
    clock.now += 7
    with watch.part("data"):
        clock.now += 2
    assert watch.read() == {"data": 2}
    assert watch.read() == {}


def test_a_part_that_fails_is_closed(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch.part("forward"), watch.part("teacher"):
        clock.now += 3
        raise RuntimeError
    with watch.part("backward"):
        clock.now += 1
    assert watch.read() == {"forward": 0, "teacher": 3, "backward": 1}
