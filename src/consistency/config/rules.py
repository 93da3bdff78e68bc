"""Rules that a study must satisfy as a whole, one function each."""

import math
from collections.abc import Callable, Iterator

from consistency.base.errors import suggestion
from consistency.config.networks import OfficialTeacher, SongUNet
from consistency.config.objectives import OBJECTIVES, Shrinking
from consistency.config.study import Study

_MOST = 10_000


def _names_are_free(study: Study) -> Iterator[str]:
    """Yield the students whose names are taken by folders of the workflow."""
    for name in sorted({"teacher", "report", "extractor", "dataset", "samples", "flows"} & study.students.keys()):
        yield f"students.{name}: that name is taken by the workflow; choose another"


def _jobs_can_be_listed(study: Study) -> Iterator[str]:
    """Yield numbers of trainings and snapshots that no list of jobs and files can hold."""
    if len(study.trainings) > _MOST:
        yield f"students and seeds are {len(study.trainings):,} trainings; {_MOST:,} are possible: list fewer seeds"
    for name, student in study.students.items():
        if student.steps // student.snapshot_every * len(student.rates) > _MOST:
            yield f"students.{name}: there are more than {_MOST:,} snapshots: raise snapshot_every"


def _students_differ_as_declared(study: Study) -> Iterator[str]:
    """Yield keys that students set themselves but `varies` does not list."""
    fields = {key for objective in OBJECTIVES.values() for key in objective.model_fields}
    for key in study.varies:
        if key not in fields:
            yield f"varies names {key!r}, not a student's field{suggestion(key, fields)}"
    for name, own in study.overrides.items():
        for key in sorted(own.keys() - set(study.varies)):
            yield (
                f"students.{name} changes {key!r}, but the study says its students differ only in "
                f"{', '.join(study.varies)}: move it to `student` for all, or add it to `varies`"
            )


def _there_is_a_teacher(study: Study) -> Iterator[str]:
    """Yield settings that need a teacher, in a study without one."""
    for name, student in study.students.items() if not study.taught else ():
        if student.from_teacher or student.needs_coefficients:
            yield (
                f"students.{name} needs a teacher, and teacher.kind is none: use objective: consistency with start: "
                "random and a preconditioning that is not fitted from one (fit), or give the study a teacher"
            )
    if not study.taught and study.calibration.published_fid is not None:
        yield "calibration.published_fid is of a teacher, and teacher.kind is none: remove it"


def _dropout_has_its_levels(study: Study) -> Iterator[str]:
    """Yield dropouts by level for networks without levels."""
    network = None if isinstance(study.teacher, OfficialTeacher) else study.teacher.network
    for name, student in study.students.items():
        if isinstance(network, SongUNet):
            yield from network.wrong_levels(f"students.{name}: dropout", student.dropout)
        elif isinstance(student.dropout, list):
            yield f"students.{name}: dropout lists levels, which only teacher.network.kind songunet has; use a number"


def _balance_has_its_block(study: Study) -> Iterator[str]:
    """Yield students whose DSM term is balanced at a block that their network lacks."""
    network = None if isinstance(study.teacher, OfficialTeacher) else study.teacher.network
    for name, student in study.students.items():
        if student.balance == "adaptive-block" and network and network.kind == "mlp":
            yield f"students.{name}: dsm_balance adaptive-block is for U-Nets, the network is an mlp: use adaptive"


def _predictor_comes_first(study: Study) -> Iterator[str]:
    """Yield students made from one that is missing, not alike, or made from them."""
    for name, student in study.students.items():
        frozen, where = student.frozen, f"students.{name}: predictor"
        if frozen is None:
            continue
        if frozen.run not in study.students:
            yield f"{where} names {frozen.run!r}, which is not one of the students {', '.join(study.students)}"
            continue
        other = study.students[frozen.run]
        if any(getattr(other, fact) != getattr(student, fact) for fact in ("preconditioning", "has_own_fit", "refits")):
            yield f"{where} names {frozen.run!r}, whose preconditioning differs: they must agree"
        if frozen.step is not None and (frozen.step > other.steps or frozen.step % other.snapshot_every):
            yield (
                f"{where} names step {frozen.step} of {frozen.run!r}, which keeps a snapshot every "
                f"{other.snapshot_every} steps up to {other.steps}: name one of those, or none for its final weights"
            )
        chain = [name]
        while (following := study.students[chain[-1]].frozen) and following.run in study.students:
            chain.append(following.run)
            if following.run in chain[:-1]:
                yield f"{where} leads round in a circle ({' -> '.join(chain)}): one must come first"
                break


