"""The rooms of the package: their order, their sentences, and the picture of them in docs/architecture.md."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tests.processes import ROOT

from consistency import ROOMS

SOURCE = ROOT / "src/consistency"


def modules(source: Path) -> dict[str, Path]:
    """The package's modules by dotted name; a room's is that of its __init__.py."""
    paths = {
        path.relative_to(source).with_suffix("").as_posix().replace("/", "."): path for path in source.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("consistency") for name in node.names), f"{path}: import by `from`"
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by full name"
            if (node.module or "").split(".")[0] == "consistency":
                inner = (node.module or "").removeprefix("consistency").lstrip(".")
                names = (f"{inner}.{name.name}".lstrip(".") for name in node.names)
                yield from (name if name in known else inner for name in names)


def upward(source: Path) -> list[str]:
    """Imports that lead from a room to one above it."""
    known = modules(source)
    pairs = [(name, other) for name, path in known.items() for other in imports(path, known) if other]
    rooms = [(name, other, name.split(".")[0], other.split(".")[0]) for name, other in pairs]
    return [
        f"{name} -> {other}"
        for name, other, room, below in rooms
        if room in ROOMS and (below not in ROOMS or ROOMS.index(below) > ROOMS.index(room))
    ]


def test_every_module_lies_in_a_room() -> None:
    # The commands and the Python interface are the package's two doors: they use every room, and none uses them.
    assert {name.split(".")[0] for name in modules(SOURCE)} == {*ROOMS, "__main__", "api"}
    assert len(ROOMS) <= 12


def test_no_import_leads_upward() -> None:
    assert upward(SOURCE) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules(SOURCE)
    graph = {name: {other for other in imports(path, known) if other} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("theory/noise.py", "from consistency.nets.denoiser import Denoiser"),
        ("config/study.py", "from consistency.training import loop"),
        ("base/files.py", "def late():\n    from consistency.config.study import Study"),
        ("stages/teacher.py", "from consistency.__main__ import main"),
    ],
)
def test_a_planted_upward_import_is_found(package: Path, name: str, line: str) -> None:
    file = package / name
    file.write_text(f"{file.read_text()}\n\n{line}\n")
    (found,) = upward(package)
    assert found.startswith(name.removesuffix(".py").replace("/", "."))


def test_the_page_on_the_architecture_has_the_rooms_in_order() -> None:
    lines = (ROOT / "docs/architecture.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    said = {room: ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text())) for room in ROOMS}
    assert [(room.strip("`"), sentence) for room, sentence in rows] == list(said.items())
