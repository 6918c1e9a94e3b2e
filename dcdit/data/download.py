"""Files of a server: no more bytes than expected, and no waiting for one that has stopped answering."""

import re
import selectors
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

from dcdit.checks import without_credentials
from dcdit.errors import UserError

CONNECT, STALL = 10.0, 60.0
"""Seconds to wait for an answer, and for the next bytes."""

_SLOWEST, _GRACE = 10_000, 60.0  # bytes per second below which a download is given up, and seconds until that is asked


class Writable(Protocol):
    """Takes bytes."""

    def write(self, content: bytes, /) -> Any:
        """Write ``content``."""


def download(url: str, target: Writable, most: int) -> int:
    """Copy what a URL holds into ``target``.

    Args:
        url: ``http:`` and ``https:``, and whatever webdataset opens.
        target: where to.
        most: bytes that are expected at most.

    Returns:
        The number of bytes.

    Raises:
        OSError: if it cannot be had, naming the URL and the reason.
        UserError: if there is no such scheme; what ``target`` raises passes through.
    """
    size, begin = 0, time.monotonic()
    for chunk in _chunks(url):
        size += len(chunk)
        if size > most:
            raise _failed(url, f"it is larger than the {most} bytes expected")
        target.write(chunk)
        spent = time.monotonic() - begin
        if spent > _GRACE and size < spent * _SLOWEST:
            raise _failed(url, f"too slow, {size} bytes in {spent:.0f} s")
    if not size:
        raise _failed(url, "it is empty")
    return size


def _failed(url: str, reason: str) -> OSError:
    return OSError(f"{without_credentials(url)} cannot be fetched: {reason}")


def _chunks(url: str) -> Iterator[bytes]:
    return _of_server(url) if url.startswith(("http:", "https:")) else _of_program(url)


def _of_server(url: str) -> Iterator[bytes]:
    import requests

    try:
        with requests.get(url, stream=True, timeout=(CONNECT, STALL)) as answer:
            if answer.status_code == 404:
                raise _failed(url, "the server has no such file")
            if not answer.ok:
                raise _failed(url, f"the server answered {answer.status_code} {answer.reason}")
            yield from answer.iter_content(1 << 20)
    except requests.Timeout:
        raise _failed(url, f"no answer within {CONNECT:.0f} s, or no more bytes for {STALL:.0f} s") from None
    except requests.ConnectionError as error:
        unknown = "name" in str(error).lower() and "resol" in str(error).lower()
        refused = "refused" in str(error).lower()
        reason = "the host is unknown" if unknown else "no server answers there" if refused else "the connection broke"
        raise _failed(url, reason) from None
    except requests.RequestException as error:
        raise _failed(url, type(error).__name__) from None


def _of_program(url: str) -> Iterator[bytes]:
    """From the program that webdataset starts for this kind of URL."""
    from webdataset import gopen

    try:
        source: Any = gopen(url, "rb")
    except ValueError as error:  # it knows no such scheme
        raise UserError(f"directory={without_credentials(url)}: {error}") from error
    stream = getattr(source, "stream", source)
    waiting = selectors.DefaultSelector()
    waiting.register(stream, selectors.EVENT_READ)
    try:
        while True:
            if not waiting.select(STALL):
                raise _failed(url, f"no more bytes for {STALL:.0f} s")
            chunk = stream.read1(1 << 20)
            if not chunk:
                break
            yield chunk
    except BaseException:
        with suppress(Exception):
            source.proc.kill()
        with suppress(Exception):
            source.close()
        raise
    finally:
        waiting.close()
    try:
        source.close()
    except OSError as error:
        status = re.search(r"exit (\d+)", str(error))
        reason = f"the program that fetches it failed with status {status[1]}" if status else str(error)
        raise _failed(url, reason) from None
