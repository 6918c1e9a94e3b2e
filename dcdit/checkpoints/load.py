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
    ForeignNetwork,
    convention_of,
    describe_diffusers,
    describe_guesses,
    infer_network,
    published_latents,
)
from dcdit.checkpoints.nesting import find_states
from dcdit.checkpoints.power_ema import FOLDER, PowerAverages
from dcdit.checkpoints.read import DamagedError, read_checkpoint
from dcdit.checkpoints.resolve import CheckpointSource, resolve_checkpoint, weights_of_folder
from dcdit.checkpoints.settings import AS_PUBLISHED, AssumeSettings, WeightsKind, length_of
from dcdit.checks import Bounds, conform, shown
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.process import Process, build_process
from dcdit.diffusion.settings import PROCESSES, PUBLISHED_PROCESS
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.network.pretrained import WEIGHTS_FILE, changed_code, read_config
from dcdit.network.registry import check_weights
from dcdit.runs.resume import STEP_NAME
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.files import read_json
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import check_shapes, load_state_strict, read_tensors, shapes_of
from dcdit.settings.plugins import ChangedPluginError, check_plugins, plugins_may_have_changed
from dcdit.settings.published import published_scales

_PREFIX = "network."  # before the names of the network's parameters within a checkpoint of ours

StepNumber = Annotated[int, Bounds(0, 99_999_999, hint="it is a number of optimiser steps")]


@dataclass(frozen=True)
class Weights:
    """The weights of a network, and everything that their file says about them.

    Attributes:
        source: what messages call the file, such as ``checkpoint of dcdit.train``.
        model: plain mapping for :func:`dcdit.network.build_network`.
        latents: the latents that it was trained on; None if neither the file nor the user describes them.
        step: optimiser steps trained; None if unknown.
        ema, raw: parameters by name; None where the file does not hold these weights.
        training: hyper-parameters of its training, as far as they are known.
        has_class_names: whether the file names its classes.
        averages: averages from which EMA weights of any length are combined; None if there are none.
    """

    source: str
    model: Mapping[str, Any]
    latents: LatentSpec | None
    step: int | None
    ema: Mapping[str, Tensor] | None
    raw: Mapping[str, Tensor] | None
    training: Mapping[str, Any] = field(default_factory=dict)
    has_class_names: bool = True
    averages: PowerAverages | None = None

    def __post_init__(self) -> None:
        classes = self.model.get("num_classes")
        if self.latents is not None and len(self.latents.classes) != classes:
            raise UserError(
                f"this {self.source} names {len(self.latents.classes)} classes, its network has {shown(classes)}:"
                " export or download it again"
            )

    def of_kind(self, kind: WeightsKind) -> Mapping[str, Tensor]:
        """Parameters by name: EMA weights, raw ones, or an average of a length; UserError if the file lacks them."""
        length = length_of(kind)
        if length is not None:
            if self.averages is None or self.ema is None:
                raise UserError(
                    f"weights={kind}: this {self.source} keeps no averages of which one of any length could be made:"
                    " train with callbacks.power_ema.lengths=[0.05,0.1]"
                )
            return {**self.ema, **self.averages.at(length)}
        state = self.raw if kind == "raw" else self.ema
        if state is None:
            other = "ema" if kind == "raw" else "raw"
            raise UserError(f"weights={kind}: this {self.source} holds weights={other} alone")
        return state

    @property
    def process(self) -> Process:
        """The diffusion process that the network was trained for; the published one where the file names none."""
        return build_process(self.training.get("diffusion", PUBLISHED_PROCESS))


