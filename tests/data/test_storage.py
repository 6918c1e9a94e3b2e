"""Shards behind URLs."""

import functools
import http.server
import json
import os
import threading

import pytest
from support.damage import sign
from support.numbered import damage, flat, loader, numbers, stream, write_numbers

from dcdit.data import storage as module
from dcdit.data.manifest import Manifest
from dcdit.data.order import Position, Readers
from dcdit.data.storage import Location
from dcdit.data.stream import LatentStream
from dcdit.errors import UserError


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A directory of shards, its URL on the loopback interface, and the requests made of it."""
    monkeypatch.setattr(module, "_PAUSES", (0.01,))
    monkeypatch.setenv("no_proxy", "*")
    folder, requests = tmp_path / "served" / "train", []
    folder.mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_over_http_equals_the_local_one(served, tmp_path, workers):
    folder, url, requests = served
    local, readers = write_numbers(folder, [7, 13, 1, 9, 20]), Readers(1, 3, 10)
    remote = Location(url, str(tmp_path / "cache")).below("train")
    assert remote.manifest() == local.manifest()
    expected = numbers(stream(local, readers, epochs=2))
    assert numbers(loader(stream(remote, readers, epochs=2), workers)) == expected
    assert len([path for path in requests if path.endswith(".tar")]) == 5  # once each, however many read


def test_the_cache_is_bounded_and_content_addressed(served, tmp_path):
    folder, url, _ = served
    local, readers = write_numbers(folder, [6] * 8), Readers(1, 3, 6)
    size = local.manifest().shards[0].bytes
    remote = Location(f"{url}/train", str(tmp_path / "cache"), cache_gb=4.5 * size / 1e9)
    assert sorted(flat(numbers(stream(remote, readers, epochs=1)))) == list(range(48))
    assert len(list(remote.directory.glob("*.tar"))) <= 5  # one may have been under way when room was made
    # other content under the old names must not come out of the cache
    write_numbers(folder, [6] * 7)
    assert sorted(flat(numbers(stream(remote, readers, epochs=1)))) == list(range(42))


def test_what_does_not_arrive_whole_is_damage(served, tmp_path):
    folder, url, requests = served
    write_numbers(folder, [8, 8])
    remote = Location(f"{url}/train", str(tmp_path / "cache"))
    manifest = remote.manifest()
    damage(folder / "shard-000.tar", 512, b"{{{{")  # one sample, in a file of the right size
    (folder / "shard-001.tar").write_bytes(b"something else")
    batches = list(LatentStream(remote, manifest, Readers(1, 4, 100), position=Position(), epochs=1))
    assert sorted(flat(numbers(batches))) == list(range(1, 8))
    complaints = flat(batch.corrupt for batch in batches)
    assert {complaint[:2] for complaint in complaints} == {
        ("shard-000.tar", 0),
        *(("shard-001.tar", i) for i in range(8)),
    }
    assert "came with 14 bytes, the manifest says" in next(c for c in complaints if c.shard == "shard-001.tar").reason
    asked = len([path for path in requests if path.endswith("shard-001.tar")])
    assert asked <= 4  # the thread that fetches ahead, and whoever needs it: two tries each, not one for every sample
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json cannot be fetched: the server has no such file"):
        remote.manifest()
    with pytest.raises(UserError, match=r"no server answers there"):
        Location("http://127.0.0.1:9/train", str(tmp_path / "cache")).manifest()


@pytest.mark.parametrize("folder", ["named", "default"])
@pytest.mark.parametrize("fault", ["another user's", "open to all", "a link of another user"])
def test_a_cache_that_others_can_write_to_is_refused(served, tmp_path, monkeypatch, folder, fault):
    folder_served, url, _ = served
    write_numbers(folder_served, [4])
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    remote = Location(f"{url}/train", str(tmp_path / "cache") if folder == "named" else None)
    remote.manifest()
    checked = remote.directory if folder == "named" else remote.directory.parent
    assert checked.stat().st_mode & 0o777 == 0o700
    if fault == "open to all":
        checked.chmod(0o777)
    elif fault == "another user's":
        os.chown(checked, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        checked.rename(tmp_path / "target")
        checked.symlink_to(tmp_path / "target")
        if os.getuid() == 0:
            os.chown(checked, 12345, -1, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
    if folder == "default" and os.getuid() == 12345:
        monkeypatch.setattr(module, "_default_cache", lambda: checked)
    for read in (remote.manifest, lambda: remote.fetch(Location(str(folder_served)).manifest().shards[0])):
        with pytest.raises(UserError, match=r"may be forged. Remove it, or name another folder with data\.cache="):
            read()


def test_what_is_cached_is_what_the_manifest_says(served, tmp_path, monkeypatch):
    """In another process: this one remembers what it has checked."""
    folder, url, requests = served
    local, remote = write_numbers(folder, [6]), Location(f"{url}/train", str(tmp_path / "cache"))
    shard = remote.manifest().shards[0]
    path = remote.fetch(shard)
    for cached in (path.read_bytes()[:-1] + b"x", path.read_bytes()):
        path.unlink()
        path.write_bytes(cached)
        module._verified.clear()
        assert remote.fetch(shard).read_bytes() == (folder / shard.name).read_bytes()
    assert len([each for each in requests if each.endswith(".tar")]) == 2
    damage(folder / shard.name, 512, b"{{{{")  # on the server, for good: kept for its other samples, and fetched once
    path.unlink()
    asked = len(requests)
    for _ in range(3):
        module._verified.clear()
        assert remote.fetch(shard).read_bytes() == (folder / shard.name).read_bytes()
    assert len(requests) == asked + 2
    assert local.directory == folder


def test_pipes_run_only_if_allowed(tmp_path):
    write_numbers(tmp_path, [4, 4])
    with pytest.raises(UserError, match=r"runs a shell command: set data.allow_pipe=true"):
        Location(f"pipe:cat {tmp_path}/{{}}")
    piped = Location(f"pipe:cat {tmp_path}/{{}}", str(tmp_path / "cache"), allow_pipe=True)
    assert sorted(flat(numbers(stream(piped, Readers(1, 2, 4), epochs=1)))) == list(range(8))
    assert Location("pipe:cat /x/{}", allow_pipe=True).below("train").root == "pipe:cat /x/train/{}"


def test_unknown_schemes_and_hostile_names(tmp_path):
    with pytest.raises(UserError, match=r"carrier://pigeon"):
        Location("carrier://pigeon/shards", str(tmp_path)).manifest()
    write_numbers(tmp_path, [4])
    path = tmp_path / "manifest.json"
    for name in ("../x.tar", "$(touch x).tar", "a;b.tar", "-f", "a b.tar"):
        sign(path, shards=[{**json.loads(path.read_text())["shards"][0], "name": name}])
        with pytest.raises(UserError, match="is not a name of letters"):
            Manifest.read(path)


def test_file_urls_are_local(tmp_path):
    write_numbers(tmp_path, [4])
    assert not Location(f"file:{tmp_path}").remote
    assert Location(f"file:{tmp_path}").manifest().samples == 4
