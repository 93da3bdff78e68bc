"""The generated blocks of a published page, `<!-- begin: NAME -->` to `<!-- end -->`, as Markdown."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from consistency.base.errors import UserError, suggestion
from consistency.config.measures import OWN_SAMPLERS
from consistency.config.study import Study
from consistency.report import wording
from consistency.report.published import CARDS, Published
from consistency.report.verdicts import verdicts

_BLOCK = re.compile(r"<!-- begin: (?P<name>[^\n]*?) -->(?P<body>.*?)<!-- end -->", re.DOTALL)

Row = dict[str, Any]


def blocks_of(text: str, page: Path) -> dict[str, str]:
    """Return the generated blocks of a page as they are. Raises UserError for an unknown name and an open block."""
    found = {block["name"]: block["body"] for block in _BLOCK.finditer(text)}
    for name in found.keys() - BLOCKS.keys():
        raise UserError(f"{page} has an unknown block {name!r}{suggestion(name, BLOCKS)}")
    if not text.count("<!-- begin:") == text.count("<!-- end -->") == len(_BLOCK.findall(text)):
        raise UserError(f"{page} has a block that does not end: write `<!-- begin: NAME -->` and `<!-- end -->`")
    return found


def filled(text: str, published: Published) -> str:
    """Write the generated blocks of a page; all else stays."""

    def fill(block: re.Match[str]) -> str:
        content = BLOCKS[block["name"]](published) or "Not measured in this study."
        return f"<!-- begin: {block['name']} -->\n\n{content}\n\n<!-- end -->"

    return _BLOCK.sub(fill, text)


def figures_named(text: str) -> set[str]:
    """Return the figures of its own folder that a page names."""
    return set(re.findall(r"(?<![\w/.-])[\w-]+\.png\b", text))


def first_page(published: Published, figures: set[str]) -> str:
    """Return a page of all blocks that apply, empty, and the figures."""
    study, applying = published.study, [name for name, block in BLOCKS.items() if block(published)]
    parts = [f"# {study.name}: {study.title or 'results'}"]
    parts += [f"## {name.capitalize()}\n\n<!-- begin: {name} -->\n<!-- end -->" for name in applying]
    parts += ["## Figures", *(f"![{name[:-4].replace('_', ' ')}]({name})" for name in sorted(figures))]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row], left: int) -> str:
    """Return rows as a Markdown table; the first columns are words, the others numbers, to the right."""
    table = pd.DataFrame(rows, dtype=str).fillna("")
    rules = ["---"] * left + ["---:"] * (table.shape[1] - left)
    lines: list[list[str]] = [[str(name) for name in table], rules, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_nfe(rows: Sequence[Row]) -> str:
    """Return a table with the texts of all NFE side by side. rows: words, nfe, text."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        words = {key: value for key, value in row.items() if key not in ("nfe", "text")}
        found.setdefault(tuple(words.values()), words)[f"NFE {row['nfe']}"] = row["text"]
    return _markdown(list(found.values()), len(rows[0]) - 2)


def _seeds(study: Study) -> str:
    return f"seed{'s' if len(study.seeds) > 1 else ''} {', '.join(map(str, study.seeds))}"


def _features(extractor: str) -> str:
    return "Inception's features" if extractor.startswith("inception") else "classifier features, not Inception's"


def _made_by(published: Published) -> str:
    """List what the cards say of the making."""
    made, cards = published.cards, list(published.cards.cards.values())
    days = sorted({card.created[:10] for card in cards})
    commits = {
        f"{(card.commit or 'unknown')[:7]}{' (with uncommitted changes)' if card.dirty else ''}" for card in cards
    }
    threads: dict[str, set[str]] = {}
    for each in made.machines:
        gpus = [f"{count} x {name}" for name, count in Counter(each["gpus"]).items()] or ["no GPU"]
        parts = f"{each['cores']} cores of {each['processor']}", f"{each['memory_gib']:g} GiB", *gpus
        threads.setdefault(", ".join(parts), set()).add(str(each["threads"]))
    machines = [f"{machine}, threads a job: {' or '.join(sorted(found))}" for machine, found in threads.items()]
    shown = ("python", "torch", "numpy", "scipy", "pandas", "scikit-learn")
    packages = [", ".join(f"{name} {each[name]}" for name in shown if name in each) for each in made.packages]
    seconds = [card.measured.get("seconds", card.seconds) for card in cards if card.stage == "student"]
    said = {
        "Command": f"`snakemake --cores all --config studies={published.study.name}`; the report's is "
        f"`{made.cards['report'].command}`, and [{CARDS}]({CARDS}) has all {len(cards)}",
        "Commit": ", ".join(sorted(commits)),
        "Date": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "Hardware": "; ".join(machines),
        "Versions": "; ".join(dict.fromkeys(packages)),
        "Students": f"{len(seconds)} trainings, {sum(seconds):,.0f} s in all",
    }
    return "\n".join(f"- {key}: {value}." for key, value in said.items())