@dataclass(frozen=True)
class TrainingCheckpoint(Weights):
    """A checkpoint of ``dcdit.train``, read completely and checked; ``values`` is everything that the file holds."""

    latents: LatentSpec
    step: int
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A trained network in evaluation mode, with the latents and the diffusion process that it was trained for.

    Attributes:
        step: optimiser steps trained; None if unknown.
        training: hyper-parameters of its training, as far as they are known.
    """

    network: Network
    latents: LatentSpec
    step: int | None
    process: Process = field(default_factory=lambda: build_process(PUBLISHED_PROCESS))
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that holds the network."""
        return next(self.network.parameters()).device

    @cached_property
    def digest(self) -> str:
        """Digest of the weights, the same for equal numbers."""
        return fingerprint(self.network)


def load_model(
    checkpoint: str | PathLike[str] | CheckpointSource,
    weights: WeightsKind = "ema",
    device: torch.device | str = "cpu",
    assume: AssumeSettings = AS_PUBLISHED,
) -> Model:
    """Build a trained network from its checkpoint alone; nothing in a file is executed.

    Args:
        checkpoint: its name, see ``resolve_checkpoint``, or its resolved source.
        weights: ``ema``, ``raw``, or ``ema@0.05`` for an average of that relative length.
        device: device that will hold the network.
        assume: what the user says about a file of another program.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, lacks these weights, or neither it nor the user says
            what its latents are.
    """
    source = checkpoint if isinstance(checkpoint, CheckpointSource) else resolve_checkpoint(str(checkpoint), "runs")
    return build_model(read_weights(source, assume), weights, device)


def build_model(weights: Weights, kind: WeightsKind, device: torch.device | str = "cpu") -> Model:
    """Build the network of ``weights`` in evaluation mode on ``device``; raises as :func:`load_model` does."""
    if weights.latents is None:
        raise UserError(
            f"this {weights.source} does not say what its latents are, nor by which process it was trained: give"
            " assume.autoencoder=... (identity for pixels), assume.scale=... and assume.diffusion=..."
        )
    network = build_network(weights.model)
    load_state_strict(network, weights.of_kind(kind))
    network.to(device).eval()
    network.to(memory_format=torch.channels_last)  # convolutions on CPUs and on tensor cores are faster so
    return Model(network, weights.latents, weights.step, weights.process.to(torch.device(device)), weights.training)


def was_trained_without_backbone(trained: Weights | Model) -> bool:
    """Whether training has come to steps in which samples leave the backbone out (``multi_budget.path_drop``)."""
    budgets = trained.training.get("multi_budget") or {}
    begun = trained.step is None or trained.step > budgets.get("full_budget_steps", 0)
    return bool(budgets.get("path_drop") and begun)


def title_with_additions(title: str, network: Network, trained: Weights | Model) -> str:
    """A network's title with what the published one does not have: ``DC-DiT (width gates, path drop)``."""
    has = {"width gates": network.gates is not None, "path drop": was_trained_without_backbone(trained)}
    additions = ", ".join(name for name, there in has.items() if there)
    return f"{title} ({additions})" if additions else title


def network_title(network: Network, weights: Weights) -> str:
    """The network's title with its published scale and its additions: ``DC-DiT-XL``, ``DiT-XL/2 (width gates)``."""
    sizes = {key: weights.model.get(key) for key in ("width", "depth", "heads")}
    scale = next((f"-{name.upper()}" for name, published in published_scales().items() if published == sizes), "")
    name, slash, patch = network.title.partition("/")
    return title_with_additions(f"{name}{scale}{slash}{patch}", network, weights)


def describe_kind(kind: WeightsKind) -> str:
    """Say in a few words which weights ``kind`` means."""
    length = length_of(kind)
    if length is not None:
        return f"EMA weights of length {length:g}"
    return "raw weights" if kind == "raw" else "EMA weights"


def describe_weights(weights: Weights, network: Network, kind: WeightsKind) -> str:
    """Say in one line what holds the weights, of which network, at which step, and which weights are taken."""
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    step = f"step {weights.step}" if weights.step is not None else "at an unknown step"
    which = describe_kind(kind) if weights.has_class_names or weights.raw else "weights as they are"
    length = length_of(kind)
    if length is not None and weights.averages is not None:
        which += f" ({weights.averages.describe_match(length)})"
    return f"{weights.source}, {network_title(network, weights)} with {millions:.1f}M parameters, {step}, {which}"


