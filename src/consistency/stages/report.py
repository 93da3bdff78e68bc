"""Stage report: tables, figures and one self-contained page from everything the study made."""

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from consistency import figures
from consistency.analysis import MEASURES, Paired, SpeedUp, final_table, paired_ratios, speed_ups
from consistency.errors import UserError
from consistency.files import read_json, write_bytes, write_json
from consistency.layout import Layout
from consistency.provenance import git_state, read_card, write_card
from consistency.stages.inputs import read_array, read_coefficients, read_dataset
from consistency.stages.scores import COLUMNS
from consistency.study import FITTED, Study
from consistency.theory.generalized_ode import GeneralizedODE

Cards = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file name, the chapter it stands in, its caption, its two files."""

    name: str
    chapter: str
    caption: str
    png: bytes
    svg: bytes

    @classmethod
    def of(cls, name: str, chapter: str, caption: str, figure: Figure) -> "Picture":
        """Draw a figure, and let go of it."""
        picture = cls(name, chapter, caption, figures.drawn(figure, "png"), figures.drawn(figure, "svg"))
        figures.close(figure)
        return picture


def make_report(study: Study, layout: Layout) -> None:
    """Write report.html, figures/, scores.csv, table.csv, speedup.csv, summary.json and card.json.

    Raises UserError when a stage's results are missing or belong to another study.
    """
    started = time.time()
    scores = read_scores(study, layout)
    cards = _cards(study, layout)
    table = final_table(scores)
    found = speed_ups(scores, baselines(study), study.scores.curve_nfe, study.report.bootstrap)
    paired = paired_ratios(scores, baselines(study), study.scores.curve_nfe)
    pictures = _pictures(study, layout, scores, found)
    folder = layout.report
    for stale in (folder / "figures").glob("*"):
        if stale.stem not in {picture.name for picture in pictures}:
            stale.unlink()
    for picture in pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)
        write_bytes(folder / "figures" / f"{picture.name}.svg", picture.svg)
    texts = {
        "scores.csv": scores.to_csv(index=False),
        "table.csv": table.to_csv(index=False),
        "speedup.csv": pd.DataFrame([asdict(item) for item in found]).to_csv(index=False),
        "paired.csv": pd.DataFrame([asdict(item) for item in paired]).to_csv(index=False),
        "report.html": _page(study, layout, scores, table, found, paired, cards, pictures),
    }
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    write_json(folder / "summary.json", _summary(scores, table, found, paired))
    inputs = [layout.scores(None, None), *_score_files(study, layout)]
    outputs = [folder / name for name in (*texts, "summary.json")]
    write_card(folder, study, "report", started=started, inputs=inputs, outputs=outputs)


def print_summary(study: Study, layout: Layout) -> None:
    """Print the score table, the speed-ups, and where the report and the MLflow page are."""
    scores = read_scores(study, layout)
    table = final_table(scores)
    label = figures.measure_label("fd", str(scores.extractor.iloc[0]))
    print(f"\n{study.title or study.name}: mean ± half-width of the 95 % t interval over seeds{_coarse(study)}\n")
    print(f"{'student':18} {'sampler':10} {'NFE':>3}  {label:>36}  {'alignment error':>24}")
    for row in table.itertuples():
        fd, alignment = (_plus_minus(getattr(row, m), getattr(row, f"{m}_half_width")) for m in ("fd", "alignment"))
        print(f"{row.run:18} {row.sampler:10} {row.nfe:3}  {fd:>36}  {alignment:>24}")
    for known in scores[scores.kind == "calibration"].to_dict("records"):
        print(f"{known['run']:18} {known['sampler']:10} {known['nfe'] or '':3}  {known['fd']:36.4g}")
    found = speed_ups(scores, baselines(study), study.scores.curve_nfe, study.report.bootstrap)
    if found:
        print(f"\nspeed-up: the baseline's iterations to its own final score over the student's{_coarse(study)}\n")
    for item in found:
        what = "FD" if item.measure == "fd" else item.measure
        print(f"{item.run:18} over {item.baseline:12} {what:10} NFE {item.nfe:<3} {_speed(item)}")
    paired = paired_ratios(scores, baselines(study), study.scores.curve_nfe)
    if paired:
        print(f"\ndifference to the baseline over the second half of training, paired by seed{_coarse(study)}\n")
    for pair in paired:
        what = "FD" if pair.measure == "fd" else pair.measure
        print(f"{pair.run:18} to   {pair.baseline:12} {what:10} NFE {pair.nfe:<3} {_ratio(pair)}")
    print(f"\nreport: {layout.report / 'report.html'}")
    tracked = layout.track / "tracked.json"
    if tracked.exists():
        print(f"MLflow: {read_json(tracked, 'track')['url_hint']}")


def read_scores(study: Study, layout: Layout) -> pd.DataFrame:
    """All score tables of the study, the calibration first. Raises UserError naming the verb for a missing one."""
    paths = {layout.scores(None, None): "calibration"}
    for path, (run, seed) in zip(_score_files(study, layout), _students(study), strict=True):
        paths[path] = f"scores --run {run} --seed {seed}"
    tables = []
    for path, verb in paths.items():
        try:
            tables.append(_checked(pd.read_csv(path), study, path, verb))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: run `python -m consistency {verb}` first") from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}): run `{verb}` again") from None
    return pd.concat(tables, ignore_index=True)


def _checked(table: pd.DataFrame, study: Study, path: Path, verb: str) -> pd.DataFrame:
    """The table, if its rows are those that this study asks for: a score table has no card that would tell."""
    extractor = "classifier" if study.scores.extractor == "classifier" else f"inception-{study.scores.mode}"
    counts = {"curve": study.scores.curve_count, "final": study.sampling.count}
    right = set(COLUMNS) <= set(table.columns) and set(table.study) | set(table.extractor) == {study.name, extractor}
    if right and verb != "calibration":
        run = str(table.run.iloc[0])
        settings = study.resolved(run)
        steps = range(0, settings.steps + 1, settings.snapshot_every)
        rows = table[table.sampler.isin(["jumps", "multistep"])]
        wanted = {("curve", step, nfe) for step in steps for nfe in study.scores.curve_nfe}
        wanted |= {("final", settings.steps, nfe) for nfe in study.sampling.nfe}
        right = set(zip(rows.kind, rows.step, rows.nfe, strict=True)) == wanted
        right = right and bool((table.images == table.kind.map(counts)).all())
    if not right:
        raise UserError(f"{path} was made with other settings: run `python -m consistency {verb}` again")
    return table


def baselines(study: Study) -> dict[str, str]:
    """The student each student's speed-up is measured against, where its objective has one."""
    pairs = {run: study.report.baseline.get(study.resolved(run).objective) for run in study.students}
    return {run: baseline for run, baseline in pairs.items() if baseline is not None}


