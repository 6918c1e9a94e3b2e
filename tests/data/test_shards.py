import os
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.data.arrays import write_shards
from dcdit.data.builtin import Digits, Mnist, Synthetic
from dcdit.data.latents import LatentSpec
from dcdit.data.manifest import Manifest
from dcdit.data.shards import CorruptSampleError, Layout, Sample, write_shard
from dcdit.data.statistics import Tally
from dcdit.data.storage import Location
from dcdit.errors import UserError


def write(directory, count=10, per_shard=4):
    latents = np.arange(count * 12, dtype=np.float16).reshape(count, 3, 2, 2)
    labels = np.arange(count) % 3
    manifest = write_shards(
        directory,
        latents,
        labels,
        classes=("a", "b", "c"),
        autoencoder="identity",
        scale=0.5,
        shift=1.0,
        samples_per_shard=per_shard,
    )
    return manifest, latents, labels


def read_all(directory, manifest, hflip=False):
    layout = Layout.of(manifest)
    labels, arrays = [], []
    for shard in manifest.shards:
        descriptor = os.open(directory / shard.name, os.O_RDONLY)
        for index in range(shard.samples):
            row = np.empty(layout.array_bytes, np.uint8)
            labels.append(layout.read(descriptor, index, hflip, row))
            arrays.append(row.view(layout.dtype).reshape(layout.stored_shape))
        os.close(descriptor)
    return labels, np.stack(arrays)


def test_round_trip(tmp_path):
    manifest, latents, labels = write(tmp_path)
    assert Location(str(tmp_path)).manifest() == manifest
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    found, arrays = read_all(tmp_path, manifest)
    assert np.array_equal(arrays, latents)
    assert found == labels.tolist()
    assert arrays.dtype == np.float16


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    dtype=st.sampled_from(["float16", "float32"]),
    hflip=st.booleans(),
    count=st.integers(1, 5),
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=700),
)
@settings(max_examples=50, deadline=None)
def test_every_sample_lies_where_the_layout_says(tmp_path_factory, shape, dtype, hflip, count, source):
    """Whatever the shape, and however long or strange the name of the image."""
    directory, layout = tmp_path_factory.mktemp("layout"), Layout(shape, dtype, hflip)
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((count, 2, *shape)).astype(dtype)
    samples = [
        Sample(f"{n:06d}-{n:06d}", n, arrays[n, 0], arrays[n, 1] if hflip else None, source) for n in range(count)
    ]
    assert write_shard(directory / "s.tar", samples, layout, Tally(shape, "sample")).samples == count
    descriptor = os.open(directory / "s.tar", os.O_RDONLY)
    for n in range(count):
        for view in range(1 + hflip):
            row = np.empty(layout.array_bytes, np.uint8)
            assert layout.read(descriptor, n, bool(view), row) == n
            assert np.array_equal(row.view(dtype).reshape(shape), arrays[n, view])
    with pytest.raises(CorruptSampleError):
        layout.read(descriptor, count, False, row)
    os.close(descriptor)


def test_any_webdataset_reader_takes_the_shards(tmp_path):
    manifest, latents, labels = write(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert np.array_equal(np.stack([sample["latent.npy"] for sample in samples]), latents)
    assert [sample["json"]["label"] for sample in samples] == labels.tolist()


def test_equal_samples_give_equal_bytes(tmp_path):
    first, _, _ = write(tmp_path / "one")
    second, _, _ = write(tmp_path / "two")
    assert first == second  # checksums included


def test_an_interrupted_shard_leaves_nothing_under_its_name(tmp_path):
    def samples():
        yield Sample("0", 0, np.zeros((1, 2, 2), np.float16))
        raise KeyboardInterrupt

    layout = Layout((1, 2, 2), "float16", False)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard.tar", samples(), layout, Tally((1, 2, 2), "sample"))
    assert write_shard(tmp_path / "shard.tar", [], layout, Tally((1, 2, 2), "sample")) is None
    assert not list(tmp_path.iterdir())


def test_missing_and_cut_shards_are_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"shard-000001.tar has \d+ bytes, the manifest says \d+"):
        Location(str(tmp_path)).manifest()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar is missing"):
        Location(str(tmp_path)).manifest()
    with pytest.raises(UserError, match=r"no shards have been written"):
        Location(str(tmp_path / "else" / "where")).manifest()


def test_latents_of_another_kind_are_told_apart(tmp_path):
    here = write(tmp_path)[0].spec
    assert here.difference(here) is None
    for change, words in (
        ({"shape": (4, 2, 2)}, "shape is (3, 2, 2) there and (4, 2, 2) here"),
        ({"scale": 0.13}, "scale is 0.5 there and 0.13 here"),
        ({"autoencoder": "vae"}, "autoencoder is identity there and vae here"),
        ({"classes": ("a", "b")}, "3 classes there and 2 here"),
        ({"classes": ("a", "c", "b")}, "class 1 is 'b' there and 'c' here"),
    ):
        assert words in here.difference(replace(here, **change))
    moved = replace(here, autoencoder="/elsewhere", fingerprint="f" * 16)
    assert replace(here, fingerprint="f" * 16).difference(moved) is None
    words = moved.difference(replace(moved, fingerprint="a" * 16))
    assert f"fingerprint is {'f' * 16} there and {'a' * 16} here" in words


def test_a_spec_survives_a_checkpoint_and_refuses_nonsense(tmp_path):
    here = write(tmp_path)[0].spec
    assert LatentSpec.from_plain(here.to_plain(), "latents") == here
    for change, words in (
        ({"shape": [3, 2]}, "latents.shape=\\[3, 2\\] has 2 elements, 3 are needed"),
        ({"shape": [3, 0, 2]}, "latents.shape=0 is outside"),
        ({"scale": float("nan")}, "latents.scale=nan is not a finite number"),
        ({"classes": []}, "latents.classes=\\[\\] asks for nothing"),
        ({"clases": []}, "did you mean classes"),
    ):
        with pytest.raises(UserError, match=words):
            LatentSpec.from_plain(here.to_plain() | change, "latents")


def test_sources_write_what_they_promise(tmp_path):
    Digits(grid=12, validation=97).write(tmp_path / "digits")
    train, val = (Manifest.read(tmp_path / "digits" / split / "manifest.json") for split in ("train", "val"))
    assert (train.samples, val.samples) == (1700, 97)
    assert train.latent_shape == (1, 12, 12)
    assert len(train.classes) == 10
    Mnist(validation=200).write(tmp_path / "mnist")
    train, val = (Manifest.read(tmp_path / "mnist" / split / "manifest.json") for split in ("train", "val"))
    assert (train.samples, val.samples, train.latent_shape) == (4800, 200, (1, 28, 28))
    assert -0.75 < train.statistics.mean[0] < -0.72
    assert 0.6 < train.statistics.deviation[0] < 0.63
    with pytest.raises(UserError, match=r"validation=5000, but there are only 5000 images"):
        Mnist(validation=5000).write(tmp_path / "none")
    Synthetic(channels=4, grid=8, num_classes=7, samples=10, samples_per_shard=4).write(tmp_path / "noise")
    assert Manifest.read(tmp_path / "noise" / "train" / "manifest.json").samples == 10


def test_the_folder_of_a_split_is_not_the_directory(tmp_path):
    write(tmp_path / "train")
    with pytest.raises(UserError, match=r"is the folder of a split, give the one above it"):
        Location(str(tmp_path / "train")).below("train").manifest()
