"""Every command of the README and the docs is understood by its program, and run by a test or listed with a reason."""

import re
import shlex

import pytest
from dvc.cli import parse_args as parse_dvc
from snakemake.cli import get_argument_parser as snakemake_parser
from tests.processes import ROOT

from consistency.__main__ import build_parser

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "config/README.md")] + sorted(
    ROOT.glob("docs/**/*.md")
)
PROGRAMS = "make|snakemake|dvc|consistency|python -m consistency|snakedeploy|mlflow|pip"
COMMAND = re.compile(rf"^(?: {{4,}}|)((?:{PROGRAMS}) .*?)(?:  +#.*|\s+#[^{{].*)?$")

#: the beginning of a command, and the test that runs it (or one that differs from it in names and numbers alone)
RUN = {
    r"make (demo|archive|release|ui|pull|test|docs)\b": "house/test_makefile.py",
    r"(python -m )?consistency (check|estimate|track|dvc|fetch)\b": "test_cli.py",
    r"(python -m )?consistency (dataset|student)\b": "house/test_installed.py",
    r"(python -m )?consistency validate": "house/test_installed.py",
    r"(python -m )?consistency doctor": "stages/test_doctor.py",
    r"(python -m )?consistency verify": "workflow/test_provenance.py",
    r"(python -m )?consistency publish": "report/test_publish.py",
    r"consistency (sample|score)\b": "test_api.py",
    r"consistency fit\b": "evaluation/test_fitted.py",
    r"snakemake (--cores all|-n)( --config studies=\S+)?$": "workflow/test_run.py",
    r"snakemake --cores all --profile slurm( --dry-run| --config \S+)?$": "workflow/slurm/test_submitted.py",
    r"snakemake --cores 1 --config '.*' --until resource": "workflow/test_cifar10.py",
    r"snakemake --cores all --profile profiles/slurm": "workflow/slurm/test_snakefiles.py",
    r"snakemake -n && dvc commit --force": "workflow/test_dvc.py",
    r"dvc (repro|exp run|metrics|plots|push|pull|import-url|remote modify)\b": "workflow/test_dvc.py",
    r"dvc remote add --default group (/|s3:)": "workflow/test_dvc.py",
    r"snakedeploy deploy-workflow": "workflow/test_module.py",
    r"mlflow server": "tracking/test_servers.py",
}
#: the same, and why no test runs it
NOT_RUN = {
    r"snakemake .* --sdm apptainer": "needs Apptainer and the site's image",
    r"dvc remote add .* ssh:": "needs somebody's server; folder and S3 are run",
    r"dvc exp (show|apply)": "shows and applies what `dvc exp run` made; DVC's own",
    r"dvc queue start": "starts what `dvc exp run --queue` has queued; DVC's own",
    r"dvc add": "DVC's own; `dvc import-url` is run",
    r"pip install 'git\+": "needs a public address; the same package is installed from a wheel",
}


def commands() -> list[tuple[str, str]]:
    """Page and command, without the remark after it."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            match = COMMAND.match(line) if line.startswith("    ") else None
            found += [(str(page.relative_to(ROOT)), match[1].strip())] if match else []
    return found


COMMANDS = commands()


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_is_run_by_a_test_or_listed(page: str, command: str) -> None:
    entries = [entry for entry in RUN | NOT_RUN if re.match(entry, command)]
    assert len(entries) == 1, f"{page}: {command}: {entries or 'add it to RUN or NOT_RUN'}"


def test_no_entry_is_left_over_and_every_test_is_there() -> None:
    assert len(COMMANDS) > 60
    for entry in RUN | NOT_RUN:
        assert any(re.match(entry, command) for _, command in COMMANDS), entry
    for name in RUN.values():
        assert (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize(
    ("page", "command"), [each for each in COMMANDS if not each[1].startswith(("pip", "snakedeploy", "mlflow"))]
)
def test_a_documented_command_is_understood_by_its_program(page: str, command: str) -> None:
    for part in re.split(r" && | ; |; ", command):
        program, *words = shlex.split(part.split(" > ")[0])
        if program == "make":
            targets = re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[0].split()
            assert words[0] in targets
        elif program == "dvc":
            parse_dvc(words)
        elif program == "snakemake":
            snakemake_parser().parse_args(shlex.split(re.sub(r" --profile \S+", "", shlex.join(words))))
        elif program in ("python", "consistency"):
            build_parser().parse_args(words[2:] if program == "python" else words)
