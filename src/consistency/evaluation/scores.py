"""Score tables: the calibration's and a student's."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from consistency.base.arrays import read_array, write_table
from consistency.base.progress import Progress
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.measures import AGAINST_HALF, HALVES, HEUN
from consistency.config.samplers import StudentSampler
from consistency.data.prepared import to_bytes
from consistency.evaluation.extractor import open_extractor, read_data_statistics
from consistency.evaluation.features import Statistics, frechet_distance, kernel_distance
from consistency.evaluation.samplers import draw, heun_sampler, jump_sampler
from consistency.nets.denoiser import Denoiser
from consistency.nets.jumps import Fit
from consistency.provenance.card import Card
from consistency.provenance.inputs import preconditioning_of, read_dataset, read_label_weights

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of a score table. run: a student, or in the calibration `teacher` or `data`; sampler: in the
    calibration HEUN, HALVES or AGAINST_HALF; ema, step: of the weights; fd, kid: distances to the data; alignment: mean
    squared error to the teacher's ODE endpoints, None where samples and endpoints do not share their noise; published,
    tolerance: of the teacher's FID, in the calibration alone."""

    study: str
    kind: Literal["calibration", "curve", "final"]
    run: str
    seed: int | None
    ema: float | None = None
    step: int = 0
    sampler: str
    nfe: int
    fd: float
    kid: float
    alignment: float | None = None
    images: int
    extractor: str
    published: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Distances:
    """Distances of images to a study's data. extractor: whose features; fd: Frechet distance, which is FID if the
    features are Inception's; kid: kernel distance; images: N."""

    fd: float
    kid: float
    images: int
    extractor: str


