"""Which requests the explorer answers: those that its own page makes, under the names that it is served at."""

import asyncio
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Mapping, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
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


class Gate:
    """An ASGI application that hands the page's own requests to Gradio, and refuses all others.

    Gradio has some sixty routes: uploads, files, direct calls beside the queue, streams. The page needs seven. A
    website that the visitor has open beside it can ask as well, by a cross-site request or by a name of its own that
    leads to this machine; the headers ``Host`` and ``Origin`` tell these.

    Args:
        app: Gradio's application.
        host: name or address that it listens at; where that means all addresses of this machine, each of them and the
            machine's own name are answered to.
        functions: Gradio's functions of the page, by number.

    Attributes:
        hosts: names and addresses that the page is served at, in lower case; may grow.
        any_address: whether each numeric address is one of them.
    """

    def __init__(self, app: ASGIApp, host: str, functions: Mapping[int, Any]) -> None:
        self.app, self.functions = app, functions
        self.any_address = _is_address(host) and ipaddress.ip_address(host).is_unspecified
        names = (socket.gethostname(), socket.getfqdn()) if self.any_address else ()
        self.hosts = {name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *names)}

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
            await self.app(*await self._admit(scope, receive), send_noting)
        except _RefusedError as error:
            response = PlainTextResponse(f"{error.detail}\n", error.status_code, {"connection": "close"})
            await response(scope, receive, send)
        except Exception as error:  # Gradio's, about a request: its trace would fill the log whenever a visitor likes
            log.debug("%s: %r", scope["path"], error)
            if not started:
                await PlainTextResponse("This cannot be answered.\n", HTTPStatus.BAD_REQUEST)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return the request as Gradio is to see it; raises :class:`_RefusedError`."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_known(host):
            raise _RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "The explorer does not answer to this name: open it by its address, or start it with host=NAME.",
            )
        if origin is not None and urlsplit(origin).netloc != host:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "The explorer answers its own page alone.")
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and _READ.fullmatch(path) and ".." not in path:
            return scope if path == "/gradio_api/queue/data" else {**scope, "query_string": b""}, receive
        if method != "POST" or path not in (_JOIN, _RUN):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "The explorer has a page and nothing else.")
        body = self._event(await _read_body(headers, Request(scope, receive)), queued=path == _JOIN)
        kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        kept.append((b"content-length", str(len(body)).encode()))
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_checked() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        return {**scope, "headers": kept, "query_string": b""}, receive_checked

    def _is_known(self, host: str) -> bool:
        """Whether the header ``Host`` names what the page is served at."""
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d+)?", host):
            return False
        name = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
        return name.lower() in self.hosts or (self.any_address and _is_address(name))

    def _event(self, body: bytes, queued: bool) -> bytes:
        """The request for an event, with nothing in it but what the page sends."""
        try:
            content = json.loads(body, parse_constant=int)  # NaN and Infinity are no whole numbers: ValueError
            index, data, session = content["fn_index"], content["data"], content["session_hash"]
            function = self.functions[index]
            known = (
                function.queue == queued
                and isinstance(data, list)
                and len(data) == len(function.inputs)
                and all(isinstance(value, _SCALARS) for value in data)
                and _SESSION.fullmatch(session)
            )
        except (ValueError, TypeError, LookupError, RecursionError):
            known = None
        if not known:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "This is no request of the explorer's page.")
        return json.dumps({"fn_index": index, "data": data, "session_hash": session}).encode()


class _RefusedError(HTTPException):
    """A request is not answered: its status of HTTP, and the reason in one sentence."""


async def _read_body(headers: Mapping[str, str], request: Request) -> bytes:
    """The body of a request, counted while it comes: a sender need not say its length, or may lie."""
    too_large = _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request has {LARGEST_BODY} bytes at most.")
    length = headers.get("content-length", "0")
    if len(length) > 9 or int(length) > LARGEST_BODY:
        raise too_large

    async def read() -> bytes:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise too_large
        return body

    try:
        return await asyncio.wait_for(read(), _SECONDS_FOR_BODY)
    except asyncio.TimeoutError:
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, "The request took too long.") from None


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