def _verdicts(published: Published) -> str:
    said = "\n".join(f"- {sentence}" for sentence in verdicts(published.study, published.results))
    return f"{said}\n\n{wording.varied(published.study)}" if said else ""


def _calibration(published: Published) -> str:
    rows, extractor = [], published.results.extractor
    for row in published.results.calibration:
        words = {"images": row["run"], "sampler": row["sampler"], "NFE": row["nfe"] or "", "N": f"{row['images']:,}"}
        distances = {wording.what_of("fd", extractor): f"{row['fd']:.4g}", "KID": f"{row['kid']:.4g}"}
        known = {key: f"{row[key]:g}" for key in ("published", "tolerance") if not pd.isna(row[key])}
        rows.append(words | distances | known)
    return f"{_markdown(rows, 2)}\n\nFrom {_features(extractor)}."


def _final(measure: str, published: Published) -> str:
    table, study, extractor = published.results.table, published.study, published.results.extractor
    rows = table[table.sampler.isin(OWN_SAMPLERS) & table[measure].notna()]
    if rows.empty:
        return ""
    factor = 1000 if rows[measure].abs().max() < 0.01 else 1
    pairs = zip(factor * rows[measure], factor * rows[f"{measure}_half_width"], strict=True)
    texts = [wording.plus_minus(*pair) for pair in pairs]
    places = zip(rows.run, rows.nfe, texts, strict=True)
    shown = _by_nfe([{"student": f"`{run}`", "nfe": nfe, "text": text} for run, nfe, text in places])
    if measure == "alignment":
        what, count = "Alignment error, mean squared per pixel", study.scores.alignment_count
    else:
        name = "KID" if measure == "kid" else wording.what_of(measure, extractor)
        what, count = f"{name} from {_features(extractor)}", int(rows.images.iloc[0])
    scale = ", x 1000" if factor > 1 else ""
    said = ": mean ± half-width of the 95 % t interval" if len(study.seeds) > 1 else ""
    return f"{shown}\n\n{what}{scale}{said}; N = {count:,}; {_seeds(study)}."


def _comparisons(items: Sequence[Any], say: Callable[[Any], str], published: Published) -> str:
    """Return a table of comparisons with the baseline, each as `say` says it."""
    rows = []
    for item in items:
        by = wording.what_of(item.measure, published.results.extractor) + wording.by_unit(item.unit)
        place = {"student": f"`{item.run}`", "over": f"`{item.baseline}`", "measure": by, "nfe": item.nfe}
        rows.append(place | {"text": say(item)})
    return _by_nfe(rows)


def _judged(name: str, say: Callable[[Any], str], published: Published) -> str:
    items, study = getattr(published.results, name), published.study
    if not items:
        return ""
    table = _comparisons(items, lambda item: f"**{say(item)}**" if item.shown else say(item), published)
    bold = " Bold: a difference is shown, by Holm over the table." if len(study.seeds) > 2 else ""
    return f"{table}\n\n{_seeds(study).capitalize()}. {wording.varied(study)}{bold}"


def _final_score(published: Published) -> str:
    """Return the ratios that papers state, which have no verdict."""
    found = published.results.found
    said = "The baseline's iterations to its own final score over the student's, of the mean curves."
    return f"{_comparisons(found, wording.final, published)}\n\n{said}" if found else ""


#: the content of each block; '' where a study has not measured it
BLOCKS: dict[str, Callable[[Published], str]] = {
    "made by": _made_by,
    "verdicts": _verdicts,
    "calibration": _calibration,
    "final fd": partial(_final, "fd"),
    "final kid": partial(_final, "kid"),
    "final alignment": partial(_final, "alignment"),
    "speed-up": partial(_judged, "found", wording.speed),
    "final score": _final_score,
    "paired": partial(_judged, "paired", wording.ratio),
}
