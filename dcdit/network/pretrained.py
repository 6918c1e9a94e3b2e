"""Networks in folders of ``config.json`` and ``model.safetensors``, which one line loads from the disk or the hub."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import save
from torch import Tensor, nn

from dcdit.checks import HUB_ID, Digest, conform, visible
from dcdit.errors import UserError
from dcdit.network.registry import NETWORKS, build_network, check_weights
from dcdit.runtime.files import content_digest, file_digest, read_json, replacing, write_text
from dcdit.runtime.hub import check_hub_answers
from dcdit.runtime.tensors import load_state_strict, read_tensors
from dcdit.settings.plugins import check_plugins, describe_unfindable, plugins_of

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

Self = TypeVar("Self", bound="Pretrained")


class Pretrained(ModelHubMixin):
    """A network with huggingface_hub's ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``, without pickles.

    huggingface_hub keeps the constructor's arguments, which are plain values, and the folder holds them.
    """

    @property
    def spec(self) -> dict[str, Any]:
        """Its name and the constructor's arguments: what :func:`dcdit.network.build_network` takes."""
        name = next((name for name, kind in NETWORKS.items() if kind is type(self)), None)
        if name is None:
            raise UserError(f"{type(self).__name__} is no network of dcdit.network.NETWORKS: register it there")
        return {"name": name, **conform("config", self._hub_mixin_config, dict[str, Any])}

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a network from an exported folder or a repository of the Hugging Face hub, in evaluation mode.

        ``options`` are those of huggingface_hub's mixin, such as ``revision`` and ``local_files_only``.

        Raises:
            UserError: if there is no such folder or repository, it is incomplete, or holds another network.
        """
        name = str(pretrained_model_name_or_path)
        if not Path(name).is_dir() and (Path(name).exists() or not re.fullmatch(HUB_ID, name)):
            raise UserError(
                f"{name} is no folder and no <owner>/<repository> of the hub: give one of them; for everything else"
                " there is dcdit.checkpoints.load.load_model"
            )
        network: Self = super().from_pretrained(name, **options)
        return network

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        if fault := describe_unfindable({"model": self.spec}):
            raise UserError(fault)
        config = {"network": self.spec, "plugins": plugins_of({"model": self.spec})}
        write_folder(save_directory, {key: value for key, value in config.items() if value}, self.state_dict())

    @classmethod
    def _from_pretrained(
        cls: type[Self],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **unknown: Any,  # the mixin passes arguments of the constructor, which the folder holds already
    ) -> Self:
        if unknown:
            raise UserError(f"from_pretrained: {', '.join(unknown)}: the folder says what the network is, leave it out")
        folder = Path(model_id)
        if not folder.is_dir():
            check_hub_answers()
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                file = hf_hub_download(
                    *(model_id, name),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
                folder = Path(file).parent
        config = read_config(folder)
        state = read_tensors(folder / WEIGHTS_FILE, config["sha256"])
        described = check_weights(
            config["network"], state
        )  # without memory until it is known that the file holds so much
        if not isinstance(described, cls):
            raise UserError(f"{model_id} holds a {described.title}: load it with {type(described).__name__}")
        network = build_network(config["network"])
        assert isinstance(network, cls)
        load_state_strict(network, state)
        return network.eval()


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and other files, each completely or not at all.

    ``config.json`` holds the digests of all files, its own among them.

    Args:
        folder: the folder; it is made if needed.
        config: plain values; ``network`` is what :func:`dcdit.network.build_network` takes.
        state: parameters by name.
        dtype: type of the floating-point numbers in the file.
        files: contents of further files, by their names, which may name a folder too: ``transformer/code.py``.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in state.items()
    }
    content = save(tensors, metadata={"format": "pt"})
    with replacing(folder / WEIGHTS_FILE) as file:
        file.write(content)
    values = {**config, "sha256": hashlib.sha256(content).hexdigest()}
    if files:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with replacing(folder / name) as file:
                file.write(data)
        values["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_text(folder / CONFIG_FILE, json.dumps({**values, "digest": content_digest(values)}, indent=2) + "\n")


def written_files(folder: Path) -> set[str]:
    """Names of the files in a folder that :func:`write_folder` wrote and nobody changed; empty if in doubt."""
    try:
        config = read_config(folder)
        digests = {WEIGHTS_FILE: config["sha256"], **digests_of(config)}
        unchanged = {name for name, digest in digests.items() if file_digest(folder / name) == digest}
    except (UserError, OSError):
        return set()
    return {CONFIG_FILE, *unchanged}


def digests_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The digests that a ``config.json`` records of the files beside it; UserError if a name leads elsewhere."""
    digests: dict[str, str] = conform("files", config.get("files", {}), dict[str, Digest])
    for name in digests:
        if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
            raise UserError(f"files: {visible(name)} is no name of a file in the folder")
    return digests


def changed_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The Python files in an exported folder that differ from what its ``config`` records, by name."""
    code = {name: digest for name, digest in digests_of(config).items() if name.endswith(".py")}
    return [name for name in code if (folder / name).exists() and file_digest(folder / name) != code[name]]


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an exported folder; ``network`` in it describes the network.

    Raises:
        UserError: if there is none, it describes no network of dcdit, was changed after it was written, or needs a
            plug-in that is not loaded.
    """
    path = folder / CONFIG_FILE
    remedy = "export the network again (dcdit export), or download the folder again"
    try:
        config: dict[str, Any] = read_json(path, dict[str, Any], remedy)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CONFIG_FILE}: it is no folder that dcdit export wrote") from None
    if "network" not in config:
        raise UserError(f"{path} describes no network of dcdit: it lacks the key `network`")
    digest = config.pop("digest", None)
    if digest != content_digest(config):
        raise UserError(f"{path} is not as it was written, its digest differs: {remedy}")
    conform("sha256", config.get("sha256"), Digest)
    training = config.get("training")
    diffusion = training.get("diffusion") if isinstance(training, Mapping) else None
    check_plugins({"model": config["network"], "diffusion": diffusion, "plugins": config.get("plugins")})
    return config