def read_weights(source: CheckpointSource, assume: AssumeSettings = AS_PUBLISHED) -> Weights:
    """Read and check the weights of a checkpoint, whichever program wrote it.

    Raises:
        UserError: if they are damaged, or of no network that is known here.
    """
    try:
        return _read_source(source.path, assume)
    except UserError as error:
        raise _named(error, source.path, source.argument) from error


def _read_source(path: Path, assume: AssumeSettings) -> Weights:
    if path.is_dir():
        return _read_folder(path, assume)
    if path.suffix == ".safetensors":
        return _infer_weights(find_states(read_tensors(path)), assume)
    values = read_checkpoint(path, legacy=path.suffix != ".ckpt")
    if "hyper_parameters" in values or path.suffix == ".ckpt":
        weights = _check_trained(values, path)
        assume.check_unused(weights.source)
        return weights
    return _infer_weights(find_states(values), assume, _adam_step(values.get("opt")))


def read_trained(path: str | PathLike[str]) -> TrainingCheckpoint:
    """Read a checkpoint of ``dcdit.train``, and check that its weights are those of the network it describes.

    Nothing in the file is executed, and no network is built before its size is known to be that of the weights.

    Raises:
        UserError: if the file is missing, was not written by ``dcdit.train``, or a value is out of range.
        DamagedError: if the file is damaged, or its step is not the one in its name.
    """
    try:
        return _check_trained(read_checkpoint(path), Path(path))
    except UserError as error:
        raise _named(error, Path(path), f"checkpoint={path}") from error


def _named(error: UserError, path: Path, argument: str) -> UserError:
    """The same error, whose message begins with ``argument`` unless it names the file."""
    text = str(error)
    return type(error)(text if str(path) in text else f"{argument}: {text}")


def _check_trained(values: dict[str, Any], path: Path) -> TrainingCheckpoint:
    """Check the values of the checkpoint of ``dcdit.train`` at ``path``; UserError if it was not written so."""
    check_plugins(values.get("hyper_parameters"))
    try:
        settings = conform("hyper_parameters", values["hyper_parameters"], dict[str, Any])
        step = conform("global_step", values["global_step"], StepNumber)
        model = conform("model", settings["model"], dict[str, Any])
        check_weights(model)
        latents = LatentSpec.from_plain(settings["latents"], "latents")
        ema = _network_state("state_dict", values["state_dict"])
        raw = _network_state("current_model_state", values.get("current_model_state", values["state_dict"]))
        network = check_weights(model, ema, raw)
        diffusion = conform("diffusion", settings.get("diffusion"), dict[str, Any])
        with plugins_may_have_changed({"diffusion": diffusion}):
            build_process(diffusion)
        averages = PowerAverages.of_checkpoint(values, step, path.resolve().parent.parent / FOLDER)
        if averages:
            parameters = shapes_of(dict(network.named_parameters()))
            for state in averages.tracked.values():
                check_shapes(shapes_of(state), parameters)
    except KeyError as error:
        raise UserError(f"it was not written by dcdit.train: it lacks {error}") from None
    except ChangedPluginError:
        raise
    except UserError as error:
        raise UserError(f"it was not written by this release of dcdit.train: {error}") from None
    match = STEP_NAME.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise DamagedError(f"checkpoint {path} holds step {step}: it is not the one that its name says")
    training = {key: value for key, value in settings.items() if key != "latents"}
    return TrainingCheckpoint(
        "checkpoint of dcdit.train", model, latents, step, ema, raw, training, averages=averages, values=values
    )


def _network_state(key: str, values: object) -> dict[str, Tensor]:
    """The network's parameters in the state of the LightningModule, which a checkpoint holds as ``key``."""
    state = conform(key, values, dict[str, Tensor])
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}


