"""What is asked of Slurm, against commands that answer as its own do; tests/slurm has the real ones."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from consistency import slurm_job
from consistency.cluster import Request, find_jobs, minutes_of, print_jobs, require_ready
from consistency.errors import UserError

SINFO = "cpu*|infinite|(null)\nshort|1:00:00|gpu:a100:4(S:0-1)\nlong|7-00:00:00|gpu:8\n"
Answer = Callable[..., None]


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """answer("sinfo", text, code): from now on that command says the text, on its error output if the code is not 0."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def say(command: str, text: str = "", code: int = 0) -> None:
        (folder / f"{command}.txt").write_text(text)
        script = folder / command
        stream = " >&2" if code else ""
        script.write_text(
            f'#!/bin/sh\necho "$@" >{folder}/{command}.words\n/bin/cat {script}.txt{stream}\nexit {code}\n'
        )
        script.chmod(0o755)

    for command in ("sbatch", "squeue", "sinfo", "scontrol"):
        say(command, SINFO if command == "sinfo" else "")
    monkeypatch.setenv("PATH", str(folder))
    return say


def queued(*jobs: tuple[str, str, Path]) -> str:
    """squeue's lines of (number, comment, folder)."""
    rows = (
        f"{number}|consistency_a-1|{comment}|R|1:02|1-00:00:00|2|one|{folder}/logs/slurm/x/%j.log|{folder}|"
        for number, comment, folder in jobs
    )
    return "".join("  |".join(row.split("|")) + "\n" for row in rows)


def ask(partition: str | None = "long", minutes: float = 60, gpus: bool = True) -> list[Request]:
    return [Request("student", partition, minutes, gpus)]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("infinite", math.inf),
        ("7-00:00:00", 10080),
        ("1:30:00", 90),
        ("30:00", 30),
        ("0:30", 0.5),
        ("1-02:03:30", 1563.5),
    ],
)
def test_slurms_times_in_minutes(limit: str, minutes: float) -> None:
    assert minutes_of(limit) == minutes


def test_what_the_cluster_can_give_is_submitted(answer: Answer, tmp_path: Path) -> None:
    require_ready([*ask(), *ask("short,long", 600), *ask(None, 1e6, gpus=False)], tmp_path)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("gpu"), "student asks for partition gpu, which this cluster does not have: set slurm_partition in "
                     "workflow/profiles/slurm/config.yaml to one of cpu, short, long"),
        (ask("short", 90), "asks for 90 minutes, but partition short gives 60 at most"),
        (ask("cpu"), "asks for GPUs, but partition cpu has none"),
        (ask(None), "asks for GPUs, but partition cpu has none"),
    ],
)  # fmt: skip
def test_what_it_cannot_give_is_said_before_anything_is_submitted(
    answer: Answer, tmp_path: Path, request_: list[Request], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        require_ready(request_, tmp_path)


def test_a_cluster_without_a_default_partition(answer: Answer, tmp_path: Path) -> None:
    answer("sinfo", SINFO.replace("*", ""))
    with pytest.raises(UserError, match="no default partition: set slurm_partition"):
        require_ready(ask(None), tmp_path)


def test_a_machine_without_slurm(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "bin/sbatch").unlink()
    with pytest.raises(UserError, match="Slurm's sbatch is not on the PATH of this machine: run this on a login node"):
        require_ready(ask(), tmp_path)


def test_a_controller_that_is_down(answer: Answer, tmp_path: Path) -> None:
    answer("sinfo", "slurm_load_partitions: Unable to contact slurm controller\n(connect failure)\n", 1)
    with pytest.raises(
        UserError, match=r"does not answer \(slurm_load_partitions: Unable .* \(connect failure\)\): try"
    ):
        require_ready(ask(), tmp_path)


def test_jobs_of_an_earlier_run_of_this_folder_alone_stop_the_next(answer: Answer, tmp_path: Path) -> None:
    """Two of them would work on one result."""
    elsewhere = [("7", "rule_student", tmp_path / "other"), ("8", "my own job", tmp_path)]
    answer("squeue", queued(*elsewhere))
    require_ready(ask(), tmp_path)
    answer("squeue", queued(*elsewhere, ("12", "rule_student_wildcards_digits_ctm_0", tmp_path)))
    with pytest.raises(
        UserError, match=r"still has jobs in Slurm's queue, 1 of them .*: wait until they end.*: scancel 12$"
    ):
        require_ready(ask(), tmp_path)
    answer("squeue", queued(*[(str(k), "rule_student", tmp_path) for k in range(20, 31)]))
    with pytest.raises(UserError, match=r"11 of them .*: scancel --name consistency_a-1$"):
        require_ready(ask(), tmp_path)


def test_the_table_of_jobs(answer: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer("squeue", queued(("12", "rule_student_wildcards_digits_ctm_0", tmp_path)))
    print_jobs(tmp_path)
    title, row = capsys.readouterr().out.splitlines()
    assert title.split() == ["JOB", "WHAT", "STATE", "TIME", "LIMIT", "RESTARTS", "WHERE", "LOG"]
    assert row.split() == [
        "12",
        "student",
        "digits_ctm_0",
        "R",
        "1:02",
        "1-00:00:00",
        "2",
        "one",
        "logs/slurm/x/12.log",
    ]
    answer("squeue")
    print_jobs(tmp_path)
    assert capsys.readouterr().out == f"no jobs of {tmp_path} are in Slurm's queue\n"
    assert find_jobs(tmp_path) == []


@pytest.mark.parametrize(("minutes", "working"), [(1, 0.5), (10, 9), (60, 54), (240, 230), (1440, 1430)])
def test_a_job_saves_before_its_end(minutes: float, working: float) -> None:
    assert slurm_job.working_minutes(minutes) == pytest.approx(working)


def test_a_job_asks_for_more_time_under_its_own_number(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert slurm_job.requeue() == ""
    assert (tmp_path / "bin/scontrol.words").read_text() == "requeue 12\n"
    answer("scontrol", "Requested operation is presently disabled for job 12\n", 1)
    assert slurm_job.requeue() == "Requested operation is presently disabled for job 12"
    (tmp_path / "bin/scontrol").unlink()
    assert "scontrol" in slurm_job.requeue()
