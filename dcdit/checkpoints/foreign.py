"""Weights that other programs wrote: the reference implementation, DiT and diffusers."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoints.names import DIFFUSERS, NAME_MAPS, REFERENCE, NameMap
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.checks import Count, Size, conform
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.process import AS_PUBLISHED as AS_PUBLISHED_PROCESS
from dcdit.diffusion.process import build_process
from dcdit.errors import UserError
from dcdit.network import Network
from dcdit.network.embeddings import position_table
from dcdit.network.registry import shapes_of_spec
from dcdit.runtime.tensors import differing_shapes, shapes_of
from dcdit.settings.published import AUTOENCODER, LATENT_SCALE, published_scales

_SHOWN = 5
"""Differences that are named."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that come from what torch wraps around networks: DDP, averaging, compiling, FSDP, checkpointing."""

_PUBLISHED_CLASSES = 1000
"""Of ImageNet, whose names and order are known."""


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by the names that they have in the network itself, whatever torch wrapped around it or its parts.

    Raises:
        UserError: if two parameters get one name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if own in plain:
            raise UserError(
                f"{name} stands beside another parameter that is {own} of the network too: save one of them"
            )
        plain[own] = tensor
    plain.pop("n_averaged", None)  # of torch's AveragedModel: how many states it has averaged
    return plain


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
    for name, tensor in states[nearest].items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds numbers of {tensor.dtype}, not of a floating-point type")
    return nearest, {str(nearest.ours(name)): tensor.float() for name, tensor in states[nearest].items()}


