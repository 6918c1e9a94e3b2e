"""From packed tokens back to the grid (paper, de-chunk): pure functions, no parameters.

B samples on an H x W grid of L = H * W raster positions; T kept tokens in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.network.packing import Packing, pack
from dcdit.network.routing import Routing

_AT_ONCE = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Grid elements that are smoothed at once. On a CPU 16 MiB in float32, which its caches hold. On a GPU 256 MiB, since
each group starts a dozen kernels: XL at batch 64 has two groups in place of 22. The latter is not measured yet."""

_NEGLIGIBLE = 1e-15
"""Gaussian weights up to here count as none. Beside a token's own weight, at least 1e-4, they are far below float32's
resolution, and their products, down to subnormal numbers, slow the matrix products of some CPUs tenfold."""


def nearest_kept(mask: Tensor) -> Tensor:
    """For every position the raster position of its nearest kept one, ties to the lowest raster index.

    Exact, in O(L * H) time and memory: within a row the nearest kept column is the nearer of a running maximum from
    the left and a running minimum from the right; among rows the best sum of squared distances wins.

    Args:
        mask: (B, H, W) bool, at least one position kept per sample.

    Returns:
        (B, L) int64 raster positions.
    """
    height, width = mask.shape[1:]
    far = height + width  # farther than any position of the grid
    column = torch.arange(width, dtype=torch.int32, device=mask.device)
    left = torch.where(mask, column, -far).cummax(dim=2).values
    right = torch.where(mask, column, 2 * far).flip(2).cummin(dim=2).values.flip(2)
    nearest_column = torch.where(column - left <= right - column, left, right)  # (B, H', W): kept column in row H'
    in_row = (column - nearest_column).square().clamp(max=far * far)

    row = torch.arange(height, dtype=torch.int32, device=mask.device)
    between_rows = (row[:, None] - row).square()  # (H, H')
    # (B, H, H', W): the row number rides in the low digits, so that the minimum is unique and prefers the upper row.
    ranked = (between_rows[:, :, None] + in_row[:, None]) * height + row[:, None]
    nearest_row = ranked.amin(dim=2) % height  # (B, H, W)
    chosen = nearest_column.long().gather(1, nearest_row.long())
    return (nearest_row * width + chosen).flatten(1)


def gaussian(side: int, sigma: float, device: torch.device) -> Tensor:
    """exp(-(i - j)^2 / (2 sigma^2)) for positions i, j of one side of the grid: (side, side); 1e-15 or less is none."""
    at = torch.arange(side, dtype=torch.float32, device=device)
    return F.threshold(torch.exp(-(at[:, None] - at).square() / (2 * sigma**2)), _NEGLIGIBLE, 0)


Kernels = tuple[Tensor, Tensor]
"""A Gaussian over the grid separates: that of the rows (H, H), and that of the columns (W, W)."""


def kernels(grid: tuple[int, int], sigma: float, device: torch.device) -> Kernels:
    """Both :func:`gaussian`s of a ``grid`` (H, W); of a square one they are the same."""
    rows = gaussian(grid[0], sigma, device)
    return rows, rows if grid[0] == grid[1] else gaussian(grid[1], sigma, device)


def blur(field: Tensor, weights: Kernels) -> Tensor:
    """Unnormalised Gaussian sum over the grid: out_i = sum_j exp(-|u_i - u_j|^2 / (2 sigma^2)) field_j.

    Args:
        field: (B, H, W, D) float32.
        weights: see :func:`kernels`; one small matrix product each.

    Returns:
        (B, H, W, D) float32.
    """
    for axis, kernel in zip((1, 2), weights, strict=True):
        field = torch.matmul(kernel, field.flatten(axis + 1)).view_as(field)
    return field


