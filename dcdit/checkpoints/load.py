"""A trained network and what its latents are, from whatever file or folder holds its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from dcdit.checkpoints.foreign import (
    describe_guesses,
    described_by_shapes,
    diffusers_network,
    process_of,
    published_latents,
)
from dcdit.checkpoints.locate import Place, locate, weights_of_folder
from dcdit.checkpoints.power_ema import FOLDER, PowerAverages
from dcdit.checkpoints.read import DamagedError, read_checkpoint
from dcdit.checkpoints.settings import AS_PUBLISHED, AssumeSettings, WeightsKind, length_of
from dcdit.checks import Bounds, conform, shown
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.process import AS_PUBLISHED as AS_PUBLISHED_PROCESS
from dcdit.diffusion.process import Process, build_process
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.network.pretrained import WEIGHTS_FILE, read_config
from dcdit.network.registry import build_without_memory, shapes_of_spec
from dcdit.runs.resume import STEP_NAME
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.files import read_json
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import check_shapes, load_whole, read_tensors, shapes_of
from dcdit.settings.published import published_scales

_PREFIX = "network."  # of the network's parameters within a checkpoint of ours

Step = Annotated[int, Bounds(0, 99_999_999, hint="it is a number of optimiser steps")]


@dataclass(frozen=True)
class Weights:
    """The weights of a network, and all that their file says of them.

    Attributes:
        source: what holds them, for people, such as ``checkpoint of dcdit.train``.
        model: plain mapping for :func:`dcdit.network.build_network`.
        latents: what was trained on; None if neither the file nor the user says it.
        step: optimiser steps trained; None if that is not known.
        ema, raw: parameters by name; None where the file does not hold these.
        training: how it was trained: hyper-parameters, as far as they are known.
        told: whether the file names its classes.
        averages: from which EMA weights of any length are put together; None if there are none.
    """

    source: str
    model: Mapping[str, Any]
    latents: LatentSpec | None
    step: int | None
    ema: Mapping[str, Tensor] | None
    raw: Mapping[str, Tensor] | None
    training: Mapping[str, Any] = field(default_factory=dict)
    told: bool = True
    averages: PowerAverages | None = None

    def __post_init__(self) -> None:
        classes = self.model.get("num_classes")
        if self.latents is not None and len(self.latents.classes) != classes:
            raise UserError(
                f"this {self.source} names {len(self.latents.classes)} classes, its network has {shown(classes)}:"
                " export or download it again"
            )

    def of_kind(self, kind: WeightsKind) -> Mapping[str, Tensor]:
        """EMA weights, raw ones, or an average of another length; UserError if the file does not hold them."""
        length = length_of(kind)
        if length is not None:
            if self.averages is None or self.ema is None:
                raise UserError(
                    f"weights={kind}: this {self.source} keeps no averages of which one of any length could be made:"
                    " train with callbacks.power_ema.lengths=[0.05,0.1]"
                )
            return {**self.ema, **self.averages.at(length)}
        found = self.raw if kind == "raw" else self.ema
        if found is None:
            other = "ema" if kind == "raw" else "raw"
            raise UserError(f"weights={kind}: this {self.source} holds weights={other} alone")
        return found

    @property
    def process(self) -> Process:
        """The diffusion process that was trained; that of the publication where nobody says it."""
        return build_process(self.training.get("diffusion", AS_PUBLISHED_PROCESS))

    @property
    def scale(self) -> str:
        """The published scale that the network has, such as ``XL``; empty if none."""
        sizes = {key: self.model.get(key) for key in ("width", "depth", "heads")}
        return next((name.upper() for name, values in published_scales().items() if values == sizes), "")


@dataclass(frozen=True)
class Trained(Weights):
    """A checkpoint of ``dcdit.train``, whole and checked.

    Attributes:
        values: everything that the file holds.
    """

    latents: LatentSpec
    step: int
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A trained network and what its latents are.

    Attributes:
        network: in evaluation mode.
        latents: what it was trained on.
        step: optimiser steps trained; None if that is not known.
        process: the diffusion process that it was trained for.
        training: how it was trained, as far as that is known.
    """

    network: Network
    latents: LatentSpec
    step: int | None
    process: Process = field(default_factory=lambda: build_process(AS_PUBLISHED_PROCESS))
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        return fingerprint(self.network)


