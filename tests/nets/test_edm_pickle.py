"""Official EDM checkpoints: what is in them comes out, and nothing that is in them ever runs."""

import copyreg
import functools
import io
import os
import pickle
import random
import re
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Changes, mistake
from tests.dangers import Call
from tests.edm_writer import SOURCE, Persistent, edm_pickle, foreign_modules, write_edm_pickle
from tests.nets.small import ARCHITECTURES, batch, make
from torch import nn

from consistency.base.errors import UserError
from consistency.nets.denoiser import Denoiser, init_denoiser
from consistency.nets.edm_pickle import read_edm_pickle

TINY = ARCHITECTURES["ddpmpp"] | {"img_resolution": 4, "model_channels": 8, "channel_mult": [1], "attn_resolutions": []}
WEIGHT = "model.map_layer0.weight"  # [32, 8] in the tiny network


@pytest.fixture(scope="module")
def tiny_denoiser() -> Denoiser:
    """A U-Net as small as one can be."""
    return init_denoiser(TINY, 0).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The place of the file."""
    return tmp_path / "edm.pkl"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that the hostile ones would make."""
    return tmp_path / "marker"


def rebuilt(storage: Any, offset: Any = 0, shape: Any = (32, 8), strides: Any = (8, 1)) -> Call:
    """A tensor of any storage, and any place in it."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


def refused(path: Path, content: bytes | None = None, match: str = "", megabytes: int = 20) -> None:
    """The file is refused in one line that names it and says what to do, for no more memory than this and a few times
    the file, be it used or not."""
    if content is not None:
        path.write_bytes(content)
    tracemalloc.start()
    try:
        message = mistake(read_edm_pickle, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20 + 4 * path.stat().st_size
    assert re.search(match, message) and len(message) < 600
    assert str(path) in message and "download" in message


# --- what is written comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"label_dim": 3, "augment_dim": 9, "sigma_data": 0.4, "dropout": 0.13, "label_dropout": 0.1}],
    ids=["plain", "all"],
)
@pytest.mark.parametrize("network", ["ddpmpp", "ncsnpp", "adm"])
def test_a_round_trip_keeps_every_bit(path: Path, network: str, changes: Changes, numpy: int) -> None:
    written = make(ARCHITECTURES[network], **changes)
    write_edm_pickle(path, written, numpy=numpy)
    read = read_edm_pickle(path)
    assert read.architecture == written.architecture
    assert read.sigma_data == written.sigma_data
    assert list(read.state_dict()) == list(written.state_dict())
    torch.testing.assert_close(read.state_dict(), written.state_dict(), rtol=0, atol=0)
    x, t = batch(written)
    labels = torch.tensor([2, 0, 1]) if written.label_dim else None
    augment_labels = torch.randn(3, 9) if changes.get("augment_dim") else None
    with torch.no_grad():
        found, expected = (net(x, t, labels=labels, augment_labels=augment_labels) for net in (read, written))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_other_protocols_are_read(path: Path, tiny_denoiser: Denoiser, protocol: int) -> None:
    write_edm_pickle(path, tiny_denoiser, protocol=protocol)
    read = read_edm_pickle(path).state_dict()
    torch.testing.assert_close(read, tiny_denoiser.state_dict(), rtol=0, atol=0)


def test_the_teacher_is_frozen_in_eval_mode_and_float32(path: Path, tiny_denoiser: Denoiser) -> None:
    write_edm_pickle(path, tiny_denoiser)
    read = read_edm_pickle(path)
    assert not any(module.training for module in read.modules())
    assert not any(parameter.requires_grad for parameter in read.parameters())
    assert {value.dtype for value in read.state_dict().values()} == {torch.float32}
    assert {value.device.type for value in read.state_dict().values()} == {"cpu"}


def test_weights_of_another_memory_layout_are_read(path: Path, tiny_denoiser: Denoiser) -> None:
    name = "model.enc.4x4_block0.conv0.weight"
    weight = tiny_denoiser.state_dict()[name]
    changed = {
        name: weight.contiguous(memory_format=torch.channels_last),
        WEIGHT: torch.arange(300.0)[44:].view(8, 32).T,
    }
    write_edm_pickle(path, tiny_denoiser, tensors=changed)
    read = read_edm_pickle(path).state_dict()
    assert torch.equal(read[name], weight) and read[name].is_contiguous()
    assert torch.equal(read[WEIGHT], torch.arange(300.0)[44:].view(8, 32).T)


def test_an_argument_left_out_is_the_official_default(path: Path, tiny_denoiser: Denoiser) -> None:
    options = dict.fromkeys(("dropout", "label_dropout", "channel_mult_emb", "encoder_type", "resample_filter"))
    write_edm_pickle(path, tiny_denoiser, options=options)
    assert read_edm_pickle(path).architecture == tiny_denoiser.architecture


# --- nothing runs ----------------------------------------------------------------------------------------


def calls(marker: Path) -> dict[str, Any]:
    """Objects that make the marker when Python's unpickler meets them."""
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w').close()"
    inner = pickle.dumps(Call(os.system, touch))
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "mkdir": Call(os.mkdir, str(marker)),
        "subprocess": Call(subprocess.call, ["touch", str(marker)]),
        "Path.touch": Call(Path.touch, marker),
        "pickle.loads": Call(pickle.loads, inner),
        "partial": functools.partial(os.system, touch),
        "storage": Call(torch.storage._load_from_bytes, inner),
    }


