"""Stage report: tables, figures and one self-contained page from all results of the study."""

from consistency.base.files import write_bytes, write_json
from consistency.config.job import Job
from consistency.provenance.card import Card
from consistency.report.page import write_page
from consistency.report.pictures import draw_pictures
from consistency.report.published import tables_of
from consistency.report.results import read_cards, read_histories, read_results
from consistency.report.summary import summary_of


def make_report(job: Job) -> None:
    """Write report.html, figures/, scores.csv, table.csv, speedup.csv, paired.csv, summary.json and card.json; ema.csv
    if a student has several EMA rates.

    Raises UserError if a stage's results are missing or belong to another study.
    """
    card, folder = Card(job, "report"), job.paths.report
    results, cards, histories = read_results(job), read_cards(job), read_histories(job)
    pictures = draw_pictures(job, results, histories)
    texts = {name: table.to_csv(index=False) for name, table in tables_of(results).items()}
    texts["report.html"] = write_page(job, results, cards, histories, pictures)
    if "ema.csv" not in texts:
        (folder / "ema.csv").unlink(missing_ok=True)
    for stale in (folder / "figures").glob("*"):
        if stale.stem not in {picture.name for picture in pictures}:
            stale.unlink()
    for picture in pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)
        write_bytes(folder / "figures" / f"{picture.name}.svg", picture.svg)
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    write_json(folder / "summary.json", summary_of(results))
    figures = [f"figures/{picture.name}.{kind}" for picture in pictures for kind in ("png", "svg")]
    card.write([folder / name for name in (*texts, "summary.json", *figures)])
