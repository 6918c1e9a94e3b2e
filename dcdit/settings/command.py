"""A command: one function of its typed configuration, which a command line or a Python program calls."""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any, Generic, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dcdit.checks import check_credentials
from dcdit.errors import UserError
from dcdit.runtime import terminal
from dcdit.settings.compose import compose_values, configuration_of, primary_config, register_resolvers
from dcdit.settings.errors import exit_with_message, explain
from dcdit.settings.help import show_help
from dcdit.settings.overrides import config_folder, options_last, plugins_named, quoted, with_paths
from dcdit.settings.plugins import add_config_folder, find_plugins, load_plugins
from dcdit.settings.published import CONFIG_DIR

C = TypeVar("C")
R = TypeVar("R")


class Command(Generic[C, R]):
    """A function of a configuration; :meth:`main` is its command line.

    Args:
        name: of the command, of its file in ``configs`` and of its module in this package.
        function: what it does; its parameter ``config`` is annotated with the class of the configuration.
        around: called on the command line with what makes the configuration and calls the function.
        paths: words of the command line that are no overrides are the key ``runs``.
        flags: words of the command line that stand for overrides.
        saved: makes of the words of a command line values that take the place of the command's own file and groups;
            None if no word asks for that.
        plugins: whether it imports installed plug-ins at its start; else only where a file that it reads needs them.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[C], R],
        around: Callable[[Callable[[], R]], Any] | None = None,
        paths: bool = False,
        flags: Mapping[str, str] | None = None,
        saved: Callable[[Sequence[str]], Mapping[str, Any] | None] = lambda words: None,
        plugins: bool = True,
    ) -> None:
        update_wrapper(self, function)
        self.name, self.function, self.paths, self.flags = name, function, paths, flags or {}
        self.saved, self.plugins = saved, plugins
        self.config: type[C] = inspect.signature(function).parameters["config"].annotation
        self.errors: list[Exception] = []
        """Of the jobs of the last command line: Hydra would print those that reach it, beside our own message."""

        def task(values: DictConfig) -> Any:
            """One job of the command line, for Hydra to call."""

            def run() -> R:
                if "run_dir" in values:  # of a job of a sweep, Hydra says where it runs
                    values.run_dir = str(HydraConfig.get().runtime.output_dir)
                return self(configuration_of(self.config, values))

            try:
                return around(run) if around else run()
            except Exception as error:
                self.errors.append(error)
                return None

        # Hydra names the job by the module, and the processes of a cluster's job find the function by both names.
        task.__module__, task.__qualname__ = f"dcdit.{name}", f"{function.__name__}.task"
        self.task = task

    def __call__(self, config: C) -> R:
        """Do what ``config`` asks for; UserError if it is no configuration of this command."""
        if not isinstance(config, self.config):
            raise UserError(
                f"{self.name} takes a {self.config.__name__}, not a {type(config).__name__}: call"
                f' {self.name}({self.name}.compose("key=value", ...))'
            )
        quiet_libraries()
        return self.function(config)

    def compose(self, *overrides: str) -> C:
        """The configuration that these words of a command line describe, such as ``"sampler.steps=20"``.

        Raises:
            UserError: naming key, value and remedy.
        """
        if self.plugins:
            load_plugins(plugins_named(overrides))
        try:
            words = quoted(overrides, self.config)
            values = compose_values(self.name, words, self.saved(words))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error, overrides) or str(error)) from error
        return configuration_of(self.config, values)

    def main(self) -> None:
        """Run the command line in ``sys.argv``; a user's mistake ends in one message and exit status 2."""
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's own printout
        exit_with_message(self._run)

    def _run(self) -> None:
        set_up_process()
        add_config_folder("--config-dir", config_folder(sys.argv[1:]))
        if self.plugins:
            find_plugins(plugins_named(sys.argv[1:]))
        if {"--help", "-h"} & set(sys.argv[1:]):
            show_help(self.name, sys.modules[self.__module__].__doc__ or "")
            return
        sys.argv[1:] = [self.flags.get(word, word) for word in sys.argv[1:]]
        if self.paths:
            sys.argv[1:] = with_paths(sys.argv[1:])
        for word in (*sys.argv[1:], *(os.environ.get(name, "") for name in ("DCDIT_DATA", "DCDIT_RUNS"))):
            check_credentials(word)  # before Hydra writes down what was given
        if self.plugins:
            load_plugins(plugins_named(sys.argv[1:]))
        sys.argv[1:] = options_last(quoted(sys.argv[1:], self.config))
        primary = primary_config(self.name, self.saved(sys.argv[1:]))
        self.errors.clear()
        hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=primary)(self.task)()
        if self.errors:
            raise self.errors[0]


def command(
    name: str,
    around: Callable[[Callable[[], Any]], Any] | None = None,
    paths: bool = False,
    flags: Mapping[str, str] | None = None,
    saved: Callable[[Sequence[str]], Mapping[str, Any] | None] = lambda words: None,
    plugins: bool = True,
) -> Callable[[Callable[[C], R]], Command[C, R]]:
    """Function decorator that makes a :class:`Command`, whose arguments these are."""
    return lambda function: Command(name, function, around, paths, flags, saved, plugins)


def set_up_process() -> None:
    """Prepare a process that runs a command or a part of one: known resolvers, plain messages."""
    terminal.install()
    register_resolvers()
    quiet_libraries()
    log = logging.getLogger("dcdit")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False


def quiet_libraries() -> None:
    """Leave out warnings of libraries that tell a user nothing."""
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
    # The compiler looks for CUDA, finds its toolkit without a GPU, and warns.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