KINDS = sorted(calls(Path("marker")))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"partial", "storage"}))
def test_the_traps_go_off_in_the_ordinary_reader(marker: Path, kind: str) -> None:
    pickle.loads(pickle.dumps(calls(marker)[kind]))
    assert marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_at_the_top_is_refused(path: Path, marker: Path, kind: str) -> None:
    refused(path, pickle.dumps(calls(marker)[kind], 4))
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place",
    [
        lambda call: {"entries": {"ema": call}},
        lambda call: {"entries": {"loss_fn": Call(OrderedDict, call)}},
        lambda call: {"state": {"sigma_data": call}},
        lambda call: {"state": {"_modules": {"model": (call,)}}},
        lambda call: {"options": {"dropout": call}},
        lambda call: {"tensors": {WEIGHT: call}},
        lambda call: {"tensors": {WEIGHT: Call(torch._utils._rebuild_parameter, call, False, OrderedDict())}},
        lambda call: {"tensors": {WEIGHT: rebuilt(call)}},
    ],
    ids=["ema", "loss", "number", "state", "option", "tensor", "parameter", "storage"],
)
def test_a_call_inside_a_true_checkpoint_is_refused(
    path: Path, marker: Path, tiny_denoiser: Denoiser, kind: str, place: Callable[[Any], dict[str, Any]]
) -> None:
    refused(path, edm_pickle(tiny_denoiser, **place(calls(marker)[kind])))
    assert not marker.exists()


def test_a_call_in_a_storage_that_no_weight_uses_stays_unread(
    path: Path, marker: Path, tiny_denoiser: Denoiser
) -> None:
    write_edm_pickle(path, tiny_denoiser, entries={"loss_fn": calls(marker)["storage"]})
    assert read_edm_pickle(path).architecture == tiny_denoiser.architecture
    assert not marker.exists()


