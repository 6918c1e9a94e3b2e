"""Folders that diffusers' ``save_pretrained`` writes of an autoencoder: read here, checked, and only then built."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dcdit.checks import HUB_ID, Bounds, NotEmpty, Size, conform, reason_of, shown, suggestion
from dcdit.data.latents import IDENTITY, Elements, LatentScale, LatentShift
from dcdit.errors import UserError
from dcdit.network.pretrained import CONFIG_FILE
from dcdit.runtime.devices import without_memory
from dcdit.runtime.files import read_json
from dcdit.runtime.hub import check_hub_answers
from dcdit.runtime.tensors import load_state_strict, read_tensors

_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class _AtMost:
    """A constraint of :func:`dcdit.checks.checking`: a list has no more than ``most`` elements."""

    most: int

    def check(self, name: str, value: Sequence[object]) -> None:
        """Raise :class:`UserError` if ``value`` has more elements."""
        if len(value) > self.most:
            raise UserError(f"{name} has {len(value)} values, at most {self.most} are understood")


_SHORT, _NOT_EMPTY = _AtMost(16), NotEmpty("give one value for each stage")
_Width = Annotated[int, Bounds(1, 8192, hint="it is a number of channels")]
_Widths = Annotated[list[_Width], _NOT_EMPTY, _SHORT]
_Small = Annotated[int, Bounds(0, 32, hint="it is a number of layers, or the side of a kernel")]
_Layers = Annotated[list[_Small], _NOT_EMPTY, _SHORT]
_Names = Annotated[list[str], _NOT_EMPTY, _SHORT]
_Scales = Annotated[list[Annotated[list[_Small], _SHORT]], _NOT_EMPTY, _SHORT]
_Factor = Annotated[float, Bounds(1e-6, 1e6, hint="the network sees latents times it, such as 0.18215")]
_Deviation = Annotated[float, Bounds(1e-6, 1e6)]
_Deviations = _Deviation | tuple[_Deviation, ...] | Elements[_Deviation]
_Summand = Annotated[float, Bounds(-1e6, 1e6)]
_Summands = _Summand | tuple[_Summand, ...] | Elements[_Summand]


@dataclass(frozen=True)
class AutoencoderKind:
    """A class of autoencoders of diffusers.

    Attributes:
        random: whether an image has a posterior, from which latents are drawn, or one latent.
        stages: key that lists the stages of the encoder, each but the first of which halves the sides.
        keys: annotations of all keys that its configuration may have, see :func:`dcdit.checks.checking`.
    """

    random: bool
    stages: str
    keys: Mapping[str, Any]


_NORMALISATION = {"shift_factor": _Summand | None, **dict.fromkeys(("latents_mean", "latents_std"), Any)}
"""Keys of any class that say what a network sees of latents: diffusers stores them at most; see :func:`_numbers`."""

_COMMON = {"in_channels": _Width, "latent_channels": _Width, "scaling_factor": _Factor, **_NORMALISATION}
AUTOENCODER_KINDS = {
    "AutoencoderKL": AutoencoderKind(
        random=True,
        stages="block_out_channels",
        keys={
            **_COMMON,
            "out_channels": _Width,
            "down_block_types": _Names,
            "up_block_types": _Names,
            "block_out_channels": _Widths,
            "layers_per_block": _Small,
            "act_fn": str,
            "norm_num_groups": _Width,
            "sample_size": Size | list[Size],
            **dict.fromkeys(("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), bool),
        },
    ),
    "AutoencoderDC": AutoencoderKind(
        random=False,
        stages="encoder_block_out_channels",
        keys={
            **_COMMON,
            "attention_head_dim": _Width,
            **{f"{half}_block_types": str | _Names for half in ("encoder", "decoder")},
            **{f"{half}_block_out_channels": _Widths for half in ("encoder", "decoder")},
            **{f"{half}_layers_per_block": _Layers for half in ("encoder", "decoder")},
            **{f"{half}_qkv_multiscales": _Scales for half in ("encoder", "decoder")},
            "upsample_block_type": str,
            "downsample_block_type": str,
            "decoder_norm_types": str | _Names,
            "decoder_act_fns": str | _Names,
            "encoder_out_shortcut": bool,
            "decoder_in_shortcut": bool,
            "decoder_conv_act_fn": str,
        },
    ),
}
"""Classes of diffusers that are understood, by the name in their configuration."""


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
        raise UserError(f"{where}it is of class {shown(class_name)}: {' and '.join(AUTOENCODER_KINDS)} are understood")
    kind = AUTOENCODER_KINDS[class_name]
    values = {key: value for key, value in config.items() if not key.startswith("_")}  # others are notes of diffusers
    for key, value in values.items():
        if key not in kind.keys:
            raise UserError(f"{where}{key}={shown(value)}: {class_name} has no such key, {suggestion(key, kind.keys)}")
        values[key] = conform(where + key, value, kind.keys[key])
    try:
        with without_memory():
            model = getattr(diffusers, class_name)(
                **{key: value for key, value in values.items() if key not in _NORMALISATION}
            )
    except Exception as error:  # whatever diffusers says of values that do not fit each other
        raise UserError(f"{where}diffusers can build no {class_name} of it ({reason_of(error)}): {remedy}") from error
    files = sorted(folder.glob(f"{_WEIGHTS}.safetensors")) or sorted(folder.glob(f"{_WEIGHTS}-*-of-*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no weights ({_WEIGHTS}.safetensors): {remedy}")
    state = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    try:
        load_state_strict(model, {_current_name(name): tensor for name, tensor in state.items()}, assign=True)
    except UserError as error:
        raise UserError(f"{files[0]}: {error}") from None
    return kind, {**model.config, **values}, model.eval().requires_grad_(False)


def _current_name(name: str) -> str:
    """The present name of a weight; published autoencoders still use the names that diffusers had before 2023."""
    old = re.fullmatch(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{old[1]}{names[old[2]]}{old[3]}" if old else name


def own_normalisation(config: Mapping[str, Any]) -> tuple[LatentScale, LatentShift]:
    """Scale and shift of the configuration of an autoencoder of diffusers.

    ``scaling_factor`` and ``shift_factor`` give (z - shift) * factor; ``latents_mean`` and ``latents_std``
    (z - mean) / std * factor.

    Raises:
        UserError: if they contradict each other, or are no numbers for its channels.
    """
    factor = float(config["scaling_factor"])
    mean = _numbers(config, "latents_mean", LatentShift, _Summands)
    deviation = _numbers(config, "latents_std", LatentScale, _Deviations)
    shift = config.get("shift_factor") or 0.0
    if mean is None and deviation is None:
        return factor, shift
    if shift:
        raise UserError(
            "it has both shift_factor and latents_mean: leave out the one that its weights were not trained with"
        )
    scale = factor if deviation is None else conform("scale", (factor / np.array(deviation)).tolist(), LatentScale)
    return scale, mean or 0.0


def _numbers(config: Mapping[str, Any], key: str, kind: Any, bounded: Any) -> Any:
    """The value of ``key``, one number or nested tuples of one per channel or element; None if there is none."""
    values, channels = config.get(key), config["latent_channels"]
    if values is None:
        return None
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}={shown(values)} are no numbers for each channel") from None
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[1:] == (1, 1):
        array = array.ravel()
    if array.ndim and len(array) != channels:
        raise UserError(f"{key} has {len(array)} numbers for {channels} channels")
    return conform(key, conform(key, array.tolist(), kind), bounded)
