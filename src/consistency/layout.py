"""Where everything lies: the paths of a study's results and of its training state."""

from dataclasses import dataclass
from pathlib import Path


def ema_suffix(rate: float | None) -> str:
    """What a further EMA rate adds to a file's name; nothing for the main one (None)."""
    return "" if rate is None else f"-ema{rate}"


def snapshot_name(step: int, rate: float | None = None) -> str:
    """The file of a training's snapshot; rate: a further EMA rate."""
    return f"step-{step:06d}{ema_suffix(rate)}.safetensors"


def sampler_name(nfe: int, gamma: float | None = None, rate: float | None = None) -> str:
    """The file, without .npy, of a student's samples: gamma for gamma-sampling, rate for a further EMA rate."""
    return f"{'' if rate is None else f'ema{rate}-'}{'' if gamma is None else f'gamma{gamma}-'}nfe{nfe}"


@dataclass(frozen=True)
class Layout:
    """Paths of one study. results: the folder of all studies' results; state: that of all training states."""

    study: str
    results: Path = Path("results")
    state: Path = Path("state")

    @property
    def root(self) -> Path:
        """Everything the study makes."""
        return self.results / self.study

    @property
    def dataset(self) -> Path:
        """images.npy, labels.npy, dataset.json, card.json."""
        return self.root / "dataset"

    @property
    def teacher(self) -> Path:
        """teacher.safetensors, history.jsonl, card.json."""
        return self.root / "teacher"

    @property
    def coefficients(self) -> Path:
        """coefficients.npz, card.json."""
        return self.root / "coefficients"

    @property
    def extractor(self) -> Path:
        """What the scores measure with: the classifier, the data's statistics, some of its features, card.json."""
        return self.root / "scores" / "extractor"

    @property
    def flows(self) -> Path:
        """transport.csv, toy.npz, plane.csv, limit.csv, card.json."""
        return self.root / "flows"

    @property
    def report(self) -> Path:
        """report.html, figures/, the tables as CSV, summary.json, card.json."""
        return self.root / "report"

    @property
    def track(self) -> Path:
        """tracked.json."""
        return self.root / "track"

    def training_state(self, run: str, seed: int) -> Path:
        """The resumable state of a training; run is 'teacher' or a student. Never a declared output."""
        return self.state / self.study / run / f"seed{seed}"

    @property
    def measured_calibration(self) -> Path:
        """What a calibration measured that was refused: JSON, never a declared output."""
        return self.state / self.study / "calibration.json"