def _students(study: Study) -> list[tuple[str, int]]:
    return [(run, seed) for run in study.students for seed in study.seeds]


def _score_files(study: Study, layout: Layout) -> list[Path]:
    return [layout.scores(run, seed) for run, seed in _students(study)]


def _cards(study: Study, layout: Layout) -> Cards:
    """The card of every stage; students and samples by run and seed."""
    cards = {
        "dataset": read_card(layout.dataset, study, "dataset"),
        "extractor": read_card(layout.extractor, study, "extractor"),
        "teacher": read_card(layout.teacher, study, "teacher"),
    }
    if study.needs_coefficients:
        cards["coefficients"] = read_card(layout.coefficients, study, "coefficients")
    cards["samples of the teacher"] = read_card(layout.samples(None, None), study, "samples")
    for run, seed in _students(study):
        cards[f"student {run} seed {seed}"] = read_card(layout.student(run, seed), study, "student", run, seed)
        cards[f"samples {run} seed {seed}"] = read_card(layout.samples(run, seed), study, "samples", run, seed)
    return cards


def _pictures(study: Study, layout: Layout, scores: pd.DataFrame, found: list[SpeedUp]) -> list[Picture]:
    """Every figure of the report, with N and seeds in its caption."""
    runs, extractor = list(study.students), str(scores.extractor.iloc[0])
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''} ({', '.join(map(str, study.seeds))})"
    count = study.scores.curve_count
    pictures = [_samples_picture(study, layout)]
    if study.needs_coefficients:
        pictures += _coefficient_pictures(study, layout)
    for measure in ("fd", "alignment"):
        images = count if measure == "fd" else study.scores.alignment_count
        caption = (
            f"{figures.measure_label(measure, extractor)} against training iterations: mean over {seeds}, band from "
            f"the lowest to the highest seed, N = {images} images a point. Step 0 is left out."
        )
        figure = figures.learning_curves(scores, runs, study.scores.curve_nfe, measure, extractor)
        pictures.append(Picture.of(f"curves_{measure}", "curves", caption, figure))
    if found:
        for measure in dict.fromkeys(item.measure for item in found):
            images = count if measure == "fd" else study.scores.alignment_count
            caption = (
                f"Iterations of the baseline over iterations of the student to the baseline's final "
                f"{_what(measure, extractor)}, {seeds}, N = {images}. Bars: 95 % bootstrap over seeds{_coarse(study)}; "
                "one that leaves the picture has no end. Triangles are bounds: up, the score was there before "
                "training; down, it was never reached."
            )
            bars = figures.speed_up_bars(found, runs, measure, extractor)
            pictures.append(Picture.of(f"speedup_{measure}", "speedup", caption, bars))
    histories = {run: [_history(layout, run, seed) for seed in study.seeds] for run in runs}
    caption = f"The terms of the training loss, mean over {seeds} and over the steps between two lines of the history."
    pictures.append(Picture.of("losses", "curves", caption, figures.training_losses(histories, runs)))
    return pictures


