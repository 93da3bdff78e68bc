"""Images that a person gives: which files of a folder are read, and what is said of the others."""

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import mistake
from tests.image_sources import encoded, noise, write_folder

from consistency.config.dataset import Dataset
from consistency.data.given import open_given, read_given

SETTINGS = Dataset(kind="digits", resolution=8, channels=1)


def test_hidden_files_are_left_out_and_every_format_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = noise(3, 8, 8)
    files = {"a.PNG": encoded(images[0]), "below/b.bmp": encoded(images[1], "BMP"), "c.tif": encoded(images[2], "TIFF")}
    write_folder(tmp_path, files | {"._a.png": b"", ".x/a.png": b"", "notes.txt": b""})
    count, chunks = open_given(tmp_path, SETTINGS)
    assert count == 3
    assert np.array_equal(np.concatenate(list(chunks))[..., 0], images)
    assert "hidden files or folders left out: 2" in capsys.readouterr().out


def test_all_bad_images_are_told_in_one_run(tmp_path: Path) -> None:
    files = {"a.png": encoded(noise(8, 8)), "b.png": b"no image", "c.png": encoded(noise(9, 8)), "d.png": b""}
    write_folder(tmp_path, files)
    for message in (mistake(lambda: list(open_given(tmp_path, SETTINGS)[1])), mistake(read_given, tmp_path)):
        assert message.endswith("; in all, 3 images cannot be used")
        assert all(f"{tmp_path}/{name}.png " in message for name in "bcd")


@pytest.mark.parametrize("asked", ["os.stat", "os.scandir"])
def test_an_unreadable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    def locked(place: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", place)

    with monkeypatch.context() as patch:
        patch.setattr(asked, locked)
        messages = [mistake(open_given, tmp_path, SETTINGS), mistake(read_given, tmp_path)]
    assert all(
        str(tmp_path) in message and ": ask its owner for it, or run as the owner" in message for message in messages
    )
