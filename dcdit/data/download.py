"""Files of a server: no more bytes than expected, and no more time than a slow line takes for them."""

import queue
import re
import selectors
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from dcdit.checks import shown, without_credentials
from dcdit.errors import UserError
from dcdit.runtime.limits import Pace, SlowError

if TYPE_CHECKING:
    from requests import Response

CONNECT, STALL = 10.0, 60.0
"""Seconds to wait for an answer, and for the next bytes."""

_REDIRECTS = 5


class AbsentError(OSError):
    """The server has no such file, or refuses it without saying whether it has it."""


def download(url: str, write: Callable[[bytes], object], max_bytes: int) -> int:
    """Hand what a URL holds to ``write``, piece by piece; returns the number of bytes.

    Args:
        url: ``http:`` and ``https:``, and whatever webdataset opens.
        write: takes the next bytes.
        max_bytes: largest size that is expected.

    Raises:
        AbsentError: if there is no such file.
        OSError: if it cannot be had, naming the URL and the reason.
        UserError: if there is no such scheme; what ``write`` raises passes through.
    """
    pace = Pace()
    fetch = _in_background(url, max_bytes, pace) if url.startswith(("http:", "https:")) else _from_program(url, pace)
    try:
        with closing(fetch) as chunks:
            for chunk in chunks:
                pace.size += len(chunk)
                if pace.size > max_bytes:
                    raise _failed(url, f"it is larger than the {max_bytes} bytes expected")
                write(chunk)
                pace.remaining()
    except SlowError as error:
        raise _failed(url, str(error)) from None
    if not pace.size:
        raise _failed(url, "it is empty")
    return pace.size


def _failed(url: str, reason: str, kind: type[OSError] = OSError) -> OSError:
    return kind(f"{without_credentials(url)} cannot be fetched: {reason}")


def _in_background(url: str, max_bytes: int, pace: Pace) -> Generator[bytes, None, None]:
    """Yield what a thread receives from a server: one read of a socket has a time limit, their sum has none."""
    chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(16)
    given_up = threading.Event()
    answers: list[Response] = []

    def put(chunk: bytes | BaseException | None) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=1.0)
                return

    def receive() -> None:
        try:
            for chunk in _from_server(url, max_bytes, answers):
                put(chunk)
                if given_up.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=receive, name="download", daemon=True).start()
    try:
        while True:
            with suppress(queue.Empty):
                chunk = chunks.get(timeout=pace.remaining())
                if chunk is None:
                    return
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
    finally:
        given_up.set()
        for answer in answers:
            with suppress(Exception):  # has the thread wake up, if this urllib3 can
                answer.raw.shutdown()


def _from_server(url: str, max_bytes: int, answers: "list[Response]") -> Generator[bytes, None, None]:
    import requests

    address = url
    try:
        for _ in range(1 + _REDIRECTS):
            # uncompressed: a few bytes could become many
            headers, limits = {"Accept-Encoding": "identity"}, (CONNECT, STALL)
            with requests.get(address, stream=True, timeout=limits, allow_redirects=False, headers=headers) as answer:
                if answer.is_redirect:
                    address = urljoin(address, answer.headers["Location"])
                    continue
                _check_answer(url, answer, max_bytes)
                answers.append(answer)
                yield from answer.iter_content(1 << 16)
                return
        raise _failed(url, f"the server redirects more than {_REDIRECTS} times")
    except requests.Timeout:
        raise _failed(url, f"no answer within {CONNECT:.0f} s, or no more bytes for {STALL:.0f} s") from None
    except requests.ConnectionError as error:
        unknown = "name" in str(error).lower() and "resol" in str(error).lower()
        refused = "refused" in str(error).lower()
        reason = "the host is unknown" if unknown else "no server answers there" if refused else "the connection broke"
        raise _failed(url, reason) from None
    except requests.exceptions.ChunkedEncodingError:
        raise _failed(url, "the connection broke") from None
    except (requests.RequestException, ValueError) as error:
        raise _failed(url, type(error).__name__) from None


def _check_answer(url: str, answer: "Response", max_bytes: int) -> None:
    """Raise OSError unless the head of an answer promises the file, plain and no larger than expected."""
    if answer.status_code in (404, 410):
        raise _failed(url, "the server has no such file", AbsentError)
    if answer.status_code != 200:
        kind = AbsentError if answer.status_code in (401, 403) else OSError  # as storage says of files it does not list
        raise _failed(url, f"the server answered {answer.status_code} {answer.reason}", kind)
    length, encoding = answer.headers.get("Content-Length", "0"), answer.headers.get("Content-Encoding", "identity")
    if not (length.isascii() and length.isdigit()):
        raise _failed(url, f"the server says that it has {shown(length)} bytes")
    if len(length) > 15 or int(length) > max_bytes:
        raise _failed(url, f"it is larger than the {max_bytes} bytes expected")
    if encoding != "identity":
        raise _failed(url, f"it comes encoded as {shown(encoding)}")


def _from_program(url: str, pace: Pace) -> Generator[bytes, None, None]:
    """Yield what the program writes that webdataset starts for this kind of URL."""
    from webdataset import gopen

    try:
        source: Any = gopen(url, "rb")
    except ValueError as error:  # it knows no such scheme
        raise UserError(f"directory={without_credentials(url)}: {error}") from error
    stream = getattr(source, "stream", source)
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(stream, selectors.EVENT_READ)
            while True:
                if not waiting.select(min(STALL, pace.remaining())):
                    pace.remaining()
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
    try:
        source.close()
    except OSError as error:
        status = re.search(r"exit (\d+)", str(error))
        reason = f"the program that fetches it failed with status {status[1]}" if status else str(error)
        raise _failed(url, reason, AbsentError) from None
