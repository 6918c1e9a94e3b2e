"""Training lengths at equal compute (paper, A.3)."""

from collections.abc import Sequence

from dcdit.compute.flops import Cost, count
from dcdit.errors import UserError
from dcdit.network import Network


def matched_steps(
    baseline_steps: int, baseline: float, full_budget_steps: int, full: float, budgets: Sequence[float]
) -> int:
    """Steps of a DC-DiT that cost as much as ``baseline_steps`` of its baseline.

    S = S_warm + (S_0 F_0 - S_warm F) / mean(F_rho), FLOPs per image F, equal batches.

    Args:
        baseline_steps: S_0.
        baseline: F_0, FLOPs of the baseline.
        full_budget_steps: S_warm, steps at the full budget before drop fractions are sampled.
        full: F, FLOPs at the full budget.
        budgets: F_rho, FLOPs at each of the drop fractions; empty: always the full budget.

    Raises:
        UserError: if the steps at the full budget alone cost more.
    """
    compute = baseline_steps * baseline
    if not budgets:
        return round(compute / full)
    if compute < full_budget_steps * full:
        raise UserError(
            f"multi_budget.full_budget_steps={full_budget_steps} steps at the full budget cost more than"
            f" {baseline_steps} steps of the baseline: take fewer than {int(compute / full)}"
        )
    return round(full_budget_steps + (compute - full_budget_steps * full) / (sum(budgets) / len(budgets)))


def steps_matching(
    network: Network,
    baseline: Network,
    baseline_steps: int,
    compression: float,
    fractions: Sequence[float],
    full_budget_steps: int,
    path_drop: float = 0.0,
    beside: Cost = Cost(),  # noqa: B008  (immutable)
) -> int:
    """:func:`matched_steps` for networks: one that routes is taken to keep 1 / ``compression`` of the positions.

    The paper counts without the residual projection, and so does this.

    Args:
        network, baseline: built, on the meta device if need be.
        baseline_steps: of the baseline.
        compression: target compression N.
        fractions: drop fractions that training samples; empty trains at the full budget.
        full_budget_steps: steps at the full budget before the first is sampled.
        path_drop: share of the samples of later steps that leave the backbone out.
        beside: what training adds to a forward pass of ``network``, but not of ``baseline``.
    """

    def flops(candidate: Network, drop: float, beside: Cost) -> float:
        lengths = [candidate.positions / compression * (1 - drop)] if candidate.routes else []
        return count(candidate, lengths).published + beside.mean(lengths)

    full, without = flops(network, 0.0, beside), flops(network, 1.0, beside)
    sampled = fractions or ([0.0] if path_drop else [])
    budgets = [(1 - path_drop) * flops(network, drop, beside) + path_drop * without for drop in sampled]
    return matched_steps(baseline_steps, flops(baseline, 0.0, Cost()), full_budget_steps, full, budgets)