def gaussian_sums(field: Tensor, packing: Packing, grid: tuple[int, int], weights: Kernels) -> Tensor:
    """For each kept token i the sum of exp(-|u_i - u_j|^2 / (2 sigma^2)) field_j over the kept tokens j of its sample.

    Equals blurring the grid of all samples at once; taking a few samples at a time bounds the memory by that of a few
    grids, forward and backward, and keeps small grids in the CPU's cache.

    Args:
        field: (T, D) float32.
        packing: where the tokens lie.
        grid: (H, W).
        weights: of the grid, see :func:`kernels`.

    Returns:
        (T, D) float32.
    """
    positions, lengths = packing.bound, packing.lengths
    if packing.valid is not None:  # at once: where groups begin is not known to the host; padding adds nothing
        field = field.masked_fill(~packing.valid[:, None], 0)
        flat = field.new_zeros(packing.batch * positions, field.shape[1]).index_add(0, packing.index, field)
        return blur(flat.unflatten(0, (-1, *grid)), weights).flatten(0, 2).index_select(0, packing.index)
    at_once = _AT_ONCE.get(field.device.type, _AT_ONCE["cpu"])
    together = max(1, at_once // (positions * field.shape[1]))
    groups = [lengths[first : first + together] for first in range(0, len(lengths), together)]
    tokens = [sum(group) for group in groups]  # split, whose backward is one concatenation, not a sum of slices
    sums = []
    for number, (part, index) in enumerate(zip(field.split(tokens), packing.index.split(tokens), strict=True)):
        at = index - number * together * positions
        flat = part.new_zeros(len(groups[number]) * positions, part.shape[1]).index_copy(0, at, part)
        sums.append(blur(flat.unflatten(0, (-1, *grid)), weights).flatten(0, 2).index_select(0, at))
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def smooth(tokens: Tensor, prob: Tensor, packing: Packing, grid: tuple[int, int], sigma: float) -> Tensor:
    """Blend each kept token with the confidence-weighted Gaussian mean of the kept tokens around it.

    o_i = q_i h_i + (1 - q_i) sum_j W_ij h_j / (sum_j W_ij + 1e-8), W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) q_j.
    No T x T matrix is needed.

    Args:
        tokens: (T, D) float32.
        prob: (T,) float32 boundary probabilities of the kept tokens.
        packing: where they lie.
        grid: (H, W).
        sigma: standard deviation in grid positions.

    Returns:
        (T, D) float32.
    """
    q = prob.clamp(1e-4, 1 - 1e-4)[:, None]
    # Two sums rather than one of D + 1 channels: an odd channel count costs the matrix product its speed.
    own, weights = q * tokens, kernels(grid, sigma, tokens.device)
    total = gaussian_sums(q, packing, grid, weights) + 1e-8
    return torch.addcmul(own, (1 - q) / total, gaussian_sums(own, packing, grid, weights))


def plug_back(tokens: Tensor, packing: Packing, mask: Tensor) -> Tensor:
    """Give every position the token of its nearest kept position.

    Args:
        tokens: (T, D), at least one.
        packing: where they lie.
        mask: (B, H, W) bool, the kept positions.

    Returns:
        (B, L, D); of a sample that keeps no position, values without meaning.
    """
    packed_index = mask.flatten().cumsum(0) - 1  # flat grid position -> index in the packed sequence
    if packing.valid is not None or 0 in packing.lengths:  # who keeps nothing is given whatever token, for no use
        mask, packed_index = mask | ~mask.any(dim=(1, 2), keepdim=True), packed_index.clamp(min=0)
    positions = nearest_kept(mask)
    batch_offset = torch.arange(len(mask), device=mask.device)[:, None] * packing.bound
    nearest = packed_index.take(batch_offset + positions)
    return tokens.index_select(0, nearest.flatten()).unflatten(0, nearest.shape)


def dechunk(tokens: Tensor, routing: Routing, packing: Packing, grid: tuple[int, int], sigma: float | None) -> Tensor:
    """Spread the backbone's output over the whole grid (paper, de-chunk): smooth, then plug back.

    Args:
        tokens: (T, D) backbone output.
        routing: the decision that ``packing`` was made from.
        packing: where the tokens lie.
        grid: (H, W).
        sigma: smoothing width in grid positions; None spreads the tokens unsmoothed (ablation).

    Returns:
        (B, L, D) float32.
    """
    tokens = tokens.float()
    if sigma is not None:
        tokens = smooth(tokens, pack(routing.prob, packing), packing, grid, sigma)
    return plug_back(tokens, packing, routing.mask.unflatten(1, grid))


def straight_through(confidence: Tensor) -> Tensor:
    """Exactly 1 in the forward pass; passes the gradient to ``confidence`` (>= 0.5) unchanged."""
    # For s in [0.5, 1] the difference 1 - s is exact in floating point, hence so is the sum.
    return confidence + (1 - confidence.detach())
