"""Arrays and tables as files: written atomically, read with one clear error."""

from collections.abc import Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints
from zipfile import ZipFile

import numpy as np

from consistency.base.files import atomic, reading

if TYPE_CHECKING:
    import pandas as pd


_LONGEST_HEADER = 1 << 16  # bytes of a table's first line: pandas makes an object of each column


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


def text_columns(*rows: type) -> frozenset[str]:
    """Return the columns that hold text: the fields that the tables' rows, dataclasses, declare as str or Literal."""
    kinds = {field.name: get_type_hints(row)[field.name] for row in rows for field in fields(row)}
    return frozenset(name for name, kind in kinds.items() if kind is str or get_origin(kind) is Literal)


def read_table(path: Path, verb: str, text: Container[str]) -> "pd.DataFrame":
    """Read CSV: the columns `text` word for word, all others as numbers, where an empty cell is NaN.

    pandas alone would guess a type from a column's content, and make numbers of names such as 007 and null. A file
    without columns is an empty table. Raises UserError as `reading` does, and for a cell that should be a number.
    """
    import pandas as pd

    with reading(path, verb):
        with path.open("rb") as file:
            if len(file.readline(_LONGEST_HEADER)) == _LONGEST_HEADER:
                raise ValueError("it has no header of a table")
        try:
            columns = [str(name) for name in pd.read_csv(path, nrows=0)]
        except pd.errors.EmptyDataError:
            return pd.DataFrame()
        kinds = {name: str for name in columns if name in text}
        empty: dict[str, list[str]] = {name: [""] for name in columns if name not in text}
        table = pd.read_csv(path, dtype=kinds, na_values=empty, keep_default_na=False)
        for name in empty:
            if len(table) and not pd.api.types.is_numeric_dtype(table[name]):
                raise ValueError(f"its column {name} holds text")
    return table


def read_arrays(path: Path, verb: str, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a .npz file, which must include these names. Raises UserError as `reading` does."""
    with reading(path, verb):
        with ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, which no such file is")
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