def test_source_text_is_never_executed(path: Path, marker: Path, tiny_denoiser: Denoiser) -> None:
    # Every official file carries source text, so such a file is read; the text is not.
    write_edm_pickle(path, tiny_denoiser, source=f"open({str(marker)!r}, 'w')\n{SOURCE}")
    read = read_edm_pickle(path).state_dict()
    assert not marker.exists()
    torch.testing.assert_close(read, tiny_denoiser.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("", "os.system"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"),
        ("torch._utils", "_rebuild_parameter.__code__"),
        ("numpy", "dtype.__class__"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("torch", "load"),
        ("torch.jit._serialization", "load"),
        ("torch.nn.modules.container", "Sequential"),
        ("consistency.nets.edm_pickle", "_persistent"),
        ("x" * 5000, "\n\x1b[31m" * 1000),
    ],
)
def test_any_other_name_is_refused(path: Path, module: str, name: str) -> None:
    program = pickle.PROTO + b"\x04" + text(module) + text(name) + pickle.STACK_GLOBAL
    refused(path, program + b".", "it asks for '.*nothing was run")
    if "\n" not in name:
        refused(path, b"\x80\x02c" + f"{module}\n{name}\n.".encode(), "it asks for '.*nothing was run")


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


@pytest.mark.parametrize(
    "program",
    [
        b"ccollections\nOrderedDict\n}b",  # a state for a name
        b"ccollections\nOrderedDict\n)R}b",
        b"ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b",  # (None, slots)
        b"ctorch.nn.modules.container\nModuleDict\n}b",
        b"ctorch.nn.modules.container\nModuleDict\nN}\x8c\x08__code__Ns\x86b",  # (None, slots) for a name
        b"ctorch.nn.modules.container\nModuleDict\n)\x81)R",  # a call of what a call made
        b"cnumpy\ndtype\n}b",
        b"ccollections\nOrderedDict\n(NtR",
        b"\x8c\x09os.system)R",
        b"NNR",
        b"ctorch._utils\n_rebuild_parameter\n)\x81",  # no class
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\nN\x85R",
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R",
        b"}]Ns",  # a list as a key
        b"})Ns",
        b"}\x8c\x01a\x8c\x01a\x86Ns",
        b"\x8f(N\x90",  # something in a set
        b"(N\x91",  # a frozen set
        b"(NNd",
        b"](NNu",
        b"}(Nu",
        b"}Na",
        b"h\x05",
        b"s",
        b"t",
        b"",
        b"NQ",  # a persistent id
        b"Pid\n",
        b"\x82\x01",  # an extension
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"(iposix\nsystem\n",
        b"(cposix\nsystem\n\x8c\x01ao",
        b"ccollections\nOrderedDict\n)}\x92",
        b"\x96" + bytes(8),
        b"\x97",
        b"N2",
        b"I1\n",
        b"\x8b\x01\x00\x00\x00a",
        b"\xff",
    ],
)
def test_a_program_that_does_anything_else_is_refused(path: Path, program: bytes) -> None:
    # Refused for what it does, not for what is missing at its end.
    refused(path, b"\x80\x04" + program + b".", r"^(?!.*no 'ema')")


def test_a_registered_extension_is_not_called(path: Path, marker: Path) -> None:
    copyreg.add_extension("posix", "mkdir", 240)
    try:
        program = pickle.dumps(Call(os.mkdir, str(marker)), 4)
        assert b"\x82\xf0" in program
        pickle.loads(program)  # puts the function in the cache
        marker.rmdir()
        refused(path, program, "instruction")
    finally:
        copyreg.remove_extension("posix", "mkdir", 240)
        copyreg.clear_extension_cache()
    assert not marker.exists()


#: bytes of protocol 2, of the text in the memo's first place
COPY = b"c_codecs\nencode\nh\x00\x8c\x06latin1\x86R"


@pytest.mark.parametrize(
    "program",
    [
        b"\x8e" + struct.pack("<Q", 2**35) + b"few",  # bytes, and text, of 32 GB
        b"\x8d" + struct.pack("<Q", 2**35) + b"few",
        b"\x8e" + struct.pack("<Q", 2**63) + b"few",
        b"B" + struct.pack("<I", 2**32 - 1) + b"few",
        b"\x95" + struct.pack("<Q", 2**62),
        b"Nr\xff\xff\xff\xff.",  # the four-billionth place in the memo
        b"I" + b"9" * 100_000 + b"\n.",
        b"]" + b"]" * 100_000 + b"a" * 100_000 + b".",
        b"N" + b"\x85" * 100_000 + b".",
        b"}N" + b"\x85" * 300_000 + b"Ns.",  # hashing it would overflow the stack
        b"}N" + b"\x94h\x00\x86" * 60 + b"Ns.",  # and this would take for ever
        b"\x96" + struct.pack("<Q", 2**35),  # a bytearray
        b"X" + struct.pack("<I", 10**5) + bytes(10**5) + b"\x940(" + COPY * 5000 + b"l.",  # copies of a text
        b"X" + struct.pack("<I", 10**6) + bytes(10**6) + b"\x940" + b"cnumpy\ndtype\nh\x00R" * 9000 + b".",  # arguments
    ],
)
def test_a_program_for_endless_memory_is_refused(path: Path, program: bytes) -> None:
    refused(path, b"\x80\x04" + program, megabytes=60)


def test_a_file_of_nothing_but_instructions_is_refused(path: Path) -> None:
    refused(path, b"]" * 2_000_000, "too many instructions", megabytes=60)


def test_lists_of_lists_of_lists_cost_nothing(path: Path) -> None:
    content: list[Any] = []
    for _ in range(200):
        content = [content, content]
    refused(path, pickle.dumps({"ema": content}, 4), "no 'ema' network")


# --- tensors ---------------------------------------------------------------------------------------------


def elements(count: int) -> Any:
    return torch.zeros(count)._typed_storage()


def stream(content: Any, **options: Any) -> Call:
    """A storage that is a torch file of something else."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


def changed_stream(change: Callable[[bytes], bytes]) -> Call:
    _, (content,) = stream(elements(256), _use_new_zipfile_serialization=False).call
    return Call(torch.storage._load_from_bytes, change(content))


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(1).expand(32, 8), "larger than its storage"),
        (rebuilt(elements(255)), "larger than its storage"),
        (rebuilt(elements(256), offset=1), "storage offset 1"),
        (rebuilt(elements(256), strides=(9, 1)), r"strides \[9, 1\]"),
        (rebuilt(elements(39), strides=(1, 1)), "larger than its storage"),
        (rebuilt(elements(256), strides=(2**47, 2**47)), "RuntimeError"),
        (rebuilt(elements(256), shape=(10**6, 10**6), strides=(10**6, 1)), "has shape"),
        (rebuilt(elements(256), shape=(2**62, 2**62)), "impossible"),
        (rebuilt(elements(256), strides=(-8, 1)), "impossible"),
        (rebuilt(elements(256), offset=-1), "impossible"),
        (rebuilt(elements(256), offset=2**2000), "impossible"),
        (rebuilt(elements(256), shape=(32.0, 8)), "impossible"),
        (rebuilt(elements(256), shape=[32, 8]), "impossible"),
        (rebuilt(elements(256), shape=(32, 8, *[1] * 30), strides=(8, 1, *[1] * 30)), "impossible"),
        (rebuilt(elements(256), strides=(8,)), "mismatch in length of strides"),
        (rebuilt(None), "without a storage"),
        (rebuilt(b"storage"), "is malformed"),
        (rebuilt(torch.zeros(256).half()._typed_storage()), "another type than float32"),
        (torch.zeros(32, 8, dtype=torch.float64), "another type than float32"),
        (torch.zeros(32, 8, dtype=torch.int64), "another type than float32"),
        (np.array([[object()]]), "_reconstruct"),
        (np.zeros((32, 8)), "_reconstruct"),
        ("weights", "is not a tensor"),
        (None, r"'model.map_layer0.weight' has shape none, the network .* has \(32, 8\)"),
        (torch.zeros(32, 9), r"has shape \(32, 9\), the network .* has \(32, 8\)"),
        (torch.full((32, 8), torch.nan), "NaN or infinity in model.map_layer0.weight"),
        (torch.full((32, 8), -torch.inf), "NaN or infinity in model.map_layer0.weight"),
        (rebuilt(stream(torch.zeros(256))), "is malformed"),
        (rebuilt(stream([1], _use_new_zipfile_serialization=False)), "another type than float32"),
        (rebuilt(changed_stream(lambda content: content[:-1])), "of the wrong length"),
        (rebuilt(changed_stream(lambda content: content + b"more")), "of the wrong length"),
        (rebuilt(changed_stream(lambda content: content[:40])), "is malformed"),
        (rebuilt(changed_stream(lambda content: b"")), "is malformed"),
    ],
)
def test_a_tensor_that_is_not_what_it_should_be_is_refused(
    path: Path, tiny_denoiser: Denoiser, tensor: Any, match: str
) -> None:
    refused(path, edm_pickle(tiny_denoiser, tensors={WEIGHT: tensor}), match)


def test_many_names_of_one_storage_are_no_bomb(path: Path, tiny_denoiser: Denoiser) -> None:
    shared = torch.zeros(2**16)
    more = OrderedDict((f"t{i}", shared) for i in range(10_000))
    refused(path, edm_pickle(tiny_denoiser, state={"_parameters": more}), "larger than the file")


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"model.enc.4x4_down.conv0.resample_filter": torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])}},
        {"options": {"resample_filter": [1, 2]}},
        {"options": {"resample_filter": [0, 0]}},
    ],
)
def test_a_filter_other_than_its_description_is_refused(path: Path, changes: Changes) -> None:
    content = edm_pickle(make(ARCHITECTURES["ddpmpp"]), **changes)
    refused(path, content, r"model.enc.4x4_down.conv0.resample_filter is not the filter")


# --- the modules and their description -------------------------------------------------------------------


def circle() -> nn.ModuleDict:
    module = nn.ModuleDict()
    module._modules["again"] = module
    return module


def twice() -> nn.ModuleDict:
    module = nn.ModuleDict()
    return nn.ModuleDict({"a": module, "b": module})


def endless() -> nn.ModuleDict:
    module = nn.ModuleDict()
    for _ in range(30):
        module = nn.ModuleDict({"inner": module})
    return module


def bomb() -> nn.ModuleDict:
    """Thousands of modules share thousands of names."""
    shared = OrderedDict((f"t{i}", torch.zeros(1)) for i in range(2000))
    modules = {f"m{i}": nn.ModuleDict() for i in range(2000)}
    for module in modules.values():
        module.__dict__.update(_parameters=shared)
    return nn.ModuleDict(modules)


@pytest.mark.parametrize("make_modules", [circle, twice, endless, bomb])
def test_modules_that_are_no_tree_are_refused(
    path: Path, tiny_denoiser: Denoiser, make_modules: Callable[[], nn.ModuleDict]
) -> None:
    content = edm_pickle(tiny_denoiser, state={"_modules": {"model": make_modules()}})
    refused(path, content, "do not form a tree")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"class_name": "iDDPMPrecond"}, "of class 'iDDPMPrecond', not EDMPrecond; baselines"),
        ({"class_name": "VPPrecond"}, "baselines are not supported"),
        ({"class_name": "Generator\n"}, "not EDMPrecond"),
        ({"class_name": 7}, "of class of type int"),
        ({"entries": {"ema": None}}, "holds no 'ema' network"),
        ({"entries": {"ema": {"state": 1}}}, "holds no 'ema' network"),
        ({"state": {"_modules": {}}}, "its network is of type NoneType|of class"),
        ({"state": {"_modules": {"model": None}}}, "its network is of"),
        ({"state": {"_modules": {"model": nn.ModuleDict()}}}, "of class 'ModuleDict', not SongUNet/DhariwalUNet"),
        ({"state": {"_modules": []}}, "without proper _modules"),
        ({"state": {"_buffers": {7: None}}}, "without proper _buffers"),
        ({"state": {"_parameters": {"a" * 10**6: None}}}, "without proper _parameters"),
        ({"state": {"_parameters": {"more": torch.zeros(2)}}}, r"'more' has shape \(2,\), .* has none"),
        ({"state": {"sigma_data": None}}, "'sigma_data': Input should be"),
        ({"state": {"sigma_data": float("nan")}}, "'sigma_data': Input should be"),
        ({"state": {"sigma_data": -0.5}}, "'sigma_data': Input should be"),
        ({"state": {"sigma_data": 0}}, "'sigma_data': Input should be"),
        ({"state": {"img_resolution": 8}}, "has shape"),
        ({"state": {"img_channels": 2}}, "has shape"),
        ({"state": {"label_dim": 10**9}}, "'label_dim': Input should be"),
        ({"state": {"label_dim": True}}, "'label_dim': Input should be"),
        ({"options": {"model_channels": 16}}, "has shape"),
        ({"options": {"model_channels": 10**6}}, "'model_channels': Input should be"),
        ({"options": {"model_channels": 2**16}}, "has shape"),
        ({"options": {"model_channels": 2**16, "channel_mult": [2**16], "channel_mult_emb": 2**16}}, "overflowed"),
        ({"options": {"model_channels": "8"}}, "'model_channels': Input should be"),
        ({"options": {"model_channels": 0}}, "got 0"),
        ({"options": {"num_blocks": 2**16}}, "'num_blocks': Input should be"),
        ({"options": {"channel_mult": [1] * 17}}, "'channel_mult': List should have"),
        ({"options": {"channel_mult": []}}, "is malformed"),
        ({"options": {"channel_mult": [1, 1, 1, 1]}}, "cannot be halved"),
        ({"options": {"dropout": 2}}, "'dropout': Input should be"),
        ({"options": {"dropout": float("inf")}}, "'dropout': Input should be"),
        ({"options": {"encoder_type": "resnet"}}, "unknown encoder_type"),
        ({"options": {"encoder_type": 5}}, "'encoder_type': Input should be"),
        ({"options": {"second_time": True}}, "'second_time': Extra inputs are not permitted"),
        ({"options": {"network": "mlp"}}, "'network': Extra inputs are not permitted"),
    ],
)
def test_another_network_is_refused(path: Path, tiny_denoiser: Denoiser, changes: Changes, match: str) -> None:
    refused(path, edm_pickle(tiny_denoiser, **changes), match)


def test_a_persistent_object_that_is_no_network_is_refused(path: Path) -> None:
    with foreign_modules():
        content = pickle.dumps({"G": None, "G_ema": Persistent("Generator", {})}, 4)
    refused(path, content, "holds no 'ema' network")


# --- damage ----------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(path: Path, tiny_denoiser: Denoiser) -> None:
    content, draw = edm_pickle(tiny_denoiser), random.Random(0)
    for end in (*range(12), *range(-11, 0), *(draw.randrange(len(content)) for _ in range(40))):
        refused(path, content[:end])


def test_random_bytes_are_refused(path: Path) -> None:
    draw = random.Random(0)
    for size in (1, 10, 100, 1000, 10_000) * 10:
        refused(path, draw.randbytes(size))
        refused(path, b"\x80\x04" + draw.randbytes(size))


def test_an_overwritten_file_is_refused_or_read_but_never_runs_wild(path: Path, tiny_denoiser: Denoiser) -> None:
    content, draw = edm_pickle(tiny_denoiser), random.Random(0)
    outcomes = set()
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            outcomes.add(type(read_edm_pickle(path)))
        except UserError as error:
            outcomes.add(type(error))
            assert "\n" not in str(error)
    assert outcomes == {Denoiser, UserError}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_is_refused(path: Path, tiny_denoiser: Denoiser, zipped: bool) -> None:
    torch.save(tiny_denoiser.state_dict(), path, _use_new_zipfile_serialization=zipped)
    refused(path)


def test_a_missing_file_a_folder_and_an_empty_file_are_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"edm.pkl is missing: download"):
        read_edm_pickle(path)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_edm_pickle(tmp_path)
    refused(path, b"", "empty file")
