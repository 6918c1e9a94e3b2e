"""Weights that other programs wrote: the reference implementation, DiT and diffusers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoints.names import DIFFUSERS, NAME_MAPS, REFERENCE, NameMap
from dcdit.checkpoints.nesting import without_wrappers
from dcdit.checkpoints.settings import CONVENTIONS, AssumeSettings, Convention
from dcdit.checks import Count, Size, conform, shown
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.process import build_process
from dcdit.diffusion.settings import PUBLISHED_PROCESS
from dcdit.errors import UserError
from dcdit.network import Network
from dcdit.network.embeddings import position_table
from dcdit.network.registry import shapes_of_spec
from dcdit.runtime.tensors import differing_shapes, shapes_of
from dcdit.settings.published import AUTOENCODER, LATENT_SCALE, published_scales

_MAX_NAMED = 5
"""Differences that a message names."""

_TRAINING_ONLY = ("projectors.",)
"""Beginnings of the names of parameters that only a training loss uses: the heads that REPA aligns features with."""

_MODERN = re.compile(r"blocks\.\d+\.(mlp\.w12|attn\.[qk]_norm)\.weight")
"""Names of parameters that the blocks of LightningDiT (arXiv 2501.01423) have beside those of a DiT."""

_PUBLISHED_CLASSES = 1000
"""Number of ImageNet's classes, whose names and order are known."""


@dataclass(frozen=True)
class ForeignNetwork:
    """A network of another program, as its weights describe it.

    Attributes:
        names: the program's names of parameters.
        spec: what :func:`dcdit.network.build_network` takes.
        weights: parameters by our names, float32.
    """

    names: NameMap
    spec: dict[str, Any]
    weights: dict[str, Tensor]


