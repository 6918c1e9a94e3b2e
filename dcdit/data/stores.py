"""Object stores and the Hugging Face hub, as fsspec opens them: listing and reading files.

Credentials come from where each library looks by itself (environment, ``~/.aws``, gcloud, ``hf auth login``): none
stands in a configuration.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dcdit.checks import reason_of, without_credentials
from dcdit.errors import UserError
from dcdit.runtime.hub import cause_of, check_hub_answers
from dcdit.runtime.imports import EXTRAS, check_installed

PIECE = 4 << 20
"""Bytes that a store is asked for at once."""


@dataclass(frozen=True)
class Store:
    """A kind of store.

    Attributes:
        module: what has its filesystem; an optional one is of :data:`dcdit.runtime.imports.EXTRAS`.
        access: what whoever is refused can do.
        options: for opening a file.
    """

    module: str
    access: str
    options: dict[str, Any] = field(default_factory=lambda: {"cache_type": "none"})


_GOOGLE = Store("gcsfs", "gcloud auth application-default login, or FSSPEC_GS_TOKEN=anon for a public bucket")

STORES = {
    "s3": Store(
        "s3fs",
        "log in with aws configure or AWS_PROFILE (AWS_ENDPOINT_URL names another store than Amazon's), or set"
        " FSSPEC_S3_ANON=true for a public bucket",
    ),
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "hf": Store("huggingface_hub", "log in with hf auth login, or set HF_TOKEN", {"block_size": 0}),  # one answer
}
"""Kinds of stores, by the beginning of their URLs. fsspec knows many more, which a URL of a stranger could open."""


class RefusedError(Exception):
    """A store does not give a file; ``absent`` if there is none, or none for this user."""

    def __init__(self, reason: str, absent: bool) -> None:
        super().__init__(reason)
        self.absent = absent


def read_store(url: str, max_bytes: int) -> Iterator[bytes]:
    """Yield what the file at ``url`` holds.

    Raises:
        RefusedError: if it cannot be had, or has more than ``max_bytes``.
        UserError: if the package for this kind of store is missing.
    """
    with _filesystem_of(url) as (filesystem, store), filesystem.open(url, "rb", **store.options) as file:
        if (file.size or 0) > max_bytes:
            raise RefusedError(f"it is larger than the {max_bytes} bytes expected", absent=False)
        while chunk := file.read(PIECE):
            yield chunk


def list_store(url: str) -> dict[str, int]:
    """Path below ``url`` and size of every file there; raises as :func:`read_store` does."""
    with _filesystem_of(url) as (filesystem, _):
        root = f"{filesystem._strip_protocol(url).rstrip('/')}/"
        found = filesystem.find(root.rstrip("/"), detail=True)
        return {
            path.removeprefix(root): int(info["size"] or 0) for path, info in found.items() if path.startswith(root)
        }


def read_small(url: str) -> bytes:
    """The whole file at ``url``, whose size :func:`list_store` told, in one request; raises as :func:`read_store`."""
    with _filesystem_of(url) as (filesystem, _):
        content: bytes = filesystem.cat_file(url)
        return content


@contextmanager
def _filesystem_of(url: str) -> Iterator[tuple[Any, Store]]:
    """The filesystem of a URL; an error of a library in the block becomes a :class:`RefusedError`."""
    protocol = url.partition(":")[0]
    filesystem = _filesystem(protocol, os.getpid())
    try:
        yield filesystem, STORES[protocol]
    except (UserError, RefusedError):
        raise
    except Exception as error:  # each library has errors of its own
        raise _refused(STORES[protocol], error) from error


@cache
def _filesystem(protocol: str, process: int) -> Any:
    """The filesystem of a protocol, one for each process: a forked one cannot use that of its parent."""
    from fsspec import get_filesystem_class

    module = STORES[protocol].module
    if module in EXTRAS:
        check_installed(module, f"{protocol}://")
    kind = get_filesystem_class(protocol)
    if protocol == "hf":
        check_hub_answers()
    return kind(skip_instance_cache=True)


def _refused(store: Store, error: Exception) -> RefusedError:
    """What an error of a store says, without what is secret in it."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # of huggingface_hub
    if isinstance(error, FileNotFoundError) or status == 404:
        return RefusedError(f"there is no such file, or it is private: {store.access}", absent=True)
    if isinstance(error, PermissionError) or status in (401, 403):
        return RefusedError(f"access is denied: {store.access}", absent=True)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return RefusedError(f"there are no credentials: {store.access}", absent=False)
    reason = cause_of(error) if store.module == "huggingface_hub" else reason_of(error)
    return RefusedError(re.sub(r"\?[^\s'\"]+", "?...", without_credentials(reason)), absent=False)  # signatures
