"""Students are told apart in every figure."""

from consistency.report.lines import line_of


def test_twelve_arms_of_a_study_have_lines_of_their_own() -> None:
    runs = [f"arm{k}" for k in range(12)]
    assert len({tuple(line_of(runs, run).values()) for run in runs}) == 12


def test_the_usual_students_look_the_same_in_every_study() -> None:
    assert line_of(["ctm", "ic"], "ctm") == line_of(["ic", "bcm", "ctm"], "ctm")
    assert line_of(["ctm", "ic"], "ic") != line_of(["ctm", "ic"], "ctm")
