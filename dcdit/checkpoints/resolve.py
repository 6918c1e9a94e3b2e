"""Resolve the name of a checkpoint to the file or folder that holds its weights, here or on the Hugging Face hub."""

import hashlib
import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dcdit.checks import HUB_ID, visible
from dcdit.errors import UserError
from dcdit.runs.resume import LAST, STEP_NAME, name_in_results
from dcdit.runtime.hub import cause_of, check_hub_answers
from dcdit.runtime.processes import say

SHIPPED = {"digits": Path(__file__).parent / "digits"}
"""Folders of the networks that come with this package, by their names."""

_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")
_CONFIG = "config.json"
_MAX_FILES = 100_000  # of a repository on the hub
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<early>[^/@]+))?(?P<path>/[^@]*)?(?:@(?P<late>.+))?")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that exists, and where results of it go.

    Attributes:
        name: its name, as the user gave it.
        path: the file or folder that holds the weights.
        run: name of its run in results, after the name of the sweep if the run is part of one.
        home: folder that its results are written to: its run's, or a folder of its own among the runs.
        key: the configuration key that named it.
    """

    name: str
    path: Path
    run: str
    home: Path
    key: str = "checkpoint"

    @property
    def argument(self) -> str:
        """The argument that named it, such as ``checkpoint=runs/b_n4``: messages begin with it."""
        return f"{self.key}={self.name}"


def resolve_checkpoint(name: str, runs: str, key: str = "checkpoint") -> CheckpointSource:
    """Resolve the name of a checkpoint; one on the hub is downloaded unless it is in the cache already.

    Args:
        name: a checkpoint file, a run's directory, an exported folder, a folder of diffusers, a name in
            :data:`SHIPPED`, or ``hf://<owner>/<repository>[/<file or folder>][@<revision>]``.
        runs: folder of all runs.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: if there is no such checkpoint, naming what is there instead.
    """
    if name in SHIPPED:
        if Path(name, _CONFIG).is_file():
            say(f"{key}={name} is the network that comes with dcdit; the folder here is {key}=./{name}")
        return CheckpointSource(name, SHIPPED[name], f"pretrained_{name}", Path(runs, f"pretrained_{name}"), key)
    if name.startswith("hf:"):
        run = re.sub(r"\W+", "_", name.removeprefix("hf:")).strip("_")
        return CheckpointSource(name, _download(name, visible(f"{key}={name}")), run, Path(runs, run), key)
    path = Path(name)
    if not path.exists():
        hub = "hf://<owner>/<repository>/<folder>"
        if re.fullmatch(HUB_ID, name) and not name.startswith(f"{runs}/"):
            hub = f"hf://{name} if it is on the hub"
        kinds = "a file, a run's directory, an exported folder, one of diffusers"
        raise UserError(f"{key}={name} does not exist: give {kinds}, {', '.join(SHIPPED)}, or {hub}")
    if path.is_dir():
        parts = (".", "checkpoints", "transformer")
        names = [file.relative_to(path).as_posix() for part in parts for file in (path / part).glob("*")]
        path = path / choose_files(names, f"{key}={name}")[0]
    folder = path.resolve().parent
    if folder.name == "checkpoints" and path.is_file():  # an exported folder there belongs to no run
        return CheckpointSource(name, path, name_in_results(folder.parent), folder.parent, key)
    absolute = path.resolve()
    digest = hashlib.sha256(str(absolute).encode()).hexdigest()[:6]  # two folders may have one name
    run = f"{absolute.name if path.is_dir() else absolute.stem}-{digest}"
    return CheckpointSource(name, path, run, Path(runs, run), key)


def choose_files(names: Collection[str], argument: str) -> tuple[str, list[str]]:
    """Choose the checkpoint among the files of a folder.

    Args:
        names: paths of the files, relative to the folder.
        argument: key and name of the folder; messages begin with it.

    Returns:
        The file or folder that holds the weights, and all files that belong to it, relative to the folder.

    Raises:
        UserError: if there is no checkpoint, or more than one.
    """
    for part in ("", "transformer/"):
        if part + _CONFIG in names:
            return part or ".", [part + _CONFIG, *_weights_beside_config(names, part)]
    for part in ("checkpoints/", ""):
        steps = sorted(name for name in names if name.startswith(part) and STEP_NAME.fullmatch(name[len(part) :]))
        if part + LAST in names or steps:
            newest = part + LAST if part + LAST in names else steps[-1]
            return newest, [newest]
    files = [name for name in names if name.endswith(_SUFFIXES) and "/" not in name]
    if not files:
        raise UserError(
            f"{argument} holds no checkpoint (it holds {_top_names(names)}): give a run's directory, an exported"
            " folder, or a file"
        )
    if len(files) > 1:
        several = ", ".join(map(visible, sorted(files)[:8]))
        raise UserError(f"{argument} holds several checkpoint files: {several}; name one of them")
    return files[0], files


def _top_names(names: Collection[str]) -> str:
    """The first names at the top of a folder with files of these ``names``, for messages."""
    return ", ".join(sorted({visible(name.split("/")[0]) for name in names})[:8]) or "nothing"


def _weights_beside_config(names: Collection[str], part: str) -> list[str]:
    """Files of weights in the folder ``part``: a whole one, or all pieces of one; no variants of lower precision."""
    files = sorted(name for name in names if name.startswith(part) and "/" not in name[len(part) :])
    for suffix in (".safetensors", ".bin"):
        whole = [name for name in files if re.fullmatch(rf"\w+{re.escape(suffix)}", name[len(part) :])]
        pieces = [name for name in files if re.fullmatch(rf"\w+-\d+-of-\d+{re.escape(suffix)}", name[len(part) :])]
        if whole or pieces:
            return whole or pieces
    raise UserError(f"beside {part}{_CONFIG} there are no weights (.safetensors): the folder is incomplete")


def weights_of_folder(folder: Path) -> list[Path]:
    """The files of weights in a folder with a ``config.json``; UserError if there are none."""
    return [folder / name for name in _weights_beside_config(os.listdir(folder), "")]


class _HubAddress(NamedTuple):
    """A file or folder of a repository on the hub, the whole repository where ``path`` is empty."""

    repository: str
    path: str
    revision: str | None


def _parse_address(address: str, argument: str) -> _HubAddress:
    """Split an address of the hub; UserError, beginning with ``argument``, if it is none."""
    match = _HUB.fullmatch(address)
    two_revisions = match and match["early"] and match["late"]
    if not match or two_revisions or {".", ".."} & set(re.split("[/@]", address)) or not address.isprintable():
        raise UserError(
            f"{argument} is no address: write hf://<owner>/<repository>[/<file or folder>][@<revision>], such"
            " as hf://amd/DynamicChunkingDiT/S-256"
        )
    return _HubAddress(match["repository"], (match["path"] or "").strip("/"), match["early"] or match["late"])


def _download(address: str, argument: str) -> Path:
    """Download the file or folder at an address of the hub; returns its path in the cache of huggingface_hub.

    Raises:
        UserError: beginning with ``argument``, if there is no such checkpoint, or neither hub nor cache can be read.
    """
    from huggingface_hub import hf_hub_download

    parts = _parse_address(address, argument)
    check_hub_answers()
    try:
        names, cached = _list_files(parts)
        target, files = _pick_below(parts, names, argument)
        options: dict[str, Any] = {"revision": parts.revision, "local_files_only": cached}
        local = [Path(hf_hub_download(parts.repository, file, **options)) for file in files]
    except UserError as error:
        raise error if str(error).startswith(argument) else UserError(f"{argument}: {error}") from error
    except Exception as error:  # huggingface_hub raises whatever a malformed answer provokes
        raise UserError(f"{argument}: {_describe_hub_error(error, parts, argument)}") from error
    return local[0] if target == files[0] else local[0].parent


def _list_files(address: _HubAddress) -> tuple[list[str], bool]:
    """Names of the files in a repository, and whether the cache lists them because the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
    from huggingface_hub.hf_api import RepoFile

    api, revision = HfApi(), address.revision
    try:
        tree = list(islice(api.list_repo_tree(address.repository, recursive=True, revision=revision), _MAX_FILES + 1))
    except (hub.RevisionNotFoundError, hub.RepositoryNotFoundError):
        raise
    except (hub.HTTPError, hub.OfflineModeIsEnabled, OSError):  # what fails from here on has this as its context
        folder = Path(api.snapshot_download(address.repository, revision=revision, local_files_only=True))
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], True
    if len(tree) > _MAX_FILES:
        raise UserError(f"{address.repository} has more than {_MAX_FILES} files")
    return [file.path for file in tree if isinstance(file, RepoFile)], False


