"""Tracking servers on the loopback: MLflow's own, on SQLite and on PostgreSQL, one that never answers, a full one."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from tests.processes import environment, free_port, start_in, wait_until

#: stands in no log, card, param or tag, wherever it was given
PASSWORD = "canary-4711"
DIRECT = build_opener(ProxyHandler({}))


@dataclass
class TrackingServer:
    """`mlflow server` in a folder, on a port that it keeps when it is started again."""

    folder: Path
    store: str  # the backend's address; it may hold a password, so it goes by the environment
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def start(self) -> "TrackingServer":
        """Start it and wait until it answers."""
        words = f"server --host 127.0.0.1 --port {self.port} --workers 1 --artifacts-destination artifacts"
        quiet = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_BACKEND_STORE_URI=self.store)
        command = [sys.executable, "-m", "mlflow", *words.split()]
        self.process = start_in(self.folder, command, quiet, self.folder / "server.log", mode="a")
        wait_until(self._answers, f"an answer of {self.url}", 300)
        return self

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log
        with suppress(OSError):
            DIRECT.open(f"{self.url}/health", timeout=5).close()
            return True
        return False

    def stop(self) -> None:
        """End it with its worker, at once: no client is waited for."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


@contextmanager
def tracking_server(folder: Path, store: str) -> Iterator[TrackingServer]:
    """A server that answers; a test may stop and start it."""
    server = TrackingServer(folder, store)
    try:
        yield server.start()
    finally:
        server.stop()


@dataclass
class Postgres:
    """A PostgreSQL cluster of our own, over the loopback, that asks for a password."""

    port: int
    user: str = "tracker"

    def uri(self, database: str) -> str:
        return f"postgresql://{self.user}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Make an empty database. Returns its address."""
        with closing(self._connect("postgres")) as connection:
            connection.cursor().execute(f"CREATE DATABASE {database}")
        return self.uri(database)

    def tables_holding(self, uri: str, text: str) -> list[str]:
        """The tables of a database with a row in which the text stands."""
        found = []
        with closing(self._connect(uri.rpartition("/")[2])) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in cursor.fetchall():
                cursor.execute(f'SELECT count(*) FROM "{table}" AS row WHERE row::text LIKE %s', (f"%{text}%",))
                found += [table] * cursor.fetchone()[0]
        return found

    def ready(self) -> bool:
        import psycopg2

        try:
            self._connect("postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def _connect(self, database: str) -> Any:
        import psycopg2

        connection = psycopg2.connect(self.uri(database), connect_timeout=5)
        connection.autocommit = True  # CREATE DATABASE stands in no transaction
        return connection


@contextmanager
def postgres(initdb: str, server: str) -> Iterator[Postgres]:
    """A fresh cluster, gone with all its files at the end. initdb, server: paths of PostgreSQL's programs."""
    # They refuse to work for root, and root's temporary folders are closed to others.
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
    folder = Path(tempfile.mkdtemp(prefix="consistency-postgres-", dir="/tmp"))
    cluster = Postgres(free_port())
    secret = folder / "password"
    secret.write_text(PASSWORD)
    for path in (folder, secret) if owner else ():
        os.chown(path, owner.pw_uid, owner.pw_gid)
    common = {"cwd": folder, "env": environment(LC_ALL="C.UTF-8"), "stdin": subprocess.DEVNULL, **as_owner}
    make = [initdb, "-D", "data", "-U", cluster.user, "-A", "scram-sha-256", "--pwfile=password", "--no-sync"]
    settings = {"port": cluster.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    try:
        subprocess.run(make, capture_output=True, timeout=120, check=True, **common)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([server, "-D", "data", *options], stdout=log, stderr=log, **common)
        try:
            wait_until(cluster.ready, "an answer of PostgreSQL", 60)
            yield cluster
        finally:
            process.send_signal(signal.SIGINT)  # its fast shutdown: connections are closed, not waited for
            process.wait(60)
    finally:
        shutil.rmtree(folder)


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def web_server(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server whose requests are answered so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Full(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(507, "Insufficient Storage")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def full_server() -> AbstractContextManager[str]:
    """The address of a server whose disk is full: it refuses everything."""
    return web_server(_Full)


def dead_server() -> AbstractContextManager[str]:
    """An address at which nobody listens."""
    return nullcontext(f"http://127.0.0.1:{free_port()}")