def load_model(
    checkpoint: str | PathLike[str] | Place,
    weights: WeightsKind = "ema",
    device: torch.device | str = "cpu",
    assume: AssumeSettings = AS_PUBLISHED,
) -> Model:
    """Rebuild a trained network from its checkpoint alone; nothing in a file is executed.

    Args:
        checkpoint: what names it, see :func:`dcdit.checkpoints.locate.locate`.
        weights: ``ema``, ``raw``, or ``ema@0.05`` for an average of that relative length.
        device: where the network goes.
        assume: what a file of another program cannot say.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, holds no such weights, or nobody says what its
            latents are.
    """
    place = checkpoint if isinstance(checkpoint, Place) else locate(str(checkpoint), "runs")
    return build_model(read_weights(place, assume), weights, device)


def build_model(found: Weights, kind: WeightsKind, device: torch.device | str = "cpu") -> Model:
    """The network whose weights were found, in evaluation mode; see :func:`load_model`."""
    if found.latents is None:
        raise UserError(
            f"this {found.source} does not say what its latents are: give assume.autoencoder=... and assume.scale=..."
        )
    network = build_network(found.model)
    load_whole(network, found.of_kind(kind))
    network.to(device).eval()
    network.to(memory_format=torch.channels_last)  # which convolutions on CPUs and on tensor cores prefer
    return Model(network, found.latents, found.step, found.process.to(torch.device(device)), found.training)


def title_of(network: Network, found: Weights) -> str:
    """The network with its published scale, if it has one: ``DC-DiT-XL``, ``DiT-XL/2``."""
    name, slash, patch = network.title.partition("/")
    return name + (f"-{found.scale}" if found.scale else "") + slash + patch


def weights_words(kind: WeightsKind) -> str:
    """Which weights, for people."""
    length = length_of(kind)
    if length is not None:
        return f"EMA weights of length {length:g}"
    return "raw weights" if kind == "raw" else "EMA weights"


def words(found: Weights, network: Network, kind: WeightsKind) -> str:
    """What was found, for people: what holds it, the network, its step, EMA weights or raw ones."""
    size = sum(parameter.numel() for parameter in network.parameters())
    step = f"step {found.step}" if found.step is not None else "at an unknown step"
    weights = weights_words(kind) if found.told or found.raw else "weights as they are"
    length = length_of(kind)
    if length is not None and found.averages is not None:
        weights += f" ({found.averages.words(length)})"
    return f"{found.source}, {title_of(network, found)} with {size / 1e6:.1f}M parameters, {step}, {weights}"


def read_weights(place: Place, assume: AssumeSettings = AS_PUBLISHED) -> Weights:
    """The weights at a place, whole and checked, and what is known of them.

    Raises:
        UserError: if they are damaged, or of no network that is known here.
    """
    path = place.path
    try:
        if path.is_dir():
            return _read_folder(path, assume)
        if path.suffix == ".safetensors":
            return _of_names({"ema": read_tensors(path)}, None, assume)
        values = read_checkpoint(path, legacy=path.suffix != ".ckpt")
        if "hyper_parameters" in values or path.suffix == ".ckpt":
            found = trained(values, path)
            assume.check_unused(found.source)
            return found
        states = {
            name: conform(name, values[key], dict[str, Tensor])
            for name, key in (("ema", "ema"), ("raw", "model"))
            if values.get(key)
        }
        return _of_names(states or {"ema": conform("state", values, dict[str, Tensor])}, values.get("opt"), assume)
    except UserError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{place.words}: {text}") from error


def read_trained(path: str | PathLike[str]) -> Trained:
    """Read a checkpoint of ``dcdit.train``, and see that its weights are those of the network it describes.

    Nothing in the file is executed, and no network is built before its size is known to be that of the weights.

    Raises:
        UserError: if the file is missing or damaged, was not written by ``dcdit.train``, a value is out of range, or
            its step is not the one in its name.
    """
    try:
        return trained(read_checkpoint(path), Path(path))
    except UserError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"checkpoint={path}: {text}") from error


