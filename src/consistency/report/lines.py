"""Line styles of students: the same colour and line in every figure of the report, and in MLflow."""

from collections.abc import Sequence

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles separate curves that coincide.
_COLOURS = ("#444444", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
# Common students look the same in every study, a centred form as its uncentred one but for the line; others take the
# remaining colours in order.
_USUAL = {
    "ctm": ("#444444", "-"),
    "analytic": ("#D55E00", "-"),
    "analytic-centred": ("#D55E00", "--"),
    "bcm": ("#0072B2", "--"),
    "analytic-forward": ("#E69F00", "-"),
    "analytic-forward-centred": ("#E69F00", "--"),
    "cm": ("#009E73", "-"),
    "analytic-endpoint": ("#CC79A7", "-."),
    "analytic-midpoint": ("#56B4E9", "-"),
    "analytic-midpoint-centred": ("#56B4E9", "--"),
}


def line_of(runs: Sequence[str], name: str) -> dict[str, str]:
    """Return the colour and line style of a student, the same in every figure of a study."""
    if name in _USUAL:
        colour, line = _USUAL[name]
    else:
        taken = {_USUAL[run][0] for run in runs if run in _USUAL}
        left = [colour for colour in _COLOURS if colour not in taken] or list(_COLOURS)
        again, k = divmod([run for run in runs if run not in _USUAL].index(name), len(left))
        colour, line = left[k], ("-", ":", "-.")[again % 3]
    return {"color": colour, "linestyle": line}
