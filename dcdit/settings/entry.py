"""What all commands share: composing their configuration, resolvers, help, and how errors are told."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dcdit.checks import check_credentials, suggestion
from dcdit.errors import TrainingError, UserError
from dcdit.runtime import terminal
from dcdit.settings.help import show_help
from dcdit.settings.overrides import quoted, with_paths
from dcdit.settings.published import CONFIG_DIR

USER_ERROR_STATUS = 2

T = TypeVar("T")


_CPU = Path("/proc/cpuinfo")


def cpu_precision() -> str:
    """``bf16-mixed`` where the CPU multiplies bfloat16 natively (AMX, AVX512-BF16), else ``32-true``."""
    try:  # where that says it, torch need not be waited for
        known = set(_CPU.read_text().split())
        native = bool(known & {"amx_bf16", "avx512_bf16"})
    except OSError:
        import torch

        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16-mixed" if native else "32-true"


def register_resolvers() -> None:
    """Register the resolvers that our configuration files use, such as ``${cpu_precision:}``."""
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    OmegaConf.register_new_resolver("relpath", os.path.relpath, replace=True)
    # A variable that is set to nothing is one that is not set: "/" is no folder of runs.
    OmegaConf.register_new_resolver("environment", lambda name, default: os.environ.get(name) or default, replace=True)
    OmegaConf.register_new_resolver("unquoted", lambda text: re.sub("['\"]", "", text), replace=True)


def plain(config: DictConfig, without: str = "", sections: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a composed configuration, interpolations resolved.

    Args:
        config: the configuration.
        without: a section to leave out, such as one that cannot be resolved here.
        sections: what must be a section, for others refer to its keys.

    Raises:
        UserError: if a section is none, or something cannot be resolved.
    """
    for name in sections:
        if not isinstance(config.get(name), DictConfig):
            raise UserError(f"{name}={config.get(name)}: {name} is a section, choose one of its group or set its keys")
    try:
        if without in config:
            config = OmegaConf.masked_copy(config, [str(key) for key in config if key != without])
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return {str(key): value for key, value in values.items()}


def model_config(name: str) -> dict[str, Any]:
    """The plain values of ``configs/model/<name>.yaml``; raises Hydra's error, with the choices, if there is none."""

    def values() -> dict[str, Any]:
        return plain(compose("flops", overrides=[f"model={name}"]).model)

    if GlobalHydra.instance().is_initialized():  # inside a command
        return values()
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return values()


def entry_point(main: Callable[[], Any], paths: bool = False, flags: Mapping[str, str] | None = None) -> None:
    """Run a command's Hydra function; a user's mistake ends in one message on stderr and exit status 2.

    Args:
        main: the function; the documentation of its module is what ``--help`` begins with.
        paths: words of the command line that are no overrides are ``runs``.
        flags: words that stand for overrides.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of Hydra's own printout

    def run() -> None:
        prepare()
        if {"--help", "-h"} & set(sys.argv[1:]):
            show_help(main.__module__)
            return
        sys.argv[1:] = [(flags or {}).get(word, word) for word in sys.argv[1:]]
        if paths:
            sys.argv[1:] = with_paths(sys.argv[1:])
        for word in (*sys.argv[1:], *(os.environ.get(name, "") for name in ("DCDIT_DATA", "DCDIT_RUNS"))):
            check_credentials(word)  # before Hydra writes down what was given
        sys.argv[1:] = quoted(sys.argv[1:])
        _held.clear()
        main()
        if _held:
            raise _held[0]

    answer(run)


_held: list[BaseException] = []


def hold(run: Callable[..., T], *arguments: Any) -> T | None:
    """Call ``run`` within Hydra; an error is kept for :func:`entry_point`, for Hydra would announce it as well."""
    try:
        return run(*arguments)
    except Exception as error:
        _held.append(error)
        return None


def answer(run: Callable[[], Any]) -> None:
    """Call ``run``; what a user did wrong becomes one message on stderr and exit status 2."""
    try:
        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        show(message)
        sys.exit(USER_ERROR_STATUS)
    loss = terminal.lost(sys.stdout)
    if loss is not None and not terminal.nobody_reads(loss):
        show(f"stdout: {loss}. The command is done, but not all that it said is there")
        sys.exit(USER_ERROR_STATUS)


def prepare() -> None:
    """What holds in every process that runs a command or a part of one: known resolvers, plain messages."""
    terminal.install()
    register_resolvers()
    log = logging.getLogger("dcdit")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False
    # Lightning finds a missing validation split and a resumed run strange, uses what torch deprecates, and advertises.
    noises = (
        "Total length of `list` across ranks is zero",
        "Checkpoint directory .* exists and is not empty",
        ".*LeafSpec",
        "The `srun` command is available",  # which is how a login node is
    )
    for noise in noises:
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def explain(error: BaseException) -> str | None:
    """What to tell a user about ``error``; None if it is no mistake of theirs, and whoever mends it wants the trace."""
    if isinstance(error, ConfigCompositionException | MissingConfigException):
        return _explain_override(error)
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        place = re.search(r"^full_key: (\S+)", str(error), flags=re.MULTILINE)
        return f"{place[1]}: {error.__cause__}" if place else str(error.__cause__)
    if isinstance(error, UserError | TrainingError | HydraException | OmegaConfBaseException):
        return str(error)
    origin = type(error).__module__
    if origin.startswith("lightning.") and type(error).__name__ == "MisconfigurationException":
        return str(error)
    if origin.startswith("wandb."):
        key = " Or set WANDB_API_KEY, or WANDB_MODE=offline, in the environment" if "api" in str(error).lower() else ""
        return f"logger=wandb: {error}{key}"
    if isinstance(error, OSError):
        where = error.filename if isinstance(error.filename, str) else _origin(error)
        return f"{where}: {error.strerror or error}"
    return None


def _origin(error: BaseException) -> str:
    """The module and line of this package that an error came through last."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if str(name).startswith("dcdit"):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found or type(error).__name__


def show(message: str) -> None:
    """Print ``message`` in a red box on stderr."""
    from rich.panel import Panel
    from rich.text import Text

    from dcdit.runtime.display import Console

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
