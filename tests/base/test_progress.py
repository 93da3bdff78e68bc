"""Progress: readable lines where no bar can be drawn."""

import io
import os
import sys
from contextlib import suppress

import pytest

from consistency.base import progress
from consistency.base.progress import SUPERVISOR, Progress, track


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at every step."""
    monkeypatch.setattr(progress, "LINE_EVERY", 1e-9)
    monkeypatch.delenv(SUPERVISOR, raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_holds_label_count_time_left_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("student ctm", 4, note=lambda: "loss 0.5")
    shown.update()
    shown.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("student ctm:  25%")
    assert "1/4" in lines[0]
    assert "3/4" in lines[1]
    assert "<" in lines[1]  # elapsed<left
    assert "step" in lines[1]
    assert lines[1].endswith("loss 0.5")
    assert lines[1].isascii()


def test_lines_are_rare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that ends before it is complete has no line of its own: its error is the last word."""
    monkeypatch.setattr(progress, "LINE_EVERY", 3600.0)
    Progress("interrupted", 2).update()
    shown = Progress("teacher", 1000)
    for _ in range(1000):
        shown.update()
    assert capsys.readouterr().err == ""
    shown.close()
    assert "1000/1000" in capsys.readouterr().err


def test_a_resumed_count_starts_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("teacher", 10, initial=6).update()
    assert "7/10" in capsys.readouterr().err


def test_an_unknown_total_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("download", 0).update(1000)
    assert "download" in capsys.readouterr().err


def test_tracking_yields_everything_in_order_and_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("dataset")(range(5))) == [0, 1, 2, 3, 4]
    assert "5/5" in capsys.readouterr().err.splitlines()[-1]
    assert list(track("nothing")([])) == []


def test_a_terminal_of_ones_own_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("teacher", 3)
    shown.update(3)
    shown.close()
    assert "\r" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_a_terminal_shared_with_other_jobs_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv(SUPERVISOR, "host:1")
    Progress("teacher", 3).update()
    assert "\r" not in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1


def test_a_reader_who_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    stderr = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stderr)
    shown = Progress("teacher", 3)
    shown.update()
    shown.close()
    monkeypatch.undo()
    with suppress(BrokenPipeError):
        stderr.close()
