"""What a trained network is handed on as: a folder for dcdit and the hub, or a file of the reference implementation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import dcdit
from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import Weights, title_of, weights_words, words
from dcdit.checkpoints.settings import WeightsKind
from dcdit.data.autoencoder_folder import is_local
from dcdit.data.latents import IDENTITY, LatentSpec, number_words
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.network.pretrained import WEIGHTS_FILE, write_folder
from dcdit.runtime.files import replacing, writable_folder, write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_CARD = Path(__file__).with_name("card.md.jinja")


@dataclass(frozen=True)
class Card:
    """What a model card says beside what the weights say themselves.

    Attributes:
        license: an identifier of the hub, such as ``apache-2.0``; None if nobody said.
        note: a paragraph.
        command: that trained the network; empty if it is not known.
        figures: what was measured, one mapping for each measurement.
    """

    license: str | None
    note: str | None
    command: str
    figures: Sequence[Mapping[str, Any]]


def write_exported(
    out: Path, found: Weights, kind: WeightsKind, dtype: Literal["fp32", "bf16", "fp16"], card: Card
) -> str:
    """Write the folder; returns in words what is there.

    Args:
        out: folder, made if needed.
        found: the weights.
        kind: which weights.
        dtype: of the numbers in the file.
        card: what the model card says.

    Raises:
        UserError: if the folder holds something else, cannot be written, or a weight does not fit ``dtype``.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / WEIGHTS_FILE).exists():
        raise UserError(f"out={out} holds other files: choose an empty folder, or one that dcdit export wrote")
    writable_folder(out, f"out={out}")
    network = _network(found, kind)
    state = network.state_dict()
    for name, tensor in state.items():
        if not tensor.to(DTYPES[dtype]).isfinite().all():
            raise UserError(f"dtype={dtype}: {name} has values that are too large for it, take bf16 or fp32")
    training = {key: value for key, value in found.training.items() if key != "model"}
    config = {
        "dcdit": dcdit.__version__,
        "network": network.spec,
        "latents": found.latents.to_plain() if found.latents else None,
        "diffusion": found.process.facts(),
        "weights": kind,
        "step": found.step,
        "training": training,
        "figures": list(card.figures),
    }
    write_folder(out, config, state, DTYPES[dtype])
    write_text(out / "README.md", _card_of(network, found, kind, training, card))
    remark = ""
    if found.latents and is_local(found.latents.autoencoder):
        remark = (
            f"\nIts latents name the autoencoder {found.latents.autoencoder}, a folder of this machine: whoever gets"
            " the export needs that too, and autoencoder=... to say where it is"
        )
    return f"{words(found, network, kind)}: {out}{remark}"


def write_reference(out: Path, found: Weights, kind: WeightsKind) -> None:
    """Write a checkpoint in the form of the reference implementation: ``model``, ``ema``, ``opt`` and ``config``.

    Raises:
        UserError: if the network has parts that are not known there, or the file cannot be written.
    """
    if out.is_dir():
        raise UserError(f"out={out} is a directory: name a file, such as {out / 'reference.pt'}")
    network = _network(found, kind)
    state = reference_state(network)
    writable_folder(out.parent, f"out={out}")
    values = {"model": state, "ema": state, "opt": {}, "config": network.spec}
    with replacing(out) as file:
        torch.save(values, file)


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; returns the address of what is there.

    Raises:
        UserError: if the hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of dcdit"))
    except (hub.HTTPError, hub.LocalTokenNotFoundError, hub.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"push={repository}: {str(error).splitlines()[0]}. The folder {folder} is complete: log in with `hf auth"
            f" login`, then `hf upload {repository} {folder}`"
        ) from error


def _network(found: Weights, kind: WeightsKind) -> Network:
    network = build_network(found.model)
    network.load_state_dict(found.of_kind(kind))
    return network.eval()


def _card_of(network: Network, found: Weights, kind: WeightsKind, training: Mapping[str, Any], card: Card) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="dcdit", license=card.license, tags=["diffusion", "dc-dit", "class-conditional"])
    headings = list(dict.fromkeys(key for row in card.figures for key in row))
    rows = [[_short(row.get(key)) for key in headings] for row in card.figures]
    return ModelCard.from_template(
        data,
        template_str="---\n{{ card_data }}\n---\n\n" + _CARD.read_text(),
        title=title_of(network, found),
        version=dcdit.__version__,
        note=card.note,
        class_name=type(network).__name__,
        network=", ".join(f"{key} {_short(value)}" for key, value in network.spec.items() if key != "name"),
        parameters=f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        weights=weights_words(kind),
        step=f"after {found.step:,} steps" if found.step is not None else "after an unknown number of steps",
        latents=_latents(found.latents),
        classes=_classes(found.latents, network),
        training=[(key, _short(value)) for key, value in training.items()],
        command=card.command,
        figures=[headings, *rows] if rows else [],
    ).content


def _latents(latents: LatentSpec | None) -> str:
    if latents is None:
        return "not recorded"
    shape = " x ".join(map(str, latents.shape))
    if latents.autoencoder == IDENTITY:
        return f"{shape}, the images themselves in [-1, 1]"
    scale, shift = number_words(latents.scale), number_words(latents.shift)
    return f"{shape} of `{latents.autoencoder}`; the network sees (latent - {shift}) x {scale}"


def _classes(latents: LatentSpec | None, network: Network) -> str:
    names = latents.classes if latents else ()
    some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{network.num_classes}" + (f": {some}" if some else "")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
