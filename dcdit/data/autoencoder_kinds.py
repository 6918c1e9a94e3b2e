"""The classes of autoencoders of diffusers that are understood: to add one is to add an entry to the table below."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dcdit.checks import Bounds, NotEmpty, Size
from dcdit.data.autoencoder_scale import (
    Config,
    batch_norm_normalisation,
    no_normalisation,
    own_normalisation,
    rae_image_size,
)
from dcdit.data.latents import LatentScale, LatentShift
from dcdit.errors import UserError


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
_Depth = Annotated[int, Bounds(1, 64, hint="it is a number of layers")]
_Names = Annotated[list[str], _NOT_EMPTY, _SHORT]
_Scales = Annotated[list[Annotated[list[_Small], _SHORT]], _NOT_EMPTY, _SHORT]
_Flags = Annotated[list[bool], _SHORT]
_Multiples = Annotated[list[Annotated[int, Bounds(1, 64)]], _NOT_EMPTY, _SHORT]
_Patch = Annotated[int, Bounds(1, 32, hint="it is the side of a patch")]
_Pixels = Annotated[int, Bounds(1, 1024, hint="it is the side of an image")]
_Colours = Annotated[list[float], NotEmpty("give one value for each colour"), _AtMost(3)]
_Factor = Annotated[float, Bounds(1e-6, 1e6, hint="the network sees latents times it, such as 0.18215")]
_Share = Annotated[float, Bounds(0, 1)]
_Summand = Annotated[float, Bounds(-1e6, 1e6)]


def _halvings(key: str) -> Callable[[Config], int]:
    """The factor of an encoder: key ``key`` lists its stages, each but the first of which halves the sides."""
    return lambda config: int(2 ** (len(config[key]) - 1))


@dataclass(frozen=True)
class AutoencoderKind:
    """A class of autoencoders of diffusers.

    Attributes:
        keys: annotations of all keys that its configuration may have, see :func:`dcdit.checks.checking`.
        factor: pixels per latent position along each side, of its configuration.
        random: whether an image has a posterior, from which latents are drawn, or one latent.
        channels: key of the number of latent channels.
        image_channels: keys of the numbers of channels of an image.
        normalisation: scale and shift, of its configuration, the number of channels and the model.
        stored: keys that diffusers keeps in a configuration, but builds nothing of.
        fold: key of the sides of tiles of positions that become channels of one position, as its networks see them.
        frames: whether it takes videos; an image is one frame.
        unit_pixels: whether its pixels are in [0, 1] instead of [-1, 1].
        distilled: whether it was made to decode latents of another autoencoder, as networks see them.
        image_size: the only side of an image that it takes, of its configuration; None: any multiple of the factor.
        requires: an optional module that diffusers needs for it, of :data:`dcdit.runtime.imports.EXTRAS`.
    """

    keys: Mapping[str, Any]
    factor: Callable[[Config], int]
    random: bool
    channels: str = "latent_channels"
    image_channels: tuple[str, ...] = ("in_channels", "out_channels")
    normalisation: Callable[[Config, int, Any], tuple[LatentScale, LatentShift]] = own_normalisation
    stored: Collection[str] = ("shift_factor", "latents_mean", "latents_std")
    fold: str | None = None
    frames: bool = False
    unit_pixels: bool = False
    distilled: bool = False
    image_size: Callable[[Config], int] | None = None
    requires: str | None = None

    def side_of_tiles(self, config: Config) -> int:
        """The side of the tiles that are folded into channels, 1 for none; UserError if they are not square."""
        sides = [1] if self.fold is None else config[self.fold]
        if len(set(sides)) > 1:
            raise UserError(f"{self.fold}={list(sides)}: only square tiles are understood")
        return int(sides[0])


_COMMON = {
    "in_channels": _Width,
    "latent_channels": _Width,
    "scaling_factor": _Factor,
    "shift_factor": _Summand | None,
    **dict.fromkeys(("latents_mean", "latents_std"), Any),
}
"""Keys of any class of image autoencoders; those that say what a network sees are stored by diffusers at most."""

_KL = {
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
}
_VIDEO = {
    "base_dim": _Width,
    "z_dim": _Width,
    "dim_mult": _Multiples,
    "num_res_blocks": _Small,
    "attn_scales": Annotated[list[float], _SHORT],
    "temperal_downsample": _Flags,
    "dropout": _Share,
    **dict.fromkeys(("latents_mean", "latents_std"), Any),
}
AUTOENCODER_KINDS = {
    "AutoencoderKL": AutoencoderKind(keys=_KL, factor=_halvings("block_out_channels"), random=True),
    "AutoencoderKLFlux2": AutoencoderKind(
        keys={
            **_KL,
            "decoder_block_out_channels": _Widths | None,
            "batch_norm_eps": Annotated[float, Bounds(1e-12, 1.0)],
            "batch_norm_momentum": _Share,
            "patch_size": Annotated[list[_Patch], NotEmpty("give both sides of a tile"), _AtMost(2)],
        },
        factor=_halvings("block_out_channels"),
        random=True,
        normalisation=batch_norm_normalisation,
        stored=(*AutoencoderKind.stored, "scaling_factor", "force_upcast"),
        fold="patch_size",
    ),
    "AutoencoderDC": AutoencoderKind(
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
        factor=_halvings("encoder_block_out_channels"),
        random=False,
        image_channels=("in_channels",),
    ),
    "AutoencoderTiny": AutoencoderKind(
        keys={
            **_COMMON,
            "out_channels": _Width,
            **{f"{half}_block_out_channels": _Widths for half in ("encoder", "decoder")},
            **{f"num_{half}_blocks": _Layers for half in ("encoder", "decoder")},
            "block_out_channels": Any,
            "act_fn": str,
            "upsample_fn": str,
            "upsampling_scaling_factor": Literal[2],
            "latent_magnitude": _Factor,
            "latent_shift": _Summand,
            "force_upcast": bool,
        },
        factor=_halvings("encoder_block_out_channels"),
        random=False,
        stored=(*AutoencoderKind.stored, "block_out_channels"),
        distilled=True,
    ),
    "AutoencoderRAE": AutoencoderKind(
        keys={
            "encoder_type": Literal["dinov2", "siglip2", "mae"],
            **{f"{half}_hidden_size": _Width for half in ("encoder", "decoder")},
            **{f"{half}_num_hidden_layers": _Depth for half in ("encoder", "decoder")},
            "decoder_num_attention_heads": _Width,
            "decoder_intermediate_size": Annotated[int, Bounds(1, 65_536)],
            **dict.fromkeys(("encoder_patch_size", "patch_size"), _Patch),
            "encoder_input_size": _Pixels,
            "image_size": _Pixels | None,
            "num_channels": _Width,
            **dict.fromkeys(("encoder_norm_mean", "encoder_norm_std"), _Colours | None),
            **dict.fromkeys(("latents_mean", "latents_std"), Any),
            "noise_tau": Annotated[float, Bounds(0, 1e3)],
            "reshape_to_2d": bool,
            "use_encoder_loss": bool,
            "scaling_factor": _Factor,
        },
        factor=lambda config: int(config["patch_size"]),
        random=False,
        channels="encoder_hidden_size",
        image_channels=("num_channels",),
        normalisation=no_normalisation,
        stored=(),
        unit_pixels=True,
        image_size=rae_image_size,
        requires="transformers",
    ),
    "AutoencoderKLQwenImage": AutoencoderKind(
        keys={**_VIDEO, "input_channels": _Width},
        factor=_halvings("dim_mult"),
        random=True,
        channels="z_dim",
        image_channels=("input_channels",),
        frames=True,
    ),
    "AutoencoderKLWan": AutoencoderKind(
        keys={
            **_VIDEO,
            "decoder_base_dim": _Width | None,
            "is_residual": bool,
            **dict.fromkeys(("in_channels", "out_channels"), _Width),
            "patch_size": None,
            **dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial"), _Small | None),
        },
        factor=_halvings("dim_mult"),
        random=True,
        channels="z_dim",
        frames=True,
    ),
}
"""Classes of diffusers that are understood, by the name in their configuration."""