def _coarse(study: Study) -> str:
    """What an interval over very few seeds is worth."""
    count = len(study.seeds)
    return "" if count > 4 else " (one seed: no interval)" if count == 1 else f" ({count} seeds: coarse)"


def _samples_picture(study: Study, layout: Layout) -> Picture:
    seed = study.seeds[0]
    data = read_dataset(study, layout)
    picks = np.linspace(0, len(data) - 1, 16).astype(int)
    rows = [("data", data.images[picks]), ("teacher", read_array(layout.samples(None, None) / "heun.npy", "samples"))]
    for nfe in study.report.grid_nfe:
        for run in study.students:
            images = read_array(layout.samples(run, seed) / f"nfe{nfe}.npy", f"samples --run {run} --seed {seed}")
            rows.append((f"{run}, NFE {nfe}", images))
    teacher_nfe = 2 * study.sampling.teacher_steps - 1
    caption = (
        f"Images of seeds 0 to 15, below the first row one noise a column: the teacher (Heun, NFE {teacher_nfe}) and "
        f"every student (training seed {seed}). First row: 16 training images, for comparison."
    )
    return Picture.of("samples", "samples", caption, figures.sample_grid(rows))


def _coefficient_pictures(study: Study, layout: Layout) -> list[Picture]:
    fit, settings = read_coefficients(layout), study.coefficients
    ode = GeneralizedODE(*(torch.from_numpy(fit[name]) for name in ("times", "l", "s")))  # type: ignore[arg-type]
    forward = any(study.resolved(run).preconditioning == "analytic-forward" for run in study.students)
    unknown = int((~fit["determined"].astype(bool)).sum())
    note = f"; {unknown} times do not determine s_t" if unknown else ""
    caption = (
        f"l_t and s_t fitted from the teacher at {settings.times} times, N = {settings.samples} noised images each, "
        f"{settings.probes} probes, fit seed {settings.seed}; band: two standard errors{note}. "
        "Dashed: the values that are ctm."
    )
    pair = (
        "f and g of the fitted preconditioning minus ctm's, for jumps from t to s. "
        f"From the fit above (N = {settings.samples}, seed {settings.seed})."
    )
    return [
        Picture.of("coefficients", "coefficients", caption, figures.coefficients(fit)),
        Picture.of("preconditioning", "coefficients", pair, figures.preconditioning(ode, forward)),
    ]


def _history(layout: Layout, run: str, seed: int) -> pd.DataFrame:
    path = layout.student(run, seed) / "history.jsonl"
    try:
        return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): run `student --run {run} --seed {seed}`") from None


