"""Raw requests to the explorer: its own page's are answered, and nothing else, whoever asks."""

import json
import socket
from urllib.parse import urlsplit

import pytest
from support.configs import check, compose_config

from dcdit import explore
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.errors import UserError

pytest.importorskip("gradio", reason="the extra `explore` is not installed")

import httpx

from dcdit.explorer.gate import LARGEST_BODY, Gate
from dcdit.explorer.page import Page
from dcdit.explorer.serving import serving
from dcdit.explorer.session import Session

JOIN, RUN = "/gradio_api/queue/join", "/gradio_api/run/predict"


@pytest.fixture(scope="module")
def blocks():
    config = check(explore, compose_config("sampler.steps=4", name="explore"))
    session = Session(config, [resolve_checkpoint("digits", config.paths.runs)], config.most_steps)
    return Page(session, "dcdit: digits").blocks()


@pytest.fixture(scope="module")
def address(blocks):
    with serving(blocks, "127.0.0.1", None, share=False) as found:
        yield found


@pytest.fixture
def ask(address, capfd):
    """Asks, and sees to it that nothing is told in the log."""
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        yield client.request
    heard = capfd.readouterr()
    assert "Traceback" not in heard.out + heard.err


def number_of(blocks, name):
    return next(number for number, function in blocks.fns.items() if function.fn.__name__ == name)


def request_of(blocks, name, *data, session="abc"):
    return {"fn_index": number_of(blocks, name), "data": list(data), "session_hash": session}


def values(blocks, name, **changed):
    """The values that the page begins with, as a browser sends them; changed by label."""
    inputs = blocks.fns[number_of(blocks, name)].inputs
    return [None if each.stateful else changed.get(each.elem_id, each.value) for each in inputs]


def answers(ask, body):
    """What the queue says to a request, until it is done."""
    assert ask("POST", JOIN, json=body).status_code == 200
    text = ask("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}).text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def test_the_page_samples(ask, blocks):
    assert "digits" in ask("GET", "/").text
    *_, done, _ = answers(ask, request_of(blocks, "update", *values(blocks, "update")))
    assert done["msg"] == "process_completed"
    assert done["success"]
    assert "Done." in done["output"]["data"][-1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/gradio_api/{path}") for path in ("upload", "run/update", "api/predict", "call/update", "cancel")),
        *(("POST", f"/gradio_api/{path}") for path in ("call/v2/update", "component_server", "process_recording")),
        *(("POST", f"/gradio_api/{path}") for path in ("stream/1", "reset", "vibe-edit", "queue/join/")),
        *(("GET", f"/gradio_api/{path}") for path in ("info", "openapi.json", "file=/etc/passwd", "call/update/1")),
        *(("GET", f"/gradio_api/{path}") for path in ("proxy=http://127.0.0.1", "stream/a/b/1/playlist.m3u8")),
        *(("GET", f"/gradio_api/{path}") for path in ("upload_progress", "queue/join", "deep_link", "runs", "app_id")),
        *(("GET", path) for path in ("/config", "/docs", "/monitoring", "/login", "/static/../../x", "/manifest.json")),
        *((method, "/") for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")),
    ],
)
def test_nothing_else_is_answered(ask, method, path):
    answer = ask(method, path, files={"files": ("a.txt", b"a")} if method == "POST" else None)
    assert answer.status_code == 404
    assert "access-control-allow-origin" not in answer.headers


def test_the_queue_cannot_be_left_out(ask, blocks):
    for name in ("update", "strip", "animate", "moments"):
        assert ask("POST", RUN, json=request_of(blocks, name, *values(blocks, name))).status_code == 400
    assert ask("POST", RUN, json=request_of(blocks, "stop")).status_code == 200  # which has to come at once


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "127.0.0.1@evil.example", "", "192.0.2.1", "::1"],
)
def test_other_names_are_refused(ask, host):
    for method, path in (("GET", "/"), ("POST", JOIN), ("OPTIONS", JOIN)):
        answer = ask(method, path, headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code == 421
        assert "access-control-allow-origin" not in answer.headers


def test_other_websites_are_refused(ask, address, blocks):
    body = request_of(blocks, "update", *values(blocks, "update"))
    for origin in ("https://evil.example", "null", "http://localhost:1", f"{address}.evil.example"):
        assert ask("POST", JOIN, json=body, headers={"Origin": origin}).status_code == 403
        assert ask("GET", "/", headers={"Origin": origin}).status_code == 403
    assert ask("GET", "/", headers={"Origin": address}).status_code == 200


@pytest.mark.parametrize(
    ("host", "answered", "refused"),
    [
        ("127.0.0.1", ["localhost", "LOCALHOST:1", "[::1]:7860"], ["10.0.0.1", "[::2]", "other"]),
        ("0.0.0.0", ["localhost", "10.0.0.1:7860", "[2001:db8::1]", socket.gethostname()], ["evil.example", "a b"]),
        ("gpu7.lab", ["gpu7.lab", "GPU7.lab:7860", "127.0.0.1"], ["gpu7.lab.evil.example", "10.0.0.1"]),
    ],
)
def test_which_names_are_known(host, answered, refused):
    known = Gate(lambda *_: None, host, {})._is_known
    assert all(map(known, answered))
    assert not any(map(known, refused))


def test_large_bodies_are_refused_before_they_have_come(address):
    """By the length that they claim, and where they claim none by what has come."""
    place = urlsplit(address)

    def answer(head, parts):
        with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
            connection.sendall(f"POST {JOIN} HTTP/1.1\r\nHost: {place.netloc}\r\n{head}\r\n\r\n".encode())
            sent = 0
            try:
                for part in parts:
                    connection.sendall(part)
                    sent += len(part)
                return sent, connection.recv(100)
            except ConnectionError:
                return sent, b"HTTP/1.1 413"

    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for head, parts in (
        ("Content-Length: 200000000", []),
        (f"Content-Length: {10**30}", []),
        ("Transfer-Encoding: chunked", [chunk] * 3000),
        (f"Content-Length: {LARGEST_BODY + 1}", [b"x"]),
    ):
        sent, told = answer(head, parts)
        assert told.startswith(b"HTTP/1.1 413") or (b"400" in told and not parts)
        assert sent < 20_000_000  # what the system keeps under way


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 10_000,
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"fn_index": 10000, "data": [], "session_hash": "a"}',
        b'{"fn_index": [], "data": [], "session_hash": "a"}',
        b'{"fn_index": 0, "data": {}, "session_hash": "a"}',
        b'{"fn_index": 0, "data": "ab", "session_hash": "a"}',
        b'{"fn_index": 0, "data": [], "session_hash": null}',
        b'{"fn_index": 0, "data": [{"path": "/x", "meta": {"_type": "gradio.FileData"}}], "session_hash": "a"}',
        b'{"fn_index": 0, "data": [NaN], "session_hash": "a"}',
        b'{"fn_index": 0, "data": [1' + b"0" * 5000 + b'], "session_hash": "a"}',
    ],
)
def test_bodies_that_no_page_sends(ask, body):
    for path in (JOIN, RUN):
        assert ask("POST", path, content=body, headers={"Content-Type": "application/json"}).status_code == 400


