"""Study files: reading, checking, printing."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError

from consistency.base.errors import UserError, suggestion
from consistency.config.explain import explain
from consistency.config.rules import RULES
from consistency.config.study import Study


def parse_yaml(text: str, path: Path) -> Any:
    """Parse the text of a file. Raises UserError with the file's name if it is not YAML or has a key twice."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", str(error))
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path} is not valid YAML: {' '.join(problem.split())}{where}") from None


def load_study(path: str | Path) -> Study:
    """Read and check a study file. Raises UserError with one line that names the file, the key and what to change."""
    path = Path(path)
    try:
        content = parse_yaml(path.read_text(), path)
    except FileNotFoundError:
        raise UserError(
            f"no study file {path}{suggestion(path.name, sorted(each.name for each in path.parent.glob('*.yaml')))}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the study file {path}: {error}") from None
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
    """Print a study with every default written out, and each of its students."""
    print(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False).rstrip())
    for run, student in study.students.items():
        print(f"# {run}: {student.model_dump(mode='json')}")
