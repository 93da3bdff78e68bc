"""The check before a training starts that its batch can be divided."""

from consistency.config.job import Job
from consistency.runtime.distributed import Ranks
from consistency.training.update import share_of


def require_shares(job: Job, processes: int) -> None:
    """Raise UserError if the batch of a student's training, or the teacher's, cannot be divided like that."""
    settings, compute = job.study.teacher if job.student is None else job.settings, job.study.compute
    if (batch := getattr(settings, "batch", None)) is not None:  # a teacher that is trained here
        share_of(batch, compute.batch_per_device, Ranks(0, processes))
