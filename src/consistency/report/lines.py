"""Line styles of students: the same colour and line in every figure of the report, and in MLflow."""

from collections.abc import Sequence

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles separate curves that coincide.
_COLOURS = ("#444444", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_LINES = ("-", "-", "--", "-", "-", "-.", "--")
# Common students look the same in every study; others take the remaining styles in order.
_USUAL = ("ctm", "analytic", "bcm", "analytic-forward", "cm", "analytic-endpoint")


def line_of(runs: Sequence[str], name: str) -> dict[str, str]:
    """Return the colour and line style of a student, the same in every figure of a study."""
    left = [i for i in range(len(_COLOURS)) if i >= len(_USUAL) or _USUAL[i] not in runs]
    others = [name for name in runs if name not in _USUAL]
    if name in _USUAL:
        i, again = _USUAL.index(name), 0
    else:
        again, k = divmod(others.index(name), len(left))
        i = left[k]
    return {"color": _COLOURS[i], "linestyle": ":" if again else _LINES[i]}
