"""Files are whole or absent, and what is cut short is named."""

import ast
from pathlib import Path

import numpy as np
import pytest
from tests.processes import SOURCE

from consistency.base.arrays import read_arrays, write_arrays
from consistency.base.errors import UserError
from consistency.base.files import atomic, read_json, write_bytes, write_json, write_with


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_text_has_an_encoding() -> None:
    # ruff's PLW1514 sees only those whose type it can tell.
    for path in Path(SOURCE).rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            words = {word.arg for word in call.keywords}
            text = getattr(call.func, "attr", "") in ("read_text", "write_text") or "text" in words
            assert "encoding" in words or not text, f"{path}, line {call.lineno}"


def test_a_file_that_the_disk_refuses_is_not_called_missing(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(path)
    with pytest.raises(UserError, match=rf"cannot read {path} \(Too many levels of symbolic links\)"):
        read_json(path, "dataset")


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_the_system_refuses_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "below"
    with pytest.raises(UserError, match=f"cannot write {path}: (File exists|Not a directory)"):
        write_bytes(path, b"x")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "Disk quota exceeded"),
        (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), "No space left on device"),
    ],
)
def test_a_full_disk_is_told_however_a_library_wraps_it(tmp_path: Path, raised: Exception, reason: str) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise raised

    with pytest.raises(UserError, match=f"{reason}. Its previous version is untouched"):
        write_with(tmp_path / "file", fail)
    assert names(tmp_path) == []


def test_other_errors_of_a_writer_are_not_disguised(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_with(tmp_path / "file", fail)


def test_json_is_sorted_so_that_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1, None]})
    write_json(tmp_path / "b.json", {"a": [1, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json", "dataset") == {"a": [1, None], "b": 1}


def test_json_that_is_missing_or_damaged_names_the_verb_that_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    with pytest.raises(UserError, match=f"{path} is missing: run `python -m consistency teacher --study FILE` first"):
        read_json(path, "teacher")
    for content in (b"", b'{"a": ', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"is damaged .*: delete it and run `python -m consistency teacher --study FILE` again"
        ):
            read_json(path, "teacher")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves a damaged archive open
@pytest.mark.parametrize("keep", [0, 3, 100, -30])
def test_arrays_that_are_cut_short_anywhere_name_the_verb_that_writes_them(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "coefficients.npz"
    write_arrays(path, {"l": np.arange(5.0), "s": np.arange(5.0)})
    assert read_arrays(path, "coefficients", "l", "s")["s"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(
        UserError,
        match=r"is damaged .*it has no array t.*: delete it and run `python .* coefficients --study FILE` again",
    ):
        read_arrays(path, "coefficients", "t")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"is damaged .*: delete it and run `python .* coefficients --study FILE` again"
    ):
        read_arrays(path, "coefficients")
