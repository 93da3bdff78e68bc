"""Types of a study's fields, and the section that rejects unknown keys."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16", "float16"]
# One number for all levels of a U-Net, or a list with one for each, from full resolution down.
Blocks = Count | list[Count]
Dropout = Fraction | list[Fraction]


class Section(BaseModel):
    """A part of the study: frozen, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
