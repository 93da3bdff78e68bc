"""A job whose Snakemake is gone gets SIGTERM, and one without a Snakemake never does."""

import platform
import signal
import subprocess
from collections.abc import Iterator

import pytest
from tests.processes import start_python

from consistency.base.progress import SUPERVISOR

# Says when it is watched, then works on; ends by itself well before the tests' patience does.
JOB = """
import time
from consistency.runtime.supervision import watch_supervisor
watch_supervisor()
print("watched", flush=True)
time.sleep({seconds})
print("done", flush=True)
"""


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[bytes]]:
    """A process that plays Snakemake."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def job(supervisor: str, seconds: float) -> subprocess.Popen[str]:
    process = start_python("-c", JOB.format(seconds=seconds), **{SUPERVISOR: supervisor})
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    return process


@pytest.mark.parametrize("reaped", [True, False])
def test_a_job_ends_with_its_supervisor(supervisor: subprocess.Popen[bytes], reaped: bool) -> None:
    """It ends too with one that nobody waits for: a zombie, as in a container without an init."""
    process = job(f"{platform.node()}:{supervisor.pid}", 50)
    assert process.poll() is None
    supervisor.kill()
    if reaped:
        supervisor.wait()
    process.communicate(timeout=40)
    assert process.returncode == -signal.SIGTERM


def test_a_job_whose_supervisor_lives_is_left_alone(supervisor: subprocess.Popen[bytes]) -> None:
    process = job(f"{platform.node()}:{supervisor.pid}", 1.2)
    assert process.communicate(timeout=40)[0] == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize("value", [None, "", "elsewhere:{gone}", "{here}:", "{here}:pid", "{gone}"])
def test_without_a_supervisor_on_this_machine_nothing_is_watched(
    supervisor: subprocess.Popen[bytes], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from consistency.runtime.supervision import watch_supervisor

    supervisor.kill()
    supervisor.wait()
    monkeypatch.delenv(SUPERVISOR, raising=False)
    if value is not None:
        monkeypatch.setenv(SUPERVISOR, value.format(here=platform.node(), gone=supervisor.pid))
    before = threading.active_count()
    watch_supervisor()
    assert threading.active_count() == before
