"""The verb release: a study's students with a model card, a folder ready for a model hub. Nothing is uploaded."""

from pathlib import Path

from consistency.base.files import link_file, write_bytes
from consistency.config.dataset import KINDS
from consistency.config.job import Job
from consistency.config.networks import NoTeacher, OfficialTeacher, Teacher
from consistency.config.study import Study
from consistency.provenance.archive import archive_of
from consistency.provenance.verification import require_consistent
from consistency.report.blocks import first_page
from consistency.report.publish import publish
from consistency.report.published import CARDS, PAGE, read_published
from consistency.report.wording import differs_in, teacher_made

_BLOCKS_BEGIN = "## Made by"


def release(job: Job, archives: Path, releases: Path) -> None:
    """Write releases/NAME: every student's file, README.md, the tables, figures and cards behind it, the archive if it
    was packed, and SHA256SUMS.

    Raises UserError if `verify` finds a fault or the study is unfinished; then nothing is written.
    """
    study, folder = job.study, releases / job.study.name
    require_consistent(job.paths.root, study)
    for run, seed in study.trainings:
        link_file(job.of(run, seed).weights(), folder / f"{run}-seed{seed}.safetensors")
    if (archive := archive_of(job, archives)).is_file():
        link_file(archive, folder / archive.name)
    (folder / PAGE).unlink(missing_ok=True)
    publish(job, releases, archives)  # writes the evidence, which the model card's blocks are made of
    published = read_published(folder)
    figures = {path.name for path in folder.glob("*.png")}
    evidence = first_page(published, figures).partition(_BLOCKS_BEGIN)
    write_bytes(
        folder / PAGE,
        (
            _model_card(job, int(published.cards.cards["teacher"].measured["parameters"]))
            + "\n"
            + "".join(evidence[1:])
        ).encode(),
    )
    publish(job, releases, archives)
    print(f"{folder}: {len(study.trainings)} students with their model card; nothing is uploaded")


def licence_of(study: Study) -> str:
    """Return the licence of the students' weights, as model hubs name it: the teacher's, ours without a foreign one."""
    if isinstance(study.teacher, Teacher | NoTeacher):
        return "mit"
    official = isinstance(study.teacher, OfficialTeacher) and study.teacher.checkpoint.startswith("edm-")
    return "cc-by-nc-sa-4.0" if official else "other"


def _model_card(job: Job, parameters: int) -> str:
    """Return the part of a model card that is not tables. parameters: of the teacher."""
    study, (run, seed) = job.study, job.study.trainings[0]
    data, student = study.dataset, study.students[run]
    rows = [f"| `{name}` | {differs_in(study, name)} |" for name in study.students]
    size = f"{data.resolution}x{data.resolution}, {'colour' if data.channels == 3 else 'grey'}"
    rate = f"{student.learning_rate:g}{'' if student.learning_rate_decay == 'none' else ', decayed'}"
    inception = study.scores.extractor == "inception"
    measured = "FID by clean-fid" if inception else "FD of a small classifier's features, **which is not FID**"
    return f"""---
license: {licence_of(study)}
library_name: consistency-distillation
tags: [consistency-models, consistency-distillation, diffusion, image-generation]
---

# {study.name}: {study.title or "students of a study"}

Consistency models that draw images of {size}, in a few jumps. Made by this project's workflow from the study
`{study.name}`; [{CARDS}]({CARDS}) has every setting, command, version and digest.

```python
from consistency import api

student = api.load_student("{run}-seed{seed}.safetensors")
images = student.sample(16, nfe={study.sampling.nfe[0]})  # uint8 [16, H, W, C]
api.save_images(images, "./grid.png")
```

| student | differs in |
| --- | --- |
{chr(10).join(rows)}

- **Teacher**: {teacher_made(study, parameters)}. A licence of its weights holds for its students.
- **Data**: `{data.kind}`, {KINDS[data.kind].about}. Its terms are its owner's.
- **Training** of `{run}`: {student.objective}, {student.steps:,} iterations of {student.batch} images by
  {student.optimizer}, rate {rate}, EMA {student.ema_rate:g}.
- **Scores** are {measured}, with N, seeds and intervals in the tables below.
- **Intended use**: research on sampling in few steps, and repeating the numbers of this page.
- **Limits**: images are those of the data, its gaps and prejudices included; many are recognisably wrong. Nothing is
  claimed of other data, sizes or numbers of jumps. Not meant for decisions about people or for presenting its images as
  photographs.
"""