def _read_folder(folder: Path, assume: AssumeSettings) -> Weights:
    """Read a folder that ``dcdit export`` or diffusers wrote."""
    config = read_json(folder / "config.json", dict[str, Any], "download or export it again")
    if "_class_name" in config:
        state: dict[str, Tensor] = {}
        for file in weights_of_folder(folder):
            state |= (
                read_tensors(file)
                if file.suffix == ".safetensors"
                else conform(file.name, read_checkpoint(file, legacy=True), dict[str, Tensor])
            )
        return _foreign_weights({"ema": describe_diffusers(config, state, assume)}, assume)
    config = read_config(folder)
    for name in changed_code(folder, config):
        say(
            f"{folder / name} is not as dcdit export wrote it. dcdit runs nothing in the folder, but diffusers does:"
            " read the file, or export again"
        )
    model = conform("network", config["network"], dict[str, Any])
    state = read_tensors(folder / WEIGHTS_FILE, config["sha256"])
    check_weights(model, state)
    training = {"model": model, **conform("training", config.get("training", {}), dict[str, Any])}
    if config.get("latents") is not None:
        assume.check_unused("exported network")
        latents: LatentSpec | None = LatentSpec.from_plain(config["latents"], "latents")
    else:
        latents = published_latents(model, assume) if assume.autoencoder else None
        training |= _assumed_process(training, assume)
    kind = conform("weights", config.get("weights", "ema"), WeightsKind)
    return Weights(
        "exported network",
        model,
        latents,
        conform("step", config.get("step"), StepNumber | None),
        state if kind != "raw" else None,
        state if kind == "raw" else None,
        training,
        has_class_names=config.get("latents") is not None,
    )


def _assumed_process(training: Mapping[str, Any], assume: AssumeSettings) -> dict[str, Any]:
    """The process of a network alone, as ``save_pretrained`` writes it, by what the user says; nothing if they do not.

    Raises:
        UserError: if it is a process as another program trains by it, or the folder names one itself.
    """
    if assume.diffusion is None:
        if assume.autoencoder is not None and "diffusion" not in training:
            say(
                f"Nothing in the folder says by which process it was trained: diffusion={PUBLISHED_PROCESS['name']} is"
                " taken, as published; assume.diffusion=flow says the other"
            )
        return {}
    if assume.diffusion not in PROCESSES or "diffusion" in training:
        raise UserError(
            f"assume.diffusion={assume.diffusion}: this exported network was trained by dcdit or a loop of your own,"
            f" take one of {', '.join(PROCESSES)}"
        )
    return {"diffusion": {"name": assume.diffusion}}


def _infer_weights(
    states: Mapping[str, Mapping[str, Tensor]], assume: AssumeSettings, step: int | None = None
) -> Weights:
    """Weights of which the file holds names and shapes alone; the first of ``states`` describes the network."""
    networks = {kind: infer_network(state, assume) for kind, state in states.items()}
    for guess in describe_guesses(next(iter(networks.values())).spec, assume):
        say(guess)
    return _foreign_weights(networks, assume, step)


def _foreign_weights(
    networks: Mapping[str, ForeignNetwork], assume: AssumeSettings, step: int | None = None
) -> Weights:
    """Weights of another program, by kind, with what the user or the publication says about them."""
    network = next(iter(networks.values()))
    model, states = network.spec, {kind: inferred.weights for kind, inferred in networks.items()}
    training: dict[str, Any] = {"model": model}
    if assume.diffusion is not None:
        training["diffusion"] = {"name": convention_of(assume).process}
    latents = published_latents(model, assume)
    return Weights(network.names.title, model, latents, step, states.get("ema"), states.get("raw"), training, False)


def _adam_step(optimizer: Any) -> int | None:
    """Number of steps in the state of an Adam optimiser; None if there is none."""
    try:
        return int(conform("step", float(next(iter(optimizer["state"].values()))["step"]), StepNumber))
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError, UserError):
        return None
