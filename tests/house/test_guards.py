"""docs/guards.md names modules and tests that exist."""

import re

import pytest
from tests.processes import ROOT

ROWS = [line.strip("| ").split(" | ") for line in (ROOT / "docs/guards.md").read_text().splitlines() if "::" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_guard_and_its_test_exist(row: list[str]) -> None:
    _, guard, tests = row
    modules = re.findall(r"`([\w/]+\.py)`", guard)
    assert modules
    assert [name for name in modules if not (ROOT / "src/consistency" / name).exists()] == []
    named = re.findall(r"`(\S+)::(\w+)`", tests)
    assert named
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
