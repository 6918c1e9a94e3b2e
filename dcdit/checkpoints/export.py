"""Export a trained network: a folder for dcdit and the hub, or a file for the reference implementation."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import dcdit
from dcdit.checkpoints.assumptions import describe_reading
from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import Weights, describe_kind, describe_weights, network_title
from dcdit.checkpoints.resolve import SHIPPED
from dcdit.checkpoints.settings import WeightsKind
from dcdit.checks import visible
from dcdit.data.autoencoder_folder import is_local
from dcdit.data.latents import IDENTITY, LatentSpec, format_numbers
from dcdit.diffusion.settings import samplers_of
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.network.pretrained import write_folder, written_files
from dcdit.runtime.files import make_writable_folder, replacing, replacing_folder
from dcdit.runtime.hub import cause_of, check_hub_answers
from dcdit.settings.plugins import describe_unfindable, plugins_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PICTURE = "samples.png"
_CARD = Path(__file__).with_name("card.md.jinja")


@dataclass(frozen=True)
class Examples:
    """Sampled images for a model card.

    Attributes:
        picture: a PNG, with a row of images for each budget.
        caption: how they were sampled.
        budgets: what each row is and costs, as a row of a table.
    """

    picture: bytes
    caption: str
    budgets: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Card:
    """Contents of a model card that the weights do not say themselves.

    Attributes:
        license: the hub's identifier of a license, such as ``apache-2.0``; None if the user gave none.
        note: a paragraph of the user; None for none.
        command: the commands that trained the network, one a line; empty if they are not known.
        figures: results of evaluations, one mapping for each.
        repository: repository of the hub that will receive the network; None if none is known.
        pipeline: files that let diffusers sample from the folder, by name; empty where it cannot.
        examples: sampled images; None for none.
    """

    license: str | None
    note: str | None
    command: str
    figures: Sequence[Mapping[str, Any]]
    repository: str | None = None
    pipeline: Mapping[str, bytes] = field(default_factory=dict)
    examples: Examples | None = None


def check_replaceable(out: Path) -> None:
    """Check that an export can replace the folder ``out``, before any work is done for it.

    Raises:
        UserError: if ``out`` holds anything but the unchanged files of an export, or cannot be written.
    """
    if out.is_dir():
        written = written_files(out)
        folders = {name.split("/")[0] for name in written if "/" in name}
        here = {path.relative_to(out).as_posix() for path in (*out.iterdir(), *out.glob("*/*"))}
        others = sorted(here - written - folders)
        if others:
            names = ", ".join(map(visible, others[:4]))
            raise UserError(
                f"out={out} holds what dcdit export did not write, or what was changed since ({names}): choose an empty"
                " folder, or move these away"
            )
        if out.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"out={out} is the current folder, or one around it: name a folder within")
    elif out.exists() or out.is_symlink():
        raise UserError(f"out={out} is no folder: choose another name")
    make_writable_folder(out.resolve().parent, f"out={out}")


def write_exported(
    out: Path, weights: Weights, kind: WeightsKind, dtype: Literal["fp32", "bf16", "fp16"], card: Card
) -> str:
    """Write weights of a ``kind`` to the folder ``out``, completely or not at all, in the place of an earlier export.

    Returns a line that describes the network and names the folder.

    Raises:
        UserError: if the folder holds anything but an export, cannot be written, or a weight does not fit ``dtype``.
    """
    check_replaceable(out)
    if fault := describe_unfindable({"model": weights.model, "diffusion": weights.process.spec}):
        raise UserError(fault)
    network = _build(weights, kind)
    state = network.state_dict()
    for name, tensor in state.items():
        if not tensor.to(DTYPES[dtype]).isfinite().all():
            raise UserError(f"dtype={dtype}: {name} has values that are too large for it, take bf16 or fp32")
    training = {key: value for key, value in weights.training.items() if key not in ("model", "plugins")}
    plugins = plugins_of({"model": network.spec, "diffusion": weights.process.spec})
    config = {
        "dcdit": dcdit.__version__,
        "network": network.spec,
        "latents": weights.latents.to_plain() if weights.latents else None,
        "diffusion": weights.process.facts(),
        "weights": kind,
        "step": weights.step,
        "training": training,
        "figures": list(card.figures),
        **({"plugins": plugins} if plugins else {}),
    }
    card_text = _render_card(network, weights, kind, config, card, out.resolve().name)
    files = {"README.md": card_text.encode(errors="backslashreplace"), **card.pipeline}
    if card.examples is not None:
        files[_PICTURE] = card.examples.picture
    with replacing_folder(out) as draft:
        write_folder(draft, config, state, DTYPES[dtype], files)
    note = ""
    if weights.latents and is_local(weights.latents.autoencoder):
        note = (
            f"\nIts latents name the autoencoder {weights.latents.autoencoder}, a folder of this machine: whoever gets"
            " the export needs that too, and autoencoder=... to say where it is"
        )
    return f"{describe_weights(weights, network, kind)}: {out}{note}"


def check_new_file(out: Path) -> None:
    """Check that the file ``out`` can be written and does not exist; UserError if not."""
    if out.is_dir():
        raise UserError(f"out={out} is a directory: name a file, such as {out / 'reference.pt'}")
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out} exists: name another file, or delete it")
    make_writable_folder(out.parent, f"out={out}")


def write_reference(out: Path, weights: Weights, kind: WeightsKind) -> str:
    """Write a checkpoint in the form of the reference implementation: ``model``, ``ema``, ``opt`` and ``config``.

    Returns a line that names the file, and how dcdit reads it.

    Raises:
        UserError: if the network has parts that are not known there, or the file cannot be written.
    """
    check_new_file(out)
    prediction = weights.process.spec.get("prediction", "velocity")
    if prediction != "velocity":
        raise UserError(
            f"format=reference: this network was trained with diffusion.prediction={prediction}, which such files do"
            " not say: format=dcdit exports it"
        )
    network = _build(weights, kind)
    state = reference_state(network)
    values = {"model": state, "ema": state, "opt": {}, "config": network.spec}
    with replacing(out) as file:
        torch.save(values, file)
    reading = describe_reading(out, network.spec, weights.process.spec, weights.latents)
    return f"{out}: for the reference implementation{reading}"


def push(folder: Path, repository: str, private: bool, space: bool = False) -> str:
    """Upload an exported folder, or a ``space``, to the Hugging Face hub; returns the address of the upload.

    What an earlier upload that broke off has sent is not sent again.

    Raises:
        UserError: if the hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    check_hub_answers()
    try:
        api = HfApi()
        kind = "space" if space else "model"
        api.create_repo(
            repository, private=private, exist_ok=True, repo_type=kind, space_sdk="gradio" if space else None
        )
        commit = api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, commit_message="Export of dcdit"
        )
        return str(commit)
    except Exception as error:  # huggingface_hub raises whatever a malformed answer provokes
        raise UserError(
            f"push={repository}: {cause_of(error)}. The folder {folder} is complete: log in with `hf auth login`, then"
            f" `{shlex.join(['hf', 'upload', repository, str(folder), *(['--repo-type=space'] if space else [])])}`"
            + ("" if space else ", or the same command again, which sends only what is not there yet")
        ) from error


