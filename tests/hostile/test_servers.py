"""Servers that do not answer, send too much, or break off; and what a password in a URL leaves behind."""

import http.server
import socket
import threading
import time

import pytest
from support.commands import typed
from support.configs import TINY
from support.numbered import write_numbers

from dcdit.data import download as module
from dcdit.data import storage
from dcdit.data.storage import Location
from dcdit.errors import UserError
from dcdit.runtime import limits


@pytest.fixture
def served(monkeypatch):
    """A server of one answer: a function of the request's handler."""
    monkeypatch.setattr(storage, "_PAUSES", (0.01,))
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def serve(answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *ignored):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()


def head(handler, status: int, length: int | None = None) -> None:
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def test_a_server_that_fails(served, tmp_path):
    url = served(lambda handler: head(handler, 500, 0))
    with pytest.raises(UserError, match=r"manifest\.json cannot be fetched: the server answered 500"):
        Location(url, str(tmp_path)).manifest()


def test_a_server_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(UserError, match="no answer within"):
            Location(f"http://127.0.0.1:{silent.getsockname()[1]}", str(tmp_path)).manifest()
        assert time.monotonic() - begin < 10


def test_a_server_that_stops_in_the_middle(served, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.3)

    def half(handler) -> None:
        head(handler, 200, 1000)
        handler.wfile.write(b"{")
        time.sleep(2)

    with pytest.raises(UserError, match=r"no more bytes for|the connection broke"):
        Location(served(half), str(tmp_path)).manifest()
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_that_sends_more_than_was_said(served, tmp_path):
    (tmp_path / "shards").mkdir()
    write_numbers(tmp_path / "shards", [4])
    manifest = (tmp_path / "shards" / "manifest.json").read_bytes()
    sent = []

    def endless(handler) -> None:
        if handler.path.endswith("manifest.json"):
            head(handler, 200, len(manifest))
            handler.wfile.write(manifest)
            return
        head(handler, 200)
        for _ in range(2000):
            try:
                handler.wfile.write(bytes(1 << 20))
            except OSError:
                return
            sent.append(1)

    location = Location(served(endless), str(tmp_path / "cache"))
    shard = location.manifest().shards[0]
    with pytest.raises(OSError, match=rf"larger than the {shard.bytes} bytes expected"):
        location.fetch(shard)
    assert len(sent) < 200  # of 2000: as much as lay in the buffers
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "cache").rglob("*.tar"))


def loop(handler) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"{handler.path}x")
    handler.end_headers()


def drip(handler, content: bytes) -> None:
    """A byte at a time, without end."""
    while True:
        for byte in content:
            try:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.02)


def slow_body(handler) -> None:
    head(handler, 200, 10**6)
    drip(handler, b"x")


def with_header(name: str, value: str):
    def answer(handler) -> None:
        handler.send_response(200)
        handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"{}")

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (loop, "the server redirects more than 5 times"),
        (slow_body, r"too slow, \d+ bytes in"),
        (lambda handler: drip(handler, b"HTTP/1.1 200 OK "), "too slow, 0 bytes in"),
        (lambda handler: (head(handler, 302), drip(handler, b"x")), "the server answered 302|too slow"),
        (with_header("Content-Length", "-5"), "the server says that it has '-5' bytes"),
        (with_header("Content-Length", "9" * 30), "larger than the"),
        (with_header("Content-Encoding", "gzip"), "it comes encoded as 'gzip'"),
    ],
)
def test_a_server_has_no_more_time_than_the_file_needs(served, tmp_path, monkeypatch, answer, message):
    monkeypatch.setattr(limits, "GRACE", 0.5)
    monkeypatch.setattr(limits, "SLOWEST", 10**5)
    url, begin = served(answer), time.monotonic()
    with pytest.raises(UserError, match=f"manifest.json cannot be fetched: .*({message})"):
        Location(url, str(tmp_path)).manifest()
    assert time.monotonic() - begin < 5
    assert not list(tmp_path.rglob("*.part"))


def test_a_redirect_leads_to_the_file(served, tmp_path):
    (tmp_path / "shards").mkdir()
    manifest = write_numbers(tmp_path / "shards", [4]).manifest()

    def answer(handler) -> None:
        if handler.path.startswith("/there/"):
            head(handler, 200)
            handler.wfile.write((tmp_path / "shards" / "manifest.json").read_bytes())
            return
        handler.send_response(301)
        handler.send_header("Location", f"/there{handler.path}")
        handler.end_headers()

    assert Location(served(answer), str(tmp_path / "cache")).manifest() == manifest


@pytest.mark.parametrize(("status", "absent"), [(404, True), (403, True), (500, False), (503, False)])
def test_a_validation_split_is_missing_only_if_the_server_says_so(served, tmp_path, status, absent):
    place = Location(served(lambda handler: head(handler, status, 0)), str(tmp_path)).below("val")
    if absent:
        assert place.manifest_if_any() is None
    else:
        with pytest.raises(UserError, match=f"the server answered {status}"):
            place.manifest_if_any()


def test_shards_larger_than_the_cache_are_not_fetched(served, tmp_path):
    (tmp_path / "shards").mkdir()
    write_numbers(tmp_path / "shards", [4])
    location = Location(served(lambda handler: None), str(tmp_path / "cache"), cache_gb=1e-9)
    shard = Location(str(tmp_path / "shards")).manifest().shards[0]
    with pytest.raises(UserError, match=r"more than the whole cache: raise data\.cache_gb"):
        location.fetch(shard)


def test_a_password_is_refused_and_written_nowhere(tmp_path, capsys):
    directory = "data.directory=http://ann:hunter2@127.0.0.1:9/latents"
    one = typed(capsys, tmp_path, "train", *TINY, directory, "data.source=null", "run_name=one")
    many = typed(capsys, tmp_path, "train", "-m", *TINY, directory, "data.source=null", "seed=0,1", "run_name=many")
    assert (one.status, many.status) == (2, 2)
    for result in (one, many):
        assert "put it into ~/.netrc" in result.words
        assert "hunter2" not in result.words
    for path in tmp_path.rglob("*"):
        assert "hunter2" not in str(path)
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
