"""Errors that the user can fix, and spelling suggestions for them."""

import difflib
import os
from collections.abc import Iterable

_MOST = 20  # errors told in one line
_LONGEST = 8000  # characters of a message


class UserError(Exception):
    """Error that the user can fix. The message is one line that says what to change; the exit code is 2.

    A message may quote a file of a stranger's: what a terminal would obey is escaped, and a long text is cut.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class NoPermission(UserError):
    """A file or folder that this user may not open."""


def one_line(text: str) -> str:
    """Return a text as one printable line of bounded length."""
    line = "".join(each if each.isprintable() else _escaped(each) for each in text[:_LONGEST])
    return line if len(text) <= _LONGEST else f"{line} [{len(text) - _LONGEST:,} more characters]"


def _escaped(letter: str) -> str:
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()


def user_error(error: Exception, message: str = "") -> UserError:
    """Return what a reader raises instead of an error: NoPermission if the system refused access, else a UserError with
    the message."""
    if isinstance(error, PermissionError):
        place = shown(error.filename or error)
        return NoPermission(f"no permission for {place}: ask its owner for it, or run as the owner")
    return UserError(message or str(error))


def shown(name: object) -> str:
    """Return a file name as printable text for a one-line message."""
    text = os.fsdecode(bytes(name)) if isinstance(name, bytes) else str(name)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def command_of(verb: str) -> str:
    """Return the command of a study's verb, with its options, for an error's advice; '' is the one that runs."""
    return f"`python -m consistency {verb} --study FILE`" if verb else "the same command"


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' with the nearest known word, or all known words if none is near."""
    names = list(known)
    near = difflib.get_close_matches(str(word), names, 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}" if names else ""


def raise_all(errors: list[str], what: str) -> None:
    """Raise UserError if there are errors, with the first 20 of them and their number."""
    if errors:
        named = f", of which {_MOST} are named here" if len(errors) > _MOST else ""
        number = f"; in all, {len(errors):,} {what} cannot be used{named}" if len(errors) > 1 else ""
        raise UserError("; ".join(errors[:_MOST]) + number)
