"""The one error a person is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message is one line that says what to change; the exit code is 2."""


def suggestion(word: object, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest of the known words, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(str(word), names, 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}" if names else ""
