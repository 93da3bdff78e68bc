"""Fixtures of many rooms: the tiny study with changes, its first results, and a finished small study."""

import copy
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.draws import SEED
from tests.processes import ROOT, SOURCE

from consistency.base.errors import UserError
from consistency.base.files import sha256, write_bytes
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.config.study import Study
from consistency.data.resources import REGISTRY
from consistency.nets.denoiser import init_denoiser
from consistency.provenance.card import Card

# The number of threads decides the last bits of a sum, and tests compare them; what they start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Where Slurm is installed, each start of Snakemake asks its controller, and waits 9 s for one that is down.
os.environ["SLURM_CONF"] = os.devnull

# A process started in the background ignores Ctrl-C, and so would all it starts: the tests that press it need it back.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = yaml.safe_load((ROOT / "config/studies/tiny.yaml").read_text())
#: in place of a value: the key is taken out
ABSENT = object()

Changes = dict[str, Any]
Tiny = Callable[..., Study]
WriteStudy = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files so that no worker of pytest-xdist waits for another: one file makes the finished study; those
    that take long and do without it come next, then those that copy it, then all others."""
    long = {item.path for item in items if item.get_closest_marker("slow") or "workflow" in item.path.parts}
    copying = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}

    def rank(item: pytest.Item) -> tuple[bool, bool, bool]:
        return item.path.name != "test_end_to_end.py", item.path not in long, item.path in copying

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _no_live_tracking() -> Iterator[None]:
    """Hundreds of tiny trainings must not import MLflow each; the tests of live tracking turn it on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSISTENCY_LIVE", "0")
        yield


@pytest.fixture(autouse=True)
def _same_draws_in_any_order() -> None:
    """A test that draws without a generator must not depend on the tests before it."""
    torch.manual_seed(SEED)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The tests' own handlers come back after main()."""
    with own_handlers():
        yield


@contextmanager
def own_handlers() -> Iterator[None]:
    """main() sets a handler of SIGTERM and the number of threads; the tests' own come back after the block."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def changed(changes: Changes) -> dict[str, Any]:
    """The tiny study as plain data, with dotted keys replaced."""
    return put(copy.deepcopy(TINY), changes)


def put(content: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Replace dotted keys in plain data, or take them out. Returns it."""
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = copy.deepcopy(value)
        if value is ABSENT:
            del section[last]
    return content


def mistake(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of what must fail by a person's mistake: one line."""
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def vouch_for(path: Path) -> None:
    """Give the working directory a registry of nothing but that file, with its digest."""
    entry = {"url": "http://127.0.0.1:9/x", "about": "a miniature", "licence": "none", "digest_source": "the test"}
    REGISTRY.parent.mkdir()
    REGISTRY.write_text(yaml.safe_dump({path.name: entry | {"sha256": sha256(path)}}))


@pytest.fixture(scope="session")
def couplings() -> Changes:
    """Changes that make the tiny study one of consistency training: students ic, ot and gc."""
    return {
        "student.objective": "consistency",
        "student.nodes": ABSENT,
        "student.max_heun_steps": ABSENT,
        "student.preconditioning": "cm",
        "student.curriculum": {"kind": "doubling", "first": 4, "last": 16},
        "varies": ["coupling", "mu"],
        "students": {"ic": {"coupling": "ic"}, "ot": {"coupling": "ot"}, "gc": {"coupling": "gc", "mu": 0.5}},
        "report.baseline": {"consistency": "ic"},
        "report.grid_nfe": [1, 2],
    }


@pytest.fixture(scope="session")
def untaught(couplings: Changes) -> Changes:
    """Changes that make it a study without a teacher."""
    network = {"kind": "mlp", "width": 32, "depth": 1, "embedding": 16}
    return couplings | {"teacher": {"kind": "none", "network": network, "conditional": True}}


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """tiny({"student.steps": 9}): the tiny study with changes."""

    def make(changes: Changes | None = None) -> Study:
        return build_study(changed(changes or {}))

    return make


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """write_study({"student.steps": 9}): the path of the tiny study's file with changes, named tiny.yaml."""

    def write(changes: Changes | None = None) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(changed(changes or {}), sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's schema, which takes seconds to make: copy it to write into it."""
    from consistency.tracking.server import connect

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def finished_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small study, made up, to be copied; its file lies beside the results."""
    from tests.fake_results import make_finished

    folder = tmp_path_factory.mktemp("small")
    make_finished(folder)
    return folder


@pytest.fixture
def small_project(finished_small: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The finished small study of a project that is the working directory, with an empty database."""
    from tests.fake_results import make_study

    shutil.copytree(finished_small / "results", tmp_path / "results")
    shutil.copy(empty_database, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Job(make_study(tmp_path / "studies"), StudyPaths("small"))


@pytest.fixture
def client(small_project: Job) -> Any:
    """MLflow's client of the database in that project."""
    from consistency.tracking.server import connect, tracking_uri

    return connect(tracking_uri())


@pytest.fixture(scope="session")
def first_results(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> StudyPaths:
    """Dataset, an untrained teacher and made-up coefficients of the tiny study."""
    import numpy as np

    from consistency.data.prepared import load_images
    from consistency.nets.checkpoint import save_denoiser
    from consistency.stages.dataset import make_dataset
    from consistency.theory.noise import log_grid
    from consistency.training.teachers import architecture

    study, folder = tiny(), tmp_path_factory.mktemp("tiny")
    layout = StudyPaths(study.name, folder / "results", folder / "state")
    make_dataset(Job(study, layout))
    teacher = init_denoiser(architecture(study, study.teacher, load_images(layout.dataset)), 0)
    save_denoiser(layout.teacher_weights, teacher, {"key": Job(study, layout).key("teacher"), "study": "tiny"})
    write_bytes(layout.teacher / "history.jsonl", b"")
    Card(Job(study, layout), "teacher").write()
    times = log_grid(16, study.noise.sigma_min, study.noise.sigma_max).numpy()
    layout.coefficients.mkdir()
    l = 1 / (1 + 1 / times)
    centre = load_images(layout.dataset).mean()
    np.savez(layout.fit, times=times, l=l, s=4 * l - 2, s_centred=3 * l - 2, centre=centre)
    Card(Job(study, layout), "coefficients").write()
    return layout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to change it."""
    source = Path(SOURCE) / "consistency"
    return Path(shutil.copytree(source, tmp_path / "consistency", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
