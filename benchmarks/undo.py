"""Do 10,000 perturbations and their undoing leave every bit of 10 million weights as it was?

    python -m benchmarks.undo --out benchmarks/results/undo.json

A cycle goes there and back as the estimator does: to w + e z, through to w - e z, and back in the pass that
goes to the next. The keys are new in every cycle; half of the cycles divide by a curvature.
"""

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path

import numpy as np

from edge_agent.digest import fold
from edge_agent.grid import displacer, plan_segments, snap
from edge_agent.native.kernel import kernel_name
from edge_agent.noise import NoiseKey

SEED = 20261121


def main() -> None:
    """Run the cycles and write what came out."""
    parser = argparse.ArgumentParser(description="Perturb and undo, and compare every bit.")
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(SEED)
    weights = (0.05 * random.standard_normal(options.weights)).astype(np.float32)
    half = options.weights // 32 * 16
    weights[half:] *= 100  # a second grid
    segments = plan_segments(weights, [(0, half), (half, options.weights)])
    snap(weights, segments)
    curvature = random.integers(0x3A00, 0x4200, options.weights).astype(np.uint16)
    before, first = hashlib.sha256(weights.tobytes()).hexdigest(), fold(weights.view(np.uint32))
    start = time.perf_counter()
    for part, bits in enumerate((None, curvature)):
        keys = [NoiseKey(SEED, cycle, part, 0) for cycle in range(options.cycles // 2)]
        displace = displacer(weights, segments, keys, epsilon=1e-3, curvature=bits)
        for cycle in range(len(keys)):
            displace(*((cycle - 1, 1, 1) if cycle else (0, 1)))
            displace(cycle, -2)
        displace(len(keys) - 1, 1)
    after = hashlib.sha256(weights.tobytes()).hexdigest()
    found = {
        "weights": options.weights,
        "cycles": options.cycles,
        "grids": len(segments),
        "kernel": kernel_name(),
        "seconds": round(time.perf_counter() - start, 1),
        "sha256_before": before,
        "sha256_after": after,
        "digest": f"{first:016x}",
        "same": before == after and first == fold(weights.view(np.uint32)),
        "machine": platform.machine(),
        "numpy": np.__version__,
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(0 if found["same"] else 1)


if __name__ == "__main__":
    main()
