"""Files that ask for more than they hold: time and memory have a bound, whatever is in them."""

import json
import os
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.damage import damaged, damages
from support.runs import differences

from dcdit.checkpoints.load import read_weights
from dcdit.checkpoints.read import read_checkpoint
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checkpoints.timm_models import read_model_weights
from dcdit.errors import UserError
from dcdit.evaluation.archives import NpzArchive
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime import limits
from dcdit.runtime.files import file_digest, read_json
from dcdit.runtime.tensors import read_tensors


@contextmanager
def bounded(seconds: float = 4, megabytes: int = 200):
    """Fail if more time is spent, or more memory taken."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - begin < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def torch_file(path: Path, content: bytes) -> Path:
    """A file of torch with this pickle, and 48 bytes of numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", bytes(48))
    return path


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def tensor(shape: bytes, stride: bytes, kind: bytes = b"Float", elements: int = 12) -> bytes:
    """The code of a tensor, remembered as number 9."""
    storage = b"(" + text(b"storage") + b"ctorch\n" + kind + b"Storage\n" + text(b"0") + text(b"cpu")
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(elements) + b"tQ" + number(0) + shape + stride
    return made + b"\x89ccollections\nOrderedDict\n)RtR"


def named(value: bytes) -> bytes:
    """A pickle of one named value."""
    return b"\x80\x02}" + text(b"x") + value + b"s."


VALUES, MANY = 200_000, 300_000


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    """A tenth of the values that files may hold, so that tests take a tenth of the time."""
    monkeypatch.setattr(limits, "VALUES", VALUES)
    monkeypatch.setattr(limits, "TEXT_BYTES", 10 * MANY)


PICKLES = {
    "an array of bytes by a code": ("writes no code 150", b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b"."),
    "text that is not there": ("writes no code 141", b"\x80\x04\x8d" + struct.pack("<Q", 8 << 30) + b"."),
    "lists within lists, shared": ("holds more than 200000 values", named(b"]q\x00" + b"0](h\x00h\x00eq\x00" * 40)),
    "lists within lists": ("nested more than 64 deep", named(b"]" * 50_000 + b"a" * 49_999)),
    "tuples within tuples": ("nested more than 64 deep", named(b")" + b"\x85" * 50_000)),
    "marks": ("holds more than 200000 values", b"\x80\x02" + b"(" * MANY),
    "numbers": ("holds more than 200000 values", named(b"](" + b"N" * MANY + b"e")),
    "long text, shared": (
        "have more than 3000000 bytes",
        named(b"](" + text(b"a" * MANY) + b"q\x00" + b"h\x00" * 1000 + b"e"),
    ),
    "classes with long names": (
        "a class with too many letters",
        b"\x80\x04" + text(b"a" * MANY) + b"q\x00" + b"h\x00h\x00\x93" * MANY + b".",
    ),
    "names with one hash": (
        "neither names nor small numbers",
        named(b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 50_000)) + b"u"),
    ),
    "tuples as names": ("neither names nor small numbers", named(b")q\x00" + b"0(h\x00h\x00tq\x00" * 40 + b"}h\x00Ns")),
    "mappings copied": (
        "holds more than 200000 values",
        named(
            b"}("
            + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))
            + b"uq\x00"
            + b"0ccollections\nCounter\nh\x00\x85R" * 20_000
        ),
    ),
    "a large tensor": (
        "have 1099511627776 elements, which are not there",
        named(tensor(number(1 << 40) + b"\x85", number(1) + b"\x85")),
    ),
    "a spread tensor": (
        "have 4 elements, which are not there",
        named(tensor(number(4) + b"\x85", number(1 << 40) + b"\x85")),
    ),
    "one number as many": (
        "have 1099511627776 elements, which are not",
        named(tensor(number(1 << 40) + b"\x85", number(0) + b"\x85")),
    ),
    "a storage that is not there": (
        "asks for 1099511627776 elements",
        named(tensor(number(1) + b"\x85", number(1) + b"\x85", elements=1 << 40)),
    ),
    "numbers named often": (
        "say to hold more than its size",
        named(b"](" + tensor(number(12) + b"\x85", number(1) + b"\x85") + b"q\x09" + b"h\x09" * 1000 + b"e"),
    ),
    "complex numbers": (
        "numbers of the type torch.ComplexFloatStorage",
        named(tensor(number(1) + b"\x85", number(1) + b"\x85", b"ComplexFloat", 1)),
    ),
    "a state for a number": (
        "appends to what is no list",
        named(tensor(number(1) + b"\x85", number(1) + b"\x85") + b"K\x00a"),
    ),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_are_counted_before_anything_is_made(tmp_path, kind):
    reason, content = PICKLES[kind]
    file = torch_file(tmp_path / "x.pt", content)
    with bounded(), pytest.raises(UserError, match=rf"x\.pt cannot be read safely: .*{reason}") as error:
        read_checkpoint(file)
    assert len(str(error.value)) < 600


