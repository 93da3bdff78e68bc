"""The report's numbers in words. No files, no figures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from consistency.config.networks import GivenTeacher, NoTeacher, OfficialTeacher
from consistency.config.study import Study
from consistency.evaluation.analysis import SIGNIFICANT, Comparison, Paired, SpeedUp
from consistency.theory.preconditioning import FORMS


def teacher_line(row: Mapping[str, Any] | None, study: Study) -> str:
    """Return the teacher's score, the first line of a report. row: the calibration's, None without a teacher."""
    if row is None:
        return "No teacher: students are measured against the data alone"
    count, first, published = int(row["images"]), study.sampling.first_seed, row.get("published")
    fid = study.scores.extractor == "inception"
    value = f"FID {row['fd']:.2f}" if fid else f"FD {row['fd']:.4g}, not FID"
    known = published is not None and not np.isnan(published)
    given = f"published {published:g}, tolerance {row['tolerance']:g}; " if known else ""
    how = f"clean-fid {study.scores.mode}" if fid else "classifier features"
    return f"Teacher: {value} ({given}{count:,} images, {how}, seeds {first}-{first + count - 1})"


def teacher_made(study: Study, parameters: int) -> str:
    """Describe the teacher's origin."""
    teacher = study.teacher
    if isinstance(teacher, NoTeacher):
        return f"none; the students' network is {teacher.network.kind}, {parameters:,} parameters"
    if isinstance(teacher, OfficialTeacher):
        return f"official EDM checkpoint {teacher.checkpoint}, {parameters:,} parameters"
    if isinstance(teacher, GivenTeacher):
        return f"the given file {Path(teacher.path).name}, {parameters:,} parameters"
    steps = f"{teacher.steps:,} steps of {teacher.batch} images"
    return f"{teacher.network.kind}, {parameters:,} parameters, {steps}"


def plus_minus(mean: float, half: float) -> str:
    """Format a mean and its half-width, as far as they are known."""
    if np.isnan(mean):
        return ""
    return f"{mean:.4g}" if np.isnan(half) else f"{mean:.4g} ± {half:.2g}"


def varied(study: Study) -> str:
    """Say what an interval varies over, and what it holds fixed."""
    count = len(study.seeds)
    if count == 1:
        return "One training seed: no interval, no verdict."
    over = (
        f"Intervals are 95 % over {count} training seeds"
        if count > 2
        else "Ranges, not intervals, over 2 training seeds"
    )
    made = "the teacher, the fit, " if study.taught else ""
    return f"{over}; {made}the extractor and the noise of the samples are one each, held fixed."


def what_of(measure: str, extractor: str) -> str:
    """Name a measure in a sentence."""
    return "alignment error" if measure == "alignment" else "FID" if extractor.startswith("inception") else "FD"


def by_unit(unit: str) -> str:
    """Name the unit of training's length, unless it is iterations."""
    return {"iterations": "", "network_evaluations": " by network evaluations", "seconds": " by wall time"}[unit]


def speed(item: SpeedUp) -> str:
    """Format a speed-up with its interval."""
    if np.isnan(item.value):
        value = "not determined"
    else:
        value = {0.0: "too low to measure", np.inf: "too high to measure"}.get(item.value, f"{item.value:.2f}")
    return value + _interval(item, lambda x: f"{x:.2f}" if x else "0")


def ratio(item: Paired) -> str:
    """Format the difference in percent, with its interval."""
    if np.isnan(item.value):
        return "not determined"
    return f"{_percent(item.value)} %{_interval(item, _percent)}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def _interval(item: Comparison, form: Callable[[float], str]) -> str:
    """Format an interval, or what is none: the range of two seeds; nothing for one. ∞, 0: open."""
    if np.isnan(item.low) or np.isnan(item.high):
        return ""
    low, high = form(item.low), form(item.high) if np.isfinite(item.high) else "∞"
    return f" ({'range ' if item.seeds == 2 else ''}{low} to {high})"


def final(item: SpeedUp) -> str:
    """Format the ratio of the steps to the baseline's final score; a score that is never reached is a bound below 1."""
    value = item.baseline_steps / item.steps
    return {"": f"{value:.2f}", "<": f"< {value:.2f}", ">": f"> {value:.2f}", "?": "not defined"}[item.reached]


