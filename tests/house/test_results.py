"""The comparison of a reader's run with a committed page."""

import re
import shutil
import textwrap
from pathlib import Path

import pandas as pd
import pytest

RESULTS = Path(__file__).parents[2] / "docs/results/digits"


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1 + 1e-3, True), (1 - 1e-3, True), (1.1, False)])
def test_a_run_agrees_with_the_page_within_the_stated_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, agrees: bool
) -> None:
    shutil.copytree(RESULTS, tmp_path / "docs/results/digits")
    report = tmp_path / "results/digits/report"
    report.mkdir(parents=True)
    scores = pd.read_csv(RESULTS / "scores.csv").query("seed.isna() or seed < 2")  # as many as the demo has
    measured = {name: scores[name] * factor for name in ("fd", "kid", "alignment")}
    scores.assign(**measured).to_csv(report / "scores.csv", index=False)
    script = re.search(r"<<'END'\n(.*?)\n    END", (RESULTS / "README.md").read_text(), re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    code = compile(textwrap.dedent(script[1]), "README.md", "exec")
    if agrees:
        exec(code, {})
    else:
        with pytest.raises(AssertionError, match="different"):
            exec(code, {})