def trained(values: dict[str, Any], path: Path) -> Trained:
    """What the values of a checkpoint of ``dcdit.train`` at ``path`` say; UserError if they are not such."""
    try:
        settings = conform("hyper_parameters", values["hyper_parameters"], dict[str, Any])
        step = conform("global_step", values["global_step"], Step)
        model = conform("model", settings["model"], dict[str, Any])
        check_weights(model)
        latents = LatentSpec.from_plain(settings["latents"], "latents")
        ema = _of_module("state_dict", values["state_dict"])
        raw = _of_module("current_model_state", values.get("current_model_state", values["state_dict"]))
        check_weights(model, ema, raw)
        build_process(conform("diffusion", settings.get("diffusion"), dict[str, Any]))
        averages = PowerAverages.of_checkpoint(values, step, path.resolve().parent.parent / FOLDER)
        if averages:
            wanted = shapes_of(dict(build_without_memory(model).named_parameters()))
            for state in averages.tracked.values():
                check_shapes(shapes_of(state), wanted)
    except KeyError as error:
        raise UserError(f"it was not written by dcdit.train: it lacks {error}") from None
    except UserError as error:
        raise UserError(f"it was not written by this release of dcdit.train: {error}") from None
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise DamagedError(f"checkpoint {path} holds step {step}: it is not the one that its name says")
    training = {key: value for key, value in settings.items() if key != "latents"}
    return Trained(
        "checkpoint of dcdit.train", model, latents, step, ema, raw, training, averages=averages, values=values
    )


def check_weights(model: Mapping[str, Any], *states: Mapping[str, Tensor]) -> None:
    """Raise :class:`UserError`, naming the first difference, unless states are those of the network described."""
    wanted = shapes_of_spec(model)
    for state in states:
        check_shapes(shapes_of(state), wanted)


def _of_module(key: str, state: Any) -> dict[str, Tensor]:
    """The network's parameters among those of the LightningModule."""
    found = conform(key, state, dict[str, Tensor])
    return {name.removeprefix(_PREFIX): tensor for name, tensor in found.items() if name.startswith(_PREFIX)}


def _read_folder(folder: Path, assume: AssumeSettings) -> Weights:
    """What ``dcdit export`` wrote, or a network of diffusers."""
    config = read_json(folder / "config.json", dict[str, Any], "download or export it again")
    if "_class_name" in config:
        state: dict[str, Tensor] = {}
        for file in weights_of_folder(folder):
            state |= (
                read_tensors(file)
                if file.suffix == ".safetensors"
                else conform(file.name, read_checkpoint(file, legacy=True), dict[str, Tensor])
            )
        kind, model, weights = diffusers_network(config, state, assume)
        return _foreign(kind.title, model, {"ema": weights}, None, assume)
    config = read_config(folder)
    model = conform("network", config["network"], dict[str, Any])
    state = read_tensors(folder / WEIGHTS_FILE, config["sha256"])
    check_weights(model, state)
    if config.get("latents") is not None:
        assume.check_unused("exported network")
        latents: LatentSpec | None = LatentSpec.from_plain(config["latents"], "latents")
    else:
        latents = published_latents(model, assume) if assume.autoencoder else None
    kind_of = conform("weights", config.get("weights", "ema"), WeightsKind)
    return Weights(
        "exported network",
        model,
        latents,
        conform("step", config.get("step"), Step | None),
        state if kind_of != "raw" else None,
        state if kind_of == "raw" else None,
        {"model": model, **conform("training", config.get("training", {}), dict[str, Any])},
    )


def _of_names(states: Mapping[str, Mapping[str, Tensor]], optimizer: Any, assume: AssumeSettings) -> Weights:
    """Weights that are told by their names alone; the first of ``states`` describes the network."""
    described = {kind: described_by_shapes(state, assume) for kind, state in states.items()}
    title, model = next((kind.title, model) for kind, model, _ in described.values())
    weights = {kind: weights for kind, (_, _, weights) in described.items()}
    for guess in describe_guesses(model, assume):
        say(guess)
    return _foreign(title, model, weights, _steps(optimizer), assume)


def _foreign(
    title: str, model: Mapping[str, Any], weights: Mapping[str, Any], step: int | None, assume: AssumeSettings
) -> Weights:
    """Weights of another program by our names, and what is known of them or assumed."""
    training = {"model": model, **({"diffusion": process_of(assume)} if assume.diffusion is not None else {})}
    latents = published_latents(model, assume)
    return Weights(title, model, latents, step, weights.get("ema"), weights.get("raw"), training, False)


def _steps(optimizer: Any) -> int | None:
    """Steps that the state of an Adam has counted; None if there is none."""
    try:
        return int(conform("step", float(next(iter(optimizer["state"].values()))["step"]), Step))
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError, UserError):
        return None
