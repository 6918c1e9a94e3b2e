"""Weights of the reference implementation, read without running anyone's pickle."""

import re
from collections.abc import Mapping
from os import PathLike

from torch import Tensor

from dcdit.checkpoints.read import read_checkpoint
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.settings.published import published_scales

_RENAMES = [
    (r"x_embedder\.proj\.", "embed."),
    (r"t_embedder\.mlp\.0\.", "condition.time.fc1."),
    (r"t_embedder\.mlp\.2\.", "condition.time.fc2."),
    (r"y_embedder\.embedding_table\.", "condition.label.table."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.cond_proj\.1\.", r"\1.blocks.\2.condition."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.skip_proj\.", r"\1.blocks.\2.skip."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.blocks.\2."),
    (r"hnet\.(encoder|decoder)\.rmsnorm\.", r"\1.norm."),
    (r"hnet\.routing_module\.proj\.", "router.project."),
    (r"hnet\.routing_module\.context_predictor\.", "router.predict."),
    (r"hnet\.routing_module\.residual_scorer\.", "router.scorer."),
    (r"hnet\.residual_proj\.", "residual."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.attn\.proj\.", r"backbone.blocks.\1.attention.out."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.attn\.qkv\.", r"backbone.blocks.\1.attention.qkv."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.adaLN_modulation\.1\.", r"backbone.blocks.\1.modulation."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.mlp\.", r"backbone.blocks.\1.mlp."),
    (r"hnet\.main_network\.main_network\.rmsnorm\.", "backbone.norm."),
    (r"final_layer\.linear\.", "output.linear."),
    (r"final_layer\.adaLN_modulation\.1\.", "output.modulation."),
]


def rename(name: str) -> str:
    """The name in this package of the reference's parameter ``name``; :class:`UserError` if it is unknown."""
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise UserError(f"parameter {name!r} is not one of a reference DC-DiT checkpoint")


def load_reference(
    path_or_state_dict: str | PathLike[str] | Mapping[str, Tensor],
    heads: int | None = None,
    smoothing_sigma: float | None = None,
) -> DCDiT:
    """Build the network of a reference checkpoint from its shapes and load its weights.

    A checkpoint file holds ``model``, ``ema``, ``opt`` and ``config``; the EMA weights are taken. It is read without
    executing its pickle.

    Args:
        path_or_state_dict: a checkpoint file, or a mapping of reference parameter names to tensors.
        heads: attention heads, which no shape tells; None looks the published scales up.
        smoothing_sigma: de-chunk smoothing in grid positions; None takes the published 1, or 2 on a 64 x 64 grid.

    Returns:
        The network in float32 and evaluation mode, on the CPU.

    Raises:
        UserError: if the file is unsafe or incomplete, a name is unknown, or the heads cannot be told.
    """
    if isinstance(path_or_state_dict, Mapping):
        state = dict(path_or_state_dict)
    else:
        checkpoint = read_checkpoint(path_or_state_dict)
        state = checkpoint.get("ema") or checkpoint.get("model") or checkpoint
    if "pos_embed" not in state:
        raise UserError("no pos_embed among the parameters: this is not a reference DC-DiT checkpoint")
    positions = state.pop("pos_embed")
    weights = {rename(name): tensor.float() for name, tensor in state.items()}
    net = _build(weights, positions, heads, smoothing_sigma)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit the network that its shapes describe: {error}") from None
    # Tables that a checkpoint brings win over computed ones: the two may differ in the last bit.
    net.pos_embed.copy_(positions[0])
    return net.eval()


def _build(weights: Mapping[str, Tensor], positions: Tensor, heads: int | None, sigma: float | None) -> DCDiT:
    """The network whose parameters have the shapes of ``weights``."""
    try:
        inner, channels = weights["embed.weight"].shape[:2]
        width = weights["residual.weight"].shape[0]
        hidden = weights["backbone.blocks.0.mlp.fc1.weight"].shape[0]
        rows = weights["condition.label.table.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"the checkpoint lacks the parameter {error.args[0]!r}") from None
    published = {scale["width"]: scale["heads"] for scale in published_scales().values()}
    heads = heads or published.get(width)
    if heads is None:
        raise UserError(f"width {width} is no published scale, and no shape tells the heads: pass heads=")
    grid = round(positions.shape[1] ** 0.5)
    return DCDiT(
        grid=grid,
        channels=channels,
        num_classes=rows - 1,
        width=width,
        depth=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("backbone.blocks.")),
        heads=heads,
        encoder_width=inner,
        mlp_ratio=hidden / width,
        smoothing_sigma=sigma if sigma is not None else (2.0 if grid == 64 else 1.0),
    )