def verdict(item: Comparison) -> str:
    """Say what a comparison shows: a difference, none, or nothing."""
    if item.seeds < 3:
        return f"no verdict from {item.seeds} seed{'s' if item.seeds > 1 else ''}"
    if item.equal:
        return f"equal within {100 * item.tolerance:g} %"
    if item.shown:
        return f"a difference (p = {item.p:.2g})"
    if item.p < SIGNIFICANT:
        return f"the curves differ (p = {item.p:.2g}), but do not fix this number"
    return "no difference is shown" + (f" (p = {item.p:.2g})" if item.p < 1 else "")


def sentence(item: SpeedUp, extractor: str) -> str:
    """Describe one speed-up, with its verdict."""
    what = what_of(item.measure, extractor)
    by = f"by {what}{by_unit(item.unit)}"
    return (
        f"At NFE {item.nfe}, {item.run}'s speed-up over {item.baseline} {by} is {speed(item)}: {verdict(item)}. "
        f"{_final_sentence(item, what)}"
    )


def _final_sentence(item: SpeedUp, what: str) -> str:
    score = f"{item.baseline}'s final {what}"
    if item.reached == "?":
        return f"{item.baseline} has its final {what} before training."
    if item.reached == ">":
        return f"It has {score} before training (ratio {final(item)})."
    if item.reached == "<":
        return f"It never reaches {score} (ratio {final(item)})."
    return f"It reaches {score} after {item.steps / item.baseline_steps:.2f} times as long."


def paired_sentence(item: Paired, extractor: str) -> str:
    """Describe a paired difference, with its verdict."""
    what = f"{what_of(item.measure, extractor)} over the second half of training{by_unit(item.unit)}"
    if np.isnan(item.value):
        return f"At NFE {item.nfe}, {item.run} and {item.baseline} have no snapshots in common for {what}."
    return (
        f"At NFE {item.nfe}, {item.run}'s {what} differs from {item.baseline}'s, seed by seed, by {ratio(item)}: "
        f"{verdict(item)}."
    )


def differs_in(study: Study, name: str) -> str:
    """List the settings in which a student differs, as the study declares; settings without effect are left out."""
    student = study.students[name]
    settings = student.model_dump(mode="json")
    return ", ".join(
        f"{key}: {_value(settings[key])}" for key in study.varies if key in settings.keys() - student.unused_fields
    )


def _value(value: Any) -> str:
    """Format a setting for a sentence; a section by its kind, with its set fields in brackets."""
    if not isinstance(value, dict):
        return str(value)
    said = {name: each for name, each in value.items() if name != "kind" and each is not None}
    fields = ", ".join(f"{name} {_value(each)}" for name, each in said.items())
    return f"{value['kind']} ({fields})" if "kind" in value else fields


def beginning(study: Study) -> str:
    """Describe the initial weights of the students, and the only keys in which they differ."""
    taught = [name for name, student in study.students.items() if student.from_teacher]
    drawn = [name for name in study.students if name not in taught]
    random = "random weights, the same for all of one seed,"
    if taught and drawn:
        where = f"Students start from the teacher ({', '.join(taught)}) or from {random} ({', '.join(drawn)})"
        return f"{where} and differ from one another only in {', '.join(study.varies)}"
    source = random if drawn else "the teacher"
    return f"Every student starts from {source} and differs from the others only in {', '.join(study.varies)}"


def claims(study: Study) -> list[str]:
    """Return the papers' claims about students like this study's, one sentence per paper, and the students that are of
    no paper."""
    said = dict.fromkeys(student.claim for student in study.students.values())
    ours = [name for name, student in study.students.items() if FORMS[student.preconditioning].ours]
    also = [f"Ours and in no paper: the preconditioning of {', '.join(ours)}."] if ours else []
    return [*(claim for claim in said if claim), *also]


def commit(state: dict[str, Any]) -> str:
    """Format a commit, and mark a tree with uncommitted changes."""
    return f"{state['commit'] or 'unknown'}{' (dirty)' if state['dirty'] else ''}"
