"""The words of a command line, made ready for Hydra: what is meant as text reaches it as it was typed."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from antlr4 import InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer

from dcdit.checks import Named, annotations, visible
from dcdit.errors import UserError
from dcdit.settings.help import choices, group_names

TEXT_KEYS = frozenset(
    {
        *("account", "autoencoder", "best", "cache", "classes", "constraint", "dir", "directory", "dirpath", "entity"),
        *("features.model", "folder", "group", "id", "mlp", "name", "norm", "notes", "partition", "project"),
        *("qos", "reference", "router", "save_dir", "setup", "subdir", "tags", "weak_checkpoint", "weights"),
    }
)
"""Keys of texts, by their last part or last two, that no class of a configuration names, and ``classes``, which may be
numbers too. In their values Hydra would find numbers: 2026_11_26, 1e5, true."""

_NUMBER_KEYS = frozenset({"sampler.cache", "ratio.group"})
"""Keys of numbers, by their last two parts, that share the last part with a key of text."""

_OPTIONS_WITH_VALUE = frozenset(
    {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn"}
    | {"--config-dir", "-cd", "--experimental-rerun"}
)
"""Options of Hydra whose value is the next word."""

_BEFORE = {OverrideLexer.COMMA, OverrideLexer.BRACKET_OPEN, OverrideLexer.POPEN}
_AFTER = {OverrideLexer.COMMA, OverrideLexer.BRACKET_CLOSE, OverrideLexer.BRACE_CLOSE, OverrideLexer.PCLOSE}
_CONVERTED = {OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL}
_OF_NUMBERS = re.compile(r"\b(range|interval|int|float|bool)\s*\(")


def options_last(arguments: Sequence[str]) -> list[str]:
    """Command-line words for Hydra, whose options may not stand between overrides: each in its order, options last."""
    of_options = _values_of_options(arguments)
    options = [index for index, word in enumerate(arguments) if word.startswith("-") or index in of_options]
    overrides = [word for index, word in enumerate(arguments) if index not in options]
    return [*overrides, *(arguments[index] for index in options)]


def _values_of_options(arguments: Sequence[str]) -> set[int]:
    """The places of words that are the values of the option before them."""
    return {index + 1 for index, word in enumerate(arguments) if word in _OPTIONS_WITH_VALUE}


def plugins_named(arguments: Sequence[str]) -> object:
    """The value of the key ``plugins`` in command-line words, which is needed before anything is composed.

    Raises:
        UserError: if it has several values, as in a sweep.
    """
    value: object = []
    for word in arguments:
        override = _parsed(word) if word.startswith("plugins=") else None
        if override is not None:
            if override.is_sweep_override():
                raise UserError(f"{word}: all runs of a sweep have the same plug-ins, name them as plugins=[one,other]")
            value = override.value()
    return value


def config_folder(arguments: Sequence[str]) -> str | None:
    """The folder that Hydra's option ``--config-dir`` names in command-line words; None without it."""
    folder = None
    for index, word in enumerate(arguments):
        option, given, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            folder = value if given else next(iter(arguments[index + 1 :]), None)
    return folder


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Command-line words for Hydra: paths that stand alone become ``runs=[...]``.

    Raises:
        UserError: if ``runs`` is given as well.
    """
    of_options = _values_of_options(arguments)
    paths = [
        word
        for index, word in enumerate(arguments)
        if index not in of_options and not word.startswith("-") and ("=" not in word or Path(word).exists())
    ]
    if paths and any(word.startswith("runs=") for word in arguments):
        raise UserError(f"{paths[0]}: paths and runs=... are two ways to say the same, take one")
    others = [word for index, word in enumerate(arguments) if index in of_options or word not in paths]
    return [*others, f"runs=[{','.join(json.dumps(path) for path in paths)}]"] if paths else others


def quoted(arguments: Sequence[str], config: Callable[..., Any] | None = None) -> list[str]:
    """Command-line words for Hydra, with quotes around what is meant as text.

    These are values that Hydra's grammar does not take, such as paths with "=", and words that it would read as numbers
    although they are given for a text, such as ``run_name=2026_11_26``, one by one in lists and sweeps.

    Args:
        arguments: the words.
        config: class of the command's configuration, whose annotations say which of its keys are texts.

    Raises:
        UserError: if a group is given what is no name of a choice, or a value cannot be read at all.
    """
    return [word if word.startswith("-") or "=" not in word else _quoted(word, config) for word in arguments]


def _quoted(word: str, config: Callable[..., Any] | None) -> str:
    key, _, value = word.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    group = "/" in name or name in group_names()
    override = _parsed(word)
    if override is None:
        escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        text = f"{key}='{escaped}{chr(92) * trailing}'"
        return text if _parsed(text) is not None else word
    if group:
        _check_choice(word, name, override)
    if (group or is_text(name, config)) and not _OF_NUMBERS.search(value):
        return f"{key}={_numbers_quoted(value)}"
    return word


def _parsed(word: str) -> Override | None:
    """The override in a word; None if Hydra's grammar does not take it."""
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):  # Python reads no number of thousands of digits
        return None


