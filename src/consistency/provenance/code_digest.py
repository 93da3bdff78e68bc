"""Digest of the code behind each stage.

It covers every function, class and constant reachable by name from the stage's entry points within this package.
Comments, docstrings and formatting do not change it. Imported packages are not followed: their versions belong to the
environment and are in the cards.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from consistency.config.dataset import KINDS
from consistency.config.distances import DISTANCES
from consistency.config.objectives import OBJECTIVES
from consistency.provenance.graph import STAGES

PACKAGE = "consistency"
SOURCE = Path(__file__).parents[1]

#: code that a study chooses by name, by the stage that does so
CHOSEN = {
    "dataset": tuple(f"data.sources:{kind}" for kind in KINDS),
    "student": (*(each.loss for each in OBJECTIVES.values()), *(each.function for each in DISTANCES.values())),
}

#: entry points of each stage; the settings of __main__:_prepare affect the bits of stages that compute
ENTRIES = {
    name: (*stage.entry, *CHOSEN.get(name, ()), *(() if name in ("dataset", "report") else ("__main__:_prepare",)))
    for name, stage in STAGES.items()
}

#: modules and packages that cannot change a number: starting, stopping, watching, storing and recording a run
INERT = {
    "__init__",
    "base.errors",
    "base.files",
    "base.locks",
    "base.progress",
    "config",  # settings are in the stage's key, which is compared separately
    "data.resources",  # files are identified by their digests
    "provenance.card",
    "provenance.environment",
    "provenance.code_digest",
    "provenance.graph",
    "runtime.launch",
    "runtime.slurm_job",
    "runtime.stopping",
    "runtime.supervision",
    "tracking",
    "training.shares",
    "training.stopwatch",
}

# A function, class or constant: (module, name). An empty name stands for the effects of importing the module.
Definition = tuple[str, str]


@dataclass
class Module:
    """A parsed module. imported: local name -> definition of another module, with an empty name for a whole module."""

    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Definition] = field(default_factory=dict)


@cache
def code_digest(stage: str, source: Path = SOURCE) -> str:
    """Return 16 hex digits that identify the code of a stage of Study.key; source: the package's folder.

    Raises KeyError for an unknown stage.
    """
    definitions = reached(stage, source)
    # Module names are left out: a definition that moves to another module is the same code.
    texts = sorted(_text(each) for module, name in definitions for each in parse(source, module).defined[name])
    digest = hashlib.sha256("\n".join(texts).encode())
    templates = source.glob("report/templates/*.j2") if ("report.page", "") in definitions else ()
    for path in sorted(templates):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


@cache
def reached(stage: str, source: Path = SOURCE) -> frozenset[Definition]:
    """Return every definition that a stage of Study.key can reach. Raises KeyError for an unknown stage."""
    found: set[Definition] = set()
    waiting = [entry.partition(":")[::2] for entry in ENTRIES[stage]]
    while waiting:
        module, name = waiting.pop()
        if (module, name) not in found and not is_inert(module):
            found.add((module, name))
            waiting += [(module, ""), *_mentioned(source, module, name)]
    return frozenset(found)


def is_inert(module: str) -> bool:
    """Tell whether a module, or the package that contains it, cannot change a number."""
    return module in INERT or module.partition(".")[0] in INERT


@cache
def parse(source: Path, name: str) -> Module:
    """Parse a module; name: dotted, within the package."""
    module = Module({"": []})
    for statement in ast.parse(_path(source, name).read_bytes()).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module.imported |= dict(_imports(source, statement))
            continue
        is_script = isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
        if is_script or _is_remark(statement):
            continue
        for defined in _defines(statement) or [""]:
            module.defined.setdefault(defined, []).append(statement)
    return module


def _path(source: Path, module: str) -> Path:
    path = source / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _defines(statement: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines; none if it is executed for its effect."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [node for target in targets for node in ast.walk(target)]
    # An assignment to an attribute or item, x.y = ... or x[y] = ..., is an effect.
    plain = all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.expr_context) for node in names)
    return [node.id for node in names if isinstance(node, ast.Name)] if plain else []


def _imports(source: Path, statement: ast.stmt) -> Iterator[tuple[str, Definition]]:
    """Yield (local name, definition) for each import from this package."""
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == PACKAGE:
        module = (statement.module or "").removeprefix(PACKAGE).removeprefix(".")
        for alias in statement.names:
            within = f"{module}.{alias.name}".removeprefix(".")
            is_module = _path(source, within).exists()
            yield alias.asname or alias.name, (within, "") if is_module else (module or "__init__", alias.name)


@cache
def _mentioned(source: Path, name: str, definition: str) -> frozenset[Definition]:
    """Return the definitions of this package that a definition of a module refers to."""
    module = parse(source, name)
    nodes = [node for statement in module.defined[definition] for node in ast.walk(statement)]
    imported = dict(module.imported)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            imported |= dict(_imports(source, node))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    found = {(name, word) for word in words & module.defined.keys()}
    return frozenset(found.union(*(_whole(source, *imported[word]) for word in words & imported.keys())))


def _whole(source: Path, module: str, name: str) -> set[Definition]:
    """Return the definition; all of the module's if it is referred to as a whole."""
    if name or is_inert(module):
        return {(module, name)}
    return {(module, each) for each in parse(source, module).defined}


def _dump(node: Any) -> str:
    """Return a syntax tree as text, without positions, docstrings and empty fields (they vary between Pythons)."""
    if isinstance(node, list):
        return f"[{','.join(_dump(each) for each in node if not _is_remark(each))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in parts)})"


_text = cache(_dump)  # stages share most definitions


def _is_remark(node: Any) -> bool:
    """Tell whether a node computes nothing: a docstring, or an import from this package."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == PACKAGE
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