def _page(
    study: Study,
    layout: Layout,
    scores: pd.DataFrame,
    table: pd.DataFrame,
    found: list[SpeedUp],
    paired: list[Paired],
    cards: Cards,
    pictures: list[Picture],
) -> str:
    """report.html: one file, no script, nothing loaded from elsewhere."""
    extractor = str(scores.extractor.iloc[0])
    template = files("consistency").joinpath("templates/report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # In words only the form the paper trains with, at the NFE it claims a speed-up (2) and none (1); all in the table.
    claims = {1, 2} & set(study.scores.curve_nfe) or set(study.scores.curve_nfe)
    headlines = {run for run in study.students if study.resolved(run).preconditioning == "analytic"}
    chapters: dict[str, list[dict[str, str]]] = {}
    for picture in pictures:
        entry = {"name": picture.name, "caption": picture.caption, "data": base64.b64encode(picture.png).decode()}
        chapters.setdefault(picture.chapter, []).append(entry)
    return environment.from_string(template).render(
        study=study,
        students={run: _says(study, run) for run in study.students},
        data=read_json(layout.dataset / "dataset.json", "dataset"),
        is_fid=extractor.startswith("inception"),
        extractor=extractor,
        fd_label=figures.measure_label("fd", extractor),
        accuracy=cards["extractor"]["measured"].get("held_out_accuracy"),
        calibration=scores[scores.kind == "calibration"].to_dict("records"),
        rows=_table_rows(table),
        found=[asdict(item) | {"text": _speed(item)} for item in found],
        paired=[asdict(item) | {"text": _ratio(item)} for item in paired],
        verdicts=[
            *(sentence(item, extractor) for item in found if item.run in headlines and item.nfe in claims),
            *(paired_sentence(item, extractor) for item in paired if item.run in headlines and item.measure != "fd"),
        ],
        coarse=_coarse(study),
        cost=_cost(study, cards),
        times=_times(cards),
        pictures=chapters,
        card=cards["teacher"],
        commits=sorted({_commit(state) for state in (git_state(), *(card["git"] for card in cards.values()))}),
        key=study.key("report"),
        commands=sorted({card["command"] for card in cards.values()}),
        resolved=yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False),
    )


def _commit(state: dict[str, Any]) -> str:
    """A commit, and whether the tree differed from it."""
    return f"{state['commit'] or 'unknown'}{' (dirty)' if state['dirty'] else ''}"


def _says(study: Study, run: str) -> str:
    """In what a student differs, as the study declares it."""
    settings = study.resolved(run).model_dump(mode="json")
    return ", ".join(f"{key}: {settings[key]}" for key in study.varies)


def _plus_minus(mean: float, half: float) -> str:
    if np.isnan(mean):
        return ""
    return f"{mean:.4g}" if np.isnan(half) else f"{mean:.4g} ± {half:.2g}"


def _table_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for row in table.to_dict("records"):
        cells = {measure: _plus_minus(row[measure], row[f"{measure}_half_width"]) for measure in MEASURES}
        rows.append({"run": row["run"], "sampler": row["sampler"], "nfe": row["nfe"], "images": row["images"], **cells})
    return rows


def _speed(item: SpeedUp) -> str:
    value = "not defined" if item.bound == "?" else f"{item.bound and item.bound + ' '}{item.value:.2f}"
    return value if np.isnan(item.low) else f"{value} ({_interval(item)})"


def _interval(item: SpeedUp) -> str:
    """Its ends; 0 where resamples do not reach the score, ∞ where they have it before training."""
    low = f"{item.low:.2f}" if item.low else "0"
    return f"{low} to {item.high:.2f}" if np.isfinite(item.high) else f"{low} to ∞"


def _what(measure: str, extractor: str) -> str:
    """A measure in a sentence."""
    return "alignment error" if measure == "alignment" else "FID" if extractor.startswith("inception") else "FD"


def sentence(item: SpeedUp, extractor: str) -> str:
    """One speed-up in words, saying so when its interval does not exclude 1."""
    final = f"{item.baseline}'s final {_what(item.measure, extractor)}"
    times = f"{item.value:.2f} times fewer" if item.value >= 1 else f"{1 / item.value:.2f} times as many"
    reached = {
        "": f"reaches {final} in {times} iterations",
        ">": f"has {final} before training (speed-up above {item.value:.2f})",
        "<": f"does not reach {final} in its training (speed-up below {item.value:.2f})",
        "?": f"has no speed-up: {item.baseline} has its final {_what(item.measure, extractor)} before training",
    }[item.bound]
    if np.isnan(item.low):
        return f"At NFE {item.nfe}, {item.run} {reached}; one seed, no interval."
    doubt = "" if item.low > 1 or item.high < 1 else "; the interval includes 1, so no difference is shown"
    interval = f"speed-up's 95 % bootstrap interval {_interval(item)}, {item.seeds} seeds"
    return f"At NFE {item.nfe}, {item.run} {reached} ({interval}){doubt}."