def _merge_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join q, k and v of each block of a diffusers DiT, and keep one of the equal copies of its embedders.

    Raises:
        UserError: if the copies of the embedders differ, which no DiT has.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if copy := re.fullmatch(r"transformer_blocks\.[1-9]\d*\.(norm1\.emb\..+)", name):
            original = state.get(f"transformer_blocks.0.{copy[1]}")
            if original is None or not torch.equal(original, tensor):
                raise UserError(f"{name} differs from that of block 0: a DiT has one embedder for all blocks")
        elif query := re.fullmatch(r"(.+\.attn1\.to_)q(\.\w+)", name):
            parts = [state.get(f"{query[1]}{part}{query[2]}") for part in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise UserError(f"{name} has no key and value of its shape beside it")
            merged[f"{query[1]}qkv{query[2]}"] = torch.cat([part for part in parts if part is not None])
        elif not re.fullmatch(r".+\.attn1\.to_[kv]\.\w+", name):
            merged[name] = tensor
    return merged


def _rename(state: Mapping[str, Tensor], candidates: tuple[NameMap, ...]) -> tuple[NameMap, dict[str, Tensor]]:
    """Find the program that wrote ``state``; returns its names and the parameters by ours, float32.

    Raises:
        UserError: if no candidate fits, with the nearest one and its first differences.
    """
    states = {names: _merge_diffusers(state) if names is DIFFUSERS else dict(state) for names in candidates}
    differences = {names: names.differences(states[names]) for names in candidates}
    nearest = min(candidates, key=lambda names: len(differences[names]))
    if differences[nearest]:
        raise UserError(
            f"its parameters are those of no network that is known here. Nearest is a {nearest.title}, with"
            f" {len(differences[nearest])} differences: {', '.join(differences[nearest][:_MAX_NAMED])}"
        )
    for name, tensor in states[nearest].items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds numbers of {tensor.dtype}, not of a floating-point type")
    return nearest, {str(nearest.ours(name)): tensor.float() for name, tensor in states[nearest].items()}


def _describe(
    names: NameMap, weights: dict[str, Tensor], grid: int, assume: AssumeSettings, known: Mapping[str, Any]
) -> ForeignNetwork:
    """Read off the shapes of ``weights``, by our names, what network they are of; UserError if that cannot be done.

    A label table without a null class gets a row of zeros for it; ``label_dropout=0`` says that it means nothing.
    ``known`` are arguments of the network that the file says beside its weights.
    """
    block = "backbone.blocks" if names.network == "dcdit" else "blocks"
    ranks = {"condition.label.table.weight": 2, "embed.weight": 4, f"{block}.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if name not in weights or weights[name].ndim != rank or not weights[name].numel():
            raise UserError(f"{names.theirs(name)} is not a tensor of {rank} dimensions: this is no {names.title}")
    table, embed, fc1 = (weights[name] for name in ranks)
    width, channels = table.shape[1], embed.shape[1]
    heads = _number_of_heads(width, assume.heads, known.get("heads"))
    num_classes = number_of_classes(len(table), assume.num_classes, known.get("num_classes"))
    spec: dict[str, Any] = {
        "name": names.network,
        "grid": grid,
        "channels": channels,
        "num_classes": num_classes,
        "width": width,
        "depth": 1 + max(int(name[len(block) + 1 :].split(".")[0]) for name in weights if name.startswith(f"{block}.")),
        "mlp_ratio": fc1.shape[0] / width,
        **known,
        "heads": heads,
    }
    if num_classes == len(table):
        weights = {**weights, "condition.label.table.weight": torch.cat([table, torch.zeros_like(table[:1])])}
        spec["label_dropout"] = 0.0
    if assume.freq_shift is not None:
        spec["freq_shift"] = assume.freq_shift
    if names.network == "dcdit":
        sigma = assume.smoothing_sigma
        spec["encoder_width"] = embed.shape[0]
        spec["smoothing_sigma"] = published_sigma(grid) if sigma is None else sigma or None
    else:
        spec["patch"] = embed.shape[2]
    bias = weights.get("output.linear.bias")
    if bias is not None and bias.shape == (channels * spec.get("patch", 1) ** 2,):
        spec["variance"] = False
    convention = convention_of(assume)
    if convention.time_input != "steps":
        spec["time_input"] = convention.time_input
    _check_described(names, spec, weights, convention.process)
    if convention.time_input == "reversed":
        weights = _with_reversed_velocity(weights, "output.linear", spec)
    return ForeignNetwork(names, spec, weights)


def _check_described(names: NameMap, spec: Mapping[str, Any], weights: Mapping[str, Tensor], diffusion: str) -> None:
    """Raise :class:`UserError` unless ``weights`` are those of the network ``spec``, and ``diffusion`` can use it."""
    differences = [
        f"{names.theirs(name)} has shape {shape} instead of {expected}"
        for name, shape, expected in differing_shapes(shapes_of(weights), shapes_of_spec(spec))
    ]
    if differences:
        raise UserError(
            f"its shapes are not those of one {names.title}, {len(differences)} differ:"
            f" {', '.join(differences[:_MAX_NAMED])}"
        )
    if spec.get("variance") is False and build_process({"name": diffusion}).needs_variance:
        raise UserError(
            f"it predicts no variance, which diffusion={diffusion} has: if it was trained by flow matching,"
            " assume.diffusion=flow_sit, flow_repa or flow says so"
        )


def _with_reversed_velocity(weights: Mapping[str, Tensor], layer: str, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """``weights`` whose output ``layer`` predicts minus the velocity: its sign changes with the direction of time.

    Its rows are C channels, and C of variance where there are any, for each position of a patch.
    """
    channels, variance = int(spec["channels"]), spec.get("variance", True)
    sign = torch.ones(int(spec.get("patch", 1)) ** 2, (1 + variance) * channels)
    sign[:, :channels] = -1
    linear, bias = f"{layer}.weight", f"{layer}.bias"
    return {**weights, linear: weights[linear] * sign.view(-1, 1), bias: weights[bias] * sign.flatten()}


def _number_of_heads(width: int, assumed: int | None, known: int | None) -> int:
    """Number of attention heads that user, file or publication say, for no shape tells it; UserError if none does."""
    if assumed and known and assumed != known:
        raise UserError(f"assume.heads={assumed}: its configuration says {known}, leave assume.heads out")
    heads: int | None = assumed or known or published_heads(width)
    if heads is None:
        raise UserError(f"width {width} is no published scale, and no shape tells the heads: give assume.heads=...")
    return heads


def published_heads(width: int) -> int | None:
    """Attention heads of the published scale of a width; None if there is none."""
    return {scale["width"]: scale["heads"] for scale in published_scales().values()}.get(width)


def published_sigma(grid: int) -> float:
    """Width of the smoothing of the published networks on a grid of this side, in grid positions."""
    return 2.0 if grid == 64 else 1.0


def number_of_classes(rows: int, assumed: int | None = None, known: int | None = None) -> int:
    """Number of classes of a label table, of what user and file say; UserError if it does not fit the ``rows``."""
    number = known if assumed is None else assumed
    if number is None:
        number = rows if rows == _PUBLISHED_CLASSES else rows - 1
    elif number not in (rows - 1, rows):
        source = f"config.json: num_embeds_ada_norm={known}" if assumed is None else f"assume.num_classes={assumed}"
        raise UserError(
            f"{source}, but the label table has {rows} rows: {rows - 1} classes and a null class, or {rows} classes"
            " and none"
        )
    return conform("num_classes", number, Count)


def convention_of(assume: AssumeSettings) -> Convention:
    """How weights were trained whose file does not say it: as the user says, or as published."""
    return CONVENTIONS[assume.diffusion or PUBLISHED_PROCESS["name"]]


def describe_guesses(model: Mapping[str, Any], assume: AssumeSettings) -> list[str]:
    """Sentences on what neither the shapes nor the user tell of a network, and what is taken instead.

    Args:
        model: ``spec`` of a :class:`ForeignNetwork`.
        assume: what the user says.
    """
    guesses = []
    if assume.diffusion is None:
        guesses.append(
            f"Nothing in the file says by which process it was trained: diffusion={convention_of(assume).process} is"
            " taken, as published. Weights of SiT and REPA have the same names and shapes, and would give noise:"
            " assume.diffusion=flow_sit or flow_repa says that it is one of them"
        )
    if assume.autoencoder not in (None, AUTOENCODER, IDENTITY) and assume.scale is None:
        guesses.append(
            f"Nothing says the scale of the latents of {assume.autoencoder}: {LATENT_SCALE} is taken, that of"
            f" {AUTOENCODER}. assume.scale says another; the autoencoder's config.json mostly has it as scaling_factor"
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


def infer_network(state: Mapping[str, Tensor], assume: AssumeSettings) -> ForeignNetwork:
    """Infer from a bare state dict which network it is of.

    Raises:
        UserError: if no network that is known here has such parameters.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_ONLY)}
    if any(map(_MODERN.fullmatch, state)):
        raise UserError(
            "these are weights of LightningDiT, or of a network with such blocks (gated MLPs w12, or normalised queries"
            " and keys), which dcdit does not read: model=dit_xl_2_modern has such blocks, to be trained from scratch"
        )
    table = state.pop("pos_embed", None)
    names, weights = _rename(state, NAME_MAPS)
    if names is DIFFUSERS:
        raise UserError("these are the weights of a network of diffusers: give their folder, with its config.json")
    if table is None or table.ndim != 3:
        raise UserError(
            f"a {names.title} has a table pos_embed of positions, this has none: it tells the grid. Weights with rotary"
            " positions are not read"
        )
    side = round(table.shape[1] ** 0.5)
    if names is REFERENCE:
        return _describe(names, weights, side, assume, {"position_patch": _position_patch(table[0], side)})
    _position_patch(table[0], side, (1,))
    patch: int = conform("patch", weights["embed.weight"].shape[2], Size)
    return _describe(names, weights, side * patch, assume, {})


def _position_patch(table: Tensor, side: int, patches: tuple[int, ...] = (1, 2, 4, 8)) -> int:
    """Side of the patches in which a table of positions (L, D) counts; UserError if it is no such table."""
    table = table.float()
    tolerance = 1e-4  # of float32; a table that was rounded to 16 bits before may be off by the rounding too
    for dtype in (torch.bfloat16, torch.float16):  # whatever fits the first mostly fits the second too
        if torch.equal(table.to(dtype).float(), table):
            tolerance += torch.finfo(dtype).eps / 2
            break
    for patch in patches:
        ours = position_table(side, side, table.shape[1], patch) if table.shape[1] % 4 == 0 else None
        if ours is not None and ours.shape == table.shape and torch.allclose(ours, table, rtol=0, atol=tolerance):
            return patch
    raise UserError(
        f"pos_embed, {list(table.shape)}, is not the fixed sin-cos table of a square grid: weights with learned"
        " positions are not read"
    )


def describe_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], assume: AssumeSettings
) -> ForeignNetwork:
    """Describe the network in a folder that diffusers' ``save_pretrained`` wrote, by its ``config.json`` and weights.

    Raises:
        UserError: if it is no DiT, or has parts that are not known here.
    """
    supported = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "dropout": 0.0,
    }
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key}={config[key]!r}, only {value!r} is known here")
    names, weights = _rename(without_wrappers(state), (DIFFUSERS,))
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
    return _describe(names, weights, grid, assume, known)


def published_latents(spec: Mapping[str, Any], assume: AssumeSettings) -> LatentSpec:
    """The latents of a network whose file does not describe them: those of published networks, or what the user says.

    Raises:
        UserError: if the network does not take such latents.
    """
    channels, grid, classes = (int(spec[key]) for key in ("channels", "grid", "num_classes"))
    if assume.autoencoder is None and channels != 4:
        raise UserError(
            f"the network takes latents of {channels} channels, the published ones have 4: say what they are with"
            " assume.autoencoder=... and assume.scale=..."
        )
    return LatentSpec(
        (channels, grid, grid),
        assume.autoencoder or AUTOENCODER,
        assume.scale or (1.0 if assume.autoencoder == IDENTITY else LATENT_SCALE),
        assume.shift or 0.0,
        imagenet_classes() if classes == _PUBLISHED_CLASSES else tuple(map(str, range(classes))),
    )


def imagenet_classes() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1,000 classes in the order of its folders, which is the usual one."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def reference_state(network: Network) -> dict[str, Tensor]:
    """The parameters of a network by the names of the implementation that it was published in.

    Raises:
        UserError: if it has parts that are not known there.
    """
    spec = network.spec
    names = next(names for names in NAME_MAPS if names.network == spec["name"])
    known = {"groups": 32, "freq_shift": 0, "norm": "layer", "mlp": "gelu", "position": "table"}
    known |= {"qk_norm": False, "gates": False}
    for key, value in known.items():
        if spec.get(key, value) != value:
            raise UserError(
                f"format=reference: model.{key}={shown(spec[key])}, the reference implementation has {shown(value)}:"
                " format=dcdit exports this network"
            )
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        theirs = names.theirs(name)
        if theirs is None:
            raise UserError(f"format=reference: the reference implementation has no counterpart of {name}")
        state[theirs] = tensor.detach().cpu()
    if not network.label_dropout:  # its null class was never trained: a table without it says so
        name = str(names.theirs("condition.label.table.weight"))
        state[name] = state[name][:-1].clone()
    if spec.get("time_input") == "reversed":
        state = _with_reversed_velocity(state, str(names.theirs("output.linear.weight")).removesuffix(".weight"), spec)
    positions = network.get_buffer("pos_embed")
    return {"pos_embed": positions[None].cpu().clone(), **state}