def _levels_can_be_drawn(study: Study) -> Iterator[str]:
    """Yield curricula without a level to draw, or whose pairs of levels become one."""
    low, high = math.log(study.noise.sigma_min), math.log(study.noise.sigma_max)
    for name, student in study.coupled.items():
        where, levels = f"students.{name}: curriculum", student.curriculum
        if not low - 5 * levels.p_std < levels.p_mean < high + 5 * levels.p_std:
            yield f"{where}.p_mean {levels.p_mean:g} is far from the study's ln sigma, {low:.2f} to {high:.2f}: move it"
        if isinstance(levels, Shrinking):
            every = levels.double_every
            if ((student.steps - 1) // every + 1) * math.log2(levels.q) > 48:
                yield f"{where}.double_every {every} makes the two levels one before step {student.steps}: raise it"


def _compared_students_are_alike(study: Study) -> Iterator[str]:
    """Yield comparisons of students that are missing or not alike."""
    students = study.students
    if len({student.snapshot_every for student in students.values()}) > 1:
        yield "students must share snapshot_every, or their learning curves cannot be compared"
    for objective, name in study.report.baseline.items():
        if name not in students:
            yield f"report.baseline.{objective} names {name!r}, which is not one of the students"
        elif students[name].objective != objective:
            yield f"report.baseline.{objective} names {name!r}, whose objective differs"
    for pair in study.report.against.items():
        unknown = [name for name in pair if name not in students]
        if unknown:
            yield f"report.against names {unknown[0]!r}, which is not one of the students"


def _teacher_fits_the_images(study: Study) -> Iterator[str]:
    """Yield reasons why the teacher cannot be one of these images."""
    if isinstance(study.teacher, OfficialTeacher):
        if study.noise.sigma_data == "measured":
            yield "noise.sigma_data cannot be measured: an EDM teacher has its own, 0.5"
        return
    network = study.teacher.network
    if network and (problem := network.refuses(study.dataset.resolution, study.dataset.channels)):
        yield problem


def _flows_are_of_couplings(study: Study) -> Iterator[str]:
    """Yield measurements of the section flows that are impossible."""
    if study.flows is None:
        return
    if not study.coupled:
        yield "flows measures students of consistency training, and there is none: remove the section"
    if len(set(study.flows.toy_seeds)) < len(study.flows.toy_seeds):
        yield "flows.toy_seeds lists a seed twice"
    for name in study.flows.discrepancy:
        if name not in study.coupled:
            yield f"flows.discrepancy names {name!r}, which is not one of the students of consistency training"


def _scores_can_be_measured(study: Study) -> Iterator[str]:
    """Yield numbers that make a score meaningless."""
    scores, sampling = study.scores, study.sampling
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds lists a seed twice"
    for nfe in sorted(set(study.report.grid_nfe) - set(sampling.nfe)):
        yield f"report.grid_nfe has {nfe}, which sampling.nfe does not sample"
    if scores.extractor == "classifier" and sampling.count <= scores.classifier.features:
        yield "sampling.count must exceed scores.classifier.features, or the Frechet distance is singular"
    if scores.extractor == "classifier" and scores.curve_count <= scores.classifier.features:
        yield "scores.curve_count must exceed scores.classifier.features, or the Frechet distance is singular"
    if study.calibration.published_fid is not None and scores.extractor != "inception":
        yield "calibration.published_fid is Inception's FID: set scores.extractor to inception, or remove it"
    if scores.alignment_count > scores.curve_count:
        yield "scores.alignment_count must not exceed scores.curve_count: they share their noise"


RULES: tuple[Callable[[Study], Iterator[str]], ...] = (
    _names_are_free,
    _jobs_can_be_listed,
    _students_differ_as_declared,
    _there_is_a_teacher,
    _dropout_has_its_levels,
    _balance_has_its_block,
    _predictor_comes_first,
    _levels_can_be_drawn,
    _compared_students_are_alike,
    _teacher_fits_the_images,
    _flows_are_of_couplings,
    _scores_can_be_measured,
)
