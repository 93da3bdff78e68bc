"""Section `report`."""

from typing import Annotated

from pydantic import Field

from consistency.config.fields import Count, Name, OneOf, Section
from consistency.config.objectives import OBJECTIVES


class Report(Section):
    """Comparisons in the report."""

    baseline: dict[Annotated[str, OneOf(OBJECTIVES)], Name] = Field(
        {}, description="The student against which each objective's speed-up is measured."
    )
    against: dict[Name, Name] = Field(
        {},
        description="Students measured against another one than their objective's baseline; one of another objective "
        "by network evaluations and by wall time of training.",
    )
    grid_nfe: list[Count] = Field([1, 2, 5], min_length=1, description="Numbers of jumps of the sample grids.")
