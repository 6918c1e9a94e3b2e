"""The pages of the reference: commands, groups of the configuration, and the modules that are called from Python."""

import html
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from keys import Key, allowed_values, heading_of, keys_of
from links import ROOT, place_of

from dcdit.__main__ import COMMANDS
from dcdit.settings.help import choices, groups_of
from dcdit.settings.published import CONFIG_DIR

MODULES = {
    "dcdit": "the names that most programs need",
    "dcdit.sampling.pipeline": "load a network and sample from it",
    "dcdit.network": "the networks, and what the rest of the code expects of one",
    "dcdit.network.interface": "what a network is",
    "dcdit.network.routing": "routers, the natural mask and the tail drop",
    "dcdit.network.attention": "attention within each sample of a packed sequence",
    "dcdit.network.packing": "kept tokens of all samples in one sequence",
    "dcdit.network.dechunk": "from tokens back to the grid",
    "dcdit.network.embeddings": "timesteps, classes and positions",
    "dcdit.network.initialisers": "initial weights",
    "dcdit.diffusion.process": "DDPM and flow matching as one object",
    "dcdit.diffusion.schedule": "noise levels of DDPM",
    "dcdit.diffusion.settings": "samplers, guidance and budgets as values",
    "dcdit.diffusion.guidance": "guidance by a weaker branch",
    "dcdit.diffusion.samplers": "from noise to latents",
    "dcdit.training.objective": "the ratio loss and the drop fraction of a step",
    "dcdit.training.settings": "the configuration of training",
    "dcdit.data.arrays": "write latent shards from arrays",
    "dcdit.data.builtin": "data sets that need no files",
    "dcdit.evaluation.settings": "metrics, and the configuration of an evaluation",
    "dcdit.evaluation.statistics": "what metrics compare",
    "dcdit.evaluation.results": "results as objects",
    "dcdit.extraction.sources": "where images come from",
    "dcdit.extraction.readers": "kinds of sources",
    "dcdit.settings.command": "commands as functions of a configuration",
    "dcdit.checks": "annotations that check values",
    "dcdit.errors": "the errors that end a command in one message",
}
"""The modules of the reference with what each is for."""


def pages() -> dict[str, str]:
    """All pages of the reference in Markdown, by their place on the site."""
    made = {"commands/index.md": _commands(), "configuration/index.md": _groups(), "api/index.md": _modules()}
    made |= {f"commands/{name}.md": _command(name) for name in COMMANDS}
    made |= {f"configuration/{group}.md": _group(group) for group in _users()}
    return made | {f"api/{name}.md": _module(name) for name in MODULES}


def config_of(name: str) -> Callable[..., Any]:
    """The class of a command's configuration."""
    config: Callable[..., Any] = getattr(import_module(f"dcdit.{name}"), name).config
    return config


def _file(name: str) -> Path:
    return Path(CONFIG_DIR, f"{name}.yaml")


def _users() -> dict[str, list[str]]:
    """The commands that choose of each group."""
    users: dict[str, list[str]] = {}
    for name in COMMANDS:
        for group in groups_of(_file(name)):
            users.setdefault(group, []).append(name)
    return users


def _commands() -> str:
    rows = "".join(f"| [`dcdit {name}`]({name}.md) | {what} |\n" for name, what in COMMANDS.items())
    return (
        "# Commands\n\nA command is called as `dcdit <command> [group=choice] [key=value] ...`, or as"
        " `python -m dcdit.<command> ...`. A group chooses a file of the [configuration](../configuration/index.md); a"
        " key sets one value. `dcdit <command> --help` prints what its page says, and"
        " `dcdit <command> --cfg job --resolve` the whole configuration with the values of its command line.\n\n"
        "These pages are made from the files in `configs/` and from the annotations that check their values.\n\n"
        f"| command | what it does |\n|---|---|\n{rows}\n"
        "`dcdit completion bash` prints what completes them with the tab key ([Installation](../install.md)).\n"
    )


def _command(name: str) -> str:
    file, config = _file(name), config_of(name)
    documentation = inspect.getdoc(import_module(f"dcdit.{name}")) or ""
    lines = [f"# dcdit {name}\n\n{documentation}\n\n"]
    groups = groups_of(file)
    if groups:
        lines.append(
            "## Groups\n\nChosen with `group=choice`; the default is bold.\n\n| group | choices |\n|---|---|\n"
        )
        for group, default in groups.items():
            names = ", ".join(f"**`{choice}`**" if choice == default else f"`{choice}`" for choice in choices(group))
            lines.append(f"| [`{group}`](../configuration/{group}.md) | {names} |\n")
        lines.append("\nThe keys of a group are on its page: click on its name.\n\n")
    keys = keys_of(file)
    lines.append(
        "## Keys\n\nSet with `key=value`. `???` is a value that you must give, `${...}` refers to another key.\n"
    )
    return "".join([*lines, *_sections(keys, allowed_values(config, keys))])


def _sections(keys: Mapping[str, Key], kinds: Mapping[str, str]) -> Iterable[str]:
    """A table of the keys of the top, then one for each section."""
    sections = [name for name, key in keys.items() if key.value is None and "." not in name]
    yield "\n" + _table([key for name, key in keys.items() if key.value is not None and "." not in name], kinds)
    for section in sections:
        comment = f"{_text(keys[section].comment)}\n\n" if keys[section].comment else ""
        below = [key for name, key in keys.items() if name.startswith(f"{section}.")]
        yield f"\n### {section}\n\n{comment}{_table(below, kinds)}"


