"""The part of a result that the same study has bit for bit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

#: keys of a history that no run can repeat begin so: times, speeds, memory
UNREPEATABLE = ("seconds", "images_per_second", "time_", "peak_")
#: bit for bit, through dictionaries and lists
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def repeatable(file: Path) -> Any:
    """The content of a result file, bit for bit, without what no run can repeat."""
    if file.suffix in (".safetensors", ".npz"):
        arrays = load_file(file) if file.suffix == ".safetensors" else np.load(file)
        return {name: array.tobytes() for name, array in arrays.items()}
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(UNREPEATABLE)} for line in lines]
    return file.read_bytes()
