"""Paths of a study's results and training states."""

from pathlib import Path

#: the files of config/ as the package ships them, for an installation outside a checkout
SHIPPED = Path(__file__).parents[1] / "shipped"


def ema_suffix(rate: float | None) -> str:
    """Return the suffix of a further EMA rate in a file's name; '' for the main rate (None)."""
    return "" if rate is None else f"-ema{rate}"


def snapshot_name(step: int, rate: float | None = None) -> str:
    """Return the file name of a training's snapshot; rate: a further EMA rate."""
    return f"step-{step:06d}{ema_suffix(rate)}.safetensors"


def sampler_name(nfe: int, gamma: float | None = None, rate: float | None = None) -> str:
    """Return the file, without .npy, of a student's samples; gamma: of gamma-sampling; rate: a further EMA rate."""
    return f"{'' if rate is None else f'ema{rate}-'}{'' if gamma is None else f'gamma{gamma}-'}nfe{nfe}"


class StudyPaths:
    """Paths of one study. results: folder of all studies' results; state: folder of all training states."""

    def __init__(self, study: str, results: Path = Path("results"), state: Path = Path("state")) -> None:
        self.study, self.results, self.state = study, results, state
        self.root = results / study  # all results of the study
        self.dataset = self.root / "dataset"
        self.images, self.labels = self.dataset / "images.npy", self.dataset / "labels.npy"
        self.facts = self.dataset / "dataset.json"
        self.teacher = self.root / "teacher"  # teacher.safetensors, history.jsonl, card.json
        self.teacher_weights = self.teacher / "teacher.safetensors"
        self.coefficients = self.root / "coefficients"
        self.fit = self.coefficients / "coefficients.npz"
        # The classifier, the data's statistics, some of its features, card.json.
        self.extractor = self.root / "scores" / "extractor"
        self.endpoints = self.root / "scores" / "endpoints.npy"  # the teacher's, of the alignment error
        self.passed = self.root / "scores" / "calibration.passed"  # there once the teacher has passed its calibration
        self.flows = self.root / "flows"  # transport.csv, discrepancy.csv, toy.npz, plane.csv, limit.csv, card.json
        self.report = self.root / "report"  # report.html, figures/, the tables as CSV, summary.json, card.json
        self.track = self.root / "track"  # tracked.json
        # Measurements of a rejected calibration: JSON, never a declared output.
        self.measured_calibration = state / study / "calibration.json"

    def training_state(self, run: str, seed: int) -> Path:
        """Return a training's resumable state; run: teacher, a student or flows/<student>. Never a declared output."""
        return self.state / self.study / run / f"seed{seed}"