def is_text(key: str, config: Callable[..., Any] | None = None) -> bool:
    """Whether the value of a key, or each in its list, is a text.

    Args:
        key: with dots.
        config: class of the configuration that the key is of.
    """
    parts = key.split(".")
    hints = [config] if config else []
    for part in parts:
        hints = [annotations(kind)[part] for hint in hints for kind in classes_of(hint) if part in annotations(kind)]
    kinds = {kind for hint in hints for kind in _scalars(hint)}
    names = {parts[-1], ".".join(parts[-2:])}
    named = bool(names & TEXT_KEYS) and not names & _NUMBER_KEYS
    if kinds:
        return str in kinds and (named or not kinds & {int, float})
    return key.startswith("cluster.env.") or named


def classes_of(hint: Any) -> list[Callable[..., Any]]:
    """The classes whose keys a section with this annotation may have."""
    named = [choice for choice in getattr(hint, "__metadata__", ()) if isinstance(choice, Named)]
    if named:
        return list(named[0].table.values())
    if get_origin(hint) in (Annotated, Union, UnionType):
        return [kind for argument in get_args(hint) for kind in classes_of(argument)]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) else []


def _scalars(hint: Any) -> set[Any]:
    """What single values an annotation takes: those of lists too, not those of sections."""
    if get_origin(hint) is Annotated:
        return _scalars(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType, list, tuple, Sequence):
        return {kind for argument in get_args(hint) for kind in _scalars(argument)}
    if get_origin(hint) is Literal:
        return {int} if any(isinstance(choice, int) for choice in get_args(hint)) else set()
    return {hint} & {bool, int, float, str}


def _numbers_quoted(value: str) -> str:
    """A value in Hydra's grammar, with quotes around those of its words that would be read as numbers."""
    text = f"={value}"  # after which the lexer expects a value
    tokens = [token for token in OverrideLexer(InputStream(text)).getAllTokens() if token.type != OverrideLexer.WS]
    parts, end, braces = [], 0, 0
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        braces += (token.type == OverrideLexer.BRACE_OPEN) - (token.type == OverrideLexer.BRACE_CLOSE)
        first = before is not None and (
            before.start == 0 or before.type in _BEFORE or (braces and before.text[-1:] == ":")
        )
        alone = first and (after is None or after.type in _AFTER)
        if alone and token.type in _CONVERTED:
            parts += [text[end : token.start], f"'{token.text}'"]
            end = token.stop + 1
    return "".join([*parts, text[end:]])[1:]


def _check_choice(word: str, group: str, override: Override) -> None:
    """Raise :class:`UserError` unless a group is given names of choices, of which Hydra makes an error of its own."""
    value = override._value
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        names = choice if isinstance(choice, list) else [choice]
        if any(
            name is None or isinstance(name, list) or (isinstance(name, dict) and name is not value) for name in names
        ):
            known = ", ".join(choices(group))
            more = {"logger": "; for none say ~logger", "callbacks": "; callbacks.<name>=null leaves one out"}
            raise UserError(
                f"{visible(word)}: {group} is a group, choose from {known}, or leave the word out{more.get(group, '')}"
            )
