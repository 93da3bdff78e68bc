"""The settings that every student has. Those of an objective are in objectives.py."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from consistency.config.distances import DISTANCES
from consistency.config.fields import Count, Dropout, Fraction, Name, OneOf, Positive, Precision, Section
from consistency.theory.preconditioning import FORMS


class Frozen(Section):
    """gc's endpoints from a previously trained student of the same seed, instead of the student's own average."""

    run: Name = Field(description="The name of that student.")
    step: Count | None = Field(None, description="Its snapshot at that step; without: its final weights.")


class Student(Section):
    """One student, whatever its objective. The study's `student` section gives the values that all share. An entry of
    `students` may replace only the keys listed in `varies`."""

    #: the loss, "module:class" of this package; its `build` is called with these settings
    loss: ClassVar[str]
    #: titles of the loss's terms
    terms: ClassVar[dict[str, str]]
    #: a paper's claim about such students, one sentence
    claim: ClassVar[str] = ""
    #: True if the student only jumps to eps, so that further jumps need fresh noise between them
    only_to_eps: ClassVar[bool] = True

    objective: str = Field(
        "trajectory", description="What the student learns. Each objective has keys of its own: a table below."
    )
    preconditioning: Annotated[str, OneOf(FORMS)] = Field(
        "ctm", description="f(t,s) and g(t,s). `midpoint` and `centred` are ours, not the papers'."
    )
    theta: float = Field(
        0.5, ge=0, le=1, description="Weight of h at s in the midpoint forms: 0 is the forward form, 1 the backward."
    )
    distance: Annotated[str, OneOf(DISTANCES)] = Field(
        "pseudo_huber", description="Distance between the two endpoints; `lpips` downloads the weights of VGG16."
    )
    optimizer: Annotated[str, OneOf(("radam", "adam", "lion"))] = Field(
        "radam", description="Optimiser, without weight decay."
    )
    steps: Count = Field(description="Optimiser steps.")
    batch: Count = Field(description="Images a step.")
    learning_rate: Positive = Field(4e-4, description="Learning rate, of the first step if it decays.")
    learning_rate_decay: Literal["none", "cosine"] = Field(
        "none", description="`cosine` brings the rate to zero by half a cosine over all steps."
    )
    ema_rate: Fraction = Field(0.999, description="EMA of target and evaluation, per step.")
    ema_warm_up: Positive | None = Field(
        None, description="The rates are at most 1 - step^-ema_warm_up, so that first weights leave no trace."
    )
    evaluation_ema: list[Fraction] = Field([], description="Further EMA rates that are kept and scored beside it.")
    precision: Precision = Field(
        "float32", description="Arithmetic of the networks in training; preconditioning and losses stay in float32."
    )
    dropout: Dropout = Field(0.0, description="Dropout of the student's network; a list: one for each level.")
    snapshot_every: Count = Field(description="Steps between snapshots of the EMA, the points of the learning curves.")
    log_every: Count = Field(50, description="Steps a line of history.jsonl; the state is saved at these steps.")

    @model_validator(mode="after")
    def _common(self) -> Self:
        if FORMS[self.preconditioning].only_to_eps and not self.only_to_eps:
            raise ValueError(
                f"preconditioning {self.preconditioning!r} is defined for s = eps only: use it with objective: endpoint"
            )
        if FORMS[self.preconditioning].centred and self.only_to_eps:
            raise ValueError(
                f"preconditioning {self.preconditioning!r} is for jumps between any two times: use it with objective: "
                "trajectory"
            )
        if self.steps % self.snapshot_every:
            raise ValueError(f"snapshot_every {self.snapshot_every} does not divide steps {self.steps}: use a divisor")
        if self.snapshot_every % self.log_every:
            raise ValueError(
                f"log_every {self.log_every} does not divide snapshot_every {self.snapshot_every}: use a divisor"
            )
        if len({self.ema_rate, *self.evaluation_ema}) < 1 + len(self.evaluation_ema):
            raise ValueError("evaluation_ema lists a rate twice, or ema_rate, which is evaluated anyway: remove it")
        return self

    @property
    def evaluations(self) -> float:
        """Mean network evaluations of an image in a step; a backward pass counts as 2."""
        raise NotImplementedError

    @property
    def fitted(self) -> bool:
        """True if f and g are made from fitted coefficients."""
        return FORMS[self.preconditioning].fitted

    @property
    def needs_coefficients(self) -> bool:
        """True if the student reads the coefficients fitted from the teacher."""
        return self.fitted and not self.has_own_fit

    @property
    def has_own_fit(self) -> bool:
        """True if l_t and s_t are fitted without the teacher and kept beside the student's weights."""
        return False

    @property
    def refits(self) -> bool:
        """True if l_t and s_t are fitted again during the training."""
        return False

    @property
    def frozen(self) -> Frozen | None:
        """The earlier student that makes gc's endpoints, None without one."""
        return None

    @property
    def rates(self) -> tuple[float | None, ...]:
        """EMA rates that are kept and scored, as in file names: None for the main one."""
        return (None, *self.evaluation_ema)

    @property
    def snapshots(self) -> range:
        """Steps of the snapshots, the start included."""
        return range(0, self.steps + 1, self.snapshot_every)

    @property
    def unused_fields(self) -> set[str]:
        """Fields that have no effect on this student."""
        form = FORMS[self.preconditioning]
        return set() if form.fitted and form.theta is None else {"theta"}

    @property
    def from_teacher(self) -> bool:
        """True if the student begins from the teacher's weights."""
        return True

    @property
    def takes_s(self) -> bool:
        """True if the network takes s."""
        return True

    @property
    def balance(self) -> str:
        """Scale of the DSM term, a value of `dsm_balance`."""
        return "fixed"
