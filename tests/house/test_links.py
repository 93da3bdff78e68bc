"""The links of every page lead somewhere: a file of this repository, and a heading of it."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.processes import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("config/**/*.md")]
ELSEWHERE = ("http://", "https://", "mailto:")


def prose(text: str) -> str:
    """A page without its blocks of code and its words of code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^ *```.*?^ *```", "", text))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(
        r"(?m)^#{1,6} +(.+?) *$", re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    ):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{k}" for k in range(1, 99))) if name not in found))
    return found


def broken(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith(ELSEWHERE):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_planted_link_to_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    good = "[a](#a-b) [b](page.md#a-b-1) `[c](c.md)` [d](https://d)\n```\n[e](e.md)\n```\n"
    page.write_text(f"# A `b`\n## A, b!\n{good}[f](f.md) [g](#b)\n")
    assert list(broken(page)) == ["f.md", "#b"]
