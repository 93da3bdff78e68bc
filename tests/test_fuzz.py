"""Every reader of a stranger's file, given damaged ones: it returns a value or raises UserError, nothing else.

`make fuzz` goes on for CONSISTENCY_FUZZ seconds a reader and keeps what it finds in tests/fuzzed/, which the tests read
again from then on.
"""

import json
import os
import time
import zipfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.conftest import TINY
from tests.draws import numpy_draws
from tests.edm_writer import write_edm_pickle
from tests.nets.small import ARCHITECTURES

from consistency.api import FittedODE
from consistency.base.arrays import read_table
from consistency.base.errors import UserError
from consistency.base.files import read_json
from consistency.config.dataset import Dataset
from consistency.config.reading import load_study
from consistency.data.pictures import decode
from consistency.data.sources import edm_zip
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import init_denoiser
from consistency.nets.edm_pickle import read_edm_pickle

KEPT = Path(__file__).parent / "fuzzed"
SECONDS = float(os.environ.get("CONSISTENCY_FUZZ", "0"))
ROUNDS = 60  # without CONSISTENCY_FUZZ
MLP = {"network": "mlp", "img_resolution": 2, "img_channels": 1, "width": 4, "depth": 1, "embedding": 4}
UNET = ARCHITECTURES["ddpmpp"] | {"img_resolution": 4, "model_channels": 8, "channel_mult": [1], "attn_resolutions": []}
#: what readers have special cases for
WORDS = [b"\x00", b"\xff" * 8, b"9" * 40, b"-1", b"nan", b"[", b"{", b'"', b"..", b"/", b"&a", b"*a", b"<<", b"1e999"]


def a_study(path: Path) -> None:
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")


def a_zip(path: Path) -> None:
    Image.new("RGB", (4, 4)).save(path.with_suffix(".png"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".png"), "00000/img0.png")
        archive.writestr("dataset.json", json.dumps({"labels": [["00000/img0.png", 0]]}))


def a_picture(path: Path) -> None:
    Image.new("RGB", (4, 4)).save(path)


def a_checkpoint(path: Path) -> None:
    save_denoiser(path, init_denoiser(MLP, 0), {"key": "a", "study": "tiny"})


def a_card(path: Path) -> None:
    content = {"format": "consistency-card-2", "key": "a", "inputs": {"a/b": "0" * 64}, "outputs": {"c": "1" * 64}}
    path.write_text(json.dumps(content), encoding="utf-8")


def a_fit(path: Path) -> None:
    times = np.geomspace(80, 0.002, 5)
    names = ("l", "l_se", "s", "s_se", "s_centred", "s_centred_se")
    arrays = dict.fromkeys(names, np.linspace(0, 1, 5)) | {"determined": times > 0, "determined_centred": times > 0}
    np.savez(path, times=times, centre=np.zeros((1, 2, 2), np.float32), **arrays)


def a_table(path: Path) -> None:
    path.write_text("run,seed,fd\nctm,0,1.5\nanalytic,1,2.5\n", encoding="utf-8")


def a_pickle(path: Path) -> None:
    write_edm_pickle(path, init_denoiser(UNET, 0).eval())


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "tiny.yaml": (a_study, load_study),
    "a.zip": (a_zip, lambda path: edm_zip(Dataset(kind="edm_zip", path=str(path), resolution=4, channels=3)).read(0)),
    "a.png": (a_picture, lambda path: decode(path.read_bytes(), str(path))),
    "a.safetensors": (a_checkpoint, load_denoiser),
    "a.json": (a_card, lambda path: read_json(path, "report")),
    "a.npz": (a_fit, FittedODE.load),
    "a.csv": (a_table, lambda path: read_table(path, "scores", {"run"})),
    "a.pkl": (a_pickle, read_edm_pickle),
}


@cache
def whole(name: str, folder: Path) -> bytes:
    """The bytes of a file that the reader accepts."""
    make, read = READERS[name]
    make(folder / name)
    read(folder / name)
    return (folder / name).read_bytes()


def damaged(content: bytes, draws: np.random.Generator) -> bytes:
    """Change, cut, repeat or insert some bytes."""
    for _ in range(int(draws.integers(1, 4))):
        first, last = sorted(draws.integers(0, len(content) + 1, 2).tolist())
        last = min(last, first + 64)
        word = WORDS[draws.integers(len(WORDS))] if draws.random() < 0.5 else draws.bytes(int(draws.integers(1, 5)))
        kind = draws.integers(4)
        if kind == 0:
            content = content[:first] + word + content[first + len(word) :]
        elif kind == 1:
            content = content[:first] + content[last:]
        elif kind == 2:
            content = content[:last] + content[first:last] * int(draws.integers(1, 9)) + content[last:]
        else:
            content = content[:first] + word + content[first:]
    return content


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    content, draws = whole(name, tmp_path), numpy_draws(sum(name.encode()))
    until, rounds = time.monotonic() + SECONDS, 0
    while rounds < ROUNDS or time.monotonic() < until:
        rounds += 1
        given = damaged(content, draws)
        (tmp_path / name).write_bytes(given)
        try:
            READERS[name][1](tmp_path / name)
        except UserError as error:
            assert str(error).isprintable()
        except BaseException:
            if SECONDS:
                KEPT.mkdir(exist_ok=True)
                (KEPT / f"{sha256(given).hexdigest()[:8]}-{name}").write_bytes(given)
            raise


@pytest.mark.parametrize("path", sorted(KEPT.glob("*")), ids=lambda path: path.name)
def test_what_was_found_once_is_refused(path: Path, tmp_path: Path) -> None:
    name = path.name.partition("-")[2]
    (tmp_path / name).write_bytes(path.read_bytes())
    with pytest.raises(UserError):
        READERS[name][1](tmp_path / name)
