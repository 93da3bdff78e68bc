"""Arrays and tables as files: written atomically, read with one clear error."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from consistency.base.files import atomic, reading


def read_array(path: Path, verb: str) -> np.ndarray[Any, Any]:
    """Open a memory-mapped .npy file. Raises UserError as `reading` does."""
    with reading(path, verb):
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
    return array


def write_table(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write rows as CSV atomically; a missing value is an empty cell."""
    import pandas as pd  # most stages write no table

    table = pd.DataFrame(rows, columns=columns)
    table = table.astype({"seed": "Int64"}) if "seed" in columns else table
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def read_arrays(path: Path, verb: str, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a .npz file, which must include these names. Raises UserError as `reading` does."""
    with reading(path, verb):
        with np.load(path) as arrays:
            found = dict(arrays)
        if missing := set(names) - found.keys():
            raise ValueError(f"it has no array {min(missing)}")
    return found


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write a .npy file atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:  # np.save would append .npy to a temporary name
        np.save(file, array)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write a .npz file atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
