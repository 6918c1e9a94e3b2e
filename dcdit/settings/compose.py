"""From the words of a command line, or of a Python program, to a typed configuration. Hydra is known here."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcdit.checks import WithOthers, annotations, call_checked
from dcdit.errors import UserError
from dcdit.runtime.files import read_json
from dcdit.settings.errors import refused_by_resolver
from dcdit.settings.plugins import load_plugins
from dcdit.settings.published import CONFIG_DIR

C = TypeVar("C")

RUN_ID = "{run_id}"
"""Stands in texts of a configuration for the run's id, which is known when the run's directory has been read."""

_CPU = Path("/proc/cpuinfo")

_SYNTHETIC = {"grid": 32, "channels": 3, "classes": 10}
"""Latents of noise where no shards say what they are."""


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


def encoder_weights(pretrained: str, *, _root_: DictConfig) -> str:
    """The weights of an encoder, ``pretrained`` or, for images of noise (``debug=tiny``), random ones."""
    return "random" if OmegaConf.select(_root_, "data.source.name") == "synthetic" else pretrained


def encoder_grid(*, _root_: DictConfig) -> int:
    """Patches of an encoder along a side: half of the latent grid's, or the next number that divides the token grid."""
    grid, patch = (OmegaConf.select(_root_, f"model.{key}", default=1) for key in ("grid", "patch"))
    if not isinstance(grid, int) or not isinstance(patch, int) or patch < 1:
        return 1  # the network itself will say what is wrong with them
    tokens = grid // patch
    return next((number for number in range(min(grid // 2, tokens), 0, -1) if tokens % number == 0), 1)


def shards_say(what: str, *, _root_: DictConfig) -> int:
    """``grid``, ``channels`` or ``classes`` of the training latents, from the manifest in ``data.directory``.

    Latents of noise, which ``debug=tiny`` writes, are as large as the network asks for; there it is some number.

    Raises:
        UserError: if there is no such folder, or its manifest does not say it.
    """
    directory = OmegaConf.select(_root_, "data.directory", throw_on_missing=False)
    if directory is None:
        raise UserError("data.directory is not set: give data.directory=..., the folder that dcdit.extract wrote")
    if OmegaConf.select(_root_, "data.source.name") == "synthetic":
        return _SYNTHETIC[what]
    path, remedy = Path(directory) / "train" / "manifest.json", "write the shards again with dcdit.extract"
    if "://" in directory:
        raise UserError(
            f"data.directory={directory}: the shape of shards elsewhere is not looked up: give model.grid,"
            " model.channels and model.num_classes"
        )
    if not path.is_file():
        fault = f"has no train/{path.name}, so it holds no shards" if Path(directory).is_dir() else "is not there"
        raise UserError(
            f"data.directory={directory} {fault}: write shards with dcdit.extract source=... out={directory}"
        )
    manifest = read_json(path, dict[str, Any], remedy)
    try:
        channels, grid, _ = manifest["latent_shape"]
        return int({"grid": grid, "channels": channels, "classes": len(manifest["classes"])}[what])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no manifest of latent shards: {remedy}") from None


def register_resolvers() -> None:
    """Register the resolvers that our configuration files use, such as ``${cpu_precision:}``."""
    # A variable that is set to nothing is one that is not set: "/" is no folder of runs.
    OmegaConf.register_new_resolver("environment", lambda name, default: os.environ.get(name) or default, replace=True)
    OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
    OmegaConf.register_new_resolver("encoder_grid", encoder_grid, replace=True)
    OmegaConf.register_new_resolver("encoder_weights", encoder_weights, replace=True)
    OmegaConf.register_new_resolver("shards_say", shards_say, replace=True)
    OmegaConf.register_new_resolver("relpath", os.path.relpath, replace=True)
    OmegaConf.register_new_resolver("unquoted", lambda text: re.sub("['\"]", "", text), replace=True)


def configuration_of(cls: Callable[..., C], values: DictConfig) -> C:
    """The configuration that composed values describe.

    Args:
        cls: its class, see :func:`dcdit.checks.config`.
        values: may have Hydra's own section.

    Raises:
        UserError: naming key, value and remedy.
    """
    return call_checked(cls, plain_values(cls, values), "")


def plain_values(cls: Callable[..., Any], values: DictConfig) -> dict[str, Any]:
    """The plain values of which :func:`configuration_of` makes a configuration.

    The plug-ins that the key ``plugins`` names are imported here: they could be named in a file, such as an experiment.

    Raises:
        UserError: if a section is none, or a plug-in cannot be imported.
    """
    hints = annotations(cls)
    optional = [name for name, hint in hints.items() if any(map(_is_open_section, get_args(hint)))]
    values_by_name = plain(values, [name for name, hint in hints.items() if _is_open_section(hint)])
    if (named := values_by_name.pop("plugins", [])) != []:
        load_plugins(named)
    return {**dict.fromkeys(optional), **values_by_name}  # None where ``~logger`` took it away


def _is_open_section(hint: Any) -> bool:
    """Whether an annotation is of a section whose keys the class does not all know; others may refer to them."""
    others = get_origin(hint) is Annotated and any(isinstance(argument, WithOthers) for argument in get_args(hint))
    return others or (get_origin(hint) or hint) in (dict, Mapping)


def plain(config: DictConfig, sections: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a composed configuration without Hydra's section, interpolations resolved.

    Args:
        config: the configuration.
        sections: what must be a section, for others refer to its keys.

    Raises:
        UserError: if a section is none, or something cannot be resolved.
    """
    for name in sections:
        if not isinstance(config.get(name), DictConfig):
            raise UserError(f"{name}={config.get(name)}: {name} is a section, choose one of its group or set its keys")
    unnamed = "run_id" in config and config.run_id is None
    try:
        if "hydra" in config or unnamed:
            config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        if unnamed:
            config.run_id = RUN_ID
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(refused_by_resolver(error) or f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return {str(key): value for key, value in values.items()} | ({"run_id": None} if unnamed else {})


def with_run_id(value: Any, run_id: str) -> Any:
    """Plain values, in whose texts the run's id stands where ``${run_id}`` stood."""
    if isinstance(value, Mapping):
        return {key: with_run_id(element, run_id) for key, element in value.items()}
    if isinstance(value, list):
        return [with_run_id(element, run_id) for element in value]
    return value.replace(RUN_ID, run_id) if isinstance(value, str) else value


def primary_config(name: str, saved: Mapping[str, Any] | None) -> str:
    """The name of the file in ``configs`` that a command's configuration is composed from.

    Args:
        name: of the command.
        saved: values that take the place of the command's own file and groups, of which ``configs/saved_<name>.yaml``
            composes them with what is not saved; None if there are none.
    """
    if saved is None:
        return name
    ConfigStore.instance().store("saved_values", dict(saved), package="_global_")
    return f"saved_{name}"


def compose_values(name: str, overrides: Sequence[str] = (), saved: Mapping[str, Any] | None = None) -> DictConfig:
    """The composed ``configs/<name>.yaml``; raises Hydra's errors, with the choices, if an override is wrong.

    Args:
        saved: see :func:`primary_config`.
    """
    register_resolvers()
    name, running = primary_config(name, saved), GlobalHydra.instance()
    if running.is_initialized() and _reads_our_files(running):  # inside a command
        return compose(name, overrides=list(overrides))
    state = Singleton.get_state()  # of a program that uses Hydra for its own configuration
    try:
        running.clear()
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            return compose(name, overrides=list(overrides))
    finally:
        Singleton.set_state(state)


def _reads_our_files(running: GlobalHydra) -> bool:
    """Whether Hydra was started by a command of dcdit, not by a program that uses it for its own configuration."""
    folders = (element.path for element in running.config_loader().get_search_path().get_path())
    return any(path is not None and path.removeprefix("file://") == CONFIG_DIR for path in folders)


def model_config(name: str) -> dict[str, Any]:
    """The plain values of ``configs/model/<name>.yaml``; raises Hydra's error, with the choices, if there is none."""
    return plain(compose_values("flops", [f"model={name}"]).model)


def given_overrides() -> list[str]:
    """The overrides of the command line that is run; none in a Python program."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def choice_of(group: str) -> str | None:
    """What the command that is run has chosen of a group; None in a Python program."""
    return str(HydraConfig.get().runtime.choices[group]) if HydraConfig.initialized() else None
