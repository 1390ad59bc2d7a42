"""Is training on the fixed-point grid worse than plain float32?

    python -m benchmarks.grid --data examples/digits.npz --model mlp --rate 0.02 --steps 1500

The same net, seeds, batches, noise and learning rate twice: once as an agent does it (weights on the grid,
perturbations rounded and undone in place, updates rounded by random words), once in plain float32 with a
copy of the weights to return to. Central differences, P = 8, one client; the accuracy is that of the test
part at the end.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.data import load_samples, to_inputs
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.noise import NoiseKey, values
from edge_agent.optimizer import METHODS
from edge_agent.replay import apply_record
from edge_agent.wire import RoundPlan, RoundRecord
from profiles.cost import graph_cost
from pruning.export import export_graph, write_exported
from pruning.models import build_model, standardisation

PERTURBATIONS = 8
EPSILON = 1e-3
BATCH = 32


def bundle_of(model: str, x: NDArray[np.float32], classes: int, seed: int, folder: Path) -> Bundle:
    """Make a net with the weights of a seed."""
    shape = x.shape[1:]
    net = build_model(model, sample_shape=shape, classes=classes, standardise=standardisation(x), seed=seed)
    return write_exported(
        export_graph(net, sample_shape=shape, classes=classes, verify=False),
        folder,
        model=model,
        sample_shape=shape,
        classes=classes,
        pruning={"method": "none"},
        cost=lambda graph: graph_cost(graph).as_dict(),
    )


def on_the_grid(
    bundle: Bundle, train, test, *, seed: int, steps: int, rate: float
) -> tuple[float, NDArray[np.float32]]:
    """Train as an agent does; return the accuracy and the weights."""
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = random.integers(0, len(train[1]), BATCH)
        x, y = np.ascontiguousarray(train[0][chosen]), train[1][chosen]
        plan = RoundPlan(
            replica.round, seed, METHODS["decomfl"].code, 1, PERTURBATIONS, EPSILON, rate, (0.0,)
        )
        found = estimate(replica, plan, lambda _, x=x, y=y: lambda: forward.loss(x, y), central=True)
        apply_record(replica, RoundRecord(plan, 0, False, found.scalars, 0), check=False)
    return forward.evaluate(*test)[1] / len(test[1]), replica.weights


def in_float32(
    bundle: Bundle, train, test, *, seed: int, steps: int, rate: float
) -> tuple[float, NDArray[np.float32]]:
    """Train in plain float32 with a copy of the weights; return the accuracy and the weights."""
    weights = bundle.replica().weights
    forward = Forward(bundle, weights)
    random = np.random.default_rng(seed)
    kept = weights.copy()
    for step in range(steps):
        chosen = random.integers(0, len(train[1]), BATCH)
        x, y = np.ascontiguousarray(train[0][chosen]), train[1][chosen]
        descent = np.zeros_like(weights)
        for number in range(PERTURBATIONS):
            z = values(NoiseKey(seed, step, 0, number), 0, weights.size).astype(np.float32)
            losses = []
            for sign in (1, -1):
                np.add(kept, np.float32(sign * EPSILON) * z, out=weights)
                losses.append(forward.loss(x, y))
            descent += np.float32((losses[0] - losses[1]) / (2 * EPSILON)) * z
        kept -= np.float32(rate / PERTURBATIONS) * descent
    weights[...] = kept
    return forward.evaluate(*test)[1] / len(test[1]), weights


def main() -> None:
    """Train both ways on every seed and write the accuracies."""
    parser = argparse.ArgumentParser(description="Train on the grid and in float32.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts = {}
    for part in ("train", "test"):
        samples = load_samples(options.data, part)
        parts[part] = (np.ascontiguousarray(to_inputs(samples.x)), samples.y)
    classes = int(parts["train"][1].max()) + 1
    rows = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            bundle = bundle_of(options.model, parts["train"][0], classes, seed, Path(folder))
            how = {"seed": seed, "steps": options.steps, "rate": options.rate}
            start = bundle.replica().weights
            grid, ours = on_the_grid(bundle, parts["train"], parts["test"], **how)
            plain, theirs = in_float32(bundle, parts["train"], parts["test"], **how)
            apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start))
            rows.append({"seed": seed, "grid": grid, "float32": plain, "distance_over_way": apart})
        print(json.dumps(rows[-1]), flush=True)
    differences = [row["grid"] - row["float32"] for row in rows]
    found = {
        "data": options.data.stem,
        "model": options.model,
        "steps": options.steps,
        "rate": options.rate,
        "perturbations": PERTURBATIONS,
        "rows": rows,
        "mean_grid": float(np.mean([row["grid"] for row in rows])),
        "mean_float32": float(np.mean([row["float32"] for row in rows])),
        "mean_difference": float(np.mean(differences)),
        "standard_error": float(np.std(differences, ddof=1) / np.sqrt(len(rows))),
    }
    print(json.dumps(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
