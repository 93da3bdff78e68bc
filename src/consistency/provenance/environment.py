"""The commit, the packages and the machine of a result."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from consistency.runtime import slurm_job

_PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "clean-fid", "pandas"),
    *("matplotlib", "snakemake", "dvc", "mlflow"),
)


@cache
def git_state() -> dict[str, Any]:
    """Commit of the running source and whether anything differs from it; both None, with a warning, where git does not
    track the source or cannot tell."""
    state, reason = find_commit()
    if reason:
        print(f"warning: the results name no commit of the code ({reason})", file=sys.stderr, flush=True)
    return state


@cache
def find_commit() -> tuple[dict[str, Any], str]:
    """Return the same without a warning, and the reason why there is no commit, '' if there is one."""
    package = Path(__file__).parents[1]
    # A hook's GIT_DIR is another repository's, and a user's own commit must not meet a lock of ours.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        text = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        options: dict[str, Any] = {"cwd": package, "env": env, "timeout": 30, "check": True, **text}
        return str(subprocess.run(command, **options).stdout.strip())

    try:
        if git("ls-files", "*.py"):
            differs = git("status", "--porcelain", "--untracked-files=no") or git("ls-files", "--others", "*.py")
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(differs)}, ""
        reason = f"the repository around {package} does not track it: run a clone"
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(getattr(error, "stderr", "") or error).split())
    return {"commit": None, "dirty": None}, reason


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def hardware(named: bool = True) -> dict[str, Any]:
    """Host ('' unless named), processor, cores, memory and GPUs of this machine."""
    import torch

    return {
        "host": platform.node() if named else "",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "slurm_job": slurm_job.number(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