def describe(
    kind: NameMap, weights: dict[str, Tensor], grid: int, assume: AssumeSettings, known: Mapping[str, Any]
) -> dict[str, Any]:
    """What :func:`dcdit.network.build_network` makes of weights, read off their shapes.

    A label table without a null class gets a row for it, of zeros, which ``label_dropout=0`` says means nothing.

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
    width = weights["condition.label.table.weight"].shape[1]
    if assume.heads and assume.heads != known.get("heads", assume.heads):
        raise UserError(f"assume.heads={assume.heads}: its configuration says {known['heads']}, leave assume.heads out")
    heads = assume.heads or known.get("heads") or _published_heads().get(width)
    if heads is None:
        raise UserError(f"width {width} is no published scale, and no shape tells the heads: give assume.heads=...")
    table = weights["condition.label.table.weight"]
    num_classes = _number_of_classes(len(table), assume.num_classes, known.get("num_classes"))
    has_null_class = num_classes < len(table)
    if not has_null_class:
        weights["condition.label.table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    depth = 1 + max(int(name.split(".")[block.count(".") + 1]) for name in weights if name.startswith(f"{block}."))
    spec: dict[str, Any] = {
        "name": kind.network,
        "grid": grid,
        "channels": weights["embed.weight"].shape[1],
        "num_classes": num_classes,
        "width": width,
        "depth": depth,
        "mlp_ratio": weights[f"{block}.0.mlp.fc1.weight"].shape[0] / width,
        **known,
        "heads": heads,
    }
    if not has_null_class:
        spec["label_dropout"] = 0.0
    if assume.freq_shift is not None:
        spec["freq_shift"] = assume.freq_shift
    if kind.network == "dcdit":
        sigma = assume.smoothing_sigma
        spec["encoder_width"] = weights["embed.weight"].shape[0]
        spec["smoothing_sigma"] = (2.0 if grid == 64 else 1.0) if sigma is None else sigma or None
        outputs = spec["channels"]
    else:
        spec["patch"] = weights["embed.weight"].shape[2]
        outputs = spec["channels"] * spec["patch"] ** 2
    if "output.linear.bias" in weights and weights["output.linear.bias"].shape == (outputs,):
        spec["variance"] = False
    faults = [
        f"{kind.theirs(name)} has shape {shape} instead of {expected}"
        for name, shape, expected in differing_shapes(shapes_of(weights), shapes_of_spec(spec))
    ]
    if faults:
        raise UserError(
            f"its shapes are not those of one {kind.title}, {len(faults)} differ: {', '.join(faults[:_SHOWN])}"
        )
    diffusion = process_of(assume)["name"]
    if spec.get("variance") is False and build_process({"name": diffusion}).needs_variance:
        raise UserError(
            f"it predicts no variance, which diffusion={diffusion} has: if it was trained by flow matching,"
            " assume.diffusion=flow says so"
        )
    return spec


def process_of(assume: AssumeSettings) -> Mapping[str, Any]:
    """What :func:`dcdit.diffusion.process.build_process` makes the process of weights of whose file does not say it."""
    return AS_PUBLISHED_PROCESS if assume.diffusion is None else {"name": assume.diffusion}


def describe_guesses(model: Mapping[str, Any], assume: AssumeSettings) -> list[str]:
    """What of a network neither shapes nor the user tell, and what is taken instead, in sentences.

    Args:
        model: as :func:`describe` found it.
        assume: what the user says.
    """
    guesses = []
    if assume.diffusion is None:
        guesses.append(
            f"Nothing in the file says by which process it was trained: diffusion={process_of(assume)['name']} is"
            " taken, as published; assume.diffusion=... says it. Weights of SiT have the same names and shapes, but"
            " their time runs the other way, which is not supported: they would give noise"
        )
    classes, has_null_class = model["num_classes"], model.get("label_dropout") != 0
    if assume.num_classes is None and not (classes == _PUBLISHED_CLASSES and has_null_class):
        rows = classes + has_null_class
        taken, other = ("and a", "without") if has_null_class else ("without a", "with")
        guesses.append(
            f"Its label table of {rows} rows is taken for {classes} classes {taken} null class, which guidance needs:"
            f" if it was trained {other} one, give assume.num_classes={rows if has_null_class else rows - 1}"
        )
    return guesses


def _number_of_classes(rows: int, assumed: int | None, known: int | None) -> int:
    """How many classes a label table has; UserError if that does not fit its ``rows``.

    Args:
        rows: of the table.
        assumed: what the user says; None if nothing.
        known: what the file says beside its weights; None if nothing.
    """
    named = f"config.json: num_embeds_ada_norm={known}" if assumed is None else f"assume.num_classes={assumed}"
    number = assumed if assumed is not None else known
    if number is not None and number not in (rows - 1, rows):
        raise UserError(
            f"{named}, but the label table has {rows} rows: {rows - 1} classes and a null class, or {rows} classes"
            " and none"
        )
    if number is None:
        number = rows if rows == _PUBLISHED_CLASSES else rows - 1
    return conform("num_classes", number, Count)


def _published_heads() -> dict[int, int]:
    return {scale["width"]: scale["heads"] for scale in published_scales().values()}


def described_by_shapes(
    state: Mapping[str, Tensor], assume: AssumeSettings
) -> tuple[NameMap, dict[str, Any], dict[str, Tensor]]:
    """Whose weights a bare state dict holds, what network they are of, and the parameters by our names.

    Raises:
        UserError: if they are of no network that is known here.
    """
    state = without_wrappers(state)
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
    table = table.float()
    tolerance = 1e-4  # of float32, and of float16 and bfloat16 the rounding; a reader may have made float32 of them
    for dtype in (torch.bfloat16, torch.float16):  # whatever fits the first mostly fits the second too
        if torch.equal(table.to(dtype).float(), table):
            tolerance += torch.finfo(dtype).eps / 2
            break
    for patch in patches:
        ours = position_table(side, side, table.shape[1], patch) if table.shape[1] % 4 == 0 else None
        if ours is not None and ours.shape == table.shape and torch.allclose(ours, table, rtol=0, atol=tolerance):
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
    kind, weights = renamed(without_wrappers(state), (DIFFUSERS,))
    num_classes = conform("num_embeds_ada_norm", config.get("num_embeds_ada_norm"), Count | None)
    heads, grid = (conform(key, config.get(key), Size) for key in ("num_attention_heads", "sample_size"))
    channels = weights["embed.weight"].shape[1]
    if config.get("out_channels") != 2 * channels:
        raise UserError(
            f"config.json: out_channels={config.get('out_channels')}, a DiT that predicts its variance too has"
            f" {2 * channels}"
        )
    # Its sinusoids of the timestep fall a little faster than DiT's, see docs/checkpoints.md.
    known = {"heads": heads, "freq_shift": 1} | ({} if num_classes is None else {"num_classes": num_classes})
    return kind, describe(kind, weights, grid, assume, known), weights


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
        imagenet_classes() if classes == _PUBLISHED_CLASSES else tuple(map(str, range(classes))),
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
    if not network.label_dropout:  # its null class was never trained: a table without it says so
        name = str(kind.theirs("condition.label.table.weight"))
        found[name] = found[name][:-1].clone()
    positions = network.get_buffer("pos_embed")
    return {"pos_embed": positions[None].cpu().clone(), **found}
