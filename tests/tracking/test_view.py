"""The saved view of a study's page."""

from typing import Any

import pytest
from tests.fake_results import make_report, make_results, make_study

from consistency.layout import Layout
from consistency.tracking.server import connect, tracking_uri
from consistency.tracking.upload import track_study
from consistency.tracking.view import VIEW, is_untouched, saved_view


def test_a_tag_holds_it() -> None:
    """MLflow takes 5,000 characters."""
    names = [f"{score}/nfe{nfe}-ema{rate}" for score in ("alignment", "fd") for nfe in range(1, 9) for rate in range(5)]
    assert 500 < len(saved_view(names)) < 5000


def test_only_scores_change_it() -> None:
    assert is_untouched(saved_view())
    assert is_untouched(saved_view(["training/loss", "kid/nfe1"]))
    assert not is_untouched(saved_view(["fd/nfe1"]))


@pytest.fixture
def client(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return connect(tracking_uri())


def test_a_persons_view_is_kept(tmp_path: Any, client: Any) -> None:
    study = make_study(tmp_path / "studies")
    layout = Layout(study.name)
    make_results(study, layout)
    make_report(study, layout)
    track_study(study, layout)
    experiment = client.get_experiment_by_name(study.name)
    assert not is_untouched(experiment.tags[VIEW])
    client.set_experiment_tag(experiment.experiment_id, VIEW, "mine")
    track_study(study, layout)
    assert client.get_experiment_by_name(study.name).tags[VIEW] == "mine"