def _ratio(item: Paired) -> str:
    """The difference in percent, with its interval."""
    text = f"{100 * (item.ratio - 1):+.1f} %"
    return text if np.isnan(item.low) else f"{text} ({100 * (item.low - 1):+.1f} to {100 * (item.high - 1):+.1f})"


def paired_sentence(item: Paired, extractor: str) -> str:
    """A paired difference in words."""
    what = f"{_what(item.measure, extractor)} over the second half of training"
    if np.isnan(item.low):
        return f"At NFE {item.nfe}, {item.run}'s {what} differs from {item.baseline}'s by {_ratio(item)}; one seed."
    verdict = "" if item.high < 1 or item.low > 1 else "; the interval includes 0, so no difference is shown"
    return (
        f"At NFE {item.nfe}, {item.run}'s {what} differs from {item.baseline}'s, seed by seed, by {_ratio(item)}: "
        f"95 % t interval, {item.seeds} seeds{verdict}."
    )


def _cost(study: Study, cards: Cards) -> dict[str, Any] | None:
    """The coefficient fit against one student's training and against all."""
    if "coefficients" not in cards:
        return None
    fit = cards["coefficients"]["measured"]
    students = [cards[f"student {run} seed {seed}"]["measured"] for run, seed in _students(study)]
    fitted = [
        cards[f"student {run} seed {seed}"]["measured"]
        for run, seed in _students(study)
        if study.resolved(run).preconditioning in FITTED
    ]
    return {
        "evaluations": fit["network_evaluations"],
        "seconds": fit["seconds"],
        "of_one_evaluations": fit["network_evaluations"] / fitted[0]["network_evaluations"],
        "of_one_seconds": fit["seconds"] / fitted[0]["seconds"],
        "of_all_evaluations": fit["network_evaluations"] / sum(m["network_evaluations"] for m in students),
        "of_all_seconds": fit["seconds"] / sum(m["seconds"] for m in students),
    }


def _times(cards: Cards) -> list[tuple[str, float]]:
    """Wall time of each stage, the students together."""
    times: dict[str, float] = {}
    for card in cards.values():
        # A training that was interrupted has its whole time only in `measured`.
        seconds = card["measured"].get("seconds", card["seconds"])
        times[card["stage"]] = times.get(card["stage"], 0.0) + seconds
    counts = Counter(card["stage"] for card in cards.values())
    return [(f"{stage} ({counts[stage]})" if counts[stage] > 1 else stage, times[stage]) for stage in times]


def _summary(
    scores: pd.DataFrame, table: pd.DataFrame, found: Sequence[SpeedUp], paired: Sequence[Paired]
) -> dict[str, Any]:
    """The numbers of the report for machines; what was not measured is absent, since JSON has no NaN."""
    final: dict[str, Any] = {}
    for row in table.to_dict("records"):
        values = {name: row[name] for measure in MEASURES for name in (measure, f"{measure}_half_width")}
        known = {name: value for name, value in values.items() if not np.isnan(value)}
        final.setdefault(row["run"], {})[f"{row['sampler']} nfe{row['nfe']}"] = known
    calibration = {
        f"{row.run} {row.sampler}": {"fd": row.fd, "kid": row.kid}
        for row in scores[scores.kind == "calibration"].itertuples()
    }
    speed: dict[str, Any] = {}
    for item in found:
        numbers = {"value": item.value, "low": item.low, "high": item.high}
        known = {"bound": item.bound} | {name: number for name, number in numbers.items() if np.isfinite(number)}
        speed.setdefault(item.run, {})[f"{item.measure} nfe{item.nfe}"] = known
    ratios: dict[str, Any] = {}
    for pair in paired:
        numbers = {"ratio": pair.ratio, "low": pair.low, "high": pair.high}
        known = {name: number for name, number in numbers.items() if np.isfinite(number)}
        ratios.setdefault(pair.run, {})[f"{pair.measure} nfe{pair.nfe}"] = known
    return {
        "extractor": str(scores.extractor.iloc[0]),
        "calibration": calibration,
        "final": final,
        "speed_up": speed,
        "paired": ratios,
    }
