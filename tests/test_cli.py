"""The command line: quick to start, helpful, and with exit codes that mean something."""

import importlib
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import ABSENT, Changes, WriteStudy
from tests.processes import ROOT, SOURCE, environment, run_light
from threadpoolctl import threadpool_info, threadpool_limits

from consistency import __main__ as cli
from consistency import __version__
from consistency.base.errors import UserError
from consistency.base.progress import SUPERVISOR
from consistency.config.job import Job
from consistency.runtime import slurm_job
from consistency.runtime.machine import as_in_a_stage
from consistency.runtime.stopping import Interrupted

pytestmark = pytest.mark.usefixtures("handlers")

TINY = str(ROOT / "config/studies/tiny.yaml")
IMAGES = {"dataset.path": "data/nowhere", "dataset.limit": ABSENT}
SAMPLES = ["samples", "--study", TINY, "--device", "cpu"]


def replaced(monkeypatch: pytest.MonkeyPatch, function: Callable[..., None]) -> list[str]:
    """The words of a verb that does something else now."""
    monkeypatch.setattr("consistency.stages.dataset.make_dataset", function)
    return ["dataset", "--study", TINY]


def test_help_waits_for_no_heavy_import() -> None:
    assert set(cli.VERBS) <= set(run_light("--help", more="pydantic").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--version"], __version__), *(([name, "--help"], verb.help) for name, verb in cli.VERBS.items())],
)
def test_every_verb_has_help(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", cli.VERBS.values())
def test_every_verb_has_what_its_function_asks_for(verb: cli.Verb) -> None:
    module, name = verb.function.split(":")
    function = getattr(importlib.import_module(f"consistency.{module}"), name)
    given = {str(option.settings.get("dest", option.flags[0])).lstrip("-").replace("-", "_") for option in verb.options}
    given |= {"job", "study_file"} if cli.STUDY in verb.options else set()
    given |= {"machine", "ranks"} if verb.computes else set()
    assert set(inspect.signature(function).parameters) <= given


@pytest.mark.parametrize("words", ["", "datset", "dataset", "student --study x", "samples --study x --seed x"])
def test_wrong_words_are_2_and_a_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    assert "usage: consistency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "--study", "nowhere.yaml"], "error: no study file nowhere.yaml"),
        (["coefficients", "--study", TINY, "--device", "tpu7"], "error: --device tpu7 cannot be used here"),
        ([*SAMPLES, "--student", "ctm"], "error: --student and --seed go together: give both for a student"),
        ([*SAMPLES, "--seed", "0"], "error: --student and --seed go together: give both for a student"),
        (["coefficients", "--study", TINY, "--threads", "0"], "error: --threads must be positive, got 0\n"),
        (
            [*SAMPLES, "--nodes", "2"],
            "error: --nodes 2 needs a Slurm job of 2 nodes: run it in one, or without --nodes\n",
        ),
        (
            [*SAMPLES, "--nodes", "2", "--processes", "3"],
            "error: --processes 3 cannot be shared evenly by --nodes 2\n",
        ),
        ([*SAMPLES, "--nodes", "0"], "error: --nodes must be positive, got 0\n"),
        ([*SAMPLES, "--job-minutes", "-1"], "error: --job-minutes must be positive, got -1\n"),
    ],
)
def test_a_users_mistake_is_2_and_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("verb", ["check", "reproduce"])
def test_a_wrong_tracking_address_stops_before_the_work(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    test_a_users_mistake_is_2_and_one_line([verb, "--study", TINY], "error: MLFLOW_TRACKING_URI ./mlruns is", capsys)


def test_check_prints_every_default_and_every_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--study", TINY]) == 0
    out = capsys.readouterr().out
    assert "sigma_min: 0.002" in out
    assert "# ctm: {'objective': 'trajectory'" in out
    assert "# analytic: " in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (IMAGES | {"dataset.kind": "image_folder"}, "error: dataset.path: there is no data/nowhere/train"),
        (IMAGES | {"dataset.kind": "edm_zip"}, "error: dataset.path: there is no data/nowhere"),
        (
            {"teacher": {"kind": "safetensors", "path": "nowhere.safetensors", "conditional": True}},
            "error: teacher.path: there is no nowhere.safetensors",
        ),
    ],
)
def test_check_names_files_that_are_not_there(
    write_study: WriteStudy, changes: Changes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--study", str(write_study(changes))]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(said) and f"start at {os.getcwd()}" in err
    assert "sigma_min: 0.002" in out


def test_a_verb_gets_the_study_and_where_its_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Job, int]] = []
    words = replaced(monkeypatch, lambda job, workers: seen.append((job, workers)))
    assert cli.main([*words, "--results", "there", "--state", "here", "--threads", "3"]) == 0
    ((job, threads),) = seen
    assert (job.study.name, job.paths.dataset, threads) == ("tiny", Path("there/tiny/dataset"), 3)
    assert job.of("ctm", 0).state == Path("here/tiny/ctm/seed0")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("mend it"), 2),
        (PermissionError(13, "Permission denied", "a file"), 2),
        (KeyboardInterrupt(), 130),
        (Interrupted("stopped at step 3", signal.SIGUSR1), 128 + signal.SIGUSR1),
    ],
)
def test_exit_codes_say_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail() -> None:
        raise error

    assert cli.main(replaced(monkeypatch, fail)) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "signum", "refusal", "said"),
    [
        ("12 4", signal.SIGALRM, "", "time limit reached: Slurm has requeued the job, which will resume"),
        ("12 4", signal.SIGALRM, "off", "Slurm did not requeue this job (off); its exit code is 142"),
        ("12 4", signal.SIGTERM, "", ""),
        ("11 4", signal.SIGALRM, "", ""),
        ("", signal.SIGALRM, "", ""),
    ],
)
def test_only_a_slurm_job_of_its_own_whose_time_is_over_asks_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str,
    signum: signal.Signals,
    refusal: str,
    said: str,
) -> None:
    def stop() -> None:
        raise Interrupted("stopped at step 3", signum)

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv(slurm_job.OWN, job)
    monkeypatch.setattr("consistency.runtime.slurm_job.requeue", lambda: refusal)
    monkeypatch.setattr("consistency.stages.samples.make_samples", stop)
    assert cli.main([*SAMPLES, "--job-minutes", "60"]) == 128 + signum
    signal.setitimer(signal.ITIMER_REAL, 0)
    printed = capsys.readouterr()
    assert sorted((printed.out + printed.err).splitlines()) == sorted(
        filter(None, ["device: cpu", "stopped at step 3", said])
    )


