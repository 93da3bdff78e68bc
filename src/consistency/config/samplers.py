"""Samplers of a student, as the section `sampling` asks for them."""

from dataclasses import dataclass

from consistency.config.job import Job
from consistency.config.paths import sampler_name


@dataclass(frozen=True)
class StudentSampler:
    """A sampler of a student. gamma: None for its own sampler; rate: a further EMA rate."""

    nfe: int
    gamma: float | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Name of its file, without .npy."""
        return sampler_name(self.nfe, self.gamma, self.rate)


def student_samplers(job: Job) -> list[StudentSampler]:
    """Return every sampler of a student, in the order of their names.

    Students that jump only to eps have CM's multistep sampler alone. Further EMA rates are drawn without gamma.
    """
    settings, sampling = job.settings, job.study.sampling
    chosen = [StudentSampler(nfe, None, rate) for rate in settings.rates for nfe in sampling.nfe]
    if not settings.only_to_eps:
        chosen += [StudentSampler(nfe, gamma) for gamma in sampling.gamma for nfe in sampling.gamma_nfe]
    return sorted(chosen, key=lambda sampler: sampler.name)
