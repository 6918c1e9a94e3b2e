"""Optional packages: the extra of dcdit that installs each; and importing a package without what it loads as well."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from dcdit.errors import UserError

EXTRAS = {
    "flash_attn": ("flash-attn", "flash-attn"),
    "gcsfs": ("gcsfs", "gcs"),
    "gradio": ("gradio", "explore"),
    "hydra_plugins.hydra_optuna_sweeper": ("hydra-optuna-sweeper", "optuna"),
    "hydra_plugins.hydra_submitit_launcher": ("hydra-submitit-launcher", "slurm"),
    "mlxtend": ("mlxtend", "demo"),
    "pyarrow": ("pyarrow", "parquet"),
    "s3fs": ("s3fs", "s3"),
    "sklearn": ("scikit-learn", "demo"),
    "submitit": ("submitit", "slurm"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "transformers": ("transformers", "rae"),
    "wandb": ("wandb", "wandb"),
}
"""Modules that an installation may lack: the package of each, and the extra of dcdit that installs it."""


def is_installed(module: str) -> bool:
    """Whether an optional module could be imported; it is looked for, not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is not there; of a module that a program made itself
        return module in sys.modules


def remedy_for(module: str) -> str:
    """The package of a module of :data:`EXTRAS`, and how to install it, for messages."""
    package, extra = EXTRAS[module]
    return f"{package}: pip install 'dcdit[{extra}]'"


def check_installed(module: str, asked: str, instead: str = "") -> None:
    """Raise :class:`UserError` unless a module of :data:`EXTRAS` is installed.

    Args:
        module: its name.
        asked: what needs it, for the message, such as ``logger=wandb``.
        instead: what else could be done, for the message, such as ``take logger=csv``.
    """
    if not is_installed(module):
        raise UserError(f"{asked} needs {remedy_for(module)}" + (f", or {instead}" if instead else ""))


def missing_extra(error: BaseException | None) -> str | None:
    """The module of :data:`EXTRAS` for want of which an import failed; None if that is not what ``error`` says."""
    while error is not None:
        if isinstance(error, ImportError):
            words = {(error.name or "").partition(".")[0], *re.findall(r"\w+", str(error))}
            for module in EXTRAS:
                if module in words and not is_installed(module):
                    return module
        error = error.__cause__
    return None


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
