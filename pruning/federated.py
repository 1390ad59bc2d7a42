"""Saliency over a fleet: draws of NTK-SAP spread over workers, and gate scores of boards summed.

Knows which worker computes which draw and in which order results are summed, so that the sum has the same
bits however the draws were dealt out. Does not know links: a worker is a function.

Source: the trace of the neural tangent kernel over a union of inputs is the sum of the local traces, so
that signed scores are sent and the absolute value is taken after the sum (arXiv 2405.04765).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.gates import GateScores
from profiles.errors import EstimateError
from pruning.masks import Masks, schedule
from pruning.saliency import Probe, ntk_draw, sum_draws

__all__ = ["Worker", "federated_masks", "local_draws", "pack_scores", "sum_gate_scores", "unpack_scores"]

Worker = Callable[[Masks, int, Sequence[int]], Mapping[int, bytes]]
"""Masks, step and the numbers of the draws in; packed signed scores of each draw out."""


def federated_masks(
    probe: Probe,
    workers: Sequence[Worker],
    *,
    density: float,
    steps: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Return the masks that :func:`pruning.saliency.ntk_sap` would find alone, bit for bit.

    Draw i of a step goes to worker i modulo their number; a worker that returns nothing for a draw is
    replaced by this process.

    Args:
        probe: The net and its draws; every worker has the same.
        workers: At least one.
        density: Fraction of the prunable weights that stays.
        steps: Cuts of the schedule.
        progress: Called with the cuts done and ``steps``.
    """

    def score(masks: Masks, step: int) -> dict[str, Tensor]:
        packed: dict[int, bytes] = {}
        for number, worker in enumerate(workers):
            packed.update(worker(masks, step, range(number, probe.draws, len(workers))))
        missing = [draw for draw in range(probe.draws) if draw not in packed]
        packed.update(local_draws(probe, masks, step, missing))
        return sum_draws(unpack_scores(packed[draw], masks) for draw in range(probe.draws))

    return schedule(score, probe.masks(), density, steps=steps, progress=progress)


def local_draws(
    probe: Probe, masks: Mapping[str, Tensor], step: int, draws: Sequence[int]
) -> dict[int, bytes]:
    """Compute draws here: what a worker does with its share."""
    return {draw: pack_scores(ntk_draw(probe, masks, step, draw)[1], masks) for draw in draws}


def pack_scores(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bytes:
    """Return the signed scores of the weights that still stand, as little-endian float32."""
    parts = [scores[name].reshape(-1)[mask.reshape(-1) > 0].numpy() for name, mask in masks.items()]
    return np.concatenate(parts).astype("<f4").tobytes()


def unpack_scores(packed: bytes, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return packed scores as tensors; a weight that fell scores 0.

    Raises:
        EstimateError: The length does not fit the masks, or a score is not finite.
    """
    values = np.frombuffer(packed, "<f4") if len(packed) % 4 == 0 else np.empty(0, np.float32)
    standing = {name: int((mask > 0).sum()) for name, mask in masks.items()}
    if len(values) != sum(standing.values()) or not np.isfinite(values).all():
        raise EstimateError(
            f"a worker sent {len(packed)} bytes of scores, expected {4 * sum(standing.values())} finite ones",
            hint="Let every worker run the same release on the same net.",
        )
    scores, start = {}, 0
    for name, mask in masks.items():
        scores[name] = torch.zeros(mask.shape)
        piece = torch.from_numpy(values[start : start + standing[name]].astype(np.float32))
        scores[name][mask > 0] = piece
        start += standing[name]
    return scores


def sum_gate_scores(replies: Iterable[tuple[str, GateScores]]) -> NDArray[np.float32]:
    """Return the gate scores over the union of the agents' inputs.

    Args:
        replies: Agent and what it measured, at least one; all of the same bundle and keys.

    Returns:
        Mean weighted by the numbers of inputs; the sum is exact, hence the same in any order.

    Raises:
        EstimateError: An agent's scores have another length or are not finite.
    """
    known = list(replies)
    if not known:
        raise ValueError("no agent replied")
    shape = known[0][1].scores.shape
    for agent, reply in known:
        if reply.scores.shape != shape or not np.isfinite(reply.scores).all() or reply.samples < 1:
            raise EstimateError(
                f"{agent} sent {reply.scores.shape} scores of {reply.samples} inputs, expected {shape}",
                hint="Leave the agent out, and let all agents hold the same bundle.",
            )
    weighted = [reply.samples * reply.scores.astype(np.float64) for _, reply in known]  # exact products
    samples = sum(reply.samples for _, reply in known)
    return np.array([math.fsum(unit) / samples for unit in zip(*weighted, strict=True)], np.float32)
