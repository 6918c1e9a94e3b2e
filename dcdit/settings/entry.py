"""What all command-line entry points share: where the configuration lies, resolvers, and how errors are told."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from dcdit.errors import UserError
from dcdit.settings.schema import suggestion
from dcdit.training.module import NonFiniteLossError

_PACKAGE = Path(__file__).parents[1]
CONFIG_DIR = str(_PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs")
"""The configuration tree: inside an installed package, or at the top of the repository."""

USER_ERROR_STATUS = 2


def cpu_precision() -> str:
    """``bf16-mixed`` where the processor multiplies bfloat16 natively (AMX, AVX512-BF16), else ``32-true``."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16-mixed" if native else "32-true"


def register_resolvers() -> None:
    """Make ``${cpu_precision:}`` and ``${relpath:...}`` known to OmegaConf."""
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    OmegaConf.register_new_resolver("relpath", os.path.relpath, replace=True)


def model_config(name: str) -> dict[str, Any]:
    """The plain values of ``configs/model/<name>.yaml``; raises Hydra's error, with the choices, if there is none."""

    def values() -> dict[str, Any]:
        composed: Any = OmegaConf.to_container(compose("flops", overrides=[f"model={name}"]).model, resolve=True)
        return composed

    if GlobalHydra.instance().is_initialized():  # inside a command
        return values()
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return values()


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Command-line words for Hydra: paths that stand alone become ``runs=[...]``.

    Raises:
        UserError: if ``runs`` is given as well.
    """
    paths = [word for word in arguments if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    if paths and any(word.startswith("runs=") for word in arguments):
        raise UserError(f"{paths[0]}: paths and runs=... are two ways to say the same, take one")
    others = [word for word in arguments if word not in paths]
    return [*others, f"runs=[{','.join(json.dumps(path) for path in paths)}]"] if paths else others


def entry_point(main: Callable[[], None], paths: bool = False) -> None:
    """Run a Hydra main function; a user's mistake ends in one message on stderr and exit status 2.

    Args:
        main: the function.
        paths: words of the command line that are no overrides are ``runs``.
    """
    prepare()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of Hydra's own printout
    try:
        if paths:
            sys.argv[1:] = with_paths(sys.argv[1:])
        main()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        show(message)
        sys.exit(USER_ERROR_STATUS)


def prepare() -> None:
    """What holds in every process that runs a command or a part of one: known resolvers, no idle warnings."""
    register_resolvers()
    # Lightning finds a missing validation split and a resumed run strange, uses what torch deprecates, and advertises.
    noises = (
        "Total length of `list` across ranks is zero",
        "Checkpoint directory .* exists and is not empty",
        ".*LeafSpec",
        "The `srun` command is available",  # which is how a login node is
    )
    for noise in noises:
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))


def explain(error: Exception) -> str | None:
    """What to tell a user about ``error``; None if it is no mistake of theirs, and whoever mends it wants the trace."""
    if isinstance(error, ConfigCompositionException | MissingConfigException):
        return _explain_override(error)
    if isinstance(error, InstantiationException):
        return f"{error.__cause__ or error}"
    if type(error).__module__.startswith("wandb."):
        return f"logger=wandb: {error} Or set WANDB_API_KEY, or WANDB_MODE=offline, in the environment"
    known = UserError | MisconfigurationException | NonFiniteLossError | HydraException | OmegaConfBaseException
    if isinstance(error, known):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def show(message: str) -> None:
    """Print ``message`` in a red box on stderr."""
    Console(stderr=True).print(Panel(Text(message.strip()), title="dcdit", border_style="red"))


def _explain_override(error: ConfigCompositionException | MissingConfigException) -> str:
    """Hydra's message about a wrong override, with the key that was probably meant."""
    cause = error.__cause__
    message = str(error).splitlines()[0]
    if isinstance(error, MissingConfigException):
        options = ", ".join(error.options or [])
        return f"{message}" + (f"\navailable: {options}" if options else "")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        given = [word for word in sys.argv[1:] if word.split("=")[0].lstrip("+~") == cause.full_key]
        known = [str(key) for key in cause.parent_node]
        remedy = suggestion(str(cause.key), known) if known else f"to add it say +{cause.full_key}=..."
        return f"{given[0] if given else cause.full_key}: there is no such key, {remedy}"
    return f"{message}\n{cause or ''}"
