"""Objectives: what a student learns, each with its settings, its cost and the paper's claim. `loss` names the class of
its loss, which needs torch; a study is read without torch, whose import takes seconds."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from consistency.base.errors import suggestion
from consistency.config.distances import DISTANCES
from consistency.config.fields import Count, Positive, Section
from consistency.config.student import Frozen, Student

_AP = (
    "The paper on preconditioning (AP) claims 2 to 3 times fewer iterations at NFE 2 and none at NFE 1, by FID on "
    "CIFAR-10, FFHQ-64 and ImageNet-64, without seeds or intervals."
)
_GC = (
    "The paper on generator-induced flows (GC) compares FID against iterations at NFE 1, gc below ot below ic: on "
    "CIFAR-10 after 100,000 iterations 7.42 ± 0.04 with ic, 6.75 ± 0.04 with ot, 5.95 ± 0.05 with gc at mu 0.5 (± over "
    "five samplings of one model); mu from 0.3 to 0.7 beats both, and mu 1 is fast, then diverges."
)


class Distillation(Student):
    """The settings that both distillations share."""

    nodes: Annotated[int, Field(ge=2)] = Field(18, description="Nodes N of the time grid.")
    target: Literal["online", "ema"] = Field(
        "online", description="Weights of the target's inner jump: the student's (CTM's code) or their EMA (paper)."
    )


class WithDenoising(Student):
    """The settings of a denoising score matching (DSM) term."""

    dsm_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of the DSM term.")
    dsm_balance: Literal["fixed", "adaptive", "adaptive-block"] = Field(
        "fixed",
        description="`adaptive` multiplies the weight by the ratio of the two terms' gradient norms at the output "
        "layer, as CTM's code does on CIFAR-10; `adaptive-block` at the last convolution of the last block, as on "
        "ImageNet (for U-Nets).",
    )

    @model_validator(mode="after")
    def _balanced(self) -> Self:
        if self.balance != "fixed" and not self.dsm_weight:
            raise ValueError(f"dsm_balance {self.balance} needs a DSM term: set dsm_weight above 0")
        return self

    @property
    def balance(self) -> str:
        return self.dsm_balance


class Trajectory(Distillation, WithDenoising):
    """Keys of `objective: trajectory`, trajectory distillation (CTM, AP (7)): jumps between any two times."""

    loss: ClassVar[str] = "training.trajectory:Trajectory"
    terms: ClassVar[dict[str, str]] = {"distillation": "distillation term", "dsm": "denoising score matching term"}
    claim: ClassVar[str] = _AP
    only_to_eps: ClassVar[bool] = False

    objective: Literal["trajectory"] = "trajectory"
    max_heun_steps: Count | None = Field(
        None, description="Largest number n of teacher steps, at most N-1 (the default). P(n) is proportional to n."
    )
    dsm_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the DSM term.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.most_steps > self.nodes - 1:
            raise ValueError(f"max_heun_steps {self.max_heun_steps} is more than nodes - 1 = {self.nodes - 1}")
        return self

    @property
    def most_steps(self) -> int:
        """The largest number n of teacher steps."""
        return self.max_heun_steps or self.nodes - 1

    @property
    def evaluations(self) -> float:
        mean_steps = (2 * self.most_steps + 1) / 3  # P(n) is proportional to n
        return 2 * mean_steps + 3 + 3 + 2 + (3 if self.dsm_weight else 0)


class Endpoint(Distillation):
    """Keys of `objective: endpoint`, endpoint distillation (CM): every jump ends at eps. AP (5)."""

    loss: ClassVar[str] = "training.endpoint:Endpoint"
    terms: ClassVar[dict[str, str]] = {"distillation": "distillation term"}
    claim: ClassVar[str] = _AP

    objective: Literal["endpoint"] = "endpoint"

    @property
    def evaluations(self) -> float:
        return 2.0 + 3 + 1


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


class Consistency(WithDenoising):
    """Keys of `objective: consistency`, consistency training (iCT, ECT, GC), which needs no teacher. The papers have no
    DSM term."""

    loss: ClassVar[str] = "training.consistency_training:ConsistencyTraining"
    terms: ClassVar[dict[str, str]] = {"consistency": "consistency term", "dsm": "denoising score matching term"}
    claim: ClassVar[str] = _GC

    objective: Literal["consistency"] = "consistency"
    fit: Literal["teacher", "data", "average"] = Field(
        "teacher",
        description="What the analytic l_t and s_t are fitted from: the teacher, before any student; the mean and "
        "covariance of the data; or these at first, and the student's own average at every new stage of the curriculum "
        "(needs dsm_weight). The last two are ours.",
    )
    coupling: Literal["ic", "ot", "gc"] = Field(
        "ic",
        description="How data and noise meet: independently, by exact assignment in the batch, or on flows that the "
        "student's average induces.",
    )
    mu: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Probability that gc replaces an image by a generated one, the paper's mu; the rest is ic."
    )
    predictor: Literal["average"] | Frozen = Field(
        "average", description="What makes gc's endpoints: the student's average, or another student, frozen."
    )
    curriculum: Doubling | Shrinking = Field(Doubling(), discriminator="kind", description="Levels of the comparison.")
    start: Literal["random", "teacher"] = Field(
        "random", description="First weights: drawn by the seed, or the teacher's (ECT)."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.frozen and self.coupling != "gc":
            raise ValueError(f"predictor is for coupling gc, {self.coupling} makes no endpoints: remove it")
        if DISTANCES[self.distance].weights:
            raise ValueError(f"distance {self.distance} is for distillation: compare by pseudo_huber")
        if self.fit != "teacher" and not self.fitted:
            raise ValueError(f"fit {self.fit}: {self.preconditioning} has no l_t and s_t; use analytic or remove it")
        if self.refits and not self.dsm_weight:
            raise ValueError("fit average is of D(x, t, t), which only a DSM term trains: set dsm_weight above 0")
        if self.refits and self.frozen:
            raise ValueError("predictor has coefficients of its own, fitted at other steps: use fit: teacher or data")
        return self

    @property
    def evaluations(self) -> float:
        return 3.0 + 1 + (1 if self.coupling == "gc" and self.mu else 0) + (3 if self.dsm_weight else 0)

    @property
    def has_own_fit(self) -> bool:
        return self.fitted and self.fit != "teacher"

    @property
    def refits(self) -> bool:
        return self.fit == "average"

    @property
    def frozen(self) -> Frozen | None:
        return self.predictor if isinstance(self.predictor, Frozen) else None

    @property
    def unused_fields(self) -> set[str]:
        unused = super().unused_fields | (set() if self.fitted else {"fit"})
        unused |= set() if self.dsm_weight else {"dsm_balance"}
        return unused | (set() if self.coupling == "gc" else {"mu", "predictor"})

    @property
    def from_teacher(self) -> bool:
        return self.start == "teacher"

    @property
    def takes_s(self) -> bool:
        """True if the network takes s: only the DSM term passes an s other than eps."""
        return self.from_teacher or self.dsm_weight > 0


class FlowMap(Student):
    """Keys of `objective: flow_map`, ours: a flow map in continuous time, by the derivative of a jump instead of a
    solver (docs/flow-maps.md). One evaluation of the teacher and one derivative of the student a step."""

    loss: ClassVar[str] = "training.flow_map:FlowMap"
    terms: ClassVar[dict[str, str]] = {"flow": "flow term", "diagonal": "term at s = t"}
    only_to_eps: ClassVar[bool] = False

    objective: Literal["flow_map"] = "flow_map"
    form: Literal["lagrangian", "eulerian"] = Field(
        "lagrangian", description="Derivative by the jump's end s, or along the teacher's ODE by its start t."
    )
    diagonal: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="Share of images with s = t, on which the student is the denoiser."
    )
    diagonal_target: Literal["teacher", "data"] = Field(
        "teacher", description="What the denoiser is compared with there: the teacher's, or the image."
    )
    draw: Literal["rho", "lognormal"] = Field(
        "rho", description="t and s: two points of the rho grid's continuous form, or ln t and ln s normal(-1.1, 2)."
    )
    adaptive_power: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Each image's distance is divided by (its value + 1e-3)^p: MeanFlow's weight."
    )
    tangent_bound: Positive | None = Field(
        None, description="c: the student's derivative v is replaced by v / (|v| / c + 1), |v| its root mean square."
    )
    tangent_warm_up: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps in which the student's derivative is brought in, from 0 to its full weight."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if DISTANCES[self.distance].weights:
            raise ValueError(f"distance {self.distance} is for endpoints: compare derivatives by pseudo_huber or l2")
        return self

    @property
    def derivative(self) -> int:
        """Evaluations of a student with its derivative: two, and by the Lagrangian form the gradient of both."""
        return 2 + (4 if self.form == "lagrangian" else 2)

    @property
    def evaluations(self) -> float:
        taught = 1 if self.diagonal_target == "teacher" else 0
        return (1 - self.diagonal) * (1 + self.derivative) + self.diagonal * (taught + 3)


#: objectives by their names in a study; a new one is a class and a line here
OBJECTIVES: dict[str, type[Student]] = {
    "trajectory": Trajectory,
    "endpoint": Endpoint,
    "consistency": Consistency,
    "flow_map": FlowMap,
}


def objective_of(settings: dict[str, Any]) -> type[Student]:
    """Return the class of a student's settings, given as plain data; Student itself for an unknown objective."""
    name = settings.get("objective", Student.model_fields["objective"].default)
    return OBJECTIVES.get(name, Student) if isinstance(name, str) else Student


def _of_its_objective(given: Any, build: ValidatorFunctionWrapHandler) -> Student:
    if not isinstance(given, dict):
        return build(given)
    objective = objective_of(given)
    if objective is Student:
        name = given["objective"]
        raise ValueError(f"unknown objective {name!r}{suggestion(name, OBJECTIVES)}")
    return objective.model_validate(given)


#: a student of any objective
AnyStudent = Annotated[Student, WrapValidator(_of_its_objective)]


def merged(shared: dict[str, Any], students: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of each student: the shared ones and its own. A shared key is left out where only the objective
    of other students has it."""
    whole = {name: {**shared, **own} for name, own in students.items() if isinstance(own, dict)}
    classes = {name: objective_of(each) for name, each in whole.items()}
    known = {key for each in classes.values() for key in each.model_fields}
    for name, each in classes.items():
        others = known - each.model_fields.keys() - students[name].keys()
        whole[name] = {key: value for key, value in whole[name].items() if key not in others}
    return {**students, **whole}
