"""The one error a person is meant to read."""


class UserError(Exception):
    """Something the user can put right. The message is one line that says what to change; the exit code is 2."""
