"""From what a user names to the file or folder that holds the weights: here, or on the Hugging Face hub."""

import hashlib
import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dcdit.checks import HUB_ID, visible
from dcdit.errors import UserError
from dcdit.runs.resume import LAST, STEP_NAME
from dcdit.runtime.hub import cause_of, check_hub_answers

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SHIPPED = {"digits": Path(__file__).parent / "digits"}
"""Networks that come with this package, by the name that stands for their folder."""

_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")
_CONFIG = "config.json"
_MOST_FILES = 100_000  # of a repository on the hub
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<early>[^/@]+))?(?P<path>/[^@]*)?(?:@(?P<late>.+))?")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Attributes:
        name: as the user gave it.
        key: that named it.
        path: the file or folder that holds the weights.
        run: what results call it; with that of its sweep, if it is of one.
        home: the folder for what is made of it: the run's, or one of its own among the runs.
    """

    name: str
    path: Path
    run: str
    home: Path
    key: str = "checkpoint"

    @property
    def words(self) -> str:
        """Key and name, as messages begin."""
        return f"{self.key}={self.name}"


def locate(name: str, runs: str, key: str = "checkpoint") -> Place:
    """Where the checkpoint ``name`` is; one on the hub is fetched, unless it is there already.

    Args:
        name: a checkpoint file, a run's directory, an exported folder, a folder of diffusers, a name in
            :data:`SHIPPED`, or ``hf://<owner>/<repository>[/<file or folder>][@<revision>]``.
        runs: folder of all runs.
        key: that names it, for messages.

    Raises:
        UserError: if there is no such checkpoint, naming what was found instead.
    """
    if name in SHIPPED:
        return _elsewhere(name, SHIPPED[name], f"pretrained_{name}", runs, key)
    if name.startswith("hf:"):
        slug = re.sub(r"\W+", "_", name.removeprefix("hf:")).strip("_")
        return _elsewhere(name, _fetch(name, visible(f"{key}={name}")), slug, runs, key)
    path = Path(name)
    if not path.exists():
        hub = "hf://<owner>/<repository>/<folder>"
        if re.fullmatch(HUB_ID, name) and not name.startswith(f"{runs}/"):
            hub = f"hf://{name} if it is on the hub"
        kinds = "a file, a run's directory, an exported folder, one of diffusers"
        raise UserError(f"{key}={name} does not exist: give {kinds}, {', '.join(SHIPPED)}, or {hub}")
    if path.is_dir():
        names = [each.relative_to(path).as_posix() for part in (".", *_PARTS) for each in (path / part).glob("*")]
        path = path / pick(names, f"{key}={name}")[0]
    folder = path.resolve().parent
    if folder.name == "checkpoints" and path.is_file():  # an exported folder there belongs to no run
        run = folder.parent
        sweep = run.parent.name
        called = f"{sweep.removesuffix('_sweep')}/{run.name}" if sweep.endswith("_sweep") else run.name
        return Place(name, path, called, run, key)
    whole = path.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()[:6]  # two folders may have one name
    return _elsewhere(name, path, f"{whole.name if path.is_dir() else whole.stem}-{digest}", runs, key)


def _elsewhere(name: str, path: Path, run: str, runs: str, key: str) -> Place:
    return Place(name, path, run, Path(runs) / run, key)


_PARTS = ("checkpoints", "transformer")


def pick(names: Collection[str], place: str) -> tuple[str, list[str]]:
    """Which of the files in a folder are the checkpoint.

    Args:
        names: of the files, relative to the folder.
        place: key and name of the folder, for messages.

    Returns:
        The file or folder that holds the weights, and all files that belong to it; relative.

    Raises:
        UserError: if there is none, or more than one.
    """
    for part in ("", "transformer/"):
        if part + _CONFIG in names:
            return part or ".", [part + _CONFIG, *_weights_of_folder(names, part)]
    for part in ("checkpoints/", ""):
        steps = sorted(name for name in names if name.startswith(part) and STEP_NAME.fullmatch(name[len(part) :]))
        if part + LAST in names or steps:
            found = part + LAST if part + LAST in names else steps[-1]
            return found, [found]
    files = [name for name in names if name.endswith(_SUFFIXES) and "/" not in name]
    if len(files) != 1:
        if files:
            raise UserError(
                f"{place} holds several checkpoint files: {', '.join(map(visible, sorted(files)[:8]))}; name one of"
                " them"
            )
        raise UserError(
            f"{place} holds no checkpoint (it holds {_tops(names)}): give a run's directory, an exported folder, or a"
            " file"
        )
    return files[0], files


def _tops(names: Collection[str]) -> str:
    """What lies at the top of a folder with files of these names, for messages."""
    return ", ".join(sorted({visible(name.split("/")[0]) for name in names})[:8]) or "nothing"


def _weights_of_folder(names: Collection[str], part: str) -> list[str]:
    """Files of weights beside a ``config.json``: one, or all pieces of one; no variants of lower precision."""
    files = sorted(name for name in names if name.startswith(part) and "/" not in name[len(part) :])
    for suffix in (".safetensors", ".bin"):
        whole = [name for name in files if re.fullmatch(rf"\w+{re.escape(suffix)}", name[len(part) :])]
        pieces = [name for name in files if re.fullmatch(rf"\w+-\d+-of-\d+{re.escape(suffix)}", name[len(part) :])]
        if whole or pieces:
            return whole or pieces
    raise UserError(f"beside {part}{_CONFIG} there are no weights (.safetensors): the folder is incomplete")


def weights_of_folder(folder: Path) -> list[Path]:
    """The files of weights in a folder with a ``config.json``; UserError if there are none."""
    return [folder / name for name in _weights_of_folder(os.listdir(folder), "")]


# ---- the hub -------------------------------------------------------------------------------------------------------


def _fetch(address: str, said: str) -> Path:
    """The file or folder at an address of the hub, in the cache of huggingface_hub; ``said`` begins messages."""
    found = _HUB.fullmatch(address)
    twice = found and found["early"] and found["late"]
    if not found or twice or {".", ".."} & set(re.split("[/@]", address)) or not address.isprintable():
        raise UserError(
            f"{said} is no address: write hf://<owner>/<repository>[/<file or folder>][@<revision>], such"
            " as hf://amd/DynamicChunkingDiT/S-256"
        )
    repository, revision = found["repository"], found["early"] or found["late"]
    path = (found["path"] or "").strip("/")
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    check_hub_answers()
    api = HfApi()
    unreachable: list[Exception] = []
    try:
        names = _names_on_hub(api, repository, revision, unreachable)
        cached = names is None
        if names is None:
            folder = Path(api.snapshot_download(repository, revision=revision, local_files_only=True))
            names = [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]
        target, files = _pick_below(path, names, f"{said}: {repository}", said)
        local = [
            Path(api.hf_hub_download(repository, name, revision=revision, local_files_only=cached)) for name in files
        ]
        return local[0] if target == files[0] else local[0].parent
    except hub.RevisionNotFoundError as error:
        raise UserError(f"{said}: {repository} has no revision {revision}") from error
    except hub.GatedRepoError as error:
        raise UserError(
            f"{said}: its owners ask you to accept their terms: do so on the page of {repository}, then `hf auth login`"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise UserError(
            f"{said}: the hub has no {repository}, or you may not see it: log in with `hf auth login`"
        ) from error
    except hub.HFValidationError as error:
        raise UserError(f"{said}: {repository} is no name of a repository: {cause_of(error)}") from error
    except (hub.HTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError) as error:
        pattern = path if not path or path.endswith(_SUFFIXES) else f"{path}/*"
        where = f" {shlex.quote(pattern)}" if pattern else ""
        raise UserError(
            f"{said}: the hub cannot be reached ({cause_of((*unreachable, error)[0])}), and the files are not in its"
            f" cache here. Where it can be reached, `hf download {repository}{where} --local-dir weights`; then copy"
            f" the folder and give {said.partition('=')[0]}=weights{f'/{path}' if path else ''}"
        ) from error
    except UserError as error:
        raise error if str(error).startswith(said) else UserError(f"{said}: {error}") from error
    except Exception as error:  # huggingface_hub raises whatever a malformed answer provokes
        raise UserError(
            f"{said}: the hub's answer cannot be understood ({type(error).__name__}: {cause_of(error)}): is HF_ENDPOINT"
            " the address of a hub?"
        ) from error


def _names_on_hub(
    api: "HfApi", repository: str, revision: str | None, unreachable: list[Exception]
) -> list[str] | None:
    """Names of all files; None, and why, if the hub cannot be asked, but the cache perhaps can."""
    from huggingface_hub import errors as hub
    from huggingface_hub.hf_api import RepoFile

    try:
        listed = list(islice(api.list_repo_tree(repository, recursive=True, revision=revision), _MOST_FILES + 1))
    except (hub.RevisionNotFoundError, hub.RepositoryNotFoundError):
        raise
    except (hub.HTTPError, hub.OfflineModeIsEnabled, OSError) as error:
        unreachable.append(error)
        return None
    if len(listed) > _MOST_FILES:
        raise UserError(f"{repository} has more than {_MOST_FILES} files")
    return [file.path for file in listed if isinstance(file, RepoFile)]


def _pick_below(path: str, names: list[str], repository: str, said: str) -> tuple[str, list[str]]:
    """What :func:`pick` says of the files at and below ``path`` of a repository."""
    if path in names:
        return path, [path]
    inside = [name.removeprefix(f"{path}/") for name in names if not path or name.startswith(f"{path}/")]
    if not inside:
        raise UserError(f"{repository} holds no {path}; it holds {_tops(names)}")
    target, files = pick(inside, said)
    return _below(path, target), [_below(path, name) for name in files]


def _below(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part and part != ".") or "."