def test_what_a_pickle_would_make_is_not_made(tmp_path):
    makes = b"cbuiltins\nbytearray\n" + number(8 << 30) + b"\x85R"
    with bounded(megabytes=100):
        values = read_checkpoint(torch_file(tmp_path / "x.pt", named(makes)))
    assert values["x"].name == "builtins.bytearray"


def test_sparse_tensors_are_not_read(tmp_path):
    torch.save({"x": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))}, tmp_path / "x.pt")
    with bounded(megabytes=100), pytest.raises(UserError, match="is no Tensor"):
        read_weights(resolve_checkpoint(str(tmp_path / "x.pt"), "runs"))


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]
tensors = st.builds(
    lambda dtype, sizes: torch.randint(0, 2, sizes).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
)
plain = st.recursive(
    tensors | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.booleans() | st.none(),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.text() | st.integers(0, 99), part, max_size=3)
        | st.builds(OrderedDict, st.dictionaries(st.text(), part, max_size=3))
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=3), st.booleans(), st.sampled_from([2, 4]))
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path_factory, values, zipped, protocol):
    file = tmp_path_factory.mktemp("saved") / "x.pt"
    values["views"] = [torch.arange(12.0).view(3, 4).T, torch.arange(9)[2:5], torch.nn.Parameter(torch.ones(2))]
    values["shared"] = [values["views"][0], values["views"][0][1]]
    torch.save(values, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = read_checkpoint(file, legacy=True)
    assert differences(read, torch.load(file, weights_only=protocol == 2)) == []
    read["shared"][0].fill_(7)
    assert (read["shared"][1] == 7).all()


@settings(max_examples=60, deadline=None)
@given(damages)
def test_damage_of_an_old_file_is_an_error_or_stays_within_it(tmp_path_factory, damage):
    file = tmp_path_factory.mktemp("saved") / "x.pt"
    torch.save({"x": torch.ones(50, 3), "y": [torch.arange(5)]}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(damaged(file.read_bytes(), damage))
    try:
        values = read_checkpoint(file, legacy=True)
    except UserError as error:
        assert str(file) in str(error)  # noqa: PT017 - old files have no checksums: some damage goes unseen
    else:
        assert len(values) <= 2


READERS = {
    "checkpoint": (read_checkpoint, "x.ckpt"),
    "weights": (lambda path: read_weights(resolve_checkpoint(str(path), "runs")), "x.pt"),
    "safetensors": (read_tensors, "x.safetensors"),
    "features": (lambda path: read_model_weights(str(path), "features.weights"), "x.pt"),
    "safe features": (lambda path: read_model_weights(str(path), "features.weights"), "x.safetensors"),
    "reference": (NpzArchive, "x.npz"),
    "statistics": (Statistics.load, "x.npz"),
    "json": (lambda path: read_json(path, dict, "write it anew"), "x.json"),
    "digest": (file_digest, "x"),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [fifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(tmp_path, reader, make):
    read, name = READERS[reader]
    make(tmp_path / name)
    with (
        bounded(megabytes=100),
        pytest.raises(UserError, match=r"no regular file|is a directory|holds no|no such file"),
    ):
        read(tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, reader):
    read, name = READERS[reader]
    (tmp_path / name).write_bytes(b"whole")
    opened = os.open

    def refuse(path, *arguments, **named):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be read: Permission denied$"):
        read(tmp_path / name)


@pytest.mark.parametrize("reader", sorted({*READERS} - {"digest"}))
def test_no_path_holds_a_null_byte(tmp_path, reader):
    with pytest.raises((UserError, FileNotFoundError)):
        READERS[reader][0](tmp_path / f"a\0b{READERS[reader][1]}")


TEXTS = {
    "many numbers": ("holds more than 200000 values", "[" + "0," * MANY + "0]"),
    "many names": ("holds more than 200000 values", "{" + '"a":0,' * MANY + '"a":0}'),
    "lists within lists": ("holds more than 200000 values", "[" * MANY),
    "lists, closed": ("nested more than 64 deep", '{"a":' * 100 + "0" + "}" * 100),
    "a long number": ("no JSON", "1" * MANY),
    "infinity": ("Infinity is not a finite number", '{"a": Infinity}'),
    "infinity as a number": ("1e999 is not a finite number", '{"a": 1e999}'),
    "bytes": ("no JSON", "\udcff"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json_is_counted(tmp_path, kind):
    reason, content = TEXTS[kind]
    file = tmp_path / "x.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with bounded(), pytest.raises(UserError, match=rf"x\.json.*({reason}).*: write it anew|{reason}") as error:
        read_json(file, dict, "write it anew")
    assert len(str(error.value)) < 600


def test_a_long_list_of_tensors_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    header = json.dumps({f"{i:07d}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)})
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with bounded(megabytes=100), pytest.raises(UserError, match=r"x\.safetensors .*its header says to have \d+ bytes"):
        read_tensors(file)


def test_a_long_list_of_members_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for number in range(150):
            archive.writestr(zipfile.ZipInfo(f"{number:02d}" + "a" * 60_000), b"")
    for read in (Statistics.load, NpzArchive, read_checkpoint):
        with bounded(megabytes=100), pytest.raises(UserError, match=r"x\.npz"):
            read(tmp_path / "x.npz")


HEADERS = ["(" * 5000, "[" * 300 + "]" * 300, "'" * 1001, "-" * 9000 + "1", "9" * 9000, "{[]: 1}", "lambda: " * 999]
SHAPES = ["(True, 8, 8, 3)", "(-1, 8, 8, 3)", "(10**99, 8, 8, 3)", "(1, 8, 8, " + "9" * 99 + ")", "8"]


@pytest.mark.parametrize(
    "header", HEADERS + [f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}" for shape in SHAPES]
)
def test_headers_of_arrays_are_no_programs(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(1000)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in ("arr_0", "count", "total", "outer", "spatial_count"):
            archive.writestr(f"{name}.npy", content)
    for read in (NpzArchive, Statistics.load):
        with bounded(), pytest.raises(UserError, match=r"x\.npz") as error:
            read(tmp_path / "x.npz")
        assert len(str(error.value)) < 600


@settings(max_examples=100, deadline=None)
@given(damages)
def test_damage_of_a_packed_reference_is_an_error_or_stays_within_it(tmp_path_factory, damage):
    file = tmp_path_factory.mktemp("packed") / "x.npz"
    np.savez_compressed(file, arr_0=np.random.default_rng(0).integers(255, size=(9, 8, 8, 3), dtype=np.uint8))
    file.write_bytes(damaged(file.read_bytes(), damage))
    try:
        archive = NpzArchive(file)
        images = archive.read(range(archive.count))
    except UserError as error:
        assert str(file) in str(error)  # noqa: PT017 - whether it raises depends on the place
    else:
        assert len(images) == archive.count


def test_complex_weights_are_refused(tmp_path):
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x holds complex numbers"):
        read_tensors(tmp_path / "x.safetensors")
