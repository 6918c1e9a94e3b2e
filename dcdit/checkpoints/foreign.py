"""Weights that other programs wrote: the reference implementation, DiT and diffusers."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoints.names import DIFFUSERS, NAME_MAPS, REFERENCE, NameMap
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.checks import Size, conform
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.network.embeddings import position_table
from dcdit.network.pretrained import shapes_of
from dcdit.runtime.devices import without_memory
from dcdit.settings.published import AUTOENCODER, LATENT_SCALE, published_scales

_SHOWN = 5
"""Differences that are named."""


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a diffusers DiT with q, k and v of each block in one, and one copy of the embedders.

    Raises:
        UserError: if the copies of the embedders differ, which no DiT has.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if copy := re.fullmatch(r"transformer_blocks\.[1-9]\d*\.(norm1\.emb\..+)", name):
            first = state.get(f"transformer_blocks.0.{copy[1]}")
            if first is None or not torch.equal(first, tensor):
                raise UserError(f"{name} differs from that of block 0: a DiT has one embedder for all blocks")
        elif query := re.fullmatch(r"(.+\.attn1\.to_)q(\.\w+)", name):
            parts = [state.get(f"{query[1]}{part}{query[2]}") for part in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise UserError(f"{name} has no key and value of its shape beside it")
            found[f"{query[1]}qkv{query[2]}"] = torch.cat([part for part in parts if part is not None])
        elif not re.fullmatch(r".+\.attn1\.to_[kv]\.\w+", name):
            found[name] = tensor
    return found


def renamed(state: Mapping[str, Tensor], kinds: tuple[NameMap, ...] = NAME_MAPS) -> tuple[NameMap, dict[str, Tensor]]:
    """Whose names those of ``state`` are, and the parameters by ours.

    Raises:
        UserError: with the nearest of ``kinds`` and the first differences, if they are nobody's.
    """
    states = {kind: joined(state) if kind is DIFFUSERS else dict(state) for kind in kinds}
    faults = {kind: kind.differences(states[kind]) for kind in kinds}
    nearest = min(kinds, key=lambda kind: len(faults[kind]))
    if faults[nearest]:
        raise UserError(
            f"its parameters are those of no network that is known here. Nearest is a {nearest.title}, with"
            f" {len(faults[nearest])} differences: {', '.join(faults[nearest][:_SHOWN])}"
        )
    return nearest, {str(nearest.ours(name)): tensor.float() for name, tensor in states[nearest].items()}


def describe(
    kind: NameMap, weights: Mapping[str, Tensor], grid: int, assume: AssumeSettings, known: Mapping[str, Any]
) -> dict[str, Any]:
    """What :func:`dcdit.network.build_network` makes of weights, read off their shapes.

    Args:
        kind: whose weights they are.
        weights: by our names.
        grid: side of the latent grid.
        assume: what no shape tells.
        known: what the file says beside its weights.

    Raises:
        UserError: if something cannot be told, or the shapes do not fit each other.
    """
    block = "backbone.blocks" if kind.network == "dcdit" else "blocks"
    ranks = {"condition.label.table.weight": 2, "embed.weight": 4, f"{block}.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if name not in weights or weights[name].ndim != rank or not weights[name].numel():
            raise UserError(f"{kind.theirs(name)} is not a tensor of {rank} dimensions: this is no {kind.title}")
    rows, width = weights["condition.label.table.weight"].shape
    if assume.heads and assume.heads != known.get("heads", assume.heads):
        raise UserError(f"assume.heads={assume.heads}: its configuration says {known['heads']}, leave assume.heads out")
    heads = assume.heads or known.get("heads") or _published_heads().get(width)
    if heads is None:
        raise UserError(f"width {width} is no published scale, and no shape tells the heads: give assume.heads=...")
    depth = 1 + max(int(name.split(".")[block.count(".") + 1]) for name in weights if name.startswith(f"{block}."))
    spec: dict[str, Any] = {
        "name": kind.network,
        "grid": grid,
        "channels": weights["embed.weight"].shape[1],
        "num_classes": rows - 1,
        "width": width,
        "depth": depth,
        "mlp_ratio": weights[f"{block}.0.mlp.fc1.weight"].shape[0] / width,
        **known,
        "heads": heads,
    }
    if assume.freq_shift is not None:
        spec["freq_shift"] = assume.freq_shift
    if kind.network == "dcdit":
        sigma = assume.smoothing_sigma
        spec["encoder_width"] = weights["embed.weight"].shape[0]
        spec["smoothing_sigma"] = (2.0 if grid == 64 else 1.0) if sigma is None else sigma or None
    else:
        spec["patch"] = weights["embed.weight"].shape[2]
    with without_memory():
        wanted = shapes_of(build_network(spec).state_dict())
    found = shapes_of(weights)
    faults = [
        f"{kind.theirs(name)} has shape {list(found.get(name, ())) or 'none'} instead of"
        f" {list(wanted.get(name, ())) or 'none'}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if faults:
        raise UserError(
            f"its shapes are not those of one {kind.title}, {len(faults)} differ: {', '.join(faults[:_SHOWN])}"
        )
    return spec


def _published_heads() -> dict[int, int]:
    return {scale["width"]: scale["heads"] for scale in published_scales().values()}


def described_by_shapes(
    state: Mapping[str, Tensor], assume: AssumeSettings
) -> tuple[NameMap, dict[str, Any], dict[str, Tensor]]:
    """Whose weights a bare state dict holds, what network they are of, and the parameters by our names.

    Raises:
        UserError: if they are of no network that is known here.
    """
    kind, weights = renamed({name: tensor for name, tensor in state.items() if name != "pos_embed"})
    if kind is DIFFUSERS:
        raise UserError("these are the weights of a network of diffusers: give their folder, with its config.json")
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        raise UserError(f"a {kind.title} has a table pos_embed of positions, this has none: it tells the grid")
    side = round(table.shape[1] ** 0.5)
    patch = 1 if kind is REFERENCE else conform("patch", weights["embed.weight"].shape[2], Size)
    known = {"position_patch": _position_patch(table[0], side)} if kind is REFERENCE else {}
    if kind is not REFERENCE:
        _position_patch(table[0], side, (1,))
    return kind, describe(kind, weights, side * patch, assume, known), weights


def _position_patch(table: Tensor, side: int, patches: tuple[int, ...] = (1, 2, 4, 8)) -> int:
    """In patches of which side a table (L, D) counts; they are computed here, not read."""
    for patch in patches:
        ours = position_table(side, side, table.shape[1], patch) if table.shape[1] % 4 == 0 else None
        if ours is not None and ours.shape == table.shape and torch.allclose(ours, table.float(), atol=1e-4):
            return patch
    raise UserError(
        f"pos_embed, {list(table.shape)}, is not the fixed sin-cos table of a square grid, which is all that is"
        " known here"
    )


def diffusers_network(
    config: Mapping[str, Any], state: Mapping[str, Tensor], assume: AssumeSettings
) -> tuple[NameMap, dict[str, Any], dict[str, Tensor]]:
    """The same of a folder that diffusers' ``save_pretrained`` wrote, whose ``config.json`` tells more.

    Raises:
        UserError: if it is no DiT, or one with parts that are not known here.
    """
    wanted = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "dropout": 0.0,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key}={config[key]!r}, only {value!r} is known here")
    kind, weights = renamed(state, (DIFFUSERS,))
    heads, grid = (conform(key, config.get(key), Size) for key in ("num_attention_heads", "sample_size"))
    channels = weights["embed.weight"].shape[1]
    if config.get("out_channels") != 2 * channels:
        raise UserError(
            f"config.json: out_channels={config.get('out_channels')}, a DiT that predicts its variance too has"
            f" {2 * channels}"
        )
    # Its sinusoids of the timestep fall a little faster than DiT's, see docs/checkpoints.md.
    return kind, describe(kind, weights, grid, assume, {"heads": heads, "freq_shift": 1}), weights


def published_latents(spec: Mapping[str, Any], assume: AssumeSettings) -> LatentSpec:
    """The latents of a network whose file says nothing of them: those of all published ones, unless told otherwise.

    Raises:
        UserError: if the network does not take such latents.
    """
    channels, grid, classes = (int(spec[key]) for key in ("channels", "grid", "num_classes"))
    autoencoder, scale = assume.autoencoder, assume.scale
    if autoencoder == IDENTITY:
        scale = scale or 1.0
    elif autoencoder is None and channels != 4:
        raise UserError(
            f"the network takes latents of {channels} channels, the published ones have 4: say what they are with"
            " assume.autoencoder=... and assume.scale=..."
        )
    return LatentSpec(
        (channels, grid, grid),
        autoencoder or AUTOENCODER,
        scale or LATENT_SCALE,
        assume.shift or 0.0,
        imagenet_classes() if classes == 1000 else tuple(map(str, range(classes))),
    )


def imagenet_classes() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1,000 classes in the usual order, which is that of its folders."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def reference_state(network: Network) -> dict[str, Tensor]:
    """The parameters of a network by the names of the implementation that it was published in.

    Raises:
        UserError: if it has parts that are not known there.
    """
    spec = network.spec
    kind = next(each for each in NAME_MAPS if each.network == spec["name"])
    for key, value in (("groups", 32), ("freq_shift", 0)):
        if spec.get(key, value) != value:
            raise UserError(f"format=reference: model.{key}={spec[key]}, the reference implementation has {value}")
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        theirs = kind.theirs(name)
        if theirs is None:
            raise UserError(f"format=reference: the reference implementation has no counterpart of {name}")
        found[theirs] = tensor.detach().cpu()
    positions = network.get_buffer("pos_embed")
    return {"pos_embed": positions[None].cpu().clone(), **found}