def _table(keys: Iterable[Key], kinds: Mapping[str, str]) -> str:
    shown = [key for key in keys if key.value is not None or key.comment]
    return _rows((key.name, _code(key.value or ""), kinds.get(key.name, ""), key.comment) for key in shown)


def _rows(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """A table of keys: name, default in Markdown, values, comment. On a phone a stylesheet stacks its cells."""
    lines = ['<div class="keys" markdown>\n', "| key | default | description, and what it may be |\n|---|---|---|"]
    for name, default, values, comment in rows:
        may_be = f'<span class="values">{values}</span>' if values else ""
        lines.append(f'| <code id="{name}">{name}</code> | {default} | {_text(comment)} {may_be} |')
    return "\n".join([*lines, "\n</div>\n"]) if len(lines) > 2 else ""


def _groups() -> str:
    rows = "".join(
        f"| [`{group}`]({group}.md) | {', '.join(f'[`{name}`](../commands/{name}.md)' for name in names)} |"
        f" {len(choices(group))} |\n"
        for group, names in _users().items()
    )
    return (
        "# Groups of the configuration\n\nA group is a folder in `configs/`; each of its files is a choice. A command"
        " composes its configuration from one choice of each of its groups, from its own keys, and from the words of"
        f" the command line.\n\n| group | commands | choices |\n|---|---|---|\n{rows}"
    )


def _group(group: str) -> str:
    commands = _users()[group]
    files = choices(group)
    users = ", ".join(f"[`dcdit {name}`](../commands/{name}.md)" for name in commands)
    what = "".join(f"| [`{name}`](#{_slug(name)}) | {_text(heading_of(file))} |\n" for name, file in files.items())
    lines = [
        f"# {group}\n\n`{group}=<choice>` is a group of {users}.\n\n",
        f"## Choices\n\n| choice | what it is |\n|---|---|\n{what}\n",
        *_keys_of_group(group, config_of(commands[0])),
        "\n## Files\n",
    ]
    for name, file in files.items():
        lines.append(f"\n### {name} {{: #{_slug(name)} }}\n\n```yaml\n{file.read_text()}```\n")
    return "".join(lines)


def _keys_of_group(group: str, config: Callable[..., Any]) -> Iterable[str]:
    """A table of the keys that the choices of a group give it, with the values of each."""
    values: dict[str, dict[str, str]] = {}
    comments: dict[str, str] = {}
    kinds: dict[str, dict[str, None]] = {}
    for name, file in choices(group).items():
        keys = keys_of(file, f"{group}.")
        own = {key: found for key, found in keys.items() if key.startswith(f"{group}.")}
        for key, kind in allowed_values(config, own).items():
            values.setdefault(key, {})[name] = own[key].value or ""
            comments[key] = comments.get(key) or own[key].comment
            kinds.setdefault(key, {})[kind] = None
    hidden = (".name", "._target_", "._convert_")
    shown = [key for key in values if not key.endswith(hidden) and (comments[key] or any(values[key].values()))]
    if shown:
        kinds_of = {key: "; or ".join(filter(None, kinds[key])) for key in shown}
        rows = ((key, _defaults(values[key], group), kinds_of[key], comments[key]) for key in shown)
        yield f"\n## Keys\n\n{_rows(rows)}"


def _defaults(values: Mapping[str, str], group: str) -> str:
    """The value that all choices have; else each value with its choices, or how many there are."""
    choices_of: dict[str, list[str]] = {}
    for choice, value in values.items():
        choices_of.setdefault(value, []).append(choice)
    every = len(values) == len(choices(group))
    if len(choices_of) == 1 and (every or not values):
        return _code(next(iter(choices_of)))
    if len(choices_of) > 4:
        return "by choice, see below"
    short = [", ".join(names) if len(names) < 6 else f"{len(names)} choices" for names in choices_of.values()]
    return "<br>".join(f"{_code(value)} {names}" for value, names in zip(choices_of, short, strict=True))


def _modules() -> str:
    rows = "".join(f"| [`{name}`]({name}.md) | {what} |\n" for name, what in MODULES.items())
    return (
        "# Python\n\nThese are the modules that a program or a plug-in uses. [From Python](../python.md) and"
        f" [Extending](../extending.md) show how.\n\n| module | content |\n|---|---|\n{rows}"
    )


def _module(name: str) -> str:
    path, module = file_of(name), import_module(name)
    options = ""
    if hasattr(module, "__path__") and not hasattr(module, "__all__"):  # a package's names are those that it imports
        names = [
            name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)
        ]
        options = f"    options:\n      members: [{', '.join(names)}]\n"
    # A key is looked up more often than what is called from Python.
    return f"---\nsearch:\n  boost: 0.2\n---\n# {name}\n\n[`{path}`](../{place_of(path)})\n\n::: {name}\n{options}"


def file_of(module: str) -> str:
    """The file of a module, from the top of the repository."""
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def _slug(choice: str) -> str:
    return f"file-{re.sub(r'[^a-z0-9_]+', '-', choice.lower())}"


def _code(value: str) -> str:
    return f"<code>{_escaped(value)}</code>" if value else ""


def _text(comment: str) -> str:
    """A comment as Markdown in a table: what is in backticks is code, a page of docs/ a link, nothing else markup."""
    parts = re.split(r"`([^`]*)`|\bdocs/(\w+\.md)", comment)
    made = []
    for place, part in enumerate(parts):
        if part:
            text = _escaped(part)
            made.append((text, f"<code>{text}</code>", f"[{text}](../{part})")[place % 3])
    return "".join(made)


def _escaped(text: str) -> str:
    return re.sub(r"([*_|\[\]\\$])", lambda match: f"&#{ord(match[1])};", html.escape(text, quote=False))
