"""Training lengths at equal compute (paper, A.3)."""

from collections.abc import Sequence

from torch import nn

from dcdit.compute.flops import count
from dcdit.errors import UserError
from dcdit.network import DCDiT


def matched_steps(baseline_steps: int, baseline: float, warmup: int, full: float, budgets: Sequence[float]) -> int:
    """Steps of a DC-DiT that cost as much as ``baseline_steps`` of its baseline.

    S = S_warm + (S_0 F_0 - S_warm F) / mean(F_rho), operations per image F, equal batches.

    Args:
        baseline_steps: S_0.
        baseline: F_0, operations of the baseline.
        warmup: S_warm, steps at the full budget before the budgets are drawn.
        full: F, operations at the full budget.
        budgets: F_rho, operations at each of the budgets that are drawn; empty: always the full one.

    Raises:
        UserError: if the warm-up alone costs more.
    """
    compute = baseline_steps * baseline
    if not budgets:
        return round(compute / full)
    if compute < warmup * full:
        raise UserError(
            f"budget.warmup={warmup} steps at the full budget cost more than {baseline_steps} steps of the baseline:"
            f" take fewer than {int(compute / full)}"
        )
    return round(warmup + (compute - warmup * full) / (sum(budgets) / len(budgets)))


def steps_matching(
    network: nn.Module,
    baseline: nn.Module,
    baseline_steps: int,
    compression: float,
    fractions: Sequence[float],
    warmup: int,
) -> int:
    """:func:`matched_steps` for networks: a DC-DiT is taken to keep 1 / ``compression`` of the positions.

    The paper counts without r's Linear, and so does this.

    Args:
        network, baseline: built, on the meta device if need be.
        baseline_steps: of the baseline.
        compression: target compression N.
        fractions: drop fractions that training draws; empty trains at the full budget.
        warmup: steps at the full budget before the first draw.
    """

    def operations(candidate: nn.Module, drop: float) -> float:
        lengths = [_kept(candidate, compression) * (1 - drop)] if isinstance(candidate, DCDiT) else []
        return count(candidate, lengths).published

    budgets = [operations(network, drop) for drop in fractions]
    full = operations(network, 0.0)
    return matched_steps(baseline_steps, operations(baseline, 0.0), warmup, full, budgets)


def _kept(network: DCDiT, compression: float) -> float:
    return network.grid[0] * network.grid[1] / compression
