"""One job of a study: the study, its paths, and the student whose artifact is made."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consistency.config.keys import key_of, settings_of
from consistency.config.paths import StudyPaths, ema_suffix, snapshot_name
from consistency.config.student import Student
from consistency.config.study import Study

#: stages with an artifact for each student and seed; samples and scores have one of the teacher as well
PER_STUDENT = ("student", "samples", "scores")


@dataclass(frozen=True)
class Job:
    """A study, its paths and, for artifacts of one student, its name and seed. Without a student, samples are the
    teacher's and scores the calibration."""

    study: Study
    paths: StudyPaths
    student: str | None = None
    seed: int | None = None

    def of(self, student: str | None = None, seed: int | None = None) -> "Job":
        """Return the same job for another student, or for none."""
        return replace(self, student=student, seed=seed)

    @property
    def trainings(self) -> list["Job"]:
        """Every student and seed of the study."""
        return [self.of(*training) for training in self.study.trainings]

    @property
    def settings(self) -> Student:
        """The student's settings."""
        return self.study.students[str(self.student)]

    @property
    def predictor(self) -> "Job | None":
        """The frozen student, of the same seed, that makes gc's endpoints; None without one."""
        frozen = self.settings.frozen
        return self.of(frozen.run, self.seed) if frozen else None

    @property
    def options(self) -> str:
        """Options of the job's verb, such as ' --student ctm --seed 0'; none without a student."""
        return "" if self.student is None else f" --student {self.student} --seed {self.seed}"

    @property
    def label(self) -> str:
        """Name in progress and messages: 'ctm seed 0', or the study's."""
        return self.study.name if self.student is None else f"{self.student} seed {self.seed}"

    def at(self, stage: str) -> "Job":
        """Return the job of a stage: this one, or that of the whole study for a stage that makes one artifact for all
        students."""
        return self if stage in PER_STUDENT else self.of()

    def key(self, stage: str) -> str:
        """Return 16 hex digits that identify the settings (and seed) of a stage's artifact."""
        job = self.at(stage)
        return key_of(self.study, stage, job.student, job.seed)

    def depends_on(self, stage: str) -> dict[str, Any]:
        """Return every key that a stage's artifact depends on."""
        return settings_of(self.study, stage, self.at(stage).student)

    @property
    def folder(self) -> Path:
        """Folder of student.safetensors and further EMA rates, history.jsonl, snapshots/ and card.json."""
        return self._below(self.paths.root / "students")

    def weights(self, rate: float | None = None, step: int | None = None) -> Path:
        """Return the student's checkpoint; rate: a further EMA rate; step: a snapshot, None for the end of training."""
        name = f"student{ema_suffix(rate)}.safetensors" if step is None else f"snapshots/{snapshot_name(step, rate)}"
        return self.folder / name

    @property
    def samples(self) -> Path:
        """Folder of one .npy per sampler and card.json."""
        return self._below(self.paths.root / "samples")

    @property
    def scores(self) -> Path:
        """Path of the score table; its card lies beside it."""
        folder = self.paths.root / "scores"
        return folder / "calibration.csv" if self.student is None else folder / self.student / f"seed{self.seed}.csv"

    def card(self, stage: str) -> Path:
        """Return the path of the card of a stage's artifact."""
        if stage == "scores":
            return self.scores.with_suffix(".card.json")
        own = {"student": self.folder, "samples": self.samples, "extractor": self.paths.extractor}
        return own.get(stage, self.paths.root / stage) / "card.json"

    @property
    def state(self) -> Path:
        """The resumable state of the student's training. Never a declared output."""
        return self.paths.training_state(str(self.student), self.seed or 0)

    @property
    def sampling_state(self) -> Path:
        """The resumable state of a sampling: parts and progress.json."""
        return self.paths.state / self.samples.relative_to(self.paths.results)

    def _below(self, folder: Path) -> Path:
        return folder / "teacher" if self.student is None else folder / self.student / f"seed{self.seed}"
