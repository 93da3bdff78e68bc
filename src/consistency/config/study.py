"""The study as a whole: its sections, its students, and queries on them.

A study is one dataset, one teacher and the students distilled from it. The tables of config/README.md are generated
from these classes (`python -m consistency reference`).
"""

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, field_serializer, model_validator

from consistency.base.errors import UserError
from consistency.config.compute import Compute
from consistency.config.dataset import Dataset, Noise
from consistency.config.fields import Name, Section
from consistency.config.measures import Calibration, Coefficients, Flows, Sampling, Scores
from consistency.config.networks import GivenTeacher, NoTeacher, OfficialTeacher, Teacher
from consistency.config.objectives import AnyStudent, Consistency, merged
from consistency.config.report import Report
from consistency.config.student import Student


class Study(Section):
    """One dataset, one teacher, its students."""

    name: Name = Field(description="Name of the study: its file and its folder under results/.")
    title: str = Field("", description="A heading for the report.")
    dataset: Dataset
    noise: Noise = Field(default_factory=Noise)
    teacher: Teacher | OfficialTeacher | GivenTeacher | NoTeacher = Field(
        discriminator="kind", description="The EDM denoiser that is distilled, or that students are measured against."
    )
    coefficients: Coefficients = Field(default_factory=Coefficients)
    student: dict[str, Any] = Field(description="Values that all students share; the fields of Student.")
    varies: list[str] = Field(["preconditioning"], description="The keys in which two students may differ.")
    students: dict[Name, AnyStudent] = Field(min_length=1, description="Name of each student and what it varies.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="Seeds of every student.")
    sampling: Sampling
    calibration: Calibration = Field(default_factory=Calibration)
    scores: Scores
    flows: Flows | None = Field(None, description="What is measured of the couplings; without: nothing is.")
    report: Report = Field(default_factory=Report)
    compute: Compute = Field(default_factory=Compute)
    _own: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)  # each student's own keys, as in the file

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, given: Any, build: Callable[[Any], Self]) -> Self:
        """Type each student, merging the shared values with its own."""
        if isinstance(given, cls):
            return given
        match given:
            case {"student": dict(shared), "students": dict(students)}:
                study = build({**given, "students": merged(shared, students)})
                study._own = students
                return study
        return build(given)

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """The keys that each student sets itself."""
        return self._own

    @field_serializer("students")
    def _as_in_the_file(self, _: dict[str, Student]) -> dict[str, dict[str, Any]]:
        return self._own

    @property
    def taught(self) -> bool:
        """True if there is a teacher."""
        return not isinstance(self.teacher, NoTeacher)

    def require(self, name: str, seed: int) -> None:
        """Raise UserError if the study has no such student or seed."""
        if name not in self.students:
            raise UserError(f"study {self.name} has no student {name!r}; it has {', '.join(self.students)}")
        if seed not in self.seeds:
            raise UserError(f"study {self.name} has no seed {seed}; its seeds are {self.seeds}")

    @property
    def trainings(self) -> list[tuple[str, int]]:
        """Student and seed of every training."""
        return [(name, seed) for name in self.students for seed in self.seeds]

    @property
    def coupled(self) -> dict[str, Consistency]:
        """The students of consistency training."""
        return {name: student for name, student in self.students.items() if isinstance(student, Consistency)}

    @property
    def with_own_fit(self) -> list[str]:
        """The students that have coefficients of their own."""
        return [name for name, student in self.students.items() if student.has_own_fit]

    @property
    def mu_sweep(self) -> dict[str, float]:
        """Students that differ in mu alone and use their own averages, with their mu in rising order; ic has mu 0.
        Empty with fewer than three values."""
        alike: dict[str, dict[str, float]] = {}
        for name, student in self.coupled.items():
            if student.coupling != "ot" and not student.frozen:
                others = repr(student.model_dump(exclude={"coupling", "mu"}))
                alike.setdefault(others, {})[name] = student.mu if student.coupling == "gc" else 0.0
        sweep = max(alike.values(), key=lambda found: len(set(found.values())), default={})
        return dict(sorted(sweep.items(), key=lambda item: item[1])) if len(set(sweep.values())) > 2 else {}

    @property
    def needs_coefficients(self) -> bool:
        """True if a student reads the coefficients fitted from the teacher."""
        return any(student.needs_coefficients for student in self.students.values())
