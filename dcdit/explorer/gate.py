"""Which requests the explorer answers: those that its own page makes, under the names that it is served at."""

import asyncio
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LARGEST_BODY = 16_384
"""Bytes of a request's body; the page sends a few hundred."""
_SECONDS_FOR_BODY = 10
_JOIN, _RUN = "/gradio_api/queue/join", "/gradio_api/run/predict"
_READ = re.compile(
    r"/|/theme\.css|/favicon\.ico|/(assets|static)/[\w./-]+|/gradio_api/queue/data|/gradio_api/heartbeat/[a-z0-9]{1,32}"
)
_SESSION = re.compile("[a-z0-9]{1,32}")
_SCALARS = (str, int, float, bool, type(None))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What happens on the page when a control is used.

    Attributes:
        inputs: number of values that it takes.
        queued: whether it waits for its turn.
    """

    inputs: int
    queued: bool


class RefusedError(Exception):
    """A request is not answered.

    Args:
        status: of HTTP.
        reason: in one sentence, for whoever asked.
    """

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gate:
    """An ASGI application that hands the page's own requests to Gradio, and refuses all others.

    Gradio has some sixty routes: uploads, files, direct calls beside the queue, streams. The page needs seven. A
    website that the visitor has open beside it can ask as well, by a cross-site request or by a name of its own that
    leads to this machine; the headers ``Host`` and ``Origin`` tell these.

    Args:
        app: what answers.
        hosts: names and addresses that the page is served at; may grow.
        any_address: whether each numeric address is one of them.
        events: of the page, by number.
    """

    def __init__(self, app: ASGIApp, hosts: set[str], any_address: bool, events: Mapping[int, Event]) -> None:
        self.app, self.hosts, self.any_address, self.events = app, hosts, any_address, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, see ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(*await self._admitted(scope, receive), send_noting)
        except RefusedError as error:
            response = PlainTextResponse(f"{error.reason}\n", error.status, {"connection": "close"})
            await response(scope, receive, send)
        except Exception as error:  # Gradio's, about a request: its trace would fill the log whenever a visitor likes
            log.debug("%s: %r", scope["path"], error)
            if not started:
                await PlainTextResponse("This cannot be answered.\n", HTTPStatus.BAD_REQUEST)(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request as Gradio sees it; raises :class:`RefusedError`."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_known(host):
            raise RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "The explorer does not answer to this name: open it by its address, or start it with host=NAME.",
            )
        if origin is not None and urlsplit(origin).netloc != host:
            raise RefusedError(HTTPStatus.FORBIDDEN, "The explorer answers its own page alone.")
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and _READ.fullmatch(path) and ".." not in path:
            if path != "/gradio_api/queue/data":
                scope = {**scope, "query_string": b""}
            return scope, receive
        if method != "POST" or path not in (_JOIN, _RUN):
            raise RefusedError(HTTPStatus.NOT_FOUND, "The explorer has a page and nothing else.")
        body = self._event(await _body(headers, receive), queued=path == _JOIN)
        kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        kept += [(b"content-length", str(len(body)).encode())]

        async def receive_again() -> MutableMapping[str, Any]:
            nonlocal body
            if body:
                body, sent = b"", body
                return {"type": "http.request", "body": sent, "more_body": False}
            return await receive()

        return {**scope, "headers": kept, "query_string": b""}, receive_again

    def _is_known(self, host: str) -> bool:
        """Whether the header ``Host`` names what the page is served at."""
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d+)?", host):
            return False
        name = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
        return name.lower() in self.hosts or (self.any_address and _is_address(name))

    def _event(self, body: bytes, queued: bool) -> bytes:
        """The request for an event, with nothing in it but what the page sends."""
        try:
            asked = json.loads(body, parse_constant=int)  # NaN and Infinity are no whole numbers: ValueError
            index, data, session = asked["fn_index"], asked["data"], asked["session_hash"]
            known = (
                self.events[index] == Event(len(data), queued)
                and isinstance(data, list)
                and all(isinstance(value, _SCALARS) for value in data)
                and _SESSION.fullmatch(session)
            )
        except (ValueError, TypeError, LookupError, RecursionError):
            known = None
        if not known:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "This is no request of the explorer's page.")
        return json.dumps({"fn_index": index, "data": data, "session_hash": session}).encode()


async def _body(headers: Mapping[str, str], receive: Receive) -> bytes:
    """The body of a request, counted while it comes: a sender need not say its length, or may lie."""
    too_large = RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request has {LARGEST_BODY} bytes at most.")
    length = headers.get("content-length", "0")
    if len(length) > 9 or int(length) > LARGEST_BODY:
        raise too_large

    async def received() -> bytes:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > LARGEST_BODY:
                raise too_large
        return body

    try:
        return await asyncio.wait_for(received(), _SECONDS_FOR_BODY)
    except asyncio.TimeoutError:
        raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, "The request took too long.") from None


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def gate(app: ASGIApp, host: str, functions: Mapping[int, Any]) -> Gate:
    """The gate before ``app``.

    Args:
        app: Gradio's.
        host: name or address that it listens at; where that means all addresses of this machine, it answers to each
            and to the machine's own name.
        functions: Gradio's, of the page.
    """
    everywhere = _is_address(host) and ipaddress.ip_address(host).is_unspecified
    names: Iterable[str] = (socket.gethostname(), socket.getfqdn()) if everywhere else ()
    hosts = {name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *names)}
    events = {number: Event(len(function.inputs), function.queue) for number, function in functions.items()}
    return Gate(app, hosts, everywhere, events)
