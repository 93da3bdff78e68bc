"""The newcomer's commands: what they run, and what they say when something is missing."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.addresses import LOGINS, hidden
from tests.processes import ROOT, SOURCE, environment, start_in, wait_until

from consistency.runtime.snakemake import AT_WORK

SYSTEM_PATH = "/usr/bin:/bin"
RUN_STUDY = "python -m consistency reproduce --study config/studies/{}.yaml"


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the files that `make` reads, in a path with a space."""
    directory = tmp_path / "a checkout"
    directory.mkdir()
    for name in ["Makefile", "pyproject.toml", "requirements.in", "requirements.lock", "requirements-docs.lock"]:
        shutil.copy(ROOT / name, directory)
    return directory


def make(
    checkout: Path, *arguments: str, path: str = SYSTEM_PATH, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env=environment(PATH=path, **(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def stamp(checkout: Path) -> Path:
    (name,) = set(re.findall(r"\.venv/\.installed-[0-9a-f]{16}", make(checkout, "-n", "install").stdout))
    return checkout / name


@pytest.fixture
def installed(checkout: Path) -> Path:
    """The checkout with an environment whose programs only write down how they were called."""
    installed_stamp = stamp(checkout)
    for name in ["python", "snakemake", "dvc", "mlflow", "ruff", "mypy", "snakefmt", "uv"]:
        script(checkout / ".venv/bin" / name, f'echo "{name} $*" >>"$PWD/calls"')
    installed_stamp.write_text(f"{checkout}\n")
    return checkout


def calls(checkout: Path) -> list[str]:
    file = checkout / "calls"
    return file.read_text().splitlines() if file.exists() else []


# --- what the targets run -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_help_lists_the_targets(checkout: Path, arguments: tuple[str, ...]) -> None:
    targets = re.search(r"(?m)^\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1]
    output = make(checkout, *arguments).stdout
    assert sorted(re.findall(r"(?m)^  make ([a-z-]+)  +\S", output)) == sorted(set(targets.split()) - {"reproduce"})


def test_dry_run_of_test_shows_its_commands(checkout: Path) -> None:
    output = make(checkout, "-n", "test", "PYTEST_ARGS=-k laws").stdout
    assert re.search(r"python -m pytest -n \d .*-k laws", output)
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("target", "study"), [("demo", "digits"), ("demo-gc", "digits-gc")])
def test_demo_runs_the_study_then_the_summary(installed: Path, target: str, study: str) -> None:
    done = make(installed, target)
    assert done.returncode == 0, done.stderr
    summary = f"python -m consistency summary --study config/studies/{study}.yaml"
    assert calls(installed) == [RUN_STUDY.format(study), summary]


@pytest.mark.parametrize("target", ["demo", "demo-gc", "pull"])
def test_a_clusters_profile_is_left_out_and_named(installed: Path, target: str) -> None:
    for name in ["python", "snakemake"]:
        script(installed / f".venv/bin/{name}", 'echo "$0 ${SNAKEMAKE_PROFILE-none}" >>"$PWD/calls"')
    done = make(installed, target, variables={"SNAKEMAKE_PROFILE": "slurm"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("SNAKEMAKE_PROFILE=slurm is left out: make runs on this machine")
    ran = [call for call in calls(installed) if not call.startswith("dvc")]
    assert ran and all(call.endswith(" none") for call in ran)


def test_lint_runs_every_tool_and_changes_nothing(installed: Path) -> None:
    assert make(installed, "lint").returncode == 0
    assert calls(installed) == [
        "ruff check .",
        "ruff format --check .",
        "mypy src",
        "snakefmt --check Snakefile workflow",
        "snakemake --lint",
    ]


def test_lock_compiles_for_every_platform_with_hashes(installed: Path) -> None:
    assert make(installed, "lock").returncode == 0
    made = calls(installed)
    assert len(made) == 2
    for call, name in zip(made, ("requirements", "requirements-docs"), strict=True):
        assert call.startswith("uv pip compile --quiet --universal --python-version 3.11 --generate-hashes")
        assert call.endswith(f" {name}.in -o {name}.lock")


def test_docs_builds_the_pages_in_an_environment_of_its_own(checkout: Path) -> None:
    for name in ["config", "docs", "examples", "src", "workflow"]:
        (checkout / name).mkdir()
    for name in ["README.md", "CITATION.cff", "LICENSE", "NOTICE", "dvc.yaml", "environment.yml"]:
        (checkout / name).touch()
    (checkout / "docs/page.md").touch()
    for name in ["python", "zensical"]:
        script(checkout / f"ready/{name}", f'echo "{name} $*" >>"$PWD/calls"')
    script(checkout / "fake/python3", 'echo "python3 $*" >>calls; mkdir .venv-docs; cp -r ready .venv-docs/bin')
    assert make(checkout, "docs", path=f"{checkout}/fake:{SYSTEM_PATH}").returncode == 0
    assert (checkout / "build/docs/docs/page.md").exists()
    build = "zensical build --strict --clean"
    install = (
        "python -m pip install --no-user --quiet --disable-pip-version-check --require-hashes -r requirements-docs.lock"
    )
    assert calls(checkout) == ["python3 -m venv --clear .venv-docs", install, build]
    assert make(checkout, "docs").returncode == 0
    assert calls(checkout)[3:] == [build]
    assert not (checkout / ".venv").exists()


def test_ui_serves_the_local_database_on_the_loopback(installed: Path) -> None:
    refused = make(installed, "ui")
    assert refused.returncode != 0
    assert "make demo" in refused.stderr
    for study in ("digits", "mine"):
        script(installed / f"results/{study}/report/report.html", "")
    commands = [f"  .venv/bin/python -m consistency track --study config/studies/{x}.yaml" for x in ("digits", "mine")]
    assert make(installed, "ui").stderr.splitlines()[1:3] == commands
    (installed / "mlflow.db").touch()
    script(installed / ".venv/bin/mlflow", 'printf "%s\\n" "mlflow $*" "$MLFLOW_BACKEND_STORE_URI" >>"$PWD/calls"')
    assert make(installed, "ui", "PORT=5055").returncode == 0
    assert calls(installed) == ["mlflow ui --host 127.0.0.1 --port 5055 --workers 1", "sqlite:///mlflow.db"]


def test_ui_shows_nobody_a_password(installed: Path) -> None:
    """MLflow, which quotes an address that it cannot use, does not begin before the database has answered."""
    script(installed / ".venv/bin/mlflow", 'echo "mlflow $*" >>"$PWD/calls"')
    for address in ("http://me:hunter2@127.0.0.1:5000", "postgresql://me:hunter2@127.0.0.1/mlflow"):
        done = make(installed, "ui", variables={"MLFLOW_TRACKING_URI": address})
        assert done.returncode == 0, done.stderr
        hidden(done.stdout + done.stderr)
    check, ui = calls(installed)
    assert check.startswith("python -c ") and ui == "mlflow ui --host 127.0.0.1 --port 5000 --workers 1"
    script(installed / ".venv/bin/python", f'PYTHONPATH={SOURCE} exec {sys.executable} "$@"')
    for address in (LOGINS[0], f"postgresql://{LOGINS[2]}"):
        done = make(installed, "ui", variables={"MLFLOW_TRACKING_URI": address})
        assert done.returncode != 0
        assert hidden(done.stdout + done.stderr).startswith("error: ")
    assert calls(installed) == [check, ui]


def test_pull_tells_snakemake_that_all_is_up_to_date(installed: Path) -> None:
    done = make(installed, "pull", "STUDY=mine")
    assert done.returncode == 0, done.stderr
    report = "--config studies=[mine] -- results/mine/report/report.html"
    assert calls(installed) == [
        "dvc pull",
        "dvc status --quiet",
        f"snakemake --touch --forceall --cores 1 --quiet all {report}",
        "snakemake --cores 1 --quiet all --config studies=[mine]",
    ]


def test_release_packs_then_writes_the_folder(installed: Path) -> None:
    assert make(installed, "release", "STUDY=mine").returncode == 0
    verbs = [f"python -m consistency {verb} --study config/studies/mine.yaml" for verb in ("archive", "release")]
    assert calls(installed) == verbs


def test_a_partial_pull_marks_nothing_as_up_to_date(installed: Path) -> None:
    script(installed / ".venv/bin/dvc", 'echo "dvc $*" >>"$PWD/calls"; [ "$*" != "status --quiet" ]')
    done = make(installed, "pull")
    assert done.returncode != 0
    assert "nothing was marked as up to date" in done.stderr
    assert calls(installed) == ["dvc pull", "dvc status --quiet", "dvc status"]


def test_clean_asks_first(installed: Path) -> None:
    for name in ["results", "state", "mlruns"]:
        (installed / name).mkdir()
    (installed / "mlflow.db").touch()
    refused = make(installed, "clean")
    assert refused.returncode != 0
    assert "CONFIRM=yes" in refused.stderr
    assert (installed / "state").exists()
    assert make(installed, "clean", "CONFIRM=yes").returncode == 0
    assert not any((installed / name).exists() for name in ["results", "state", "mlruns", "mlflow.db"])


def test_clean_names_what_it_leaves_behind_links(installed: Path) -> None:
    for place in ("results", "state/tiny"):
        scratch = installed / "scratch" / place
        scratch.mkdir(parents=True)
        (installed / place).parent.mkdir(exist_ok=True)
        (installed / place).symlink_to(scratch)
    lines = make(installed, "clean", "CONFIRM=yes").stdout.splitlines()
    assert lines[1:] == [f"  {place} -> {installed}/scratch/{place}" for place in ("results", "state/tiny")]
    assert (installed / "scratch/results").exists() and not (installed / "results").is_symlink()


# --- interrupted and failed runs ----------------------------------------------------------------


def test_nothing_is_removed_while_a_run_is_at_work(installed: Path) -> None:
    (installed / "results").mkdir()
    (installed / ".snakemake").mkdir()
    with (installed / AT_WORK).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        refused = make(installed, "clean", "CONFIRM=yes")
    assert refused.returncode != 0
    assert "A run is at work in this directory" in refused.stderr
    assert (installed / "results").exists()
    script(installed / "fake/flock", "exit 65")
    assert "at work" not in make(installed, "clean", "CONFIRM=yes", path=f"{installed}/fake:{SYSTEM_PATH}").stderr


def test_a_failed_study_fails_the_demo_without_a_summary(installed: Path) -> None:
    script(installed / ".venv/bin/python", 'echo "python $*" >>"$PWD/calls"; exit 1')
    assert make(installed, "demo").returncode != 0
    assert calls(installed) == [RUN_STUDY.format("digits")]


def test_control_c_reaches_snakemake_and_stops_all(installed: Path) -> None:
    script(
        installed / ".venv/bin/python",
        'trap \'echo interrupted >>"$PWD/calls"; exit 1\' INT; echo started >>"$PWD/calls"; sleep 30 & wait',
    )
    demo = start_in(installed, ["make", "demo"], environment(PATH=SYSTEM_PATH), installed / "output.txt")
    try:
        wait_until(lambda: calls(installed) == ["started"], "the start of the demo", 60)
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(timeout=60) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
    assert calls(installed) == ["started", "interrupted"]


# --- the installation ---------------------------------------------------------------------------


def fake_python(checkout: Path, version: str) -> str:
    """A PATH whose python3 says it is `version`, and has no module venv."""
    script(checkout / "fake/python3", f'case "$*" in *version_info*) echo {version} ;; *) exit 9 ;; esac')
    return f"{checkout}/fake:{SYSTEM_PATH}"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("3.9", ["Python 3.9", "3.11 or newer", "apt-get install python3.11 python3.11-venv", "PYTHON="]),
        ("3.11", ["cannot make virtual environments", "apt-get install python3 python3-venv"]),
    ],
)
def test_an_unfit_python_gets_one_clear_message(checkout: Path, version: str, said: list[str]) -> None:
    done = make(checkout, "demo", path=fake_python(checkout, version))
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [part for part in said if part not in message] == []
    assert ("5.6 GB" in done.stdout) == ("cannot make" in message)
    assert not (checkout / ".venv").exists()


def test_a_missing_python_gets_a_message_that_names_its_packages(checkout: Path) -> None:
    done = make(checkout, "demo", "PYTHON=python3.99")
    assert done.returncode != 0
    assert "apt-get install python3.99 python3.99-venv" in done.stderr


@pytest.mark.parametrize(
    ("tool", "body", "said"),
    [
        ("uname", "echo Darwin", "make needs Linux here: use WSL on Windows"),
        (
            "flock",
            "exit 65",
            "flock cannot lock .install.lock: install util-linux, or work on a disk that has file locks",
        ),
    ],
)
def test_a_system_that_lacks_something_gets_one_line(checkout: Path, tool: str, body: str, said: str) -> None:
    script(checkout / "fake" / tool, body)
    done = make(checkout, "install", path=f"{checkout}/fake:{SYSTEM_PATH}")
    assert done.returncode != 0
    assert said in done.stderr and "another make" not in done.stdout


def test_an_installed_environment_is_left_alone(installed: Path) -> None:
    done = make(installed, "install")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_lock_asks_for_another_installation(checkout: Path) -> None:
    before = stamp(checkout)
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert stamp(checkout) != before


def test_pip_installs_into_the_environment_whatever_it_is_told(checkout: Path) -> None:
    script(checkout / ".venv/bin/python", '[ "$1" = -c ] || echo "$* ${PIP_USER-}${PIP_TARGET-}" >>calls')
    (checkout / ".venv/.installed-0000000000000000").write_text(f"{checkout}\n")
    make(checkout, "install", variables={"PIP_USER": "1", "PIP_TARGET": "/elsewhere"})
    assert [call for call in calls(checkout) if call.startswith("-m pip install --no-user ")] == calls(checkout) != []
    assert "1/elsewhere" not in "".join(calls(checkout))


@pytest.mark.parametrize("left", [".installing", ".installed-0000000000000000"])
def test_an_interrupted_or_moved_installation_starts_afresh(checkout: Path, left: str) -> None:
    venv = checkout / ".venv"
    script(venv / "bin/python", "exit 0")
    (venv / left).write_text("/another/place\n")
    done = make(checkout, "install", path=fake_python(checkout, "3.9"))
    assert "afresh" in done.stdout
    assert not venv.exists()


def test_a_failed_installation_says_so_and_is_repaired_next_time(checkout: Path) -> None:
    script(
        checkout / ".venv/bin/python",
        'case "$*" in *version_info*) exit 0 ;; *) echo "no network" >&2; exit 1 ;; esac',
    )
    (checkout / ".venv/.installed-0000000000000000").write_text(f"{checkout}\n")
    failed = make(checkout, "install", variables={"UV_CACHE_DIR": "/dev/shm"})
    assert failed.returncode != 0
    assert "no network" in failed.stderr
    places = r"6 GB of disk here \(\S+ free\), .* \(/dev/shm, \S+ free; UV_CACHE_DIR .* in /\S+ \(\S+ free\)"
    assert re.search(places, failed.stderr)
    assert "Run the same command again" in failed.stderr
    assert (checkout / ".venv/.installing").exists()
