"""Folders that diffusers' ``save_pretrained`` writes of an autoencoder: read here, checked, and only then built."""

import re
from pathlib import Path
from typing import Any

from dcdit.checks import HUB_ID, conform, reason_of, shown, suggestion
from dcdit.data.autoencoder_kinds import AUTOENCODER_KINDS, AutoencoderKind
from dcdit.data.latents import IDENTITY
from dcdit.errors import UserError
from dcdit.network.pretrained import CONFIG_FILE
from dcdit.runtime.devices import without_memory
from dcdit.runtime.files import read_json
from dcdit.runtime.hub import check_hub_answers
from dcdit.runtime.imports import check_installed
from dcdit.runtime.tensors import load_state_strict, read_tensors

_WEIGHTS = "diffusion_pytorch_model"


def is_local(name: str) -> bool:
    """Whether ``name`` can only be a local folder: it is one, or is no ``<owner>/<repository>`` of the hub."""
    return name != IDENTITY and (Path(name).is_dir() or not re.fullmatch(HUB_ID, name))


def folder_of(name: str) -> Path:
    """The local folder of the autoencoder ``name``; one on the hub is fetched, unless it is there already.

    Raises:
        UserError: if there is no such folder, or the hub cannot be reached.
    """
    if is_local(name):
        if not name or not Path(name).is_dir():
            raise UserError("there is no such folder: name one that save_pretrained wrote, or an <owner>/<repository>")
        return Path(name)
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    check_hub_answers()
    try:
        hf_hub_download(name, f"{_WEIGHTS}.safetensors")
        return Path(hf_hub_download(name, CONFIG_FILE)).parent  # of the same commit
    except (hub.HTTPError, OSError, ValueError) as error:
        raise UserError(
            "there is no such folder, and it cannot be had from the hub: give a local folder written by"
            f" save_pretrained, or the id of one on the hub, which must be reachable ({reason_of(error)})"
        ) from error


def read_folder(folder: Path) -> tuple[AutoencoderKind, dict[str, Any], Any]:
    """The autoencoder in a folder of diffusers, in evaluation mode on the CPU, in float32.

    Its configuration is checked before diffusers sees it; every weight is there, is used, and is finite.

    Returns:
        What kind it is, its whole configuration, and the model.

    Raises:
        UserError: naming the first key or weight that does not fit.
    """
    import diffusers

    where, remedy = f"{folder / CONFIG_FILE}: ", "download it again, or save it again with save_pretrained"
    try:
        config = read_json(folder / CONFIG_FILE, dict[str, Any], remedy)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CONFIG_FILE}: {remedy}") from None
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or class_name not in AUTOENCODER_KINDS:
        raise UserError(f"{where}it is of class {shown(class_name)}: {', '.join(AUTOENCODER_KINDS)} are understood")
    kind = AUTOENCODER_KINDS[class_name]
    if not hasattr(diffusers, class_name):
        raise UserError(f"{where}diffusers {diffusers.__version__} has no {class_name}: install a newer one")
    if kind.requires:
        check_installed(kind.requires, f"{where}{class_name}")
    values = {key: value for key, value in config.items() if not key.startswith("_")}  # others are notes of diffusers
    for key, value in values.items():
        if key not in kind.keys:
            raise UserError(f"{where}{key}={shown(value)}: {class_name} has no such key, {suggestion(key, kind.keys)}")
        values[key] = conform(where + key, value, kind.keys[key])
    arguments = {key: value for key, value in values.items() if key not in kind.stored}
    try:
        with without_memory():
            model = getattr(diffusers, class_name)(**arguments)
    except Exception as error:  # whatever diffusers says of values that do not fit each other
        raise UserError(f"{where}diffusers can build no {class_name} of it ({reason_of(error)}): {remedy}") from error
    files = sorted(folder.glob(f"{_WEIGHTS}.safetensors")) or sorted(folder.glob(f"{_WEIGHTS}-*-of-*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no weights ({_WEIGHTS}.safetensors): {remedy}")
    computed = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # diffusers' own patterns of names
    state = {
        _current_name(name): tensor
        for file in files
        for name, tensor in read_tensors(file).items()
        if not any(re.search(pattern, name) for pattern in computed)
    }
    try:
        load_state_strict(model, state, assign=True)
    except UserError as error:
        raise UserError(f"{files[0]}: {error}") from None
    if any(buffer.is_meta for buffer in model.buffers()):  # tables that no file holds: the constructor computes them
        state, model = model.state_dict(), getattr(diffusers, class_name)(**arguments)
        model.load_state_dict(state)
    return kind, {**model.config, **values}, model.eval().requires_grad_(False)


def _current_name(name: str) -> str:
    """The present name of a weight; published autoencoders still use the names that diffusers had before 2023."""
    old = re.fullmatch(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{old[1]}{names[old[2]]}{old[3]}" if old else name