@pytest.mark.parametrize(("variables", "code"), [({}, 0), ({SUPERVISOR: "nowhere:1"}, 143)])
def test_an_ignored_sigterm_stays_ignored_outside_the_workflow(variables: dict[str, str], code: int) -> None:
    """The shell of the workflow's jobs ignores it, so that tee outlives the verb."""
    script = (
        "import os, signal, sys; from consistency import __main__ as cli; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "cli._run = lambda args: os.kill(os.getpid(), signal.SIGTERM) or 0; sys.exit(cli.main(['validate']))"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, env=environment(PYTHONPATH=SOURCE, **variables)).returncode == code


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_rule_every_pool(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Those of OpenMP and of both BLAS libraries, beside PyTorch's: a last bit of an FD depends on them."""
    pools: list[set[int]] = []

    def look() -> None:
        pools.append({each["num_threads"] for each in threadpool_info()} | {torch.get_num_threads()})

    monkeypatch.setattr("consistency.stages.samples.make_samples", look)
    with threadpool_limits(2):
        assert cli.main([*SAMPLES, "--threads", str(threads)]) == 0
    with threadpool_limits(2):
        with as_in_a_stage(threads):
            look()
        look()
    assert pools[:2] == [{threads}] * 2
    assert 2 in pools[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("asked", ["--processes 1", "--gpu 1", "--gres gpu:1", "CUDA_VISIBLE_DEVICES=7"])
def test_a_gpu_that_is_asked_for_and_absent_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.setattr("consistency.stages.samples.make_samples", lambda: None)
    monkeypatch.setattr("consistency.runtime.launch.claim_gpus", lambda count: None)
    value = asked.partition("=")[2]
    words = [] if value else asked.split()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert cli.main(["samples", "--study", TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {asked} asks for a GPU: ") and error.count("\n") == 1
    assert "driver" in error or "CUDA enabled" in error
    assert cli.main([*SAMPLES, *words]) == 0
    assert capsys.readouterr().err == "device: cpu\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_an_absent_gpu_is_one_line_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    monkeypatch.setattr("consistency.runtime.launch.claim_gpus", lambda count: None)
    monkeypatch.setattr("consistency.runtime.launch.run_processes", lambda count, words: started.append(count) or 0)
    words = ["samples", "--study", TINY, "--processes", "2", "--device"]
    assert cli.main([*words, "auto"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --processes 2 asks for a GPU: ") and error.count("\n") == 1
    assert started == []
    assert cli.main([*words, "cpu"]) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.main([*words, "auto"]) == 2
    assert "--processes 2 needs 2 GPUs here, torch sees 1" in capsys.readouterr().err
    assert started == [2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher", "--processes", "3"], "a batch of 64 cannot be shared by 3 processes"),
        (["student", "--student", "ctm", "--seed", "0", "--gres", "gpu:3"], "cannot be shared by 3 processes"),
        (["student", "--student", "ctm", "--seed", "0"], "compute.batch_per_device 5 does not divide"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_starts(
    words: list[str], message: str, write_study: WriteStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {} if "3" in " ".join(words) else {"compute": {"batch_per_device": 5}}
    assert cli.main([*words, "--study", str(write_study(changes)), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")])
def test_a_full_memory_names_the_key(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    def fill() -> None:
        raise error

    monkeypatch.setattr("consistency.stages.samples.make_samples", fill)
    assert cli.main(["samples", "--study", "tiny", "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "memory is full: halve compute.batch_per_device" in said


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(replaced(monkeypatch, fail))


def test_sigterm_unwinds_like_an_error_and_is_143(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from consistency.base.files import atomic

    def stopped() -> None:
        with atomic(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        cli.main(replaced(monkeypatch, stopped))
    assert end.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_a_reader_who_leaves_is_141_without_a_traceback() -> None:
    command = f"{sys.executable} -m consistency check --study {TINY} | true; exit ${{PIPESTATUS[0]}}"
    variables = environment(PYTHONPATH=SOURCE, PYTHONUNBUFFERED="1")
    done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")
