"""Parquet files, repositories of the hub and data sets of torchvision: what is not as it should be is told."""

import hashlib
import json
import pickle
import struct
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import call, compose_config
from support.hub import COMMIT, hub_of, offline
from support.sources import COLUMNS, SMALL, WORDNET, as_food101, as_parquet, as_stream, pictures, write_parquet

from dcdit import extract
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.extraction.classes import WantedClasses
from dcdit.extraction.decode import decode_image
from dcdit.extraction.parquet import _PIECES, shuffled_pieces
from dcdit.extraction.readers import Torchvision
from dcdit.extraction.sources import Request
from dcdit.extraction.torchvision_data import open_torchvision

FILE = "data/train-00001-of-00002.parquet"


def run(*words: str) -> None:
    call(extract, compose_config(*SMALL, *words, name="extract"))


def refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(*words, f"out={tmp_path}/refused")
    assert not (tmp_path / "refused" / "train" / "manifest.json").exists()


@given(st.lists(st.integers(0, 700), min_size=1, max_size=8), st.integers(1, 500), st.integers(0, 9))
def test_shards_consist_of_many_pieces_of_rows(rows, per_task, seed):
    if not sum(rows):
        return
    order = shuffled_pieces(rows, per_task, seed)
    assert sorted(order.tolist()) == list(range(sum(rows)))
    longest = max(1, per_task // _PIECES)
    pieces = [(group, row // longest) for group, count in enumerate(rows) for row in range(count)]
    taken = [pieces[number] for number in order.tolist()]
    met = [piece for piece, _ in groupby(taken)]
    assert len(met) == len(set(met))  # no piece is torn apart
    for start in range(0, len(order) - per_task + 1, per_task):
        assert len(set(taken[start : start + per_task])) >= min(per_task, _PIECES)
    assert (shuffled_pieces(rows, per_task, seed) == order).all()


def test_shards_mix_the_classes_of_a_sorted_file():
    for shard in shuffled_pieces([3000, 7000], 1000, 0).reshape(10, 1000):
        assert (np.bincount(shard // 1000, minlength=10) > 20).all()


def test_mistakes_in_parquet_files_are_told_before_work(tmp_path):
    words, plain = as_parquet(tmp_path / "all"), f"source={tmp_path}/all"
    (tmp_path / "names.txt").write_text("\n".join(WORDNET[:2]))
    write_parquet(tmp_path / "none" / "a.parquet", [])
    write_parquet(tmp_path / "labels" / "a.parquet", [("a", None, b"x")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"PAR1 is not enough PAR1")
    write_parquet(tmp_path / "others" / "a.parquet", pictures(), WORDNET)
    write_parquet(tmp_path / "others" / "b.parquet", pictures(), WORDNET[::-1])
    for asked, message in (
        ([plain, *COLUMNS], r"files of several splits \(test, train\): choose one, such as \"reader.files='\*t"),
        ([plain, *COLUMNS, "reader.files='val*'"], r"has no files reader.files=val\*; there are 'data/t"),
        (
            [plain, *COLUMNS, "reader.files='data/train-00000*'"],
            r"only 1 of the 2 files data/train-\*-of-00002",
        ),
        ([*words[:2], *words[3:]], r"reader.image_column=image is none of its columns: note, img, fine_label"),
        ([*words[:3], *words[4:]], r"reader.label_column=label is none of its columns"),
        ([*words, "classes=3"], r"classes=3: .* names its classes, leave their number out"),
        ([*words, f"classes={tmp_path}/names.txt"], r"names.txt has no class 'n00000020': add it there"),
        ([*words, "reader.stream=true"], r"reader.stream=true is for repositories"),
        ([f"source={tmp_path}/nowhere", *COLUMNS], r"nowhere is no folder, no file, and no hf://datasets"),
        ([f"source={tmp_path}/none", *COLUMNS], r"its parquet files have no rows"),
        ([f"source={tmp_path}/labels", *COLUMNS], r"row 0 has null, which is neither a number nor a name of a class"),
        ([f"source={tmp_path}/broken", *COLUMNS], r"a.parquet cannot be read: "),
        ([f"source={tmp_path}/others", *COLUMNS], r"b.parquet has other classes than a.parquet"),
        (["source=hf://datasets/one", *COLUMNS], r"source=hf://datasets/one is no address"),
        (["source=hf://datasets/a/b/../c", *COLUMNS], r"is no address"),
    ):
        refused(asked, message, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        refused(words, r"reader=parquet needs pyarrow: pip install 'dcdit\[parquet\]'", tmp_path)


def test_what_is_no_image_in_a_table_is_listed(tmp_path):
    rows = [*pictures(5), ("none", WORDNET[0], None), ("broken", WORDNET[1], b"no image")]
    write_parquet(tmp_path / "a.parquet", rows, WORDNET)
    run(f"source={tmp_path}/a.parquet", *COLUMNS, f"out={tmp_path}/out")
    manifest = Manifest.read(tmp_path / "out" / "train" / "manifest.json")
    assert manifest.samples == 5
    assert {image.file: image.reason[:20] for image in manifest.skipped} == {
        "a.parquet/5": "its column img holds",
        "a.parquet/6": "not an image (JPEG, ",
    }


def test_changed_files_are_told_and_a_file_that_vanishes_stops(tmp_path, monkeypatch):
    words = [*as_parquet(tmp_path / "source"), f"out={tmp_path}/out"]
    file = tmp_path / "source" / FILE
    monkeypatch.setattr(extract, "processes", lambda: (0, 2))
    run(*words)
    monkeypatch.undo()
    content = file.read_bytes()
    write_parquet(file, pictures()[12:], WORDNET[::-1])
    with pytest.raises(UserError, match=f"source: '{FILE}' has changed since this extraction"):
        run(*words)
    file.write_bytes(content)
    monkeypatch.setattr("dcdit.extraction.parquet.ParquetSource.size", lambda *_: file.unlink(missing_ok=True))
    with pytest.raises(UserError, match=r"train-0000.*/\d+: .*cannot be read: .*the same command goes on"):
        run(*words)


def test_a_stream_fetches_what_it_reads_and_a_repository_is_read_from_the_cache(tmp_path):
    words = as_stream(tmp_path / "source")
    with hub_of({"a/b": tmp_path / "source"}, tmp_path / "cache") as hub:
        run(*words, f"out={tmp_path}/stream")
        assert not list((tmp_path / "cache").rglob("*.parquet"))
        run(*words[:-1], f"out={tmp_path}/whole")
        assert not any("test-" in path for path in hub.asked)
        with offline():
            run(*words[:-1], f"out={tmp_path}/again")
            refused(words, r"the hub does not give it at reader.revision=main: ", tmp_path)
        refused([*words, "reader.revision=v9"], r"the hub does not give it at reader.revision=v9: ", tmp_path)
        refused(
            ["source=hf://datasets/c/d", *words[1:]], r"source=hf://datasets/c/d: the hub does not give it", tmp_path
        )
        hub.listing = json.dumps({"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": "../a.parquet"}]}).encode()
        refused(words[:-1], r"rfilename='../a.parquet', which leaves its folder", tmp_path)
    shards = {name: sorted((tmp_path / name / "train").glob("*")) for name in ("stream", "whole", "again")}
    first, *others = [[path.read_bytes() for path in paths] for paths in shards.values()]
    assert all(other == first for other in others)
    manifest = Manifest.read(tmp_path / "stream" / "train" / "manifest.json")
    assert manifest.extraction["source"]["commit"] == COMMIT


def cifar10(root: Path, monkeypatch) -> tuple[np.ndarray, list[int]]:
    """A few images in the files of CIFAR-10, whose checksums torchvision compares."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(256, size=(6, 32, 32, 3), dtype=np.uint8), [3, 1, 4, 1, 5, 9]
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"class {number}" for number in range(10)]
    files = {
        "test_batch": {"data": pixels.transpose(0, 3, 1, 2).reshape(6, -1), "labels": labels},
        "batches.meta": {"label_names": names},
    }
    sums = {}
    for name, values in files.items():
        content = pickle.dumps(values)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return pixels, labels


def fashion(root: Path, monkeypatch) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(256, size=(6, 28, 28), dtype=np.uint8), [3, 1, 4, 1, 5, 9]
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 6, 28, 28) + pixels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 6) + bytes(labels))
    for part in ("images-idx3", "labels-idx1"):
        (folder / f"train-{part}-ubyte").write_bytes(b"")
    return np.repeat(pixels[..., None], 3, -1), labels


@pytest.mark.parametrize(("name", "make"), [("CIFAR10", cifar10), ("FashionMNIST", fashion)])
def test_data_sets_of_torchvision_keep_pixels_labels_and_names(tmp_path, monkeypatch, name, make):
    pixels, labels = make(tmp_path, monkeypatch)
    source = open_torchvision(Torchvision(name, "test"), Request(str(tmp_path), 4, 0, None, None))
    items = [item for task in range(source.tasks) for item in source.items(task).items]
    assert source.tasks == 2
    assert sorted(item.number for item in items) == list(range(6))
    for item in items:
        assert item.label == labels[item.number]
        assert (decode_image(source.read(item), pixels.shape[1]) == pixels[item.number]).all()
    assert (len(source.classes), source.class_order) == (10, "of the data set")
    wanted = WantedClasses.of_train(tuple(sorted(source.classes, reverse=True)))
    other = open_torchvision(Torchvision(name, "test"), Request(str(tmp_path), 4, 0, None, wanted))
    for item in other.items(0).items:
        assert other.classes[item.label] == source.classes[labels[item.number]]


def test_mistakes_with_torchvision_are_told_before_work(tmp_path):
    words = as_food101(tmp_path / "source")
    for asked, message in (
        (words[:-1], r"reader.part is not set: Food101 is divided"),
        ([*words[:-1], "reader.part=val"], r"reader.part=val: Unknown value 'val' for argument split"),
        (
            [*words[:2], "reader.dataset=CIFAR10", "reader.part=val"],
            r"reader.part='val': CIFAR10 is divided",
        ),
        (
            [*words[:2], "reader.dataset=CIFAR10", "reader.part=test"],
            r"does not find it there .*dcdit downloads no",
        ),
        ([*words[:2], "reader.dataset=EuroSAT", "reader.part=test"], r"reader.part='test': EuroSAT is not divided"),
        ([*words[:2], "reader.dataset=FakeData"], r"reader.dataset='FakeData' is not one of CIFAR10"),
        ([*words, "classes=3"], r"classes=3: reader=torchvision names its classes"),
    ):
        refused(asked, message, tmp_path)
