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

    def student(self, run: str, seed: int) -> Path:
        """student.safetensors and those of further EMA rates, history.jsonl, snapshots/, card.json."""
        return self.root / "students" / run / f"seed{seed}"

    def student_file(self, run: str, seed: int, rate: float | None = None, step: int | None = None) -> Path:
        """A student's checkpoint; rate: a further EMA rate; step: a snapshot, None for the end of training."""
        name = f"student{ema_suffix(rate)}.safetensors" if step is None else f"snapshots/{snapshot_name(step, rate)}"
        return self.student(run, seed) / name

    def samples(self, run: str | None, seed: int | None) -> Path:
        """One .npy a sampler, card.json; the teacher's without a run."""
        folder = self.root / "samples"
        return folder / "teacher" if run is None else folder / run / f"seed{seed}"

    def scores(self, run: str | None, seed: int | None) -> Path:
        """The score table of a student, or of the calibration without a run; its card lies beside it."""
        folder = self.root / "scores"
        return folder / "calibration.csv" if run is None else folder / run / f"seed{seed}.csv"

    def card(self, stage: str, run: str | None = None, seed: int | None = None) -> Path:
        """The card of what a stage makes; samples and scores without a run are the teacher's."""
        if stage == "scores":
            return self.scores(run, seed).with_suffix(".card.json")
        if run is None or seed is None:
            folders = {"extractor": self.extractor, "samples": self.samples(None, None)}
            return folders.get(stage, self.root / stage) / "card.json"
        return (self.student(run, seed) if stage == "student" else self.samples(run, seed)) / "card.json"

    def training_state(self, run: str, seed: int) -> Path:
        """The resumable state of a training; run is 'teacher' or a student. Never a declared output."""
        return self.state / self.study / run / f"seed{seed}"

    def sampling_state(self, run: str | None, seed: int | None) -> Path:
        """The resumable state of a sampling: parts and progress.json; the teacher's without a run."""
        return self.state / self.samples(run, seed).relative_to(self.results)
