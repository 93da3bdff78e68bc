"""Where everything lies: the paths of a study's results and of its training state."""

from dataclasses import dataclass
from pathlib import Path


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
        """What the scores measure with: the classifier or the data's features, card.json."""
        return self.root / "scores" / "extractor"

    @property
    def report(self) -> Path:
        """report.html, figures/, the tables as CSV, summary.json, card.json."""
        return self.root / "report"

    @property
    def track(self) -> Path:
        """tracked.json."""
        return self.root / "track"

    def student(self, run: str, seed: int) -> Path:
        """student.safetensors, history.jsonl, snapshots/, card.json."""
        return self.root / "students" / run / f"seed{seed}"

    def samples(self, run: str | None, seed: int | None) -> Path:
        """One .npy a sampler, card.json; the teacher's without a run."""
        folder = self.root / "samples"
        return folder / "teacher" if run is None else folder / run / f"seed{seed}"

    def scores(self, run: str | None, seed: int | None) -> Path:
        """The score table of a student, or of the calibration without a run."""
        folder = self.root / "scores"
        return folder / "calibration.csv" if run is None else folder / run / f"seed{seed}.csv"

    def training_state(self, run: str, seed: int) -> Path:
        """The resumable state of a training; run is 'teacher' or a student. Never a declared output."""
        return self.state / self.study / run / f"seed{seed}"
