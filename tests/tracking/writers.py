"""Eight processes, each a training that writes its history and the follower that sends it.

`python -m tests.tracking.writers studies/small.yaml`, in the study's folder: they are forked from one process that has
done the slow import, so that eight cost little more than one.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow.store.tracking.rest_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

import consistency.tracking.data  # noqa: F401
from consistency.layout import Layout
from consistency.study import load_study
from consistency.tracking import follow
from consistency.tracking.live import LOG, _opening
from consistency.training.folder import append

PIECES = 10  # in which a history is written


def main(file: str) -> int:
    """Replay all trainings of a finished study at once. Returns how many followers failed."""
    study = load_study(Path(file))
    layout = Layout(study.name)
    openings = {
        (run, seed): _opening(study, layout, layout.training_state(run, seed), run, seed)
        for run in study.students
        for seed in study.seeds
    }
    pids = [_fork(layout, run, seed, opening) for (run, seed), opening in openings.items()]
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


def _fork(layout: Layout, run: str, seed: int, opening: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _replay(layout, run, seed, opening)
        except BaseException as error:
            print(f"{run} seed {seed}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def _replay(layout: Layout, run: str, seed: int, opening: dict[str, Any]) -> None:
    state = layout.training_state(run, seed)
    sys.stdout = (state / LOG).open("w", buffering=1)
    follow.GRACE = 200.0  # eight at low priority share a busy machine
    reading, writing = os.pipe()

    def train() -> None:
        lines = (layout.student(run, seed) / "history.jsonl").read_text().splitlines()
        size = len(lines) // PIECES
        with os.fdopen(writing, "w", buffering=1) as messages:
            messages.write(json.dumps(opening) + "\n")
            for start in range(0, len(lines), size):
                for line in lines[start : start + size]:
                    append(state, json.loads(line))
                time.sleep(0.1)
            messages.write('{"status": "FINISHED"}\n')

    threading.Thread(target=train).start()
    with os.fdopen(reading) as messages:
        follow.follow(messages)


if __name__ == "__main__":
    code = main(sys.argv[1])
    # Freeing all that was imported takes longer than the rest.
    sys.stderr.flush()
    os._exit(code)
