"""Files that other users made, and files for them: what a process may not open is said to be that."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.dangers import forbidden

from consistency.base.arrays import read_array, read_arrays, read_table, write_array, write_table
from consistency.base.errors import NoPermission, UserError
from consistency.base.files import link_file, read_json, require_output, write_with
from consistency.config.reading import load_study
from consistency.data.containers import open_folder
from consistency.data.given import read_given
from consistency.nets.checkpoint import load_given, read_metadata
from consistency.nets.edm_pickle import read_edm_pickle
from consistency.nets.openai import read_openai
from consistency.runtime.snakemake import _open
from consistency.training.state import load_state, save_state


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_umask_says(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(umask)
    try:
        write_with(tmp_path / "a", lambda path: save_file({"w": torch.zeros(1)}, path))
        save_state(tmp_path / "b", {})
        write_array(tmp_path / "c", np.zeros(1))
        write_table(tmp_path / "d", [], ["x"])
        link_file(tmp_path / "a", tmp_path / "e")
        os.close(_open())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(["a", "b", "c", "d", "e", "at-work.lock"], 0o666 & ~umask)


@pytest.mark.parametrize(
    "read",
    [
        *(
            lambda path, read=read: read(path, "teacher")
            for read in (require_output, read_json, read_array, read_arrays)
        ),
        lambda path: read_table(path, "scores", ()),
        *(read_metadata, load_state, read_openai, read_given, read_edm_pickle, load_study),
        lambda path: open_folder(path.parent).read(0),
        lambda path: load_given(path, None),
    ],
)
def test_a_missing_permission_is_said_to_be_one(read: Callable[[Path], object]) -> None:
    with TemporaryDirectory(dir="/tmp") as folder:  # pytest's own belong to one user
        Path(folder).chmod(0o755)
        path = Path(folder, "file.npy")
        path.write_bytes(b"content")
        with suppress(UserError):  # the first call imports modules, which may be root's alone
            read(path)
        with forbidden(path), pytest.raises(NoPermission, match=f"^no permission for {path}: ask its owner"):
            read(path)
