"""Masks: which weights stand, how a schedule thins them, and the densities they leave.

Knows scores and counts. Does not know how a score is computed, nor what a net is.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Masks", "Scorer", "densities_of", "keep_top", "schedule"]

Masks = dict[str, Tensor]
"""One float32 tensor of zeros and ones per prunable weight."""

Scorer = Callable[[Masks, int], Mapping[str, Tensor]]
"""Masks of the moment and step of the schedule in; a score per weight out, higher stays longer."""


def keep_top(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    density: float,
    *,
    per_layer: bool = False,
    costs: Mapping[str, float] | None = None,
) -> Masks:
    """Keep the weights with the highest scores, per unit of cost, among those that still stand.

    Args:
        scores: A score per weight, any sign, higher stays longer.
        masks: What stands now.
        density: Fraction of *all* weights that stays, in (0, 1], or of their cost; at least one stays.
        per_layer: Apply ``density`` to every tensor rather than to all of them together.
        costs: What one weight of a tensor costs, > 0, such as its multiply-accumulates; 1 if None.

    Returns:
        New masks that cost at most ``density`` of everything, or less where less stood before. Among equal
        scores the earlier tensor and element stays, so that the result does not depend on the machine.
    """
    if per_layer:
        return {k: keep_top({k: scores[k]}, {k: masks[k]}, density)[k] for k in masks}
    price = {k: 1.0 if costs is None else float(costs[k]) for k in masks}
    worth = torch.cat([scores[k].reshape(-1).double() / price[k] for k in masks])
    standing = torch.cat([masks[k].reshape(-1) for k in masks]) > 0
    prices = torch.cat([torch.full((masks[k].numel(),), price[k], dtype=torch.float64) for k in masks])
    order = torch.sort(torch.where(standing, worth, -torch.inf), descending=True, stable=True).indices
    allowed = density * float(prices.sum()) + 0.5 * min(price.values())
    count = max(1, int((torch.cumsum(prices[order], 0) <= allowed).sum()))
    kept = torch.zeros(worth.numel())
    kept[order[: min(count, int(standing.sum()))]] = 1.0
    pieces = torch.split(kept, [mask.numel() for mask in masks.values()])
    return {k: piece.reshape(masks[k].shape) for k, piece in zip(masks, pieces, strict=True)}


def schedule(
    score: Scorer,
    masks: Masks,
    density: float,
    *,
    steps: int = 20,
    per_layer: bool = False,
    costs: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Thin the masks in ``steps`` to ``density``, scoring anew before each cut.

    After step t of T the fraction density ** (t / T) stands (Tanaka et al., "Pruning neural networks
    without any data", arXiv 2006.05467, algorithm 1).

    Args:
        score: Called with the masks of the moment and the step (counted from 0).
        masks: Where to start; all ones for a dense net.
        density: Fraction of all weights that stays at the end, in (0, 1].
        steps: T, at least 1.
        per_layer: See :func:`keep_top`.
        costs: See :func:`keep_top`.
        progress: Called with the steps done and ``steps``.
    """
    if not 0 < density <= 1 or steps < 1:
        raise ValueError(f"density must be in (0, 1] and steps >= 1, got {density=} and {steps=}")
    for step in range(steps):
        scores = score(masks, step)
        masks = keep_top(scores, masks, density ** ((step + 1) / steps), per_layer=per_layer, costs=costs)
        if progress is not None:
            progress(step + 1, steps)
    return masks


def densities_of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of each tensor that stands; at least one element counts as standing.

    A layer that lost everything would cut the net in two, so it is counted as if one weight were left.
    """
    return {name: max(float(mask.sum()), 1.0) / mask.numel() for name, mask in masks.items()}
