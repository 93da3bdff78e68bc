"""Addresses without their secrets: no login, query or fragment is printed, logged or stored."""

import re
from urllib.parse import parse_qsl, quote, unquote

_HIDDEN = "***"
# A query or a fragment that has a name; any other ? or # may be a password's.
_NAMED = re.compile(r"[?#](?=[^=&@/?#\s]+=)")
_HOST = r"(?:[\w.-]*|\[[\da-fA-F:.]+\])(?::\d*)?"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*")
_DOMAIN = re.compile(r"localhost|[\w-]+(?:\.[\w-]+)+")
_IN_TEXT = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"<>()]+|(?<=url: )/[^\s'\"<>()]+")
_LEAST = 3  # letters of a part of a secret: shorter ones would be found in any text


def masked(url: str) -> str:
    """Return an address without user, password, query and fragment, with or without a scheme; paths of this machine
    stay. The host is hidden too where a / ? or # of a password leaves open which part it is."""
    scheme, rest = _split(url.strip())
    if scheme in ("", "sqlite://", "file://") and re.match(r"\.{0,2}/|~", rest):
        return scheme + rest.partition("?")[0]
    address, authority = _NAMED.split(rest, maxsplit=1)[0], re.split(r"[/?#]", rest, maxsplit=1)[0]
    login, at, place = address.rpartition("@")
    if not at or ("@" not in authority and _DOMAIN.fullmatch(authority)):  # an @ of the path or the query, if any
        clear, place = "@" not in rest or bool(_HOSTS.fullmatch(authority)), address
    else:
        clear = "?" not in login and ("@" in authority or not _HOSTS.fullmatch(authority))
    place = re.split(r"[?#]", place, maxsplit=1)[0]
    clear &= not at or not scheme or bool(_HOSTS.fullmatch(place.partition("/")[0]))
    return scheme + (place if clear else _HIDDEN)


def without_secrets(text: str, *urls: str, secrets: tuple[str, ...] = ()) -> str:
    """Return a text without the logins and queries of these addresses, parts of them included, and without further
    secrets; every other address in it is masked."""
    found = set(secrets)
    for url in urls:
        rest = "" if url.startswith("sqlite:") else _split(url)[1]
        login, at, _ = _NAMED.split(rest, maxsplit=1)[0].rpartition("@")
        password = login.partition(":")[2]
        query = rest[len(login) :].partition("?")[2]
        # Libraries that stop at the first / ? # or @ quote what is behind it.
        parts = [*re.split(r"[/?#@]", password), *(value for _, value in parse_qsl(query))]
        found |= {login + at, password, query, *(part for part in parts if len(part) >= _LEAST)}
    found |= {each for secret in found for each in (unquote(secret), quote(secret), quote(secret, safe=""))}
    for secret in sorted(filter(None, found), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return _IN_TEXT.sub(lambda address: masked(address[0]), text)


def _split(url: str) -> tuple[str, str]:
    """Return the scheme with its slashes, '' without one, and the rest."""
    found = re.match(r"(?:[a-zA-Z][\w+.-]*:)?//", url)
    return (found[0], url[found.end() :]) if found else ("", url)
