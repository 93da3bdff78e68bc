"""Study files: reading, checking, printing."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError

from consistency.base.errors import UserError, suggestion, user_error
from consistency.base.files import write_bytes
from consistency.config.explain import explain
from consistency.config.paths import SHIPPED
from consistency.config.rules import RULES
from consistency.config.study import Study

#: set to the folder of the study files as they were when the run began
KEPT = "CONSISTENCY_STUDIES"


#: characters of a file, and values in it with each alias counted as what it stands for; a long study has 5,000 and 500
_MOST_TEXT, _MOST_VALUES = 1 << 17, 20_000


def parse_yaml(text: str, path: Path) -> Any:
    """Parse the text of a file. Raises UserError with the file's name if it is not YAML, has a key twice or is too
    large."""
    try:
        if len(text) > _MOST_TEXT or _exceeds(YAML(typ="safe", pure=True).compose(text), _MOST_VALUES):
            raise UserError(
                f"{path} is too large for such a file: it may have {_MOST_VALUES:,} values, aliases counted"
            )
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: its brackets are too deep") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # Of a date that is none, a number of thousands of digits, a tag on a value of another kind.
        raise UserError(f"{path} is not valid YAML: a value cannot be read ({error})") from None
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", str(error))
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path} is not valid YAML: {' '.join(problem.split())}{where}") from None


def _exceeds(node: Any, most: int) -> bool:
    """Tell whether a tree of YAML's nodes has more than so many, an alias being its whole subtree each time."""
    waiting, count = [node], 0
    while waiting and count <= most:
        value, count = getattr(waiting.pop(), "value", None), count + 1
        if isinstance(value, list):
            waiting += [each for item in value for each in (item if isinstance(item, tuple) else (item,))]
    return count > most


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2, as `parse_yaml` reads it, takes for numbers, and PyYAML alone does not: 1e3, 08."""


_NUMBER = re.compile(r"^(0o[0-7]+|0x[0-9a-fA-F]+|[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?)$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def dump_yaml(content: Any, **options: Any) -> str:
    """Return plain data as YAML that `parse_yaml` and PyYAML read back alike, keys in their order. options: of
    PyYAML."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, **options)


def load_studies(names: Any, keep: bool) -> dict[str, Study]:
    """Read the studies of a run, a name or a list of names; keep: their files are copied, and `load_study` reads the
    copies in this process and those that it starts. Raises UserError as `load_study` does, and without a name."""
    if keep:
        os.environ.pop(KEPT, None)
    wanted = names if isinstance(names, list) else [] if names is None else [names]
    if numbers := [each for each in wanted if not isinstance(each, str)]:
        raise UserError(
            f"studies in the configuration has {numbers[0]!r}, which is not a name: write a name that looks like a "
            "number as --config studies=[2024], or in quotes in a file"
        )
    files = [Path(f"config/studies/{name}.yaml") for name in wanted]
    if not files:
        raise UserError("studies in the configuration is empty: --config studies=digits, or studies=[digits,tiny]")
    studies = {file.stem: load_study(file) for file in files}
    if keep:
        content = {file.name: file.read_bytes() for file in files}
        digest = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:16]
        folder = Path(".snakemake/studies").resolve() / digest
        for name, text in content.items():
            write_bytes(folder / name, text)
        os.environ[KEPT] = str(folder)
    return studies


def find_study(given: str | Path) -> Path:
    """Return the file of a study: the given one or, for a name where no such file exists, config/studies/NAME.yaml or
    the file that the package ships."""
    path = Path(given)
    if path.is_file() or path.name != str(given) or path.suffix in (".yaml", ".yml"):
        return path
    found = (folder / f"{given}.yaml" for folder in (Path("config/studies"), SHIPPED / "studies"))
    return next(filter(Path.is_file, found), path)


def load_study(given: str | Path) -> Study:
    """Read and check a study, a file or a name (`find_study`), or its copy in a job of a run that has kept one
    (`load_studies`).

    Raises UserError with one line that names the file, the key and what to change.
    """
    path = find_study(given)
    kept = Path(os.environ.get(KEPT, ""), path.name)
    path = kept if KEPT in os.environ and kept.is_file() else path
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        beside = sorted(each.name for each in path.parent.glob("*.yaml"))
        shipped = sorted(each.stem for each in (SHIPPED / "studies").glob("*.yaml"))
        near = suggestion(path.name, beside) if beside and path.suffix else suggestion(path.stem, shipped)
        raise UserError(f"no study file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise user_error(error, f"cannot read the study file {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values, such as `name: {path.stem}`")
    try:
        study = build_study(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if study.name != path.stem:
        raise UserError(f"{path}: the study is named {study.name!r}; its file must be {study.name}.yaml")
    return study


def build_study(content: Any) -> Study:
    """Type and check a study given as plain data. Raises UserError with the first thing that is wrong."""
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(error, Study, content=content)) from None
    for rule in RULES:
        for problem in rule(study):
            raise UserError(problem)
    return study


def print_study(study: Study) -> None:
    """Print a study with every default written out, and each of its students. Raises UserError if a file or folder that
    it names is not there."""
    print(dump_yaml(study.model_dump(mode="json")).rstrip())
    for name, student in study.students.items():
        print(f"# {name}: {student.model_dump(mode='json')}")
    dataset, teacher = study.dataset, getattr(study.teacher, "path", None)
    images = (
        os.path.join(dataset.path, dataset.split) if dataset.path and dataset.kind == "image_folder" else dataset.path
    )
    for key, path in {"dataset.path": images, "teacher.path": teacher}.items():
        if path and not os.path.exists(path):
            raise UserError(f"{key}: there is no {path}, or it cannot be read; relative paths start at {os.getcwd()}")