STRANGE = ["x", "\ud800\x1b[2J", -1, 2.5, 1e300, float("inf"), 10**400, "1" * 10_000, True, None]


@pytest.mark.parametrize("name", ["update", "strip", "moments", "animate", "_next_seed", "update_controls", "<lambda>"])
def test_strange_values_are_told_on_the_page(ask, blocks, name):
    """In each control alone, and no trace in the log."""
    begin, inputs = values(blocks, name), blocks.fns[number_of(blocks, name)].inputs
    controls = [number for number, each in enumerate(inputs) if not each.stateful]
    for number in controls:
        for strange in STRANGE if len(controls) == 1 else [STRANGE[number % 8]]:
            data = [*begin[:number], strange, *begin[number + 1 :]]
            content = json.dumps(request_of(blocks, name, *data)).replace("Infinity", "1e999")
            said = ask("POST", JOIN, content=content, headers={"Content-Type": "application/json"})
            assert said.status_code == 200
            text = ask("GET", "/gradio_api/queue/data", params={"session_hash": "abc"}).text
            done = next(json.loads(line[6:]) for line in text.splitlines() if "process_completed" in line)
            assert done["success"], (inputs[number].label, strange, done)


def test_names_of_strangers(blocks, monkeypatch):
    """Of classes and of runs: the page is there, shows them, and does not obey them."""
    page = blocks.fns[number_of(blocks, "update")].fn.__self__
    hostile = "\ud800\x1b[2J\u202e<img src=x onerror=alert(1)>![a](http://192.0.2.1/)"
    monkeypatch.setattr(page.session, "classes", lambda side: [hostile] * 10)
    other = Page(page.session, hostile).blocks()
    with serving(other, "127.0.0.1", None, share=False) as address, httpx.Client(trust_env=False) as client:
        text = client.get(address).text
        body = request_of(other, "update", *values(other, "update"))
        assert client.post(address + JOIN, json=body).status_code == 200
        said = client.get(f"{address}/gradio_api/queue/data?session_hash=abc", timeout=60).text
    assert r"\ud800\x1b[2J\u202e&lt;img" in said.replace("\\\\", "\\")
    assert "Done." in said
    for each in (text, said):
        assert not any(letter in each for letter in "\x1b\u202e")


def test_where_nothing_can_listen(blocks, address):
    taken = urlsplit(address).port
    for host, port, words in (
        ("127.0.0.1", taken, f"port={taken}: it is taken"),
        ("192.0.2.1", None, "host=192.0.2.1 port=7860: nothing can listen there"),
    ):
        with pytest.raises(UserError, match=words), serving(blocks, host, port, share=False):
            pass
