"""Importing packages without an optional package that they would load as well."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Iterator[None]:
    """Hide ``module`` from packages that are imported within the block, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # the import system takes this for a missing module
    try:
        yield
    finally:
        del sys.modules[module]
