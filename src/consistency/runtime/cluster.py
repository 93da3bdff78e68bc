"""Slurm as seen from the login node: checks before any job is submitted."""

import argparse
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from consistency.base.errors import UserError


def require_cluster() -> None:
    """Raise UserError if sbatch is missing or a job of Snakemake's profile would wait for ever."""
    if shutil.which("sbatch") is None:
        raise UserError("Slurm's sbatch is not on the PATH: run this on a login node, or without --profile slurm")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--profile", action="append")
    names = parser.parse_known_args()[0].profile or [os.environ.get("SNAKEMAKE_PROFILE", "")]
    limits = partition_limits()
    for file in (Path(name, "config.yaml") for name in names):
        if file.exists():
            require_possible(file, limits)


def partition_limits(patience: float = 60.0) -> dict[str, float]:
    """Return the time limits, in minutes, of this user's partitions. Raises UserError if Slurm does not answer within
    so many seconds."""
    try:
        command = ["sinfo", "-h", "-o", "%R %l"]
        text: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, check=True, timeout=patience, **text)
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"Slurm does not answer ({said}): try again when `sinfo` does") from None
    return {name: minutes_of(limit) for name, limit in map(str.split, done.stdout.splitlines())}


def minutes_of(limit: str) -> float:
    """Convert Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS to minutes; any other word is infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (math.inf, 0, 0, 0)
    return 1440 * days + 60 * hours + minutes + seconds / 60


def require_possible(profile: Path, limits: dict[str, float]) -> None:
    """Raise UserError if a partition of the profile does not exist, or its limit is below a rule's last attempt.

    Slurm itself judges lists of name=value, expressions other than `60 * attempt`, and partitions of another cluster.
    """
    settings = yaml.safe_load(profile.read_text(encoding="utf-8")) or {}
    parts = [settings.get(key) or {} for key in ("default-resources", "set-resources")]
    if not all(isinstance(part, dict) for part in parts):  # lists of name=value
        return
    for rule, own in [("default-resources", {}), *((f"rule {rule}", own) for rule, own in parts[1].items())]:
        asked = {"slurm_partition": "", "runtime": ""} | parts[0] | own
        if asked.keys() & {"cluster", "clusters", "slurm_cluster"}:
            continue
        names = [name for name in str(asked["slurm_partition"]).split(",") if re.fullmatch(r"[\w.-]+", name)]
        if missing := set(names) - set(limits):
            there = ", ".join(limits)
            raise UserError(f"{profile}: {rule} asks for partition {min(missing)}; this cluster has {there}")
        minutes = re.fullmatch(r"(\d+)( \* attempt)?", str(asked["runtime"]))
        most = int(minutes[1]) * (1 + settings.get("retries", 0) if minutes[2] else 1) if minutes else 0
        if names and most > (longest := max(limits[name] for name in names)):
            told = f"{most} minutes, but partition {','.join(names)} gives {longest:g} at most"
            raise UserError(f"{profile}: {rule} asks for {told}: lower its runtime, or the job waits for ever")
