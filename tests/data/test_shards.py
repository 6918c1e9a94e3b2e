import json

import numpy as np
import pytest

from dcdit.data.manifest import Manifest
from dcdit.data.shards import Sample, decode, read_raw, write_shard, write_shards
from dcdit.data.sources import Digits, Synthetic
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


def test_round_trip(tmp_path):
    manifest, latents, labels = write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    samples = [decode(raw) for raw in read_raw(tmp_path / shard.name for shard in manifest.shards)]
    assert np.array_equal(np.stack([s.latent for s in samples]), latents)
    assert [s.label for s in samples] == labels.tolist()
    assert samples[0].latent.dtype == np.float16


def test_equal_samples_give_equal_bytes(tmp_path):
    first, _, _ = write(tmp_path / "one")
    second, _, _ = write(tmp_path / "two")
    assert first == second  # checksums included


def test_an_interrupted_shard_leaves_nothing_under_its_name(tmp_path):
    def samples():
        yield Sample("0", np.zeros((1, 2, 2), np.float16), 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard.tar", samples())
    assert not (tmp_path / "shard.tar").exists()


def test_missing_and_cut_shards_are_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"shard-000001.tar has \d+ bytes, the manifest says \d+"):
        Manifest.read(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar is missing"):
        Manifest.read(tmp_path)
    with pytest.raises(UserError, match=r"no shards have been written"):
        Manifest.read(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99"),
        ({"latent_shape": [4]}, "latent_shape"),
        ({"surprise": 1}, "surprise"),
        ({"representation": "moments"}, "reads .sample."),
        ({"shards": []}, "no shards"),
        ({"shards": [{"name": "../x.tar", "samples": 1, "bytes": 1, "sha256": ""}]}, "out of the directory"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path, change, message):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Manifest.read(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="no valid manifest"):
        Manifest.read(tmp_path)


def test_pickles_are_never_decoded():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged sample"):
        decode({"__key__": "k", "latent.npy": buffer.getvalue(), "cls": b"1"})


def test_sources_write_what_they_promise(tmp_path):
    Digits(grid=12, validation=97).write(tmp_path / "digits")
    train, val = (Manifest.read(tmp_path / "digits" / split) for split in ("train", "val"))
    assert (train.samples, val.samples) == (1700, 97)
    assert train.latent_shape == (1, 12, 12)
    assert len(train.classes) == 10
    Synthetic(channels=4, grid=8, num_classes=7, samples=10, samples_per_shard=4).write(tmp_path / "noise")
    assert Manifest.read(tmp_path / "noise" / "train").samples == 10
