"""Addresses that hold secrets, for the tests that nothing tells them."""

PIECES = ("hunter", "7ter2", "s3cret", "t0ken")
#: without a scheme; the password has letters of every kind, the query a token
LOGINS = [f"me:{word}@127.0.0.1:9/x" for word in ("hunter2", "hunter/7ter2", "hunter@7ter2", "hunter#7ter2", "7ter2/x")]
LOGINS += ["me:hunter%402@127.0.0.1:9/x?token=s3cret", "127.0.0.1:9/x?token=s3cret&b=t0ken#hunter"]
LOGINS += ["me:hunter2@127.0.0.1:9,127.0.0.1:8/x?password=s3cret", "me:hunter?7ter2@127.0.0.1:9/x"]


def hidden(text: str) -> str:
    """Return a text, in which no secret may be."""
    assert not [piece for piece in PIECES if piece in text], text
    return text
