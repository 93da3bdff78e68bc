"""Eight processes, each a training that writes its history and the thread that sends it.

`python -m tests.tracking.writers`, in the study's folder: they are forked from one process that has
done the slow import, so that eight cost little more than one.
"""

import os
import sys
import time

import mlflow.store.tracking.rest_store  # noqa: F401
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import mlflow.system_metrics.system_metrics_monitor  # noqa: F401
from tests.tracking.trainings import replayed

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.tracking import live

PIECES = 10  # in which a history is written


def main() -> int:
    """Replay all trainings of a finished study at once. Returns how many failed."""
    live.GRACE = 200.0  # eight share a busy machine
    study = Job(load_study("small.yaml"), StudyPaths("small"))
    pids = [_fork(job) for job in study.trainings]
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


def _fork(job: Job) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with replayed(job) as training:
                for _ in range(PIECES):
                    training.write(50 // PIECES)
                    time.sleep(0.1)
            code = int(training.follower.trouble != "")
        finally:
            os._exit(code)
    return pid


if __name__ == "__main__":
    code = main()
    # Freeing all that was imported takes longer than the rest.
    sys.stderr.flush()
    os._exit(code)
