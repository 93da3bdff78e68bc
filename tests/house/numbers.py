"""Numbers in the prose of a page of results, and the committed values that they may come from."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tests.processes import ROOT

from consistency.config.reading import load_study

# Not versions, which have two points, and not parts of words.
NUMBER = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.(\d+))?(?:e([-+]\d+))?)(?!\.?\w)(\s*%)?")
# Generated blocks, code, and the addresses of links.
NO_PROSE = (
    r"(?s)<!-- begin: .*?<!-- end -->|^ *```.*?^ *```|`[^`\n]*`",
    r"(?m)^ {4,}\S.*$",
    r"\]\([^)\s]*\)",
    r"https?://\S+",
    r"Python 3\.\d+",
)
# The level of an interval is no result.
LEVEL = r"95\s%(?=\s(?:t|bootstrap|interval|intervals)\b)"


def unsupported(text: str, *folders: Path, study_file: Path | None = None) -> list[str]:
    """The decimal numbers and percentages in prose that no value of the folders' files or studies gives at the printed
    precision: v, 1000 v, or in percent 100 v and, of a ratio, 100 (v - 1), without its sign."""
    found = ([*values_of(folder), *numbers_in(study_of(folder, study_file))] for folder in folders)
    values = np.array([value for each in found for value in each], float)
    values = values[np.isfinite(values)]
    percents = (100 * values, 100 * (values[(values > 0.2) & (values < 6)] - 1))
    for pattern in (*NO_PROSE, LEVEL):
        text = re.sub(pattern, " ", text, flags=re.MULTILINE)
    missing = []
    for match in NUMBER.finditer(text):
        whole, decimals, exponent, percent = match.groups()
        if decimals is None and exponent is None and percent is None:
            continue
        unit = 10.0 ** (int(exponent or 0) - len(decimals or ""))
        # The ends of an interval in percent have no sign of their own: -8.3 % (-21.1 to +6.5).
        forms = (*percents, *(() if percent else (values, 1000 * values)))
        number = float(whole.replace(",", ""))
        if not any((np.abs(np.abs(form) - number) <= (0.5 + 1e-6) * unit).any() for form in forms):
            missing.append(" ".join(match[0].split()))
    return missing


def paragraphs(page: Path, published: Iterable[str]) -> Iterator[tuple[str, list[Path]]]:
    """The paragraphs of a page that link to published results, each with the folders that it names."""
    for text in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
        named = dict.fromkeys(re.findall(r"\]\((?:[./]|docs/)*results/([\w-]+)/", text))
        if named and named.keys() <= set(published):
            yield text, [ROOT / "docs/results" / name for name in named]


def values_of(folder: Path) -> Iterator[float]:
    """Every number in the tables and JSON files of a folder."""
    for path in folder.glob("*.csv"):
        yield from pd.read_csv(path).select_dtypes("number").to_numpy().ravel()
    for path in folder.glob("*.json"):
        yield from numbers_in(json.loads(path.read_text()))


def study_of(folder: Path, study_file: Path | None) -> dict[str, Any]:
    """The study of a folder with every default, and its students."""
    study = load_study(study_file or ROOT / f"config/studies/{folder.name}.yaml")
    students = [student.model_dump(mode="json") for student in study.students.values()]
    return study.model_dump(mode="json") | {"whole": students}


def numbers_in(content: Any) -> Iterator[float]:
    """Every number in plain data."""
    if isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from numbers_in(each)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content
