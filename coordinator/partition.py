"""Deals the samples of one file to the agents of a test-bed, evenly or not.

In a real fleet every board has its own data; this is how an experiment imitates it, the same for the
same seed.
"""

import numpy as np
from numpy.typing import NDArray

from profiles.errors import DataError

__all__ = ["partition"]

_ATTEMPTS = 200


def partition(
    labels: NDArray[np.int64], agents: int, *, split: str, alpha: float, min_samples: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return for each agent the indices of its samples; together they are all samples, each once.

    Args:
        labels: Of all samples, shape (n,).
        agents: How many agents, at least 1.
        split: ``iid``; ``dirichlet``, where each class is dealt by shares drawn from Dirichlet(alpha)
            (Hsu, Qi, Brown, arXiv 1909.06335); or ``shards``, where each agent gets two runs of the
            samples sorted by label (McMahan et al., AISTATS 2017).
        alpha: Of the Dirichlet distribution.
        min_samples: No agent gets fewer; Dirichlet shares are drawn again until that holds.
        seed: Names the deal.

    Raises:
        DataError: There are too few samples for that, or 200 draws did not give it.
    """
    if len(labels) < agents * min_samples:
        raise DataError(
            f"{len(labels)} samples are too few for {agents} agents with at least {min_samples} each",
            hint="Use fewer devices, lower data.min_samples, or bring more data.",
        )
    rng = np.random.default_rng([seed, 0x5911])
    if split == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), agents)]
    if split == "shards":
        runs = np.array_split(np.argsort(labels, kind="stable"), 2 * agents)
        order = rng.permutation(2 * agents)
        return [np.sort(np.concatenate([runs[order[2 * a]], runs[order[2 * a + 1]]])) for a in range(agents)]
    for _ in range(_ATTEMPTS):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(agents)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(agents, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        dealt = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, dealt)) >= min_samples:
            return dealt
    raise DataError(
        f"in {_ATTEMPTS} draws with alpha = {alpha}, some of the {agents} agents always got fewer than "
        f"{min_samples} samples",
        hint="Raise data.alpha, lower data.min_samples, or use fewer devices.",
    )
