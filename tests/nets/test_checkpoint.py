"""Checkpoints: what was saved comes back, what is damaged or foreign is refused, a full disk costs nothing."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import mistake
from tests.dangers import Call, file_size_limit
from tests.nets.small import make_denoiser

from consistency.base.errors import UserError
from consistency.nets.checkpoint import load_denoiser, read_metadata, save_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.training.state import load_state, save_state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_denoiser(path, make_denoiser(), {"key": "abc", "study": "tiny", "step": 7})
    return path


def refused(path: Path, match: str, key: str | None = None) -> None:
    message = mistake(load_denoiser, path, key)
    assert re.search(match, message) and str(path) in message


# --- what is saved comes back


@pytest.mark.parametrize("options", [{}, {"second_time": True}, {"label_dim": 3, "sigma_data": 0.3, "dropout": 0.1}])
def test_a_round_trip_keeps_every_bit_and_freezes(tmp_path: Path, options: dict[str, Any]) -> None:
    denoiser = make_denoiser(1, **options)
    path = tmp_path / "deep" / "er" / "model.safetensors"
    save_denoiser(path, denoiser, {"key": "abc", "parents": {"images.npy": "123"}, "git": {"dirty": None}})
    loaded, metadata = load_denoiser(path, "abc")
    assert loaded.architecture == denoiser.architecture
    torch.testing.assert_close(loaded.state_dict(), denoiser.state_dict(), rtol=0, atol=0)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert metadata["parents"] == {"images.npy": "123"}
    assert metadata["git"] == {"dirty": None}
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 3.0])
    assert torch.equal(loaded(x, t), denoiser.eval()(x, t))


def test_the_same_weights_make_the_same_file(saved: Path) -> None:
    """It is the same to the last byte, with names in other alphabets too: digests of checkpoints are compared."""
    for metadata in (
        {"key": "abc", "study": "tiny", "step": 7},
        {"title": 'é "quoted" \\ \n 数', "a": 1, "b": 2, "c": 3},
    ):
        files = set()
        for i in range(8):
            path = saved.with_name(f"{i}.safetensors")
            save_denoiser(path, make_denoiser(), dict(reversed(metadata.items())) if i % 2 else metadata)
            files.add(path.read_bytes())
        assert len(files) == 1
        assert metadata.items() <= load_denoiser(path)[1].items()


def test_weights_in_another_memory_layout_are_saved(tmp_path: Path) -> None:
    denoiser = make_denoiser()
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.ndim == 2:
                p.set_(p.t().contiguous().t())
    save_denoiser(tmp_path / "m.safetensors", denoiser, {})
    loaded, _ = load_denoiser(tmp_path / "m.safetensors")
    torch.testing.assert_close(loaded.state_dict(), denoiser.state_dict(), rtol=0, atol=0)


def test_a_state_comes_back_with_every_bit(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state.pt") is None
    state = {"key": "a", "clock": {"step": 3}, "model": {"w": torch.randn(3)}, "list": [1, 2.5, None]}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert loaded is not None
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w"))
    assert loaded == state


# --- what is damaged or foreign is refused


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "model.safetensors", "is missing")
    refused(tmp_path, "is not a whole safetensors file")


@pytest.mark.parametrize("keep", [0, 4, 8, 50, 600, -1])
def test_a_truncated_checkpoint_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    refused(saved, "is not a whole safetensors file")


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": '"other"'}, {"format": "{"}):
        save_file({"w": torch.zeros(3)}, path, metadata=metadata)
        refused(path, "was not written by this project")


@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_a_pickle_by_another_name_is_refused_and_never_run(tmp_path: Path, writer: Callable[..., None]) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "model.safetensors"
    with path.open("wb") as file:
        writer({"ema": Call(Path.touch, sprung)}, file)
    refused(path, "is not a whole safetensors file")
    assert not sprung.exists()


@pytest.mark.parametrize("content", [{"key": Call(Path.touch, Path("sprung"))}, [1, 2]], ids=["code", "list"])
def test_what_is_no_state_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "state.pt")
    with pytest.raises(UserError, match="is damaged") as error:
        load_state(Path("state.pt"))
    assert not Path("sprung").exists()
    assert "weights_only" not in str(error.value)


def test_a_checkpoint_of_other_settings_is_refused(saved: Path) -> None:
    load_denoiser(saved, "abc")
    refused(saved, "made by study 'tiny' with other settings", "abd")


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    tensors, metadata = load_file(path), read_metadata(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in metadata.items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.pop("model.linear_in.weight"),
        lambda tensors, metadata: tensors.update(extra=torch.zeros(1)),
        lambda tensors, metadata: tensors.update({"model.linear_in.weight": torch.zeros(2, 2)}),
        lambda tensors, metadata: metadata.pop("architecture"),
        lambda tensors, metadata: metadata.update(architecture={"network": "mpl"}),
        lambda tensors, metadata: metadata.update(architecture=5),
        lambda tensors, metadata: metadata["architecture"].update(width="wide"),
        lambda tensors, metadata: metadata["architecture"].update(widht=3),
    ],
    ids=["missing", "extra", "shape", "no architecture", "network", "number", "type", "key"],
)
def test_tensors_that_do_not_fit_the_architecture_are_refused(saved: Path, change: Callable[..., None]) -> None:
    rewritten(saved, change)
    refused(saved, "does not fit its architecture")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    rewritten(saved, lambda tensors, metadata: tensors["model.linear_out.bias"].fill_(value))
    refused(saved, r"holds NaN or infinity in model\.linear_out\.bias")


# --- a full disk


@pytest.mark.parametrize(
    "write",
    [lambda path, model: save_denoiser(path, model, {}), lambda path, model: save_state(path, model.state_dict())],
    ids=["denoiser", "state"],
)
def test_a_limit_on_file_sizes_leaves_the_old_file(tmp_path: Path, write: Callable[[Path, Denoiser], None]) -> None:
    """A quota looks like this. torch says nothing of the cause, and is taken to mean a full disk."""
    path, small = tmp_path / "folder" / "file", make_denoiser()
    write(path, small)
    before, reason = path.read_bytes(), "(File too large|No space left on device)"
    with file_size_limit(128 * 1024), pytest.raises(UserError, match=f"cannot write {path}: {reason}"):
        write(path, make_denoiser(0, width=256))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    write(path, small)
