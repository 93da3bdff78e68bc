"""The report's numbers in words. No files, no figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from consistency.config.networks import NoTeacher, OfficialTeacher
from consistency.config.study import Study
from consistency.evaluation.analysis import Paired, SpeedUp


def coarse(study: Study) -> str:
    """Return a caution on intervals over few seeds."""
    count = len(study.seeds)
    return "" if count > 4 else " (one seed: no interval)" if count == 1 else f" ({count} seeds: coarse)"


def teacher_line(row: Mapping[str, Any] | None, study: Study) -> str:
    """Return the teacher's score, the first line of a report. row: the calibration's, None without a teacher."""
    if row is None:
        return "No teacher: students are measured against the data alone"
    count, published = int(row["images"]), row.get("published")
    fid = study.scores.extractor == "inception"
    value = f"FID {row['fd']:.2f}" if fid else f"FD {row['fd']:.4g}, not FID"
    known = published is not None and not np.isnan(published)
    given = f"published {published:g}, tolerance {row['tolerance']:g}; " if known else ""
    how = f"clean-fid {study.scores.mode}" if fid else "classifier features"
    return f"Teacher: {value} ({given}{count:,} images, {how}, seeds 0-{count - 1})"


def teacher_made(study: Study, parameters: int) -> str:
    """Describe the teacher's origin."""
    teacher = study.teacher
    if isinstance(teacher, NoTeacher):
        return f"none; the students' network is {teacher.network.kind}, {parameters:,} parameters"
    if isinstance(teacher, OfficialTeacher):
        return f"official EDM checkpoint {teacher.checkpoint}, {parameters:,} parameters"
    steps = f"{teacher.steps:,} steps of {teacher.batch} images"
    return f"{teacher.network.kind}, {parameters:,} parameters, {steps}"


def plus_minus(mean: float, half: float) -> str:
    """Format a mean and its half-width, as far as they are known."""
    if np.isnan(mean):
        return ""
    return f"{mean:.4g}" if np.isnan(half) else f"{mean:.4g} ± {half:.2g}"


def speed(item: SpeedUp) -> str:
    """Format the value with its bound and interval."""
    value = "not defined" if item.bound == "?" else f"{item.bound and item.bound + ' '}{item.value:.2f}"
    return value if np.isnan(item.low) else f"{value} ({_interval(item)})"


def _interval(item: SpeedUp) -> str:
    """Format the interval: 0 if resamples do not reach the score, ∞ if some have it before training."""
    low = f"{item.low:.2f}" if item.low else "0"
    return f"{low} to {item.high:.2f}" if np.isfinite(item.high) else f"{low} to ∞"


def what_of(measure: str, extractor: str) -> str:
    """Name a measure in a sentence."""
    return "alignment error" if measure == "alignment" else "FID" if extractor.startswith("inception") else "FD"


def sentence(item: SpeedUp, extractor: str) -> str:
    """Describe one speed-up, and say so if its interval does not exclude 1."""
    final = f"{item.baseline}'s final {what_of(item.measure, extractor)}"
    times = f"{item.value:.2f} times fewer" if item.value >= 1 else f"{1 / item.value:.2f} times as many"
    reached = {
        "": f"reaches {final} in {times} iterations",
        ">": f"has {final} before training (speed-up above {item.value:.2f})",
        "<": f"does not reach {final} in its training (speed-up below {item.value:.2f})",
        "?": f"has no speed-up: {item.baseline} has its final {what_of(item.measure, extractor)} before training",
    }[item.bound]
    if np.isnan(item.low):
        return f"At NFE {item.nfe}, {item.run} {reached}; one seed, no interval."
    doubt = "" if item.low > 1 or item.high < 1 else "; the interval includes 1, so no difference is shown"
    interval = f"speed-up's 95 % bootstrap interval {_interval(item)}, {item.seeds} seeds"
    return f"At NFE {item.nfe}, {item.run} {reached} ({interval}){doubt}."


def ratio(item: Paired) -> str:
    """Format the difference in percent, with its interval."""
    text = f"{100 * (item.ratio - 1):+.1f} %"
    return text if np.isnan(item.low) else f"{text} ({100 * (item.low - 1):+.1f} to {100 * (item.high - 1):+.1f})"


def paired_sentence(item: Paired, extractor: str) -> str:
    """Describe a paired difference."""
    what = f"{what_of(item.measure, extractor)} over the second half of training"
    if np.isnan(item.low):
        return f"At NFE {item.nfe}, {item.run}'s {what} differs from {item.baseline}'s by {ratio(item)}; one seed."
    verdict = "" if item.high < 1 or item.low > 1 else "; the interval includes 0, so no difference is shown"
    return (
        f"At NFE {item.nfe}, {item.run}'s {what} differs from {item.baseline}'s, seed by seed, by {ratio(item)}: "
        f"95 % t interval, {item.seeds} seeds{verdict}."
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
    """Return the papers' claims about students like this study's, one sentence per paper."""
    said = dict.fromkeys(student.claim for student in study.students.values())
    return [claim for claim in said if claim]


def commit(state: dict[str, Any]) -> str:
    """Format a commit, and mark a tree with uncommitted changes."""
    return f"{state['commit'] or 'unknown'}{' (dirty)' if state['dirty'] else ''}"
