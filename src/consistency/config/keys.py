"""Keys: the settings that a stage's result depends on, and their digest."""

import hashlib
import json
from typing import Any

from consistency.config.networks import OfficialTeacher
from consistency.config.study import Study


def settings_of(study: Study, stage: str, name: str | None = None) -> dict[str, Any]:
    """Return every key that a stage's result depends on, including those of earlier stages.

    stage: dataset, teacher, extractor, coefficients, student, samples, scores, flows, report; name: the student
    for student, samples and scores; samples and scores without one are the teacher's.
    """
    # Without labels, how they are drawn has no effect.
    unused = {"batch"} if study.teacher.conditional else {"batch", "labels"}
    dump = study.model_dump(mode="json", exclude={"compute": True, "sampling": unused})
    images = {key: value for key, value in dump["dataset"].items() if key != "horizontal_flip"}
    base = {part: dump[part] for part in ("dataset", "noise", "teacher")}
    match stage:
        case "report":
            return dump
        case "dataset":
            return {"dataset": images}
        case "extractor":
            measured_by = ("extractor", "classifier", "mode", "kid_images")
            return {"dataset": images} | {key: dump["scores"][key] for key in measured_by}
        case "teacher":
            return {"teacher": dump["teacher"]} if isinstance(study.teacher, OfficialTeacher) else base
        case "coefficients":
            return base | {"coefficients": dump[stage]} if study.needs_coefficients else {"coefficients": None}
        case "flows" if study.flows is None:
            return {"flows": None}
        case "flows":
            students = {name: settings_of(study, "student", name) for name in study.coupled}
            precision = dump["sampling"]["precision"]
            return {"flows": dump[stage], "seeds": study.seeds, "measured": students, "precision": precision}
    settings = base
    if name is None:
        gate = set() if stage == "scores" else {"published_fid", "tolerance"}
        settings["calibration"] = {key: value for key, value in dump["calibration"].items() if key not in gate}
    else:
        student = study.students[name]
        settings["student"] = student.model_dump(mode="json")
        if student.fitted:
            settings["coefficients"] = dump["coefficients"]
        if student.frozen:
            settings["predictor"] = settings_of(study, "student", student.frozen.run)
    for part in {"samples": ["sampling"], "scores": ["sampling", "scores"]}.get(stage, []):
        settings[part] = dump[part]
    return settings


def key_of(study: Study, stage: str, name: str | None = None, seed: int | None = None) -> str:
    """Return 16 hex digits that identify exactly these settings (and seed) and mark the files of the stage."""
    return settings_key(stage, seed, settings_of(study, stage, name))


def settings_key(stage: str, seed: int | None, settings: dict[str, Any]) -> str:
    """Return the 16 hex digits that identify a stage's settings and seed."""
    content = {"stage": stage, "seed": seed, "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
