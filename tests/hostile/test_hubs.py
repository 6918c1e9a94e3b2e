"""What a hub sends becomes names of files here: answers that would lead elsewhere are refused, all others told."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from support.foreign import write_reference
from support.hub import Hub, hub_of

from dcdit import DCDiT
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.data.autoencoder import load_autoencoder
from dcdit.errors import UserError
from dcdit.evaluation.features import TimmFeatures
from dcdit.runtime.hub import _items

OID = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository; the cache, and the folder around it, are empty."""
    repository = tmp_path / "repository"
    write_reference(repository / "S-256" / "0700000.pt")
    for name in ("config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"):
        (repository / name).write_text("{}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with hub_of({"a/b": repository}, tmp_path / "around" / "a" / "b" / "cache") as hub:
        yield hub


def listing(**changes) -> bytes:
    return json.dumps([{"type": "file", "oid": OID, "path": "S-256/0700000.pt", "size": 3, **changes}]).encode()


FETCHERS: dict[str, Callable[[], object]] = {
    "checkpoint": lambda: resolve_checkpoint("hf://a/b/S-256", "runs"),
    "network": lambda: DCDiT.from_pretrained("a/b"),
    "autoencoder": lambda: load_autoencoder("a/b", torch.device("cpu")),
    "features": lambda: TimmFeatures("test_resnet.r160_in1k"),
}


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_no_head_of_an_answer_leads_out_of_the_cache(hub, tmp_path, fetcher):
    hub.repositories["timm/test_resnet.r160_in1k"] = hub.repositories["a/b"]
    absolute = str(tmp_path / "around" / "x")
    for header in ("ETag", "X-Linked-Etag", "X-Repo-Commit"):
        for value in ("../../x", absolute, "..", "a/b", "a\\b", ""):
            hub.headers = {header: f'"{value}"'}
            with pytest.raises(UserError, match=f"the hub sent {header}: .* which is no digest"):
                FETCHERS[fetcher]()
            assert written(tmp_path / "around") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Please log in</html>", "the hub sent something else than JSON"),
        (b"\xff\xfe", "the hub sent something else than JSON"),
        (b"[" * 100_000, "the hub sent something else than JSON"),
        (b"7", "the hub's answer cannot be understood"),
        (b"[7]", "the hub's answer cannot be understood"),
        (b"[{}]", "the hub's answer cannot be understood"),
        (listing(path=7), "the hub's answer cannot be understood"),
        (listing(path="../../x.pt"), "the hub sent path=.* which leaves its folder"),
        (listing(path="/etc/x.pt"), "the hub sent path=.* which leaves its folder"),
        (listing(oid="../x"), "the hub sent oid=.* which is no digest"),
        (listing(lfs={"oid": "../../x", "size": 3, "pointerSize": 3}), "the hub sent oid=.* which is no digest"),
        (listing(path="\x1b[31m/x.pt"), r"a/b holds no S-256; it holds \\x1b\[31m"),
        (b"[]", "a/b holds no S-256; it holds nothing"),
    ],
)
def test_a_list_of_files_is_one_or_is_refused(hub, tmp_path, content, message):
    hub.listing = content
    with pytest.raises(UserError, match=rf"^checkpoint=hf://a/b/S-256: .*{message}"):
        resolve_checkpoint("hf://a/b/S-256", "runs")
    assert written(tmp_path / "around") == []


def test_what_an_owner_writes_is_no_path():
    content = {"sha": OID, "siblings": [{"rfilename": "x"}], "cardData": {"path": "../x", "sha": "?"}}
    assert {key for key, _ in _items(content)} >= {"sha", "rfilename"}
    assert not {"../x", "?"} & {value for _, value in _items(content) if isinstance(value, str)}


@pytest.mark.parametrize(
    "address",
    ["--/b", "-a/b", "a..b/c", "a/b.git", f"{'a' * 97}/b", "a/b/c@../x", "a/b@..", "a/b/\0", "ä/b", "a/b/c@\x1b[31m"],
)
def test_odd_addresses_end_in_one_message(hub, tmp_path, address):
    with pytest.raises(UserError, match=r"^checkpoint=hf://") as refused:
        resolve_checkpoint(f"hf://{address}", "runs")
    assert str(refused.value).isprintable()
    assert written(tmp_path / "around") == []


def test_a_server_that_is_silent_is_left(hub, monkeypatch):
    """huggingface_hub itself would wait for a list for ever."""
    monkeypatch.setattr(Hub, "answer", lambda self, request, body: threading.Event().wait(0.5))
    monkeypatch.setattr("dcdit.runtime.hub.TIMEOUT", 0.1)
    with pytest.raises(UserError, match=r"the hub cannot be reached .*time"):
        resolve_checkpoint("hf://a/b/S-256", "runs")


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_a_hub_that_sends_a_file_byte_by_byte_is_left(hub, monkeypatch, fetcher):
    """Though each byte comes in time."""
    hub.repositories["timm/test_resnet.r160_in1k"] = hub.repositories["a/b"]
    monkeypatch.setattr("dcdit.runtime.limits.GRACE", 0.3)
    send, sent = hub.send, []

    def drip(request, status, content, headers, body) -> None:
        if not body or "api" in request.path:
            send(request, status, content, headers, body)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(10**6))
        request.end_headers()
        for _ in range(1000):
            try:
                request.wfile.write(b"x")
            except OSError:
                return
            sent.append(1)
            threading.Event().wait(0.05)

    monkeypatch.setattr(hub, "send", drip)
    with pytest.raises(UserError, match=r"the hub is too slow, \d+ bytes in 0 s: try again later"):
        FETCHERS[fetcher]()
    assert 1 < len(sent) < 100


@pytest.fixture
def pauses(hub, monkeypatch) -> list[float]:
    """A hub at whose address nothing listens, and the pauses between attempts to reach it."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    hub.server.shutdown()
    hub.server.server_close()
    return pauses


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_a_hub_that_cannot_be_reached_is_given_up_soon(pauses, fetcher):
    with pytest.raises((UserError, OSError), match=r"reached|downloaded|had from the hub|connection"):
        FETCHERS[fetcher]()
    assert sum(pauses) <= 3


def test_without_a_network_the_cache_serves(hub, monkeypatch):
    path = resolve_checkpoint("hf://a/b/S-256", "runs").path
    asked = len(hub.asked)
    hub.server.shutdown()
    hub.server.server_close()
    assert resolve_checkpoint("hf://a/b/S-256", "runs").path == path
    assert len(hub.asked) == asked


def test_a_hub_that_comes_back_is_asked_again(hub, monkeypatch):
    from huggingface_hub.utils import get_session

    from dcdit.runtime.hub import check_hub_answers

    check_hub_answers()
    session = get_session()
    with pytest.raises(OfflineModeIsEnabled):
        session.get("http://127.0.0.1:9/")
    assert session.get(f"{hub.address}/a/b/resolve/main/config.json").status_code == 200
