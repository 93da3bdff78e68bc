"""Small files that would cost much: each reader is bounded by its input. The memory is limited while each is read."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY
from tests.processes import run_python

Make = Callable[[Path], None]

#: reads a file within 400 MiB more than its imports need, and 20 seconds; a mistake's message comes last
READ = """
import resource, signal, sys
from importlib import import_module
from pathlib import Path
from consistency.base.errors import UserError
import numpy, {imports}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
signal.alarm(20)
try:
    {call}
    print("read")
except UserError as error:
    print(error)
"""


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def memoised_text(path: Path) -> None:
    """One text of a megabyte, which a thousand calls turn into bytes."""
    text = b"x" * (1 << 20)
    call = b"c_codecs\nencode\nh\x00\x8c\x06latin1\x86R"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", len(text)) + text + b"q\x00" + b"]" + b"(" + call * 1000 + b"e.")


def laughs(path: Path) -> None:
    """Each alias is nine of the one before: nine levels are 400 million values."""
    lines = ["a0: &a0 [1]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)), "seeds: *a9"]
    path.write_text("\n".join(lines), encoding="utf-8")


def merges(path: Path) -> None:
    lines = ["a0: &a0 {k: 1}", *(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, 10))]
    path.write_text("\n".join(lines), encoding="utf-8")


def cycle(path: Path) -> None:
    path.write_text("seeds: &a [*a, *a]", encoding="utf-8")


def long_name(path: Path) -> None:
    zipped(path, {"x" * 60_000: b"", **{f"{k}.png": b"" for k in range(20_000)}}, zipfile.ZIP_STORED)


def long_labels(path: Path) -> None:
    zipped(path, {"dataset.json": b'{"labels": [' + b"[]," * (60 << 20) + b"[]]}", "a.png": b""})


def twice(path: Path) -> None:
    zipped(path, {"dataset.json": b'{"labels": [["a.png", 0], ["a.png", 1]]}', "a.png": b""})


def header(path: Path) -> None:
    """A header of safetensors that is all brackets."""
    text = b'{"__metadata__":{"format":"' + b"[" * (8 << 20) + b'"}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def nested_metadata(path: Path) -> None:
    text = json.dumps({"__metadata__": {"format": "[" * 100_000}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def huge_network(path: Path) -> None:
    """Metadata that describe a network of 10 GB."""
    network = {"network": "mlp", "img_resolution": 8, "img_channels": 1, "width": 16_000, "depth": 6}
    metadata = {"format": "consistency-denoiser-1", "architecture": network}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    text = json.dumps({"__metadata__": texts}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_list(path: Path) -> None:
    path.write_text("[]", encoding="utf-8")


def brackets(path: Path) -> None:
    path.write_text("[" * 20_000, encoding="utf-8")


def large_json(path: Path) -> None:
    path.write_bytes(b"[" + b"[]," * (8 << 20) + b"[]]")


def compressed_arrays(path: Path) -> None:
    np.savez_compressed(path, times=np.zeros(1 << 27))


def huge_shape(path: Path) -> None:
    """An array of a terabyte, as its header says."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("times.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)})


def many_columns(path: Path) -> None:
    path.write_text(",".join(f"c{k}" for k in range(500_000)), encoding="utf-8")


STUDY = ("consistency.config.reading", "consistency.config.reading.load_study(sys.argv[1])")
ZIP = (
    "consistency.data.sources, consistency.config.dataset as d",
    "consistency.data.sources.edm_zip(d.Dataset(kind='edm_zip', path=sys.argv[1], resolution=8, channels=3))",
)
PICKLE = ("consistency.nets.edm_pickle", "consistency.nets.edm_pickle.read_edm_pickle(Path(sys.argv[1]))")
WEIGHTS = ("consistency.nets.checkpoint", "consistency.nets.checkpoint.read_metadata(Path(sys.argv[1]))")
NETWORK = ("consistency.nets.checkpoint", "consistency.nets.checkpoint.load_denoiser(Path(sys.argv[1]))")
JSON = ("consistency.base.files", "consistency.base.files.read_json(Path(sys.argv[1]), 'report')")
ARRAYS = ("consistency.base.arrays", "consistency.base.arrays.read_arrays(Path(sys.argv[1]), 'coefficients', 'times')")
TABLE = ("consistency.base.arrays, pandas", "consistency.base.arrays.read_table(Path(sys.argv[1]), 'scores', set())")

CASES: list[tuple[Make, str, tuple[str, str], str]] = [
    (memoised_text, "a.pkl", PICKLE, "is not an official EDM checkpoint"),
    (laughs, "a.yaml", STUDY, "is too large for such a file"),
    (merges, "a.yaml", STUDY, "is too large for such a file"),
    (cycle, "a.yaml", STUDY, "is too large for such a file"),
    (brackets, "a.yaml", STUDY, "its brackets are too deep"),
    (long_name, "a.zip", ZIP, "a name in it has 60,000 bytes"),
    (long_labels, "a.zip", ZIP, "bytes for 1 images"),
    (twice, "a.zip", ZIP, "has a.png twice"),
    (header, "a.safetensors", WEIGHTS, "its header has"),
    (nested_metadata, "a.safetensors", WEIGHTS, "was not written by this project"),
    (huge_network, "a.safetensors", NETWORK, "does not fit its architecture"),
    (a_pipe, "a.safetensors", WEIGHTS, "it is no file"),
    (a_pipe, "a.json", JSON, "is no file"),
    (a_list, "a.json", JSON, "it holds no keys and values"),
    (brackets, "a.json", JSON, "is damaged"),
    (large_json, "a.json", JSON, "more than such a file can have"),
    (compressed_arrays, "a.npz", ARRAYS, "it is compressed"),
    (huge_shape, "a.npz", ARRAYS, "is damaged"),
    (many_columns, "a.csv", TABLE, "it has no header of a table"),
]


@pytest.mark.parametrize(("make", "name", "reader", "message"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_a_small_file_costs_little_and_one_line(
    make: Make, name: str, reader: tuple[str, str], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    code = READ.format(imports=reader[0], call=reader[1])
    found = run_python("-c", code, str(tmp_path / name), folder=tmp_path)
    assert message in found.stdout.splitlines()[-1]
    assert len(found.stdout) < 9000


@pytest.mark.parametrize(
    "text", ["title: 2026-13-45", f"seeds: [{'9' * 5000}]", "title: !!timestamp x", "title: !!int x", "a: !!float [1]"]
)
def test_a_value_that_does_not_convert_is_one_line(text: str, tmp_path: Path) -> None:
    from consistency.base.errors import UserError
    from consistency.config.reading import load_study

    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_study(file)
    assert "is not valid YAML" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_file_says_is_escaped_and_cut(tmp_path: Path) -> None:
    from consistency.base.errors import UserError
    from consistency.config.reading import build_study

    for wrong in ({"\x1b[2Jkey\nline": 1}, {"title": ["x" * 10_000_000]}, {"name": "\x1b]0;title\x07"}):
        with pytest.raises(UserError) as error:
            build_study({**TINY, **wrong})
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 8100
