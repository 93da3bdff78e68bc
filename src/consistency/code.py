"""What code a stage's result depends on: a digest that changes with that code, and not with comments or wording.

From a stage's entry points, every function, class and constant that it can reach by name, here or in another module of
the package, counts; what it says in comments, docstrings and layout does not. Imported packages are not followed:
their versions are the environment's, and stand in the cards.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "consistency"
SOURCE = Path(__file__).parent

#: where each stage of Study.key begins; what __main__ sets for all of them decides bits too
ENTRIES = {
    "dataset": ["stages.dataset:make_dataset"],
    "teacher": ["stages.teacher:make_teacher", "__main__:_prepare"],
    "coefficients": ["stages.coefficients:make_coefficients", "__main__:_prepare"],
    "extractor": ["stages.extractor:make_extractor", "__main__:_prepare"],
    "student": ["stages.student:make_student", "__main__:_prepare"],
    "samples": ["stages.samples:make_samples", "__main__:_prepare"],
    "scores": ["stages.scores:make_calibration", "stages.scores:make_scores", "__main__:_prepare"],
    "flows": ["stages.flows:make_flows", "__main__:_prepare"],
    "report": ["stages.report:make_report"],
}

#: modules and packages that cannot change a number: how a run is started, stopped, watched, stored and recorded
INERT = {
    "__init__",
    "errors",
    "files",
    "job",
    "launch",
    "layout",
    "locks",
    "progress",
    "provenance",
    "resources",  # a file has its digest, however it came
    "study",  # its settings are the stage's key, which is compared beside this
    "supervision",
    "tracking",
    "training.stopwatch",
}

#: files that are code too, by the module that reads them
TEMPLATES = {"stages.page": "templates/*.j2"}

# A function, class or constant: (module, name). An empty name is what a module does when it is imported.
Definition = tuple[str, str]


@dataclass
class Module:
    """A module taken apart. imported: what a name of another module means here, with an empty name for the module."""

    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Definition] = field(default_factory=dict)


@cache
def code_digest(stage: str, source: Path = SOURCE) -> str:
    """16 hex digits that name the code of a stage of Study.key; source: the package's folder.

    Raises KeyError for another word.
    """
    definitions = reached(stage, source)
    # Without the modules' names: a definition that moves to another module is the same code.
    texts = sorted(_text(each) for module, name in definitions for each in parse(source, module).defined[name])
    digest = hashlib.sha256("\n".join(texts).encode())
    patterns = [pattern for module, pattern in TEMPLATES.items() if (module, "") in definitions]
    for path in sorted(path for pattern in patterns for path in source.glob(pattern)):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


@cache
def reached(stage: str, source: Path = SOURCE) -> frozenset[Definition]:
    """Every definition that a stage can reach. Raises KeyError for another word than a stage of Study.key."""
    found: set[Definition] = set()
    waiting: list[Definition] = [(module, name) for module, name in (entry.split(":") for entry in ENTRIES[stage])]
    while waiting:
        module, name = waiting.pop()
        if (module, name) not in found and not is_inert(module):
            found.add((module, name))
            waiting += [(module, ""), *_mentioned(source, module, name)]
    return frozenset(found)


def is_inert(module: str) -> bool:
    """Whether it, or the package that it is in, cannot change a number."""
    return module in INERT or module.partition(".")[0] in INERT


@cache
def parse(source: Path, name: str) -> Module:
    """The module of that dotted name within the package."""
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
    """The names that a statement of a module gives a meaning; none when it is done for its effect."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [node for target in targets for node in ast.walk(target)]
    # An assignment to a part of something, x.y = ... or x[y] = ..., is an effect.
    plain = all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.expr_context) for node in names)
    return [node.id for node in names if isinstance(node, ast.Name)] if plain else []


def _imports(source: Path, statement: ast.stmt) -> Iterator[tuple[str, Definition]]:
    """(name here, definition) of what an import takes from this package."""
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == PACKAGE:
        module = (statement.module or "").removeprefix(PACKAGE).removeprefix(".")
        for alias in statement.names:
            within = f"{module}.{alias.name}".removeprefix(".")
            is_module = _path(source, within).exists()
            yield alias.asname or alias.name, (within, "") if is_module else (module or "__init__", alias.name)


@cache
def _mentioned(source: Path, name: str, definition: str) -> frozenset[Definition]:
    """The definitions of this package that a definition of a module names."""
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
    """A definition, or all of a module that is named itself."""
    if name or is_inert(module):
        return {(module, name)}
    return {(module, each) for each in parse(source, module).defined}


def _said(node: Any) -> str:
    """A syntax tree as text: without positions, docstrings, and what Python versions leave out or write as empty."""
    if isinstance(node, list):
        return f"[{','.join(_said(each) for each in node if not _is_remark(each))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(f'{name}={_said(value)}' for name, value in parts)})"


# Stages share most of what they reach.
_text = cache(_said)


def _is_remark(node: Any) -> bool:
    """Whether it says nothing of what is computed: a docstring, or where a definition of this package stands."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == PACKAGE
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
