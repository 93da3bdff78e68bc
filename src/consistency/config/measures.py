"""Sections `coefficients`, `sampling`, `calibration`, `scores` and `flows`."""

from typing import Annotated, Literal

from pydantic import Field

from consistency.config.fields import Count, Name, Positive, Precision, Section

#: columns of the score tables that are measured
MEASURES = ("fd", "kid", "alignment")
#: students' own samplers in the score tables; others are named gamma=...
OWN_SAMPLERS = ("jumps", "multistep")
#: samplers of the calibration's rows: the teacher's images against all data, and one half of the data against the other
#: half and against the teacher's images, at equal numbers
HEUN, HALVES, AGAINST_HALF = "heun", "halves", "heun against half"


class Coefficients(Section):
    """The fit of l_t and s_t."""

    times: Annotated[int, Field(ge=8)] = Field(120, description="Log-spaced times from sigma_min to sigma_max.")
    samples: Annotated[int, Field(ge=2)] = Field(4096, description="Noised training images a time, at most.")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        1e-3,
        description="Fewer images do if the standard error of f and g, over all jumps of the students, is below this. "
        "The report says how many were used.",
    )
    probes: Count | Literal["exact"] = Field(
        1, description="Rademacher probes an image for the trace, or `exact` (one product a dimension)."
    )
    mode: Literal["reverse", "forward"] = Field(
        "reverse",
        description="Differentiation: `reverse` works for any network and is faster; `forward` gives the same to "
        "rounding.",
    )
    batch: Count = Field(
        512, description="Images an evaluation, whose graph is kept; never more than compute.batch_per_device."
    )
    precision: Literal["float32", "float64"] = Field("float32", description="Arithmetic of the network.")
    seed: int = Field(0, description="Seed of images, noise and probes.")

    def evaluations(self, dimension: int, images: int) -> int:
        """Return the network evaluations of a fit with so many images of that many numbers.

        A vector-Jacobian product counts 1, like the evaluation before it: one for each probe, r, x and x - mu. A
        Jacobian-vector product evaluates too and counts 2: one for each probe and for J, beside an evaluation for r.
        """
        probes = dimension if self.probes == "exact" else self.probes
        return self.times * images * (probes + 4 if self.mode == "reverse" else 2 * probes + 3)


class Churn(Section):
    """The stochastic part of EDM's sampler: before each step, noise is raised from t to t (1 + gamma),
    gamma = min(s_churn / N, sqrt(2) - 1) while s_min <= t <= s_max."""

    s_churn: Positive = Field(description="Total amount of added noise.")
    s_min: Annotated[float, Field(ge=0)] = Field(0.0, description="Smallest time with added noise.")
    s_max: Positive = Field(1e9, description="Largest time with added noise.")
    s_noise: Positive = Field(1.0, description="Standard deviation of the added noise.")


class Sampling(Section):
    """Samples kept and scored at the end of training. Image i always comes from seed first_seed + i."""

    count: Annotated[int, Field(ge=2)] = Field(description="Images a sampler.")
    first_seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Seed of the first image. EDM, for one, takes the lowest FID of three: 0, 50000, 100000."
    )
    nfe: list[Count] = Field([1, 2, 3, 5, 8], min_length=1, description="Numbers of jumps.")
    gamma: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [], description="Further samplers with fresh noise between jumps; 1 is CM's multistep sampler."
    )
    gamma_nfe: list[Count] = Field([2], description="Numbers of jumps of the gamma samplers.")
    labels: Literal["data", "balanced"] = Field(
        "data",
        description="Classes of a conditional network's images: drawn in the data's class proportions, or `balanced`, "
        "uniform over the classes, as EDM, CTM and CM do.",
    )
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
    curve_count: Annotated[int, Field(ge=2)] = Field(description="Images a point of the learning curves.")
    kid_images: Annotated[int, Field(ge=4)] = Field(
        50_000, description="Images of the data, at most, whose features are kept for KID."
    )
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
