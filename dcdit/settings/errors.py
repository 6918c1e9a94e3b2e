"""How a command tells errors: what a user did wrong is one message; what they did not is a traceback."""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dcdit.checks import shown, suggestion
from dcdit.errors import TrainingError, UserError
from dcdit.runtime import terminal
from dcdit.runtime.files import describe_dangling_link
from dcdit.runtime.imports import missing_extra, remedy_for
from dcdit.settings.help import choices, keys_in

USER_ERROR_STATUS = 2
MOST_SUGGESTED = 3
"""Keys that are suggested for one that there is not."""

_PLUGINS = {"hydra/sweeper/optuna": "hydra_plugins.hydra_optuna_sweeper"}
"""Files that an optional plug-in of Hydra brings."""


def exit_with_message(run: Callable[[], Any]) -> None:
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
        print_error(message)
        sys.exit(USER_ERROR_STATUS)
    loss = terminal.lost(sys.stdout)
    if loss is not None and not terminal.nobody_reads(loss):
        print_error(f"stdout: {loss}. The command is done, but not all that it said is there")
        sys.exit(USER_ERROR_STATUS)


def explain(error: BaseException, overrides: Sequence[str] | None = None) -> str | None:
    """What to tell a user about ``error``; None if it is no mistake of theirs, and whoever mends it wants the trace.

    Args:
        overrides: what the configuration was composed of; None takes the command line.
    """
    if isinstance(error, ConfigCompositionException | MissingConfigException):
        return _explain_override(error, sys.argv[1:] if overrides is None else overrides)
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        full_key = re.search(r"^full_key: (\S+)", str(error), flags=re.MULTILINE)
        return f"{full_key[1]}: {error.__cause__}" if full_key else str(error.__cause__)
    if isinstance(error, OverrideParseException):
        return (
            f"{shown(error.override)} is no key=value that can be read. A value with spaces or special characters needs"
            ' quotes around the whole, "classes=[circle, square]"; a text with commas or brackets in it needs its own,'
            " \"note='a, b'\""
        )
    if isinstance(error, UserError | TrainingError | HydraException | OmegaConfBaseException):
        return refused_by_resolver(error) or str(error)
    if isinstance(error, ValueError) and re.match(r"(Only one of|The) --", str(error)):
        return str(error)  # of Hydra, about its options
    origin = type(error).__module__
    if origin.startswith("lightning.") and type(error).__name__ == "MisconfigurationException":
        return str(error)
    if origin.startswith("wandb."):
        remedy = " Or set WANDB_API_KEY in the environment, or logger.wandb.mode=offline"
        key = remedy if "api" in str(error).lower() else ""
        return f"logger=wandb: {error}{key}"
    if isinstance(error, RuntimeError) and str(error).startswith("Unknown plugin class"):  # of Hydra
        slurm = remedy_for("hydra_plugins.hydra_submitit_launcher")
        return f"{error}: its package is not installed, or does not fit. cluster=slurm needs {slurm}"
    if module := missing_extra(error):
        return f"this needs {remedy_for(module)}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{str(error).partition('. ')[0]}: take a smaller batch_size, or precision=bf16"
    if isinstance(error, OSError):
        where = error.filename if isinstance(error.filename, str) else _origin(error)
        return describe_dangling_link(error) or f"{where}: {error.strerror or error}"
    return None


def refused_by_resolver(error: BaseException) -> str | None:
    """The message of a :class:`UserError` of a resolver, which OmegaConf puts into an error of its own."""
    mark, line = f"{UserError.__name__} raised while resolving interpolation: ", str(error).partition("\n")[0]
    return line.partition(mark)[2] or None


def _origin(error: BaseException) -> str:
    """The module and line of this package that an error came through last."""
    location, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if str(name).startswith("dcdit"):
            location = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return location or type(error).__name__


def print_error(message: str) -> None:
    """Print ``message`` in a red box on stderr."""
    from rich.panel import Panel
    from rich.text import Text

    from dcdit.runtime.display import Console

    Console(stderr=True).print(Panel(Text(message.strip()), title="dcdit", border_style="red"))


def _explain_override(error: ConfigCompositionException | MissingConfigException, overrides: Sequence[str]) -> str:
    """Hydra's message about a wrong override, with the key that was probably meant."""
    cause = error.__cause__
    message = str(error).splitlines()[0]
    if isinstance(error, MissingConfigException):
        if module := _PLUGINS.get(error.missing_cfg_file or ""):
            return f"{message.rstrip('.')}: it needs {remedy_for(module)}"
        options = list(error.options or [])
        close = difflib.get_close_matches((error.missing_cfg_file or "").rpartition("/")[2], options, n=1)
        meant = f": did you mean {close[0]}?" if close else ". If a plug-in has it, name that with plugins=[...]"
        return f"{message.rstrip('.')}{meant}\navailable: {', '.join(options)}" if options else message
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        given = next(
            (word for word in overrides if _key_of(word).startswith(f"{cause.full_key}.")), str(cause.full_key)
        )
        given = next((word for word in overrides if _key_of(word) == cause.full_key), given)
        known = [str(key) for key in cause.parent_node]
        remedy = suggestion(str(cause.key), known) if known else f"to add it say +{cause.full_key}=..."
        same = _keys_ending_in(_key_of(given).rpartition(".")[2], cause.parent_node._get_root())
        if 0 < len(same) <= MOST_SUGGESTED:
            remedy = f"did you mean {' or '.join(same)}?"
        elif owners := _choices_with(str(cause.full_key)):
            named = ", ".join(owners[:MOST_SUGGESTED])
            remedy = f"it belongs to {named}" + (", and others" if len(owners) > MOST_SUGGESTED else "")
        return f"{given}: there is no such key, {remedy}"
    if ambiguous := re.fullmatch(r"Ambiguous value for argument '(.*)'", message):
        key, _, value = ambiguous[1].replace("'", "").partition("=")
        return (
            f"{key}={value}: values with commas between them are a sweep, which needs -m. One text that has a comma"
            f" needs quotes, \"{key}='{value}'\"; a list needs brackets, {key}=[{value}]"
        )
    return f"{message}\n{cause or ''}"


def _key_of(word: str) -> str:
    """The key that an override sets, without its value."""
    return word.split("=")[0].lstrip("+~")


def _choices_with(full_key: str) -> list[str]:
    """The choices of a configuration group that have a key, such as ``diffusion=flow``."""
    group, _, key = full_key.rpartition(".")
    files = choices(group) if group else {}
    return [f"{group}={choice}" for choice, file in files.items() if key in keys_in(file)]


def _keys_ending_in(last: str, node: Any, path: str = "") -> list[str]:
    """The keys of a composed configuration whose last part is ``last``; none of Hydra's own."""
    found = []
    for key in node if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() else ():
        name = str(key)
        where = f"{path}.{name}" if path else name
        found += [where] if name == last else []
        if where != "hydra":
            found += _keys_ending_in(last, node._get_node(key), where)
    return found