def _describe_hub_error(error: Exception, address: _HubAddress, argument: str) -> str:
    """Say why nothing came from the hub, and what the user can do."""
    from huggingface_hub import errors as hub

    repository, path, revision = address
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{repository} has no revision {revision}"
    if isinstance(error, hub.GatedRepoError):
        return f"its owners ask you to accept their terms: do so on the page of {repository}, then `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"the hub has no {repository}, or you may not see it: log in with `hf auth login`"
    if isinstance(error, hub.HFValidationError):
        return f"{repository} is no name of a repository: {cause_of(error)}"
    if isinstance(error, hub.HTTPError | hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | OSError):
        pattern = path if not path or path.endswith(_SUFFIXES) else f"{path}/*"
        where = f" {shlex.quote(pattern)}" if pattern else ""
        return (
            f"the hub cannot be reached ({cause_of(error)}), and the files are not in its cache here. Where it can be"
            f" reached, `hf download {repository}{where} --local-dir weights`; then copy the folder and give"
            f" {argument.partition('=')[0]}=weights{f'/{path}' if path else ''}"
        )
    return (
        f"the hub's answer cannot be understood ({type(error).__name__}: {cause_of(error)}): is HF_ENDPOINT the address"
        " of a hub?"
    )


def _pick_below(address: _HubAddress, names: list[str], argument: str) -> tuple[str, list[str]]:
    """Choose the checkpoint at and below a path of a repository, as :func:`choose_files` does in a folder."""
    path = address.path
    if path in names:
        return path, [path]
    prefix = f"{path}/" if path else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not inside:
        raise UserError(f"{argument}: {address.repository} holds no {path}; it holds {_top_names(names)}")
    target, files = choose_files(inside, argument)
    return (f"{prefix}{target}".removesuffix("/.") or "."), [f"{prefix}{name}" for name in files]
