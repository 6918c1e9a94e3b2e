"""Class folders in an object store: the same shards as from the folder on the disk."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bucket import bucket_served
from support.commands import typed
from support.hub import hub_of

from dcdit.data import stores
from dcdit.data.manifest import Manifest

WORDS = ("autoencoder=identity", "image_size=16", "samples_per_shard=5", "batch_size=4", "device=cpu", "num_workers=0")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders, one class without images, and what else lies in a bucket."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(18):
        name = ("zebra", "Ant", "cat é", "cat é/deeper")[number % 4]
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / f"{number:03d} #?+.png")
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("none yet")
    (root / "zebra" / "broken.jpg").write_bytes(b"")
    (root / "zebra" / "old.heic").write_bytes(b"x")
    (root / "zebra" / ".DS_Store").write_bytes(b"x")
    (root / "beside.png").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def bucket(images):
    with bucket_served() as bucket:
        bucket.put(images, "images")
        yield bucket


def extract(capsys, folder: Path, source: object, out: str, *words: str):
    return typed(capsys, folder, "extract", f"source={source}", f"out={folder / out}", *WORDS, *words)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*/*") if path.suffix in (".tar", ".json")}


def test_a_store_gives_the_shards_that_the_folder_gives(bucket, images, tmp_path, capsys):
    assert extract(capsys, tmp_path, images, "local").status == 0
    remote = extract(capsys, tmp_path, "s3://bucket/images/", "store")
    assert remote.status == 0, remote.words
    assert content(tmp_path / "store") == content(tmp_path / "local")
    manifest = Manifest.read(tmp_path / "store" / "train" / "manifest.json")
    assert manifest.classes == ("Ant", "cat é", "empty", "zebra")
    assert manifest.samples == 18
    assert {image.file for image in manifest.skipped} == {"zebra/broken.jpg", "zebra/old.heic", "beside.png"}
    # what was begun on one machine goes on from the copy, with workers of its own
    (tmp_path / "local" / "train" / "shard-000001.tar").unlink()
    again = extract(capsys, tmp_path, "s3://bucket/images", "local", "num_workers=2")
    assert again.status == 0, again.words
    assert content(tmp_path / "store") == content(tmp_path / "local")
    bucket.client.put_object(Bucket="bucket", Key="images/Ant/new.png", Body=b"x")
    changed = extract(capsys, tmp_path, "s3://bucket/images", "store")
    bucket.client.delete_object(Bucket="bucket", Key="images/Ant/new.png")
    assert changed.status == 2
    assert "Ant" in changed.words


def test_a_repository_gives_them_too(images, tmp_path, capsys, monkeypatch):
    shutil.copytree(images, tmp_path / "repository" / "birds")
    with hub_of({"a/b": tmp_path / "repository"}, tmp_path / "cache"):
        stores._filesystem.cache_clear()
        done = extract(capsys, tmp_path, "hf://datasets/a/b/birds", "hub")
    stores._filesystem.cache_clear()
    assert done.status == 0, done.words
    extract(capsys, tmp_path, images, "local")
    assert content(tmp_path / "hub") == content(tmp_path / "local")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/none", "source=s3://bucket/none holds no files"),
        ("s3://other/none", "source=s3://other/none cannot be listed: there is no such file, or it is private"),
        ("s3://bucket/images/zebra", "has no subfolders"),
        ("s3://key:hunter2@bucket/images", "holds a password"),
        ("s3://bucket/a.tar", "tar files must lie on a local disk"),
        ("https://host/images", "images are read from a folder, or from class folders behind s3://"),
        ("zip::s3://bucket/images", "images are read from a folder, or from class folders behind s3://"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_encoded(bucket, tmp_path, capsys, source, message):
    refused = extract(capsys, tmp_path, f"'{source}'", "out")
    assert refused.status == 2
    assert message in refused.words
    assert "hunter2" not in refused.words
    assert not list(tmp_path.rglob("*.tar"))
