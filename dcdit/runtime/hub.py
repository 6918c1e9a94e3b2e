"""The Hugging Face hub: its answers are checked before huggingface_hub uses them, and may not take for ever."""

import json
import re
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from dcdit.checks import reason_of, shown
from dcdit.errors import UserError
from dcdit.runtime.limits import Pace, SlowError

_DIGEST = re.compile(r'(W/)?"?[\w-]{1,128}"?', re.ASCII)
_DIGEST_HEADERS = ("ETag", "X-Linked-Etag", "X-Repo-Commit")
_DIGEST_KEYS = {"sha", "oid", "sha256", "commitOid"}
_PATH_KEYS = {"path", "rfilename"}
TIMEOUT = 60
"""Seconds that the hub may be silent."""

_ATTEMPTS = 3
"""To connect to the hub, with pauses of 1 and 2 seconds between them; one where that failed before."""


def check_hub_answers() -> None:
    """Have every answer to huggingface_hub in this process checked before it is used.

    huggingface_hub makes names of folders and files of what a server sends: the ETag and the commit in the head of an
    answer, digests and paths in a list of files. A server could thereby have it write anywhere. From the call on, such
    an answer raises :class:`UserError` within huggingface_hub, whoever calls it: diffusers and timm too. The check
    stands in the exchange itself, so that a server cannot answer differently after it. A hub that cannot be reached is
    given up soon, as if HF_HUB_OFFLINE were set: huggingface_hub would try for half a minute for each file.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    factory, unreachable = _http._GLOBAL_CLIENT_FACTORY, set[str]()
    if getattr(factory, "checks_answers", False):
        return

    def checked_client() -> Any:
        client: Any = factory()
        for event, hook in (("request", _bound_silence), ("response", _bound_duration), ("response", _check_answer)):
            client.event_hooks = {**client.event_hooks, event: [*client.event_hooks.get(event, []), hook]}
        client.send = _giving_up(client, unreachable)
        return client

    checked_client.checks_answers = True  # type: ignore[attr-defined]
    set_client_factory(checked_client)


def _giving_up(client: Any, unreachable: set[str]) -> Callable[..., Any]:
    """The method ``send`` of a client (of httpx), which gives a hub up that cannot be reached, and notes its name."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    send, library = client.send, import_module(HTTPError.__module__.partition(".")[0])  # httpx, or httpx2

    def send_or_give_up(request: Any, **options: Any) -> Any:
        host, attempt = request.url.host, 0
        while True:
            attempt += 1
            try:
                return send(request, **options)
            except (library.ConnectError, library.ConnectTimeout) as error:
                waited = isinstance(error, library.ConnectTimeout)
                if attempt == _ATTEMPTS or waited or host in unreachable:
                    unreachable.add(host)
                    # huggingface_hub does not try again after this error, and takes what its cache holds.
                    raise OfflineModeIsEnabled(f"{host} cannot be reached: {error}") from error
                time.sleep(attempt)

    return send_or_give_up


def _bound_silence(request: Any) -> None:
    """Let no request (of httpx) wait for ever."""
    timeouts = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {name: seconds or TIMEOUT for name, seconds in timeouts.items()}


def _bound_duration(answer: Any) -> None:
    """Have the body of an answer (of httpx) raise :class:`UserError` once it takes longer than on a slow line."""
    stream, pace = answer.stream, Pace()

    class TimedStream(type(stream)):  # type: ignore[misc]  # httpx takes streams of its own classes only
        def __init__(self) -> None:
            """Read ``stream``, which is another object."""

        def __iter__(self) -> Iterator[bytes]:
            try:
                for chunk in stream:
                    pace.size += len(chunk)
                    pace.remaining()
                    yield chunk
            except SlowError as error:
                raise UserError(f"the hub is {error}: try again later, or from another network") from None

        def close(self) -> None:
            stream.close()

    answer.stream = TimedStream()


def _check_answer(answer: Any) -> None:
    """Raise :class:`UserError` if an answer (of httpx) would lead to an unsafe name of a file."""
    if answer.request.method == "HEAD":
        for name in _DIGEST_HEADERS:
            value = answer.headers.get(name)
            if value is not None and not _DIGEST.fullmatch(value):
                raise UserError(f"the hub sent {name}: {shown(value)}, which is no digest; nothing was written")
    elif re.search("/api/(models|datasets)/", answer.request.url.path) and answer.is_success:
        answer.read()
        try:
            content = json.loads(answer.content)
        except (ValueError, RecursionError):
            raise UserError("the hub sent something else than JSON: is HF_ENDPOINT the address of a hub?") from None
        for key, value in _items(content):
            if key in _DIGEST_KEYS and isinstance(value, str) and not _DIGEST.fullmatch(value):
                raise UserError(f"the hub sent {key}={shown(value)}, which is no digest; nothing was written")
            if key in _PATH_KEYS and isinstance(value, str) and {"", ".", ".."} & set(re.split(r"[/\\]", value)):
                raise UserError(f"the hub sent {key}={shown(value)}, which leaves its folder; nothing was written")


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values that describe a repository and its files, without those that its owner wrote about it."""
    described = [content] if isinstance(content, dict) else content
    if isinstance(content, dict) and isinstance(content.get("siblings"), list):
        described += content["siblings"]
    for entry in described if isinstance(described, list) else []:
        for part in (entry, entry.get("lfs")) if isinstance(entry, dict) else ():
            yield from part.items() if isinstance(part, dict) else ()


def cause_of(error: BaseException) -> str:
    """Why the hub failed, in one line: the error of ours in the chain of causes, else the first error of the chain."""
    while not isinstance(error, UserError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return reason_of(error)
