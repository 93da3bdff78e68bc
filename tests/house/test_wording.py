"""A docstring says what something does or is: a function's begins with a verb, a class's or property's with a noun."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src/consistency"
NOT_FIRST = {"What", "That", "Those", "Whether", "Where", "How"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_docstring_begins_with_a_subordinate_clause(path: Path) -> None:
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, definitions)]
    first = [((ast.get_docstring(node) or "-").split()[0], getattr(node, "name", "the module")) for node in nodes]
    assert [f"{path.name}, {name}: begins with {word}" for word, name in first if word in NOT_FIRST] == []
