"""Servers for the tests of this folder."""

from collections.abc import Iterator

import pytest
from tests.processes import PROXIES
from tests.tracking.debian import needs_debian
from tests.tracking.servers import Postgres, TrackingServer, postgres, tracking_server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback is reached directly."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    """PostgreSQL, really started."""
    package = "postgresql"
    with postgres(needs_debian(package, "initdb"), needs_debian(package, "postgres")) as started:
        yield started


@pytest.fixture(scope="module")
def sqlite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A server on a fresh SQLite file."""
    with tracking_server(tmp_path_factory.mktemp("server"), "sqlite:///server.db") as server:
        yield server


@pytest.fixture(scope="module")
def postgres_server(postgresql: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A server on a fresh PostgreSQL database."""
    with tracking_server(tmp_path_factory.mktemp("server"), postgresql.create("mlflow")) as server:
        yield server
