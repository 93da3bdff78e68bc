"""The typed study: every field with its unit, range and default. Unknown keys are errors with a suggestion.

A study is one dataset, one teacher and the students distilled from it. The field reference, config/studies/README.md,
is generated from these classes (`python -m consistency reference`).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator
from ruamel.yaml import YAML, YAMLError

from consistency.errors import UserError, suggestion

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16", "float16"]
# One number for all levels of a U-Net, or a list with one for each, from full resolution down.
Blocks = Count | list[Count]
Dropout = Fraction | list[Fraction]

# Preconditionings that read the fitted coefficients, and where each may be used.
FITTED = ("analytic", "analytic-forward")


class Section(BaseModel):
    """A part of the study: frozen, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(Section):
    """Source of the images, and the shape they are brought to."""

    kind: Literal["digits", "image_folder", "cifar10", "ffhq", "imagenet", "celeba", "edm_zip"] = Field(
        description="`digits`: the 1,797 UCI 8x8 images that come with scikit-learn; "
        "`image_folder`: a tree `<path>/<split>/<class>/*.{png,jpg}`; "
        "`cifar10`: its archive, downloaded, or `path` (the archive or the folder cifar-10-batches-py); "
        "`ffhq`: the official aligned images, a folder or a zip; "
        "`imagenet`: the ILSVRC2012 training set, its tree or its tar; "
        "`celeba`: img_align_celeba, a folder or a zip, and list_eval_partition.txt in or beside it; "
        "`edm_zip`: the zip of PNGs with dataset.json that EDM's dataset tool writes."
    )
    path: str | None = Field(
        None, description="Where the images are: a folder, zip or tar; relative paths start at the project's root."
    )
    split: Name = Field(
        "train",
        description="Which part to read: of an image folder any, of cifar10 `train` or `test`, of celeba `train`, "
        "`valid` or `test`.",
    )
    resolution: Count = Field(
        description="Side of the square images, pixels. Others are cropped (not FFHQ's, which are square) and resized."
    )
    channels: Literal[1, 3] = Field(description="1 for grey, 3 for RGB.")
    limit: Count | None = Field(None, description="Use only so many images of each class, the first in sorted order.")
    horizontal_flip: bool = Field(False, description="Mirror each training image with probability 1/2.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        size, channels = {"digits": (8, 1), "cifar10": (32, 3)}.get(self.kind, (self.resolution, self.channels))
        if (self.resolution, self.channels) != (size, channels):
            raise ValueError(f"{self.kind}: set dataset.resolution to {size} and dataset.channels to {channels}")
        if self.kind == "digits" and self.path is not None:
            raise ValueError("dataset.path is for other kinds; the digits come with scikit-learn")
        if self.kind not in ("digits", "cifar10") and self.path is None:
            raise ValueError(f"dataset.path is missing: {self.kind} needs to know where the images are")
        splits = {"cifar10": ["train", "test"], "celeba": ["train", "valid", "test"]}.get(self.kind, [self.split])
        if self.split not in splits:
            raise ValueError(f"dataset.split {self.split!r}: {self.kind} has the splits {', '.join(splits)}")
        return self


class Noise(Section):
    """The range of noise levels, shared by teacher, students and samplers."""

    sigma_min: Positive = Field(0.002, description="Smallest time eps, where a trajectory ends.")
    sigma_max: Positive = Field(80.0, description="Largest time T, where a trajectory starts.")
    rho: Positive = Field(7.0, description="Exponent of the time grids.")
    sigma_data: Positive | Literal["measured"] = Field(
        0.5, description="Standard deviation of the data in [-1, 1] units, or `measured` to take the dataset's own."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError("noise.sigma_min must be smaller than noise.sigma_max")
        return self


class SongUNet(Section):
    """DDPM++ or NCSN++, with the official parameter names."""

    kind: Literal["songunet"] = "songunet"
    variant: Literal["ddpmpp", "ncsnpp"] = Field("ddpmpp", description="DDPM++ (the -vp teachers) or NCSN++ (-ve).")
    model_channels: Count = Field(128, description="Channels at full resolution before the multiplier.")
    channel_mult: list[Count] = Field([2, 2, 2], min_length=1, description="Channel multiplier of each level.")
    num_blocks: Blocks = Field(4, description="Residual blocks a level; a list: one number for each level.")
    attn_resolutions: list[Count] = Field(
        [16], description="Resolutions with self-attention, pixels; the decoder's first block always has it."
    )
    dropout: Dropout = Field(0.13, description="Dropout probability; a list: one for each level.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key in ("num_blocks", "dropout"):
            for problem in self.wrong_levels(f"teacher.network.{key}", getattr(self, key)):
                raise ValueError(problem)
        return self

    def wrong_levels(self, key: str, value: float | list[int] | list[float]) -> Iterator[str]:
        """Yield a message that names the key, if its list is not as long as channel_mult."""
        if isinstance(value, list) and len(value) != len(self.channel_mult):
            levels = len(self.channel_mult)
            yield f"{key} lists {len(value)} levels, teacher.network.channel_mult {levels}: give as many"


class MLP(Section):
    """A residual multi-layer perceptron for vectors up to a few hundred dimensions."""

    kind: Literal["mlp"] = "mlp"
    width: Count = Field(256, description="Units a layer.")
    depth: Count = Field(4, description="Residual blocks.")
    embedding: Count = Field(64, description="Size of the noise embedding.")
    dropout: Fraction = Field(0.0, description="Dropout probability.")


class Teacher(Section):
    """The EDM denoiser that is distilled, trained on the dataset."""

    kind: Literal["trained"] = "trained"
    network: SongUNet | MLP = Field(discriminator="kind", description="The network inside the denoiser.")
    conditional: bool = Field(False, description="Condition on the class.")
    steps: Count = Field(description="Optimiser steps.")
    batch: Count = Field(description="Images a step.")
    learning_rate: Positive = Field(1e-3, description="Adam's learning rate after the ramp.")
    learning_rate_ramp: Annotated[int, Field(ge=0)] = Field(0, description="Linear ramp of the rate, images.")
    p_mean: float = Field(-1.2, description="Mean of ln sigma in the loss.")
    p_std: Positive = Field(1.2, description="Standard deviation of ln sigma in the loss.")
    ema_half_life: Positive = Field(500_000, description="Half-life of the weight average, images.")
    ema_ramp_up: Positive = Field(0.05, description="The half-life is at most this share of the images seen.")
    seed: int = Field(0, description="Seed of weights, data order and noise.")
    log_every: Count = Field(100, description="Steps a line of history.jsonl; the state is saved at these steps.")


class OfficialTeacher(Section):
    """An official EDM checkpoint, downloaded and converted."""

    kind: Literal["edm"] = "edm"
    checkpoint: Name = Field(description="Its file name in config/resources.yaml: edm-cifar10-32x32-uncond-vp.pkl, ...")
    conditional: bool = Field(False, description="Whether it is conditioned on the class; must agree with the file.")


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


class NoTeacher(Section):
    """No teacher: only the network of the students of consistency training. No measurement uses a teacher."""

    kind: Literal["none"] = "none"
    network: SongUNet | MLP = Field(discriminator="kind", description="The network inside the students.")
    conditional: bool = Field(False, description="Condition on the class.")


class Coefficients(Section):
    """The fit of l_t and s_t."""

    times: Annotated[int, Field(ge=8)] = Field(120, description="Log-spaced times from sigma_min to sigma_max.")
    samples: Annotated[int, Field(ge=2)] = Field(4096, description="Noised training images a time.")
    probes: Count | Literal["exact"] = Field(
        4, description="Rademacher probes an image for the trace, or `exact` (one JVP a dimension)."
    )
    batch: Count = Field(512, description="Images an evaluation.")
    precision: Literal["float32", "float64"] = Field("float32", description="Arithmetic of the network.")
    seed: int = Field(0, description="Seed of images, noise and probes.")


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
    def carries_fit(self) -> bool:
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
    def idle(self) -> set[str]:
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
    def second_time(self) -> bool:
        """True if the network takes s. In consistency training only the DSM term passes an s other than eps."""
        return self.from_teacher or self.dsm_weight > 0

    @property
    def to_the_end(self) -> bool:
        """True if the student only jumps to eps, so that further jumps need fresh noise between them."""
        return self.objective != "trajectory"


class Churn(Section):
    """The stochastic part of EDM's sampler: before each step, noise is raised from t to t (1 + gamma),
    gamma = min(s_churn / N, sqrt(2) - 1) while s_min <= t <= s_max."""

    s_churn: Positive = Field(description="Total amount of added noise.")
    s_min: Annotated[float, Field(ge=0)] = Field(0.0, description="Smallest time with added noise.")
    s_max: Positive = Field(1e9, description="Largest time with added noise.")
    s_noise: Positive = Field(1.0, description="Standard deviation of the added noise.")


class Sampling(Section):
    """Samples kept and scored at the end of training. Image i always comes from seed i."""

    count: Count = Field(description="Images a sampler, from seeds 0 to count-1.")
    nfe: list[Count] = Field([1, 2, 3, 5, 8], min_length=1, description="Numbers of jumps.")
    gamma: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [], description="Further samplers with fresh noise between jumps; 1 is CM's multistep sampler."
    )
    gamma_nfe: list[Count] = Field([2], description="Numbers of jumps of the gamma samplers.")
    precision: Precision = Field(
        "float32", description="Arithmetic of the networks; with churn the sampler's state is float64."
    )
    batch: Count = Field(512, description="Images an evaluation (changes nothing but speed and memory).")


class Calibration(Section):
    """The teacher's own samples, scored before any student is trained. No student's result depends on it."""

    steps: Annotated[int, Field(ge=2)] = Field(18, description="Heun steps N of the teacher, NFE 2N-1.")
    churn: Churn | None = Field(None, description="Added noise of the teacher's sampler; without: the ODE.")
    published_fid: Positive | None = Field(
        None, description="The teacher's published FID. If ours is off, the study stops before any student is trained."
    )
    tolerance: Positive = Field(0.1, description="By how much it may be off, FID.")


class Classifier(Section):
    """The small CNN that is trained on the dataset and whose features stand in for Inception's."""

    features: Annotated[int, Field(ge=8)] = Field(64, description="Dimension of the features.")
    steps: Count = Field(600, description="Optimiser steps.")
    batch: Count = Field(128, description="Images a step.")
    learning_rate: Positive = Field(2e-3, description="Adam's peak learning rate.")
    seed: int = Field(0, description="Seed of weights and data order.")


class Scores(Section):
    """Measurements on samples."""

    extractor: Literal["classifier", "inception"] = Field(
        "inception",
        description="Features of FD and KID: Inception (this is FID) or the dataset's classifier (not FID).",
    )
    mode: Literal["legacy_tensorflow", "clean"] = Field(
        "legacy_tensorflow", description="clean-fid's resizing mode, for inception."
    )
    classifier: Classifier = Field(default_factory=Classifier, description="Settings of the classifier.")
    curve_nfe: list[Count] = Field([1, 2, 3], min_length=1, description="Numbers of jumps of the learning curves.")
    curve_count: Count = Field(description="Images a point of the learning curves.")
    kid_images: Count = Field(50_000, description="Images of the data, at most, whose features are kept for KID.")
    kid_subsets: Count = Field(100, description="Subsets of KID.")
    kid_subset_size: Annotated[int, Field(ge=2)] = Field(1000, description="Images a subset of KID.")
    alignment_count: Count = Field(512, description="Noises of the alignment error.")
    alignment_nodes: Annotated[int, Field(ge=2)] = Field(80, description="Heun nodes of the reference ODE endpoint.")


class Flows(Section):
    """Measurements on the couplings of consistency training (GC): transport cost, the toy, the theorem."""

    images: Annotated[int, Field(ge=2)] = Field(2048, description="Images of the transport cost, at most the data's.")
    times: Annotated[int, Field(ge=2)] = Field(24, description="Times of the transport cost, a rho grid.")
    toy_steps: Count = Field(4000, description="Optimiser steps of the toy in the plane; 25 s of CPU for 4,000.")
    toy_seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="Seeds of the toy.")
    pairs: Annotated[int, Field(ge=2)] = Field(
        4096, description="Pairs of the velocity discrepancy on the toy's data, each of 4 times."
    )
    intervals: Annotated[int, Field(ge=10)] = Field(1280, description="The finest grid of the theorem, from 10 on.")
    discrepancy: list[Name] = Field(
        [], description="Students for whose coupling a denoiser is trained, to measure R_t on the images (first seed)."
    )
    denoiser_steps: Count = Field(6000, description="Optimiser steps of each.")
    denoiser_batch: Count = Field(256, description="Images a step.")
    denoiser_learning_rate: Positive = Field(1e-3, description="Adam's learning rate.")
    seed: int = Field(0, description="Seed of images, pairs, noise and denoisers.")


class Report(Section):
    """Comparisons in the report."""

    baseline: dict[Literal["trajectory", "endpoint", "consistency"], Name] = Field(
        {}, description="The student against which each objective's speed-up is measured."
    )
    against: dict[Name, Name] = Field(
        {}, description="Students measured against another one than their objective's baseline."
    )
    grid_nfe: list[Count] = Field([1, 2, 5], min_length=1, description="Numbers of jumps of the sample grids.")
    bootstrap: Count = Field(2000, description="Resamples of the intervals.")


class Compute(Section):
    """Use of the machine. Nothing here is part of a result's key: it may change during a training and then alters only
    the last bits of what follows."""

    batch_per_device: Count | None = Field(
        None, description="Images a device at once; the study's batch is kept by accumulation. Without: all at once."
    )
    channels_last: bool = Field(False, description="Memory layout NHWC inside the networks, faster on GPUs.")
    compile: bool = Field(False, description="Compile the networks with torch.compile: minutes at first, then faster.")
    data_on_device: bool | None = Field(
        None, description="Keep the whole dataset in the GPU's memory. Without: if it takes less than a 16th of it."
    )


class Study(Section):
    """One dataset, one teacher, its students."""

    name: Name = Field(description="Name of the study: its file and its folder under results/.")
    title: str = Field("", description="A heading for the report.")
    dataset: Dataset
    noise: Noise = Field(default_factory=Noise)
    teacher: Teacher | OfficialTeacher | NoTeacher = Field(
        discriminator="kind", description="The EDM denoiser that is distilled, or that students are measured against."
    )
    coefficients: Coefficients = Field(default_factory=Coefficients)
    student: dict[str, Any] = Field(description="Values that all students share; the fields of Student.")
    varies: list[str] = Field(["preconditioning"], description="The keys in which two students may differ.")
    students: dict[Name, Student] = Field(min_length=1, description="Name of each student and what it varies.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="Seeds of every student.")
    sampling: Sampling
    calibration: Calibration = Field(default_factory=Calibration)
    scores: Scores
    flows: Flows | None = Field(None, description="What is measured of the couplings; without: nothing is.")
    report: Report = Field(default_factory=Report)
    compute: Compute = Field(default_factory=Compute)
    _own: dict[str, dict[str, Any]] = {}  # each student's own keys, as in the file

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, given: Any, build: Callable[[Any], Self]) -> Self:
        """Type each student, merging the shared values with its own."""
        if isinstance(given, cls):
            return given
        match given:
            case {"student": dict(shared), "students": dict(students)}:
                whole = {run: {**shared, **own} if isinstance(own, dict) else own for run, own in students.items()}
                study = build({**given, "students": whole})
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

    def require(self, run: str, seed: int) -> None:
        """Raise UserError if the study has no such student or seed."""
        if run not in self.students:
            raise UserError(f"study {self.name} has no student {run!r}; it has {', '.join(self.students)}")
        if seed not in self.seeds:
            raise UserError(f"study {self.name} has no seed {seed}; its seeds are {self.seeds}")

    @property
    def trainings(self) -> list[tuple[str, int]]:
        """Student and seed of every training."""
        return [(run, seed) for run in self.students for seed in self.seeds]

    @property
    def coupled(self) -> dict[str, Student]:
        """The students of consistency training."""
        return {run: student for run, student in self.students.items() if student.objective == "consistency"}

    @property
    def carrying(self) -> list[str]:
        """The students that carry coefficients of their own."""
        return [run for run, student in self.students.items() if student.carries_fit]

    @property
    def mu_sweep(self) -> dict[str, float]:
        """Students that differ in mu alone and use their own averages, with their mu in rising order; ic has mu 0.
        Empty with fewer than three values."""
        alike: dict[str, dict[str, float]] = {}
        for run, student in self.coupled.items():
            if student.coupling != "ot" and not student.frozen:
                others = repr(student.model_dump(exclude={"coupling", "mu"}))
                alike.setdefault(others, {})[run] = student.mu if student.coupling == "gc" else 0.0
        sweep = max(alike.values(), key=lambda found: len(set(found.values())), default={})
        return dict(sorted(sweep.items(), key=lambda item: item[1])) if len(set(sweep.values())) > 2 else {}

    @property
    def needs_coefficients(self) -> bool:
        """True if a student reads the coefficients fitted from the teacher."""
        return any(student.needs_coefficients for student in self.students.values())


def _names_are_free(study: Study) -> Iterator[str]:
    """Yield the students whose names are taken by folders of the workflow."""
    for run in sorted({"teacher", "report", "extractor", "dataset", "samples", "flows"} & study.students.keys()):
        yield f"students.{run}: that name is taken by the workflow; choose another"


def _students_differ_as_declared(study: Study) -> Iterator[str]:
    """Yield keys that students set themselves but `varies` does not list."""
    for key in study.varies:
        if key not in Student.model_fields:
            yield f"varies names {key!r}, not a student's field{suggest_field(key, Student)}"
    for run, own in study.overrides.items():
        for key in sorted(own.keys() - set(study.varies)):
            yield (
                f"students.{run} changes {key!r}, but the study says its students differ only in "
                f"{', '.join(study.varies)}: move it to `student` for all, or add it to `varies`"
            )


def _teacher_fits_the_images(study: Study) -> Iterator[str]:
    """Yield reasons why the teacher cannot be one of these images."""
    if isinstance(study.teacher, OfficialTeacher):
        if study.noise.sigma_data == "measured":
            yield "noise.sigma_data cannot be measured: an EDM teacher has its own, 0.5"
        return
    size, network = study.dataset.resolution, study.teacher.network
    values = study.dataset.channels * size**2
    if isinstance(network, MLP) and values > 1024:
        yield f"teacher.network.kind mlp is for up to 1024 values, the images have {values}: use songunet"
    if isinstance(network, SongUNet) and size % 2 ** (halvings := len(network.channel_mult) - 1):
        yield f"dataset.resolution {size} cannot be halved {halvings} times, as teacher.network.channel_mult asks"


def _there_is_a_teacher(study: Study) -> Iterator[str]:
    """Yield settings that need a teacher, in a study without one."""
    for run, student in study.students.items() if not study.taught else ():
        if student.from_teacher or student.needs_coefficients:
            yield (
                f"students.{run} needs a teacher, and teacher.kind is none: use objective: consistency with start: "
                "random and a preconditioning that is not fitted from one (fit), or give the study a teacher"
            )
    if not study.taught and study.calibration.published_fid is not None:
        yield "calibration.published_fid is of a teacher, and teacher.kind is none: remove it"


def _dropout_has_its_levels(study: Study) -> Iterator[str]:
    """Yield dropouts by level for networks without levels."""
    network = None if isinstance(study.teacher, OfficialTeacher) else study.teacher.network
    for run, student in study.students.items():
        if isinstance(network, SongUNet):
            yield from network.wrong_levels(f"students.{run}: dropout", student.dropout)
        elif isinstance(student.dropout, list):
            yield f"students.{run}: dropout lists levels, which only teacher.network.kind songunet has: give one number"


def _predictor_comes_first(study: Study) -> Iterator[str]:
    """Yield students made from one that is missing, not alike, or made from them."""
    for run, student in study.students.items():
        frozen, where = student.frozen, f"students.{run}: predictor"
        if frozen is None:
            continue
        if frozen.run not in study.students:
            yield f"{where} names {frozen.run!r}, which is not one of the students {', '.join(study.students)}"
            continue
        other = study.students[frozen.run]
        if (other.preconditioning, other.fit) != (student.preconditioning, student.fit):
            yield f"{where} names {frozen.run!r}, whose preconditioning is another: they must agree"
        if frozen.step is not None and (frozen.step > other.steps or frozen.step % other.snapshot_every):
            yield (
                f"{where} names step {frozen.step} of {frozen.run!r}, which keeps a snapshot every "
                f"{other.snapshot_every} steps up to {other.steps}: name one of those, or none for its final weights"
            )
        chain = [run]
        while (following := study.students[chain[-1]].frozen) and following.run in study.students:
            chain.append(following.run)
            if following.run in chain[:-1]:
                yield f"{where} leads round in a circle ({' -> '.join(chain)}): one must come first"
                break


def _levels_can_be_drawn(study: Study) -> Iterator[str]:
    """Yield curricula without a level to draw, or whose pairs of levels become one."""
    low, high = math.log(study.noise.sigma_min), math.log(study.noise.sigma_max)
    for run, student in study.coupled.items():
        where, levels = f"students.{run}: curriculum", student.curriculum
        if not low - 5 * levels.p_std < levels.p_mean < high + 5 * levels.p_std:
            yield f"{where}.p_mean {levels.p_mean:g} is far from the study's ln sigma, {low:.2f} to {high:.2f}: move it"
        if isinstance(levels, Shrinking):
            every = levels.double_every
            if ((student.steps - 1) // every + 1) * math.log2(levels.q) > 48:
                yield f"{where}.double_every {every} makes the two levels one before step {student.steps}: raise it"


def _compared_students_are_alike(study: Study) -> Iterator[str]:
    """Yield comparisons of students that are missing or not alike."""
    students = study.students
    if len({student.snapshot_every for student in students.values()}) > 1:
        yield "students must share snapshot_every, or their learning curves cannot be compared"
    for objective, run in study.report.baseline.items():
        if run not in students:
            yield f"report.baseline.{objective} names {run!r}, which is not one of the students"
        elif students[run].objective != objective:
            yield f"report.baseline.{objective} names {run!r}, whose objective is another"
    for pair in study.report.against.items():
        unknown = [run for run in pair if run not in students]
        if unknown:
            yield f"report.against names {unknown[0]!r}, which is not one of the students"
        elif students[pair[0]].objective != students[pair[1]].objective:
            yield f"report.against.{pair[0]} names {pair[1]!r}, whose objective is another"


def _flows_are_of_couplings(study: Study) -> Iterator[str]:
    """Yield measurements of the section flows that are impossible."""
    if study.flows is None:
        return
    if not study.coupled:
        yield "flows measures students of consistency training, and there is none: remove the section"
    if len(set(study.flows.toy_seeds)) < len(study.flows.toy_seeds):
        yield "flows.toy_seeds lists a seed twice"
    for run in study.flows.discrepancy:
        if run not in study.coupled:
            yield f"flows.discrepancy names {run!r}, which is not one of the students of consistency training"


def _scores_can_be_measured(study: Study) -> Iterator[str]:
    """Yield numbers that make a score meaningless."""
    scores, sampling = study.scores, study.sampling
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds lists a seed twice"
    for nfe in sorted(set(study.report.grid_nfe) - set(sampling.nfe)):
        yield f"report.grid_nfe has {nfe}, which sampling.nfe does not sample"
    if scores.extractor == "classifier" and sampling.count <= scores.classifier.features:
        yield "sampling.count must exceed scores.classifier.features, or the Frechet distance is singular"
    if scores.extractor == "classifier" and scores.curve_count <= scores.classifier.features:
        yield "scores.curve_count must exceed scores.classifier.features, or the Frechet distance is singular"
    if study.calibration.published_fid is not None and scores.extractor != "inception":
        yield "calibration.published_fid is Inception's FID: set scores.extractor to inception, or remove it"
    if scores.alignment_count > scores.curve_count:
        yield "scores.alignment_count must not exceed scores.curve_count: they share their noise"


RULES: tuple[Callable[[Study], Iterator[str]], ...] = (
    _names_are_free,
    _students_differ_as_declared,
    _there_is_a_teacher,
    _dropout_has_its_levels,
    _predictor_comes_first,
    _levels_can_be_drawn,
    _compared_students_are_alike,
    _teacher_fits_the_images,
    _flows_are_of_couplings,
    _scores_can_be_measured,
)


def settings_of(study: Study, stage: str, run: str | None = None) -> dict[str, Any]:
    """Return every key that a stage's result depends on, including those of earlier stages.

    stage: dataset, teacher, extractor, coefficients, student, samples, scores, flows, report; run: name of the student
    for student, samples and scores; samples and scores without one are the teacher's.
    """
    dump = study.model_dump(mode="json", exclude={"compute": True, "sampling": {"batch"}})
    images = {key: value for key, value in dump["dataset"].items() if key != "horizontal_flip"}
    base = {part: dump[part] for part in ("dataset", "noise", "teacher")}
    match stage:
        case "report":
            return dump
        case "dataset":
            return {"dataset": images}
        case "extractor":
            measured_by = ("extractor", "classifier", "mode", "kid_images")
            return {"dataset": images} | {key: dump["scores"][key] for key in measured_by}
        case "teacher":
            return {"teacher": dump["teacher"]} if isinstance(study.teacher, OfficialTeacher) else base
        case "coefficients":
            return base | {"coefficients": dump[stage]} if study.needs_coefficients else {"coefficients": None}
        case "flows" if study.flows is None:
            return {"flows": None}
        case "flows":
            students = {run: settings_of(study, "student", run) for run in study.coupled}
            precision = dump["sampling"]["precision"]
            return {"flows": dump[stage], "seeds": study.seeds, "measured": students, "precision": precision}
    settings = base
    if run is None:
        gate = set() if stage == "scores" else {"published_fid", "tolerance"}
        settings["calibration"] = {key: value for key, value in dump["calibration"].items() if key not in gate}
    else:
        student = study.students[run]
        settings["student"] = student.model_dump(mode="json")
        if student.preconditioning in FITTED:
            settings["coefficients"] = dump["coefficients"]
        if student.frozen:
            settings["predictor"] = settings_of(study, "student", student.frozen.run)
    for part in {"samples": ["sampling"], "scores": ["sampling", "scores"]}.get(stage, []):
        settings[part] = dump[part]
    return settings


def key_of(study: Study, stage: str, run: str | None = None, seed: int | None = None) -> str:
    """Return 16 hex digits that identify exactly these settings (and seed) and mark the files of the stage."""
    return settings_key(stage, seed, settings_of(study, stage, run))


def settings_key(stage: str, seed: int | None, settings: dict[str, Any]) -> str:
    """Return the 16 hex digits that identify a stage's settings and seed."""
    content = {"stage": stage, "seed": seed, "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


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
        own = (content["students"].get(location[1]) or {}) if content else {}
        prefix = f"students.{location[1]}." if location[2] in own else "student."
        location, model = location[2:], Student
    # The member of a union is a step of pydantic's location that the file does not have.
    key = prefix + ".".join(part for part in location if part not in _MEMBERS and not _UNION_MEMBER.search(part))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{suggest_field(location[-1], _owner(location[:-1], model))}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    return f"key '{key}': {problem['msg'][0].lower() + problem['msg'][1:]}, got {problem['input']!r}"


# Parts that pydantic adds to a location besides keys: the member of a union, and a mark that the key is wrong.
_UNION_MEMBER = re.compile(r"^(constrained-\w+|(literal|list)\[.*\]|\[key\])$")
# The unions' members that are sections, by their discriminator.
_MEMBERS: dict[str, type[Section]] = {
    cls.model_fields["kind"].default: cls
    for cls in (SongUNet, MLP, Teacher, OfficialTeacher, NoTeacher, Doubling, Shrinking)
} | {"Frozen": Frozen}


def _owner(location: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section that a location leads to."""
    for part in location:
        field = model.model_fields.get(part)
        # The other option of an optional section is None.
        options = [each for each in get_args(field.annotation) if each is not type(None)] if field else []
        section = options[0] if len(options) == 1 else field.annotation if field else _MEMBERS.get(part)
        if isinstance(section, type) and issubclass(section, BaseModel):
            model = section
    return model


def suggest_field(key: str, model: type[BaseModel] | None) -> str:
    """Return the nearest field of a section, or all of them."""
    return suggestion(key, model.model_fields if model else [])
