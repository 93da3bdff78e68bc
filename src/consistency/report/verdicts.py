"""Sentences on the papers' claims, for the report and for published pages."""

from consistency.config.study import Study
from consistency.report import wording
from consistency.report.results import Results


def verdicts(study: Study, results: Results) -> list[str]:
    """Return sentences on the papers' claims; the tables hold the rest. Distillation: the analytic students' speed-up
    by every measure. Consistency training: every coupling's FD at the lowest NFE."""
    coupled, first = study.coupled, min(study.scores.curve_nfe)
    distilled = {name for name in study.students if study.students[name].preconditioning == "analytic"} - coupled.keys()
    faster = [item for item in results.found if item.run in distilled]
    better = [item for item in results.paired if item.run in coupled and item.measure == "fd" and item.nfe == first]
    return [
        *(wording.sentence(item, results.extractor) for item in faster),
        *(wording.paired_sentence(item, results.extractor) for item in better),
    ]
