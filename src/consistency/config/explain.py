"""One line about what is wrong with a file, from pydantic's errors."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from consistency.base.errors import suggestion
from consistency.config.fields import Section
from consistency.config.networks import NETWORKS, GivenTeacher, NoTeacher, OfficialTeacher, Teacher
from consistency.config.objectives import OBJECTIVES, Doubling, Shrinking, objective_of
from consistency.config.student import Frozen


def explain(error: ValidationError, model: type[BaseModel], content: Any = None) -> str:
    """Return the most informative problem of a validation in one line; content: the study's file."""
    problems = error.errors()
    # An unknown key explains a missing one. Of a union, the member that fits best has the longest location.
    unknown = [each for each in problems if each["type"] == "extra_forbidden"]
    first = [each for each in problems if each["loc"][:1] == problems[0]["loc"][:1]]
    problem, prefix = max(unknown or first, key=lambda each: len(each["loc"])), ""
    location = [str(part) for part in problem["loc"]]
    student = location[:1] == ["students"]
    if problem["type"] == "value_error":
        return (f"students.{location[1]}: " if student else "") + str(problem["ctx"]["error"])
    if student and len(location) > 2 and location[2] != "[key]":
        own, shared = (content["students"].get(location[1]) or {}, content["student"]) if content else ({}, {})
        prefix = f"students.{location[1]}." if location[2] in own else "student."
        model = objective_of({**shared, **own})
        location = location[2:]
    # The member of a union is a step of pydantic's location that the file does not have.
    key = prefix + ".".join(
        part for part in location if part not in NETWORKS.keys() | _MEMBERS.keys() and not _UNION_MEMBER.search(part)
    )
    if problem["type"] == "extra_forbidden":
        others = [name for name, each in OBJECTIVES.items() if prefix and location[-1] in each.model_fields]
        if others:
            return f"{key} is for objective {' or '.join(others)}: remove it, or set that objective"
        return f"unknown key '{key}'{suggest_field(location[-1], _owner(location[:-1], model))}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    quotes = (
        ": write it in quotes"
        if problem["type"] == "string_type" and not isinstance(problem["input"], dict | list)
        else ""
    )
    return f"key '{key}': {problem['msg'][0].lower() + problem['msg'][1:]}, got {problem['input']!r}{quotes}"


# Parts that pydantic adds to a location besides keys: the member of a union, and a mark that the key is wrong.
_UNION_MEMBER = re.compile(r"^(constrained-\w+|(literal|list)\[.*\]|\[key\])$")
# The unions' members that are sections, by their discriminator.
_MEMBERS: dict[str, type[Section]] = {
    cls.model_fields["kind"].default: cls
    for cls in (Teacher, OfficialTeacher, GivenTeacher, NoTeacher, Doubling, Shrinking)
} | {"Frozen": Frozen}


def _owner(location: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section that a location leads to."""
    for part in location:
        field = model.model_fields.get(part)
        # The other option of an optional section is None.
        options = [each for each in get_args(field.annotation) if each is not type(None)] if field else []
        section = options[0] if len(options) == 1 else field.annotation if field else {**_MEMBERS, **NETWORKS}.get(part)
        if isinstance(section, type) and issubclass(section, BaseModel):
            model = section
    return model


def suggest_field(key: str, model: type[BaseModel] | None) -> str:
    """Return the nearest field of a section, or all of them."""
    return suggestion(key, model.model_fields if model else [])
