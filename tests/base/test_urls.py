"""Addresses: what is left of them for a person to read, and texts that quote them."""

import pytest
from tests.addresses import LOGINS, hidden

from consistency.base.urls import masked, without_secrets


@pytest.mark.parametrize(
    ("url", "left"),
    [
        ("http://me:pass@host:5000/base", "http://host:5000/base"),
        ("https://me:p#a/s@s@host", "https://host"),
        ("postgresql://me:pass@host/db?password=pass", "postgresql://host/db"),
        ("postgresql://me:p/w@h1:5432,h2:5433/db?target=x", "postgresql://h1:5432,h2:5433/db"),
        ("postgresql://h1:5432,h2:5433/db?password=x@y", "postgresql://h1:5432,h2:5433/db"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dx", "mssql+pyodbc:///"),
        ("http://me:pw@[::1]:5000/x#part", "http://[::1]:5000/x"),
        ("http://host:5000/x?token=a@b&sig=S", "http://host:5000/x"),
        ("http://host#token=x", "http://host"),
        ("me:p/w@host/x", "host/x"),
        ("//me:p@w@host/x", "//host/x"),
        ("ssh://me@host/data", "ssh://host/data"),
        # Nobody can tell a password from a port and a path.
        ("http://me:12/3@host", "http://***"),
        ("http://me:p?w@host", "http://***"),
        ("me:p?w@host", "***"),
        ("http://me:p?a=b@host", "http://***"),
        # These hold no secret.
        ("http://host:5000", "http://host:5000"),
        ("https://cdn.example.org/lpips@1/x", "https://cdn.example.org/lpips@1/x"),
        ("sqlite:////home/a@b#c/mlflow.db", "sqlite:////home/a@b#c/mlflow.db"),
        ("/net/a@b/x", "/net/a@b/x"),
        ("./mlruns", "./mlruns"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_login_query_and_fragment_are_left_out(url: str, left: str) -> None:
    assert masked(url) == left


@pytest.mark.parametrize("scheme", ["", "http://", "postgresql://"])
@pytest.mark.parametrize("login", LOGINS)
def test_no_secret_is_left(login: str, scheme: str) -> None:
    hidden(masked(scheme + login))
    hidden(without_secrets(f"cannot open {scheme}{login}, nor {login}", scheme + login))


def test_a_text_loses_the_secrets_in_every_form_and_other_addresses() -> None:
    text = "API request to http://me:p%40ss@host/api failed; password p@ss"
    said = "API request to http://***host/api failed; password ***"
    assert without_secrets(text, "http://me:p%40ss@host") == said
    # SQLAlchemy takes what is behind the first @ for the host.
    quoted = without_secrets("no host 'cret@db' and no port 'very'", "postgresql://me:very/se@cret@db/x")
    assert quoted == "no host '***@db' and no port '***'"
    text = "Max retries exceeded with url: /x?sig=s3cret (No adapters for 'ftp://me:hunter2@h/x')"
    assert without_secrets(text) == "Max retries exceeded with url: /x (No adapters for 'ftp://h/x')"
