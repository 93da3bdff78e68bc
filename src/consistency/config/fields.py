"""Types of a study's fields, and the section that rejects unknown keys."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16", "float16"]
# One number for all levels of a U-Net, or a list with one for each, from full resolution down.
FewBlocks = Annotated[int, Field(ge=1, le=256)]
Blocks = FewBlocks | list[FewBlocks]
Dropout = Fraction | list[Fraction]


class Section(BaseModel):
    """A part of the study: frozen, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class OneOf:
    """Annotation of a text that must be a name of a registry, which may grow after the section is defined."""

    registry: Iterable[str]

    def check(self, name: str) -> str:
        """Return a known name; raises pydantic's error for another."""
        if name not in self.registry:
            raise PydanticCustomError("unknown_name", "input should be " + ", ".join(map(repr, self.registry)))
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.registry)}