class Measures:
    """The measures of a study: its extractor, and the statistics of its data's features."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.settings, self.data = job.study.scores, read_data_statistics(job)
        self.extractor = open_extractor(job, read_dataset(job), device)

    def statistics(self, pieces: Iterable[Array], count: int) -> Statistics:
        """Return the statistics of the features of `count` images, which come in pieces [n, d]."""
        return Statistics.gather(pieces, count, self.settings.kid_images)

    def distances(self, a: Statistics, b: Statistics, images: int) -> Distances:
        """Compare two sets of features, the first of that many images."""
        kid = kernel_distance(a, b, self.settings.kid_subsets, self.settings.kid_subset_size)
        return Distances(frechet_distance(a, b), kid, images, self.extractor.name)


CALIBRATION_COLUMNS = [column.name for column in fields(Score)]
COLUMNS = CALIBRATION_COLUMNS[:-2]


class Scorer:
    """Maker of scores, a student's or the calibration's: the extractor, the data's statistics and the card. label,
    total: name and images of the progress."""

    def __init__(self, job: Job, device: torch.device, label: str, total: int) -> None:
        self.job, self.study, self.card = job, job.study, Card(job, "scores")
        self.measures = Measures(job, device)
        self.progress = Progress(label, total)

    def score(self, chunks: Iterable[Array], count: int, **place: Any) -> Score:
        """Compare `count` uint8 images, which come in chunks [n, H, W, C], with the data. place: what is scored, as
        fields of Score."""
        return self._score(self._statistics(chunks, count), self.measures.data, count, **place)

    def calibration(self, images: Array | None) -> list[Score]:
        """Compare one half of the data's kept features with the other and, given the teacher's images, all of them with
        the data and as many of them as a half has with that half. The halves have sampling.count images at most."""
        features = self.measures.data.features
        # The halves must not depend on the dataset's order.
        order = torch.randperm(len(features), generator=generator(0, "halves")).numpy()
        half, count = len(order) // 2, self.half
        first, second = (Statistics.of(features[part[:count]]) for part in (order[:half], order[half:]))
        scores = [self._score(second, first, count, kind="calibration", run="data", sampler=HALVES, nfe=0)]
        if images is not None:
            place = {"kind": "calibration", "run": "teacher", "nfe": 2 * self.study.calibration.steps - 1}
            drawn = self._statistics([images], len(images))
            scores.append(self._score(drawn, self.measures.data, len(images), sampler=HEUN, **place))
            alike = Statistics.of(drawn.features[:count])
            scores.append(self._score(alike, first, count, sampler=AGAINST_HALF, **place))
        return scores

    @property
    def half(self) -> int:
        """Images on each side where halves are compared: no more than the teacher has."""
        return min(len(self.measures.data.features) // 2, self.study.sampling.count)

    def _statistics(self, chunks: Iterable[Array], count: int) -> Statistics:
        return self.measures.statistics(self.progress.counted(self.measures.extractor.pieces(chunks)), count)

    def _score(self, a: Statistics, b: Statistics, images: int, **place: Any) -> Score:
        measured = asdict(self.measures.distances(a, b, images))
        return Score(study=self.study.name, seed=self.job.seed, **place, **measured)

    def warn_of_singular(self, samples: int) -> None:
        """Warn if there are too few images for the covariance of the features."""
        features = len(self.measures.data.mean)
        counts = {
            "sampling.count": samples,
            "scores.curve_count": self.study.scores.curve_count,
            "data halves": self.half,
        }
        few = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count <= features)
        if few:
            print(
                f"warning: fewer images than the {features:,} features ({few}): their covariance is singular, and the "
                "Frechet distance larger than that of more images; compare it at equal numbers only",
                flush=True,
            )

    def write(self, scores: list[Score]) -> None:
        """Write the table and its card."""
        self.progress.close()
        columns = CALIBRATION_COLUMNS if self.job.student is None else COLUMNS
        write_table(self.job.scores, [asdict(score) for score in scores], columns)
        self.card.write()


@dataclass
class StudentScorer:
    """Maker of a student's scores at one EMA rate (None: the main one)."""

    scorer: Scorer
    rate: float | None
    endpoints: Array
    fit: Fit | None

    def __post_init__(self) -> None:
        self.job, self.settings = self.scorer.job, self.scorer.job.settings

    def final(self, model: Denoiser, sampler: StudentSampler) -> Score:
        """Score one sampler's samples at the end of training."""
        images = read_array(self.job.samples / f"{sampler.name}.npy", f"samples{self.job.options}")
        place = self._place("final", self.settings.steps, sampler.nfe, sampler.gamma)
        score = self.scorer.score([images], len(images), **place)
        if sampler.gamma is not None or not self._aligned(sampler.nfe):
            return score
        error = _AlignmentError(self.endpoints)
        for rows, batch in self._drawn(model, sampler.nfe, len(self.endpoints)):
            error.add(rows, batch)
        return replace(score, alignment=error.mean)

    def curve(self, model: Denoiser, step: int, nfe: int) -> Score:
        """Score one snapshot at one number of jumps; images are discarded once they are measured."""
        error, count = _AlignmentError(self.endpoints), self.job.study.scores.curve_count

        def chunks() -> Iterator[Array]:
            for rows, batch in self._drawn(model, nfe, count):
                error.add(rows, batch)
                yield to_bytes(batch)

        score = self.scorer.score(chunks(), count, **self._place("curve", step, nfe, None))
        return replace(score, alignment=error.mean) if self._aligned(nfe) else score

    def _place(self, kind: str, step: int, nfe: int, gamma: float | None) -> dict[str, Any]:
        sampler = "multistep" if self.settings.only_to_eps else "jumps" if gamma is None else f"gamma={gamma}"
        rate = self.settings.ema_rate if self.rate is None else self.rate
        return {"kind": kind, "run": self.job.student, "ema": rate, "step": step, "sampler": sampler, "nfe": nfe}

    def _aligned(self, nfe: int) -> bool:
        """Tell whether the samples depend on their first noise alone, as do the teacher's endpoints, if any."""
        return len(self.endpoints) > 0 and (nfe == 1 or not self.settings.only_to_eps)

    def _drawn(self, model: Denoiser, nfe: int, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
        jumps = jump_sampler(self.job, model, preconditioning_of(self.settings, model, self.fit), nfe)
        sampling, classes = self.job.study.sampling, read_label_weights(self.job, model)
        return draw(sampling.batch, model, jumps, count, classes, sampling.first_seed)


class _AlignmentError:
    """Mean squared error to the teacher's ODE endpoints from the same noise, per pixel in [-1, 1] units."""

    def __init__(self, endpoints: Array) -> None:
        self.teacher_endpoints, self._sum = endpoints, 0.0

    def add(self, rows: slice, images: torch.Tensor) -> None:
        """Add the images of those rows, as far as there are endpoints."""
        there = self.teacher_endpoints[rows.start : rows.stop]
        if len(there):
            self._sum += float(np.square(images[: len(there)].double().cpu().numpy() - there).sum())

    @property
    def mean(self) -> float:
        """The error, once all images have been added."""
        return self._sum / self.teacher_endpoints.size


def teacher_endpoints(job: Job, teacher: Denoiser) -> Array:
    """Draw the teacher's ODE endpoints at eps of the first alignment_count seeds, float32 [n, C, H, W]."""
    study, classes = job.study, read_label_weights(job, teacher)
    sampler = heun_sampler(study, teacher, study.scores.alignment_nodes)
    count, sampling = study.scores.alignment_count, study.sampling
    batches = draw(sampling.batch, teacher, sampler, count, classes, sampling.first_seed)
    return torch.cat([batch.cpu() for _, batch in batches]).numpy()
