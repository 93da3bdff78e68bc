"""Sections `student` and `students`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from consistency.config.fields import Count, Dropout, Fraction, Name, Positive, Precision, Section

# Preconditionings that read the fitted coefficients, and where each may be used.
FITTED = ("analytic", "analytic-forward")


class Doubling(Section):
    """iCT's levels: neighbours of a grid whose intervals double during training."""

    kind: Literal["doubling"] = "doubling"
    first: Count = Field(10, description="Intervals of the first grid.")
    last: Count = Field(1280, description="Intervals of the last grid.")
    p_mean: float = Field(-1.1, description="Mean of ln sigma, by which levels are drawn.")
    p_std: Positive = Field(2.0, description="Standard deviation of ln sigma.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"curriculum.first {self.first} is more than curriculum.last {self.last}: raise last")
        return self


class Shrinking(Section):
    """ECT's levels: ln t is normal, and the second level approaches t during training."""

    kind: Literal["shrinking"] = "shrinking"
    double_every: Count = Field(description="Steps until the next stage; the ratio of the levels nears 1 by q.")
    p_mean: float = Field(-1.1, description="Mean of ln t.")
    p_std: Positive = Field(2.0, description="Standard deviation of ln t.")
    q: Annotated[float, Field(gt=1)] = Field(2.0, description="ECT's q.")
    k: Annotated[float, Field(ge=0)] = Field(8.0, description="ECT's k.")
    b: Positive = Field(1.0, description="ECT's b.")


class Frozen(Section):
    """gc's endpoints from a previously trained student of the same seed, instead of the student's own average."""

    run: Name = Field(description="The name of that student.")
    step: Count | None = Field(None, description="Its snapshot at that step; without: its final weights.")


class Student(Section):
    """One student. The study's `student` section gives the values that all share. An entry of `students` may replace
    only the keys listed in `varies`."""

    objective: Literal["trajectory", "endpoint", "consistency"] = Field(
        "trajectory",
        description="Trajectory distillation (CTM + DSM), endpoint distillation (CM), or consistency training, which "
        "needs no teacher (iCT, ECT).",
    )
    preconditioning: Literal["cm", "bcm", "ctm", "analytic", "analytic-forward"] = Field(
        "ctm", description="f(t,s) and g(t,s)."
    )
    fit: Literal["teacher", "data", "average"] = Field(
        "teacher",
        description="What the analytic l_t and s_t are fitted from: the teacher, before any student; the mean and "
        "covariance of the data; or these at first, and the student's own average at every new stage of the curriculum "
        "(needs dsm_weight). The last two are ours, for consistency training.",
    )
    nodes: Annotated[int, Field(ge=2)] = Field(18, description="Nodes N of the time grid.")
    max_heun_steps: Count | None = Field(
        None, description="Largest number n of teacher steps, at most N-1 (the default). P(n) is proportional to n."
    )
    distance: Literal["pseudo_huber", "l2", "euclidean", "lpips"] = Field(
        "pseudo_huber", description="Distance between the two endpoints; `lpips` downloads the weights of VGG16."
    )
    coupling: Literal["ic", "ot", "gc"] = Field(
        "ic",
        description="How data and noise meet (consistency only): independently, by exact assignment in the batch, or "
        "on flows that the student's average induces.",
    )
    mu: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Probability that gc replaces an image by a generated one, the paper's mu; the rest is ic."
    )
    predictor: Literal["average"] | Frozen = Field(
        "average", description="What makes gc's endpoints: the student's average, or another student, frozen."
    )
    curriculum: Doubling | Shrinking = Field(
        Doubling(), discriminator="kind", description="Levels of consistency training."
    )
    start: Literal["random", "teacher"] = Field(
        "random", description="First weights in consistency training: drawn by the seed, or the teacher's (ECT)."
    )
    target: Literal["online", "ema"] = Field(
        "online", description="Weights of the target's inner jump: the student's (CTM's code) or their EMA (paper)."
    )
    dsm_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of the DSM term; none in endpoint distillation; in consistency training 0 unless given.",
    )
    dsm_balance: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="`adaptive` multiplies the weight by the ratio of the two terms' gradient norms at the last layer, "
        "as CTM's code does.",
    )
    optimizer: Literal["radam", "adam", "lion"] = Field("radam", description="Optimiser, without weight decay.")
    steps: Count = Field(description="Optimiser steps.")
    batch: Count = Field(description="Images a step.")
    learning_rate: Positive = Field(4e-4, description="Constant learning rate.")
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

    @model_validator(mode="before")
    @classmethod
    def _without_dsm(cls, given: Any) -> Any:
        """Turn off the DSM term in consistency training unless it is asked for: the papers have none."""
        consistency = isinstance(given, dict) and given.get("objective") == "consistency"
        return {"dsm_weight": 0.0, **given} if consistency else given

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._check_fit()
        if self.objective != "consistency":
            given = self.model_fields_set & {"coupling", "mu", "predictor", "curriculum", "start"}
            if given:
                raise ValueError(f"{min(given)} is for consistency training: use it with objective: consistency")
        elif isinstance(self.predictor, Frozen) and self.coupling != "gc":
            raise ValueError(f"predictor is for coupling gc, {self.coupling} makes no endpoints: remove it")
        elif self.distance == "lpips":
            raise ValueError("distance lpips is for distillation: consistency training compares by pseudo_huber")
        if self.preconditioning == "cm" and self.objective == "trajectory":
            raise ValueError("preconditioning 'cm' is defined for s = eps only: use it with objective: endpoint")
        if self.max_heun_steps is not None and self.max_heun_steps > self.nodes - 1:
            raise ValueError(f"max_heun_steps {self.max_heun_steps} is more than nodes - 1 = {self.nodes - 1}")
        if self.steps % self.snapshot_every:
            raise ValueError(f"snapshot_every {self.snapshot_every} does not divide steps {self.steps}")
        if self.snapshot_every % self.log_every:
            raise ValueError(f"log_every {self.log_every} does not divide snapshot_every {self.snapshot_every}")
        if len({self.ema_rate, *self.evaluation_ema}) < 1 + len(self.evaluation_ema):
            raise ValueError("evaluation_ema lists a rate twice, or ema_rate itself, which is evaluated anyway")
        if self.dsm_balance == "adaptive" and self.objective != "endpoint" and not self.dsm_weight:
            raise ValueError("dsm_balance adaptive needs a DSM term: set dsm_weight above 0")
        return self

    def _check_fit(self) -> None:
        if self.fit == "teacher":
            return
        if self.objective != "consistency":
            raise ValueError(f"fit {self.fit} is for consistency training: use it with objective: consistency")
        if self.preconditioning not in FITTED:
            raise ValueError(f"fit {self.fit}: {self.preconditioning} has no l_t and s_t; use analytic or remove it")
        if self.fit == "average" and not self.dsm_weight:
            raise ValueError("fit average is of D(x, t, t), which only a DSM term trains: set dsm_weight above 0")
        if self.fit == "average" and isinstance(self.predictor, Frozen):
            raise ValueError("predictor has coefficients of its own, fitted at other steps: use fit: teacher or data")

    @property
    def needs_coefficients(self) -> bool:
        """True if the student reads the coefficients fitted from the teacher."""
        return self.preconditioning in FITTED and self.fit == "teacher"

    @property
    def has_own_fit(self) -> bool:
        """True if l_t and s_t are fitted without the teacher and kept beside the student's weights."""
        return self.preconditioning in FITTED and self.fit != "teacher"

    @property
    def frozen(self) -> Frozen | None:
        """The earlier student that makes gc's endpoints, None without one."""
        return self.predictor if isinstance(self.predictor, Frozen) else None

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
        fit = set() if self.preconditioning in FITTED else {"fit"}
        coupled = {"coupling", "mu", "predictor", "curriculum", "start"}
        if self.objective == "trajectory":
            return fit | coupled
        if self.objective == "endpoint":
            return fit | coupled | {"max_heun_steps", "dsm_weight", "dsm_balance"}
        without = set() if self.dsm_weight else {"dsm_balance"}
        own = set() if self.coupling == "gc" else {"mu", "predictor"}
        return fit | without | own | {"max_heun_steps", "nodes", "target"}

    @property
    def from_teacher(self) -> bool:
        """True if the student begins from the teacher's weights."""
        return self.objective != "consistency" or self.start == "teacher"

    @property
    def takes_s(self) -> bool:
        """True if the network takes s. In consistency training only the DSM term passes an s other than eps."""
        return self.from_teacher or self.dsm_weight > 0

    @property
    def only_to_eps(self) -> bool:
        """True if the student only jumps to eps, so that further jumps need fresh noise between them."""
        return self.objective != "trajectory"
