"""Questions to Slurm, against commands that answer as its own do; tests/workflow/slurm has the real ones."""

import inspect
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from snakemake_executor_plugin_slurm import ExecutorSettings

from consistency.base.errors import UserError
from consistency.runtime import slurm_job
from consistency.runtime.cluster import minutes_of, require_cluster

PROFILE = Path(__file__).parents[2] / "workflow/profiles/slurm/config.yaml"
SINFO = "cpu infinite\ngpu 7-00:00:00\nshort 1:00:00\n"
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

    for command in ("sbatch", "sinfo", "scontrol"):
        say(command, SINFO if command == "sinfo" else "")
    monkeypatch.setenv("PATH", str(folder))
    return say


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the profile, with which Snakemake was started."""
    (tmp_path / "slurm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["snakemake", "--cores", "all", "--profile=slurm", "--", "results/a"])
    return Path(shutil.copy(PROFILE, tmp_path / "slurm"))


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", math.inf), ("7-00:00:00", 10080), ("1:30:00", 90), ("30:00", 30), ("0:30", 0.5)],
)
def test_slurms_times_are_read_as_minutes(limit: str, minutes: float) -> None:
    assert minutes_of(limit) == minutes


def test_the_profile_as_it_comes_is_submitted(answer: Answer, profile: Path) -> None:
    require_cluster()


def test_what_the_profile_has_commented_out_is_known_to_the_plugin(answer: Answer, profile: Path) -> None:
    commented = re.compile(r"^( *)# ([a-z_-]+)(: .*)$", re.MULTILINE)
    text = profile.read_text(encoding="utf-8")
    names = {match[2] for match in commented.finditer(text)} - {"runtime", "attempt"}
    settings = {f"slurm-{field.name.replace('_', '-')}" for field in fields(ExecutorSettings)}
    resources = "".join(path.read_text("utf-8") for path in Path(inspect.getfile(ExecutorSettings)).parent.glob("*.py"))
    given_settings = {name for name in names if name.startswith("slurm-")}
    assert given_settings <= settings
    # The plugin has settings that it never reads, slurm-no-account in 2.8.0.
    read = {name for name in given_settings if f"settings.{name[6:].replace('-', '_')}" in resources}
    assert read == given_settings
    written = (names | set(re.findall(r'(?<![\w-])([a-z_]+): "', text))) - given_settings
    unknown = [name for name in written if f'"{name}"' not in resources]
    assert unknown == []
    profile.write_text(commented.sub(r"\1\2\3", text), encoding="utf-8")
    given = yaml.safe_load(profile.read_text(encoding="utf-8"))
    assert names <= given.keys() | given["default-resources"].keys() | given["set-resources"]["student"].keys()
    require_cluster()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"cpu"', '"main"', "default-resources asks for partition main; this cluster has cpu, gpu, short"),
        ('student:\n    slurm_partition: "gpu"', 'student:\n    slurm_partition: "short"',
         "rule student asks for 1440 minutes, but partition short gives 60 at most: lower its runtime"),
        # The third attempt asks for three times as much.
        ("480 * attempt", "5000 * attempt", "rule coefficients asks for 15000 minutes, but partition gpu gives 10080"),
    ],
)  # fmt: skip
def test_what_would_wait_for_ever_is_not_submitted(
    answer: Answer, profile: Path, before: str, after: str, message: str
) -> None:
    text = profile.read_text(encoding="utf-8")
    assert before in text
    profile.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(UserError, match=f"^slurm/config.yaml: {message}"):
        require_cluster()


@pytest.mark.parametrize("partition", ['"short,gpu"', '\'"short" if wildcards.student == "a" else "gpu"\''])
def test_several_partitions_and_expressions_are_left_to_slurm(answer: Answer, profile: Path, partition: str) -> None:
    profile.write_text(
        profile.read_text(encoding="utf-8").replace('slurm_partition: "gpu"', f"slurm_partition: {partition}"),
        encoding="utf-8",
    )
    require_cluster()


def test_lists_are_left_to_slurm_and_defaults_are_checked(answer: Answer, profile: Path) -> None:
    profile.write_text(
        "default-resources:\n  - slurm_partition=main\nset-resources:\n  - student:runtime=60\n", encoding="utf-8"
    )
    require_cluster()
    profile.write_text("default-resources:\n  slurm_partition: main\n", encoding="utf-8")
    with pytest.raises(UserError, match="default-resources asks for partition main"):
        require_cluster()


def test_the_profile_of_the_environment_is_read(answer: Answer, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.write_text(profile.read_text(encoding="utf-8").replace('"cpu"', '"main"'), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["snakemake", "--cores", "all"])
    require_cluster()
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    with pytest.raises(UserError, match="partition main"):
        require_cluster()


def test_a_machine_without_slurm_is_named(answer: Answer, profile: Path, tmp_path: Path) -> None:
    (tmp_path / "bin/sbatch").unlink()
    with pytest.raises(UserError, match="Slurm's sbatch is not on the PATH: run this on a login node"):
        require_cluster()


def test_a_controller_that_is_down_is_named(answer: Answer, profile: Path, tmp_path: Path) -> None:
    answer("sinfo", "slurm_load_partitions: Unable to contact slurm controller\n(connect failure)\n", 1)
    with pytest.raises(
        UserError, match=r"does not answer \(slurm_load_partitions: Unable .* \(connect failure\)\): try"
    ):
        require_cluster()
    (tmp_path / "bin/sinfo").unlink()
    with pytest.raises(UserError, match=r"does not answer \(.*sinfo.*\): try"):
        require_cluster()


@pytest.mark.parametrize(
    ("words", "owned"),
    [
        ("--cores all", False),
        ("--executor slurm --jobs 9", False),
        ("--executor slurm-jobstep --jobs 1", True),
        ("--local-groupid 1 --executor slurm-jobstep --jobs 1", False),
    ],
)
def test_only_a_job_step_of_one_rule_owns_its_job(monkeypatch: pytest.MonkeyPatch, words: str, owned: bool) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv(slurm_job.OWN, "")
    monkeypatch.setattr("sys.argv", ["snakemake", *words.split()])
    slurm_job.note_own()
    assert slurm_job.owned() == owned


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
