"""The published results of the repository: they verify, and the numbers in their prose are theirs."""

from pathlib import Path

import pytest
import yaml
from tests.conftest import TINY
from tests.house.numbers import paragraphs, unsupported
from tests.processes import ROOT

from consistency.provenance.verification import Finding, study_of
from consistency.report.verification import verify_published

PUBLISHED = [path.parent for path in sorted(ROOT.glob("docs/results/*/cards.json"))]


def test_published_results_are_consistent() -> None:
    found: dict[str, list[Finding]] = {}
    for folder in PUBLISHED:
        findings = verify_published(folder, study_of(folder, None))
        found[folder.name] = [finding for finding in findings if finding.faults]
    assert found == {folder.name: [] for folder in PUBLISHED}


def test_every_number_in_prose_is_a_value_of_the_folder_or_of_one_that_it_links_to() -> None:
    texts = {folder: (folder / "README.md").read_text() for folder in PUBLISHED}
    linked = {folder: [each for each in PUBLISHED if f"](../{each.name}/" in texts[folder]] for folder in PUBLISHED}
    pages = {folder.name: unsupported(texts[folder], folder, *linked[folder]) for folder in PUBLISHED}
    assert pages == {folder.name: [] for folder in PUBLISHED}


def test_every_number_beside_a_link_to_published_results_is_theirs() -> None:
    names = [folder.name for folder in PUBLISHED]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/results/README.md"]
    found = [
        (page.name, unsupported(text, *folders))
        for page in pages
        if page.is_file()
        for text, folders in paragraphs(page, names)
    ]
    assert found and not [each for each in found if each[1]]


@pytest.mark.parametrize(
    ("prose", "missing"),
    [
        ("FD is 1.234 or 1.23, not 1.24.", ["1.24"]),
        ("It is 2.1 % (-2.1 to +3.7 %) lower with 95 % t intervals, 95 % of the time.", ["95 %"]),
        ("Alignment error x 1000: 4.56; the rate is 5e-1 and 0.5, not 6e-1.", ["6e-1"]),
        ("torch 2.13.0, seeds 0, 1, N = 1,797, NFE 2-3, [a](b-7.77.md) `9.99`, accuracy 97.8 %.", []),
        ("<!-- begin: paired -->\n8.88\n<!-- end -->\n\n    code 7.77\n\n```\n6.66 %\n```\n", []),
        ("About 1,234.5 and 239,552.0 of them; 12 %.", ["1,234.5", "12 %"]),
    ],
)
def test_a_number_that_no_file_has_is_found(tmp_path: Path, prose: str, missing: list[str]) -> None:
    (tmp_path / "table.csv").write_text("run,fd,ratio,alignment\nctm,1.2341,0.979,0.00456\nanalytic,,1.037,\n")
    (tmp_path / "cards.json").write_text('{"measured": [{"held_out": 0.9781, "parameters": 239552}], "dirty": true}')
    study = tmp_path / "tiny.yaml"
    study.write_text(yaml.safe_dump(TINY))
    assert unsupported(prose, tmp_path, study_file=study) == missing
