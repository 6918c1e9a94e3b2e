"""The weight matrices of transformer blocks, for optimisers that treat matrices as matrices."""

from torch import nn

from dcdit.network.blocks import blocks_of


def block_matrices(network: nn.Module) -> dict[nn.Parameter, int]:
    """The trained weights of all Linears inside transformer blocks, and how many matrices each of them stacks.

    A Linear may hold several matrices of equal size, one below the other: queries, keys and values, or the six
    modulations of a block. The module that owns it says so by a class attribute ``stacked``: the number by the
    Linear's name. All others hold one matrix.
    """
    found: dict[nn.Parameter, int] = {}
    for module in [module for block in blocks_of(network) for module in block.modules()]:
        stacked: dict[str, int] = getattr(module, "stacked", {})
        for name, child in module.named_children():
            weight = child.weight if isinstance(child, nn.Linear) else None
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                found[weight] = stacked.get(name, 1)
    return found
