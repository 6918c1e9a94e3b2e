"""Files of a server or a store: no more bytes than expected, and no more time than a slow line takes for them."""

import queue
import re
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from dcdit.checks import shown, without_credentials
from dcdit.data.stores import STORES, RefusedError, read_store
from dcdit.runtime.limits import Pace, SlowError

if TYPE_CHECKING:
    from requests import Response

CONNECT, STALL = 10.0, 60.0
"""Seconds to wait for an answer, and for the next bytes."""

_REDIRECTS = 5

_SCHEME = re.compile("([a-z][a-z0-9+.-]+):")

Stops = list[Callable[[], object]]
"""What has the reader of a URL stop, for whoever gives it up."""


class AbsentError(OSError):
    """The server has no such file, or refuses it without saying whether it has it."""


def scheme_of(url: str) -> str:
    """What a URL begins with; empty for a path."""
    match = _SCHEME.match(url)
    return match[1] if match else ""


def download(url: str, write: Callable[[bytes], object], max_bytes: int) -> int:
    """Hand what a URL holds to ``write``, piece by piece; returns the number of bytes.

    Args:
        url: its scheme is one of :data:`READERS`.
        write: takes the next bytes.
        max_bytes: largest size that is expected.

    Raises:
        AbsentError: if there is no such file.
        OSError: if it cannot be had, naming the URL and the reason.
        UserError: if a package for it is missing; what ``write`` raises passes through.
    """
    pace = Pace()
    try:
        with closing(_in_background(url, max_bytes, pace)) as chunks:
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


def _stalled(url: str) -> OSError:
    return _failed(url, f"no answer within {CONNECT:.0f} s, or no more bytes for {STALL:.0f} s")


def _in_background(url: str, max_bytes: int, pace: Pace) -> Generator[bytes, None, None]:
    """Yield what a thread receives: one read of a socket has a time limit, their sum has none."""
    chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(4)
    given_up = threading.Event()
    stops: Stops = []

    def put(chunk: bytes | BaseException | None) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=1.0)
                return

    def receive() -> None:
        try:
            for chunk in READERS[scheme_of(url)](url, max_bytes, stops):
                put(chunk)
                if given_up.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=receive, name="download", daemon=True).start()
    try:
        while True:
            left = pace.remaining()
            try:
                chunk = chunks.get(timeout=min(left, STALL))
            except queue.Empty:
                if left > STALL:
                    raise _stalled(url) from None
                continue
            if chunk is None:
                return
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
    finally:
        given_up.set()
        for stop in stops:
            with suppress(Exception):  # has the thread wake up, if this urllib3 can
                stop()


def _from_server(url: str, max_bytes: int, stops: Stops) -> Iterator[bytes]:
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
                stops.append(answer.raw.shutdown)
                yield from answer.iter_content(1 << 16)
                return
        raise _failed(url, f"the server redirects more than {_REDIRECTS} times")
    except requests.Timeout:
        raise _stalled(url) from None
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


def _from_store(url: str, max_bytes: int, stops: Stops) -> Iterator[bytes]:
    try:
        yield from read_store(url, max_bytes)
    except RefusedError as error:
        raise _failed(url, str(error), AbsentError if error.absent else OSError) from error.__cause__


def _from_program(url: str, max_bytes: int, stops: Stops) -> Iterator[bytes]:
    command = url.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as program:  # noqa: S602  (allow_pipe says so)
        stops.append(program.kill)
        assert program.stdout is not None
        while chunk := program.stdout.read1(1 << 20):  # type: ignore[attr-defined]
            yield chunk
    if program.returncode:
        raise _failed(url, f"the program that fetches it failed with status {program.returncode}", AbsentError)


READERS: dict[str, Callable[[str, int, Stops], Iterator[bytes]]] = {
    "http": _from_server,
    "https": _from_server,
    **dict.fromkeys(STORES, _from_store),
    "pipe": _from_program,
}
"""What yields the bytes of a URL, by its scheme; each takes the URL and the largest size, and adds to :data:`Stops`.

fsspec does not read http here: it asks for each file twice, and hides status, redirects and encoding of the answer.
"""
