"""Names of parameters in other programs' files, and what they are called here."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, eq=False)
class NameMap:
    """One program's names of the parameters of a network.

    Attributes:
        title: what messages call the program's checkpoints.
        network: name in :data:`dcdit.network.NETWORKS`.
        modules: their names by ours, without ``weight`` and ``bias``; ``#`` stands for a number.
        optional: theirs that a network may do without.
    """

    title: str
    network: str
    modules: Mapping[str, str]
    optional: Collection[str] = ()

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str, re.Pattern[str], str]]:
        return [(_pattern(theirs), theirs, _pattern(ours), ours) for ours, theirs in self.modules.items()]

    def ours(self, name: str) -> str | None:
        """What the parameter ``name`` of the other program is called here; None if it is unknown."""
        module, _, last = name.rpartition(".")
        for pattern, _, _, ours in self._patterns:
            if match := pattern.fullmatch(module):
                return f"{_numbered(ours, match)}.{last}"
        return None

    def theirs(self, name: str) -> str | None:
        """What our parameter ``name`` is called there; None if it has no counterpart."""
        module, _, last = name.rpartition(".")
        for _, theirs, pattern, _ in self._patterns:
            if match := pattern.fullmatch(module):
                return f"{_numbered(theirs, match)}.{last}"
        return None

    def differences(self, names: Collection[str]) -> list[str]:
        """What tells ``names`` from those of such a checkpoint, in words; nothing if they may be one."""
        modules = {name.rpartition(".")[0] for name in names}
        unknown = [f"{name} is unknown" for name in names if self.ours(name) is None]
        wanted = (theirs for theirs in self.modules.values() if theirs not in self.optional)
        lacking = [f"{theirs} is missing" for theirs in wanted if not any(map(_pattern(theirs).fullmatch, modules))]
        return lacking + unknown


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)"))


def _numbered(template: str, match: re.Match[str]) -> str:
    return template.replace("#", match[1]) if "#" in template else template


_EMBEDDERS_AND_OUTPUT = {
    "embed": "x_embedder.proj",
    "condition.time.fc1": "t_embedder.mlp.0",
    "condition.time.fc2": "t_embedder.mlp.2",
    "condition.label.table": "y_embedder.embedding_table",
    "output.linear": "final_layer.linear",
    "output.modulation": "final_layer.adaLN_modulation.1",
}
_BLOCK = {
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
_CONV_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "condition": "cond_proj.1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "skip_proj",
}
_STACKS = ("encoder", "decoder")

REFERENCE = NameMap(
    "reference DC-DiT checkpoint",
    "dcdit",
    {
        **_EMBEDDERS_AND_OUTPUT,
        **{
            f"{stack}.blocks.#.{ours}": f"hnet.{stack}.layers.#.{theirs}"
            for stack in _STACKS
            for ours, theirs in _CONV_BLOCK.items()
        },
        **{f"{stack}.norm": f"hnet.{stack}.rmsnorm" for stack in _STACKS},
        "router.project": "hnet.routing_module.proj",
        "router.predict": "hnet.routing_module.context_predictor",
        "router.scorer.#": "hnet.routing_module.residual_scorer.#",
        "residual": "hnet.residual_proj",
        **{
            f"backbone.blocks.#.{ours}": f"hnet.main_network.main_network.layers.#.{theirs}"
            for ours, theirs in _BLOCK.items()
        },
        "backbone.norm": "hnet.main_network.main_network.rmsnorm",
    },
    optional=[f"hnet.{stack}.layers.#.skip_proj" for stack in _STACKS],
)

DIT = NameMap(
    "DiT checkpoint",
    "dit",
    {**_EMBEDDERS_AND_OUTPUT, **{f"blocks.#.{ours}": f"blocks.#.{theirs}" for ours, theirs in _BLOCK.items()}},
)

DIFFUSERS = NameMap(
    "diffusers DiTTransformer2DModel",
    "dit",
    {
        "embed": "pos_embed.proj",
        "condition.time.fc1": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "condition.time.fc2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "condition.label.table": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
        "blocks.#.attention.qkv": "transformer_blocks.#.attn1.to_qkv",
        "blocks.#.attention.out": "transformer_blocks.#.attn1.to_out.0",
        "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
        "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
        "blocks.#.modulation": "transformer_blocks.#.norm1.linear",
        "output.modulation": "proj_out_1",
        "output.linear": "proj_out_2",
    },
)
"""With q, k and v in one tensor, and one copy of the embedders: ``foreign.py`` joins them before it looks here."""

NAME_MAPS = (REFERENCE, DIT, DIFFUSERS)
