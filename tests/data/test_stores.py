"""Shards in an object store, and on the Hugging Face hub: the same samples, the same promises as from any server."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bucket import Bucket, bucket_served
from support.commands import typed
from support.configs import TINY
from support.hub import hub_of
from support.numbered import damage, flat, loader, numbers, stream, write_numbers

from dcdit.data import storage, stores
from dcdit.data.order import Readers
from dcdit.data.storage import Location
from dcdit.data.stores import STORES
from dcdit.errors import UserError
from dcdit.runtime.imports import EXTRAS

IN_ANOTHER_PROCESS = get_context("fork")


@pytest.fixture(scope="module")
def bucket():
    with bucket_served() as bucket:
        yield bucket


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.01,))
    monkeypatch.setattr(stores, "PIECE", 10_000)  # so that some shards come in several


def shards(bucket: Bucket, folder: Path, sizes: list[int]) -> tuple[Location, Location]:
    """The same shards in a folder and in the bucket, with a cache of its own."""
    (folder / "train").mkdir(parents=True)
    local = write_numbers(folder / "train", sizes)
    bucket.put(folder / "train", f"{folder.name}/train")
    return local, Location(f"s3://bucket/{folder.name}", str(folder / "cache")).below("train")


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stream_from_a_store_equals_the_local_one_from_anywhere(bucket, tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    readers = Readers(2, data.draw(st.integers(1, max(1, sum(sizes) // 2))), data.draw(st.integers(0, 8)))
    if not readers.batches(sum(sizes)):
        return
    local, remote = shards(bucket, tmp_path_factory.mktemp("shards"), sizes)
    assert remote.manifest() == local.manifest()
    for rank in range(2):
        expected = numbers(stream(local, readers, rank, epochs=2))
        assert numbers(stream(remote, readers, rank, epochs=2)) == expected
        start = data.draw(st.integers(0, len(expected) // 2))  # within the first epoch
        assert numbers(stream(remote, readers, rank, start=start, epochs=2)) == expected[start:]


def test_workers_and_processes_share_one_cache(bucket, tmp_path):
    local, remote = shards(bucket, tmp_path / "shared", [7, 13, 1, 9, 20])
    readers = Readers(2, 3, 10)
    expected = [numbers(stream(local, readers, rank, epochs=1)) for rank in range(2)]
    bucket.asked.clear()
    with IN_ANOTHER_PROCESS.Pool(2) as pool:
        assert pool.starmap(_read, [(remote, readers, rank) for rank in range(2)]) == expected
    assert numbers(loader(stream(remote, readers, epochs=1), workers=2)) == expected[0]
    begun = [path for method, path in bucket.asked if method == "HEAD" and path.endswith(".tar")]
    assert sorted(begun) == sorted(set(begun))  # each shard was opened once, by whoever came first
    assert len(begun) == 5


def _read(remote: Location, readers: Readers, rank: int) -> list[list[int]]:
    return numbers(stream(remote, readers, rank, epochs=1))


def test_a_process_that_is_killed_leaves_no_half_shard(bucket, tmp_path):
    local, remote = shards(bucket, tmp_path / "killed", [8])
    shard = remote.manifest().shards[0]
    process = IN_ANOTHER_PROCESS.Process(target=_fetch_slowly, args=(remote, shard))
    process.start()
    waited = time.monotonic() + 60
    while not list(remote.directory.glob("*.part")) and time.monotonic() < waited:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(remote.directory.glob("*.tar"))
    assert list(remote.directory.glob("*.part"))
    with IN_ANOTHER_PROCESS.Pool(1) as pool:
        path = pool.apply(_fetch_after_a_sweep, (remote, shard))
    assert path.read_bytes() == (local.directory / shard.name).read_bytes()
    assert not list(remote.directory.glob("*.part"))


def _fetch_slowly(remote: Location, shard) -> None:
    read = storage.download
    storage.download = lambda url, write, most: read(url, lambda chunk: (write(chunk), time.sleep(100)), most)
    remote.fetch(shard)


def _fetch_after_a_sweep(remote: Location, shard) -> Path:
    from dcdit.runtime import files

    files._swept.clear()  # as in a process that is new
    return remote.fetch(shard)


def test_what_changed_under_its_name_is_damage_and_told(bucket, tmp_path):
    local, remote = shards(bucket, tmp_path / "changed", [8, 8])
    remote.manifest()
    damage(local.directory / "shard-000.tar", 512, b"{{{{")  # one sample, in a file of the right size
    (local.directory / "shard-001.tar").write_bytes(b"something else")
    bucket.put(local.directory, "changed/train")
    batches = list(stream(remote, Readers(1, 4, 100), epochs=1))
    assert sorted(flat(numbers(batches))) == list(range(1, 8))
    reasons = {complaint.shard: complaint.reason for complaint in flat(batch.corrupt for batch in batches)}
    assert "came with 14 bytes, the manifest says" in reasons["shard-001.tar"]
    assert "shard-000.tar" in reasons
    (local.directory / "shard-001.tar").write_bytes(bytes(10**6))
    bucket.put(local.directory, "changed/train")
    shard = remote.manifest().shards[1]
    bucket.asked.clear()
    with pytest.raises(OSError, match=rf"is larger than the {shard.bytes} bytes expected"):
        remote.fetch(shard)
    assert not [path for method, path in bucket.asked if method == "GET"]  # the store said how large it is


def test_one_limit_holds_for_the_shards_of_all_urls(bucket, tmp_path):
    cache = tmp_path / "cache"
    places = [shards(bucket, tmp_path / name, [6] * 4)[1] for name in ("one", "two")]
    size = places[0].manifest().shards[0].bytes
    own = cache / "mine" / "photographs.tar"
    own.parent.mkdir(parents=True)
    own.write_bytes(bytes(100 * size))
    for place in places:
        limited = Location(place.root, str(cache), cache_gb=3.5 * size / 1e9)
        assert sorted(flat(numbers(stream(limited, Readers(1, 3, 6), epochs=1)))) == list(range(24))
    fetched = [path for path in cache.rglob("*.tar") if path != own]
    assert 3 <= len(fetched) <= 4  # one may have been under way when room was made
    assert own.stat().st_size == 100 * size


def test_what_a_store_refuses_ends_in_one_message(bucket, tmp_path, monkeypatch):
    _, remote = shards(bucket, tmp_path / "asked", [4])
    cache = str(tmp_path / "cache")
    for root, message in (
        ("s3://bucket/none", r"s3://bucket/none/manifest.json cannot be fetched: there is no such file, or it is priv"),
        ("s3://other/asked", r"s3://other/asked/manifest.json cannot be fetched: there is no such file, or it is priv"),
        ("s3:bucket/asked", r"directory='s3:bucket/asked' begins with none of http://, https://, s3://"),
        ("zip::s3://bucket/asked", r"begins with none of"),
        ("ssh://bucket/asked", r"begins with none of"),
        ("github://a:b@/asked", r"begins with none of|holds a password"),
        ("s3://key:hunter2@bucket/asked", r"s3://\.\.\.@bucket/asked holds a password"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            Location(root, cache).manifest()
        assert "hunter2" not in str(refused.value)
    assert Location("s3://bucket/asked", cache).below("val").manifest_if_any() is None
    monkeypatch.setattr("fsspec.config.conf", {"s3": {"anon": True}})
    stores._filesystem.cache_clear()
    with pytest.raises(UserError, match=r"access is denied: .*AWS_PROFILE"):
        remote.manifest()
    bucket.client.put_object_acl(Bucket="bucket", Key="asked/train/manifest.json", ACL="public-read")
    assert remote.manifest().samples == 4
    monkeypatch.setattr("fsspec.config.conf", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    stores._filesystem.cache_clear()
    with pytest.raises(UserError, match=r"Could not connect to the endpoint URL: .http://127"):
        remote.manifest()
    for protocol in ("s3", "gs"):
        module = STORES[protocol].module
        stores._filesystem.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
            with pytest.raises(
                UserError, match=rf"{protocol}:// needs {module}: pip install 'dcdit\[{EXTRAS[module][1]}\]'"
            ):
                Location(f"{protocol}://bucket/asked", cache).manifest()
    stores._filesystem.cache_clear()


def test_training_from_a_store_writes_no_credential_anywhere(bucket, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stores, "PIECE", 1 << 20)
    bucket.put(Path(digits), "digits")
    words = ("data.source=null", "data.directory=s3://bucket/digits", f"data.cache={tmp_path}/cache")
    done = typed(capsys, tmp_path, "train", *TINY, "run_name=store", "trainer.max_steps=2", *words)
    assert done.status == 0, done.words
    assert "secret-of-a-test" not in done.words
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secret-of-a-test" not in path.read_bytes(), path


def test_a_stream_from_a_hub_equals_the_local_one(tmp_path, monkeypatch):
    folder = tmp_path / "repository" / "latents" / "train"
    folder.mkdir(parents=True)
    local = write_numbers(folder, [7, 3])
    with hub_of({"a/b": tmp_path / "repository"}, tmp_path / "hub-cache") as hub:
        stores._filesystem.cache_clear()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        place = Location("hf://datasets/a/b/latents", str(tmp_path / "cache"))
        remote, readers = place.below("train"), Readers(1, 3, 4)
        assert numbers(stream(remote, readers, epochs=2)) == numbers(stream(local, readers, epochs=2))
        asked = [path for path in hub.asked if path.endswith(".tar")]
        assert len(asked) == 2  # one answer for each shard, though it is read in pieces
        with pytest.raises(UserError, match=r"there is no such file, or it is private: log in with hf auth login"):
            Location("hf://datasets/a/none", str(tmp_path / "cache")).manifest()
        assert place.below("val").manifest_if_any() is None
    stores._filesystem.cache_clear()
