"""Where everything lies: the paths of a study's results and of its training state."""

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


class Layout:
    """Paths of one study. results: the folder of all studies' results; state: that of all training states."""

    def __init__(self, study: str, results: Path = Path("results"), state: Path = Path("state")) -> None:
        self.study, self.results, self.state = study, results, state
        self.root = results / study  # everything the study makes
        self.dataset = self.root / "dataset"  # images.npy, labels.npy, dataset.json, card.json
        self.teacher = self.root / "teacher"  # teacher.safetensors, history.jsonl, card.json
        self.coefficients = self.root / "coefficients"  # coefficients.npz, card.json
        # What the scores measure with: the classifier, the data's statistics, some of its features, card.json.
        self.extractor = self.root / "scores" / "extractor"
        self.flows = self.root / "flows"  # transport.csv, discrepancy.csv, toy.npz, plane.csv, limit.csv, card.json
        self.report = self.root / "report"  # report.html, figures/, the tables as CSV, summary.json, card.json
        self.track = self.root / "track"  # tracked.json
        # What a calibration measured that was refused: JSON, never a declared output.
        self.measured_calibration = state / study / "calibration.json"

    def training_state(self, run: str, seed: int) -> Path:
        """The resumable state of a training; run is 'teacher' or a student. Never a declared output."""
        return self.state / self.study / run / f"seed{seed}"
