"""Images for training: bytes and floats, and what a damaged dataset says."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.dangers import Call
from tests.image_sources import noise

from consistency.base.errors import UserError
from consistency.data.batches import Batches
from consistency.data.prepared import ImageData, load_images, to_bytes, to_signed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of six random colour images of three classes."""
    images = noise(6, 4, 5, 3)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(6) % 3)
    (tmp_path / "dataset.json").write_text(json.dumps({"count": 6, "classes": ["a", "b", "c"]}))
    return tmp_path


def test_bytes_survive_the_way_to_floats_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    signed = to_signed(torch.from_numpy(every))
    assert signed.min() == -1
    assert signed.max() == 1
    assert np.array_equal(to_bytes(signed), every)


def test_floats_beyond_the_range_are_clipped() -> None:
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5)
    assert to_bytes(images).ravel().tolist() == [0, 0, 128, 255, 255]


def test_channels_and_rows_keep_their_places() -> None:
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    signed = to_signed(torch.from_numpy(images))
    assert signed.shape == (2, 3, 3, 4)
    assert signed[1, 2, 0, 3].item() == pytest.approx(images[1, 0, 3, 2] / 127.5 - 1)
    assert np.array_equal(to_bytes(signed), images)


def test_images_are_memory_mapped_and_read_only(folder: Path) -> None:
    data = load_images(folder)
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    assert data.shape == (3, 4, 5)
    assert data.classes == 3
    assert len(data) == 6


def test_rows_come_with_their_labels(folder: Path) -> None:
    data = load_images(folder)
    images, labels = data.take(np.array([4, 0, 4]))
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.int64
    assert torch.equal(images[0], images[2])
    assert np.array_equal(to_bytes(images), data.images[[4, 0, 4]])


def batches(data: ImageData, count: int = 64, share: slice = slice(None), **settings: Any) -> Batches:
    plain = {"seed": 3, "purpose": "test", "flip": False, "device": torch.device("cpu")}
    return Batches(data, count, share, **{**plain, **settings})


def test_the_batch_of_a_step_depends_on_seed_purpose_and_step_alone(folder: Path) -> None:
    """It depends neither on the batches asked for before, nor on where the dataset lies."""
    data = load_images(folder)
    first = batches(data, flip=True)
    wanted = [first(step) for step in range(4)]
    again = batches(data, flip=True, on_device=True)
    for step in (3, 1, 2, 0, 0):
        torch.testing.assert_close(again(step), wanted[step], rtol=0, atol=0)
    assert not torch.equal(wanted[0][0], wanted[1][0])
    for other in (batches(data, seed=4), batches(data, purpose="other")):
        assert not torch.equal(other(0)[0], wanted[0][0])


def test_the_shares_of_all_processes_are_the_batch(folder: Path) -> None:
    data = load_images(folder)
    whole = batches(data, flip=True)(5)
    parts = [batches(data, share=slice(start, start + 16), flip=True)(5) for start in range(0, 64, 16)]
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


def test_flip_mirrors_half_of_the_images_and_changes_neither_rows_nor_labels(folder: Path) -> None:
    data = load_images(folder)
    plain, labels = batches(data, 2000)(0)
    flipped, same_labels = batches(data, 2000, flip=True)(0)
    assert torch.equal(labels, same_labels)
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)])
    assert bool((mirrored ^ kept).all())
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_every_image_is_drawn_equally_often(folder: Path) -> None:
    _, labels = batches(load_images(folder), 30_000)(0)
    assert torch.bincount(labels).tolist() == pytest.approx([10_000] * 3, rel=0.03)


def test_an_unreadable_image_array_is_an_error_of_the_step_that_needs_it(folder: Path) -> None:
    """It happens in a thread, and must not be lost there."""
    data = load_images(folder)
    broken = ImageData(data.images[:0], data.labels, {**data.facts})
    with pytest.raises((IndexError, RuntimeError)):
        batches(broken)(0)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "dataset.json"])
@pytest.mark.parametrize("keep", [None, 0, 5, 100])
def test_a_missing_or_truncated_file_is_a_clear_error(folder: Path, name: str, keep: int | None) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: min(keep, len(content) - 1)])
    with pytest.raises(UserError, match="run `python -m consistency dataset --study FILE`") as error:
        load_images(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images.npy", np.zeros((6, 4, 4, 3), np.float32)),
        ("images.npy", np.zeros((6, 4, 4), np.uint8)),
        ("images.npy", np.zeros((5, 4, 4, 3), np.uint8)),
        ("labels.npy", np.zeros(5, np.int64)),
    ],
)
def test_arrays_that_contradict_the_facts_are_refused(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / name, array)
    with pytest.raises(UserError, match=r"does not match its dataset\.json"):
        load_images(folder)


def test_labels_are_never_unpickled(folder: Path, tmp_path: Path) -> None:
    traps = [Call(Path.touch, tmp_path / "sprung")] * 6
    np.save(folder / "labels.npy", np.array(traps, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        load_images(folder)
    assert not (tmp_path / "sprung").exists()


# --- the size of ImageNet


def read_at_random(folder: Path, seed: int) -> tuple[int, int]:
    """RssAnon in KiB of this process after ten batches, when the allocator has settled, and after 40 more."""
    torch.set_num_threads(1)
    data, rng, found = load_images(folder), np.random.default_rng(seed), []
    for batch in range(50):
        images, labels = data.take(rng.integers(0, len(data), 50))
        assert images.shape == (50, 3, 64, 64) and not labels.any()
        if batch in (9, 49):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            found.append(int(status.split("RssAnon:")[1].split()[0]))
    return found[0], found[1]


def test_several_processes_read_a_dataset_of_imagenets_size_in_flat_memory(tmp_path: Path) -> None:
    count = 1_281_167
    path = tmp_path / "images.npy"
    try:
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 64, 64, 3))
    except OSError as error:
        pytest.skip(f"no file of 16 GB here: {error}")
    try:
        if path.stat().st_blocks * 512 > 1 << 20:
            pytest.skip("this file system has no sparse files")
        np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
        (tmp_path / "dataset.json").write_text(json.dumps({"count": count, "classes": ["0"]}))
        with multiprocessing.get_context("spawn").Pool(4, maxtasksperchild=1) as pool:
            found = pool.starmap(read_at_random, [(tmp_path, seed) for seed in range(4)], chunksize=1)
    finally:
        path.unlink()
    for first, last in found:
        # 2,000 rows are 24 MB as bytes, and 98 MB as floats.
        assert last - first < 16 << 10