def _build(weights: Weights, kind: WeightsKind) -> Network:
    network = build_network(weights.model)
    network.load_state_dict(weights.of_kind(kind))
    return network.eval()


def _render_card(
    network: Network, weights: Weights, kind: WeightsKind, config: Mapping[str, Any], card: Card, folder: str
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["diffusion", "dc-dit", "class-conditional", *(["diffusers"] if card.pipeline else [])]
    data = ModelCardData(library_name="dcdit", license=card.license, tags=tags)
    name, class_name = card.repository or folder, type(network).__name__
    path = f"./{folder}" if folder in SHIPPED else folder  # without ./ it is the network that comes with dcdit
    checkpoint = f"hf://{card.repository}" if card.repository else path
    overrides = [f"checkpoint={checkpoint}"] + (["weights=raw"] if kind == "raw" else [])
    text = ModelCard.from_template(
        data,
        template_str="---\n{{ card_data }}\n---\n\n" + _CARD.read_text(),
        title=network_title(network, weights),
        version=dcdit.__version__,
        note=card.note,
        class_name=class_name,
        module="dcdit" if hasattr(dcdit, class_name) else type(network).__module__,
        name=json.dumps(name),
        command_to_sample=shlex.join(["dcdit", "sample", *overrides]) if weights.latents else None,
        diffusion=_short(weights.process.facts()),
        samplers=", ".join(samplers_of(weights.process.settings.name)),
        network=", ".join(f"{key} {_short(value)}" for key, value in network.spec.items() if key != "name"),
        parameters=f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        weights=describe_kind(kind),
        step=f"after {weights.step:,} steps" if weights.step is not None else "after an unknown number of steps",
        latents=_describe_latents(weights.latents),
        classes=_describe_classes(weights.latents, network),
        plugins=", ".join(f"{module} ({_short(package)})" for module, package in config.get("plugins", {}).items()),
        training=[(key, _short(value)) for key, value in config["training"].items()],
        command=card.command,
        figures=_table(card.figures),
        pipeline="pipeline.py" in card.pipeline,
        routes=network.routes,
        picture=_PICTURE,
        caption=card.examples.caption if card.examples else "",
        budgets=_table(card.examples.budgets if card.examples else []),
    ).content
    return str(text).encode("utf-8", "backslashreplace").decode()  # names of files may be no text


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of text whose first row has the keys of all ``rows``; empty for no rows."""
    headings = list(dict.fromkeys(key for row in rows for key in row))
    return [headings, *([_short(row.get(key)) for key in headings] for row in rows)] if rows else []


def _describe_latents(latents: LatentSpec | None) -> str:
    if latents is None:
        return "not recorded"
    shape = " x ".join(map(str, latents.shape))
    if latents.autoencoder == IDENTITY:
        return f"{shape}, the images themselves in [-1, 1]"
    scale, shift = format_numbers(latents.scale), format_numbers(latents.shift)
    return f"{shape} of `{latents.autoencoder}`; the network sees (latent - {shift}) x {scale}"


def _describe_classes(latents: LatentSpec | None, network: Network) -> str:
    names = latents.classes if latents else ()
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{network.num_classes}" + (f": {_short(listed)}" if listed else "")


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else visible(str(value)).replace("|", "\\|")
