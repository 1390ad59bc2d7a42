"""What the passes over the weights cost against one pass over the same bytes: ``scalarfed bench kernel``.

A pass reads and writes every weight once, in numpy, on one core. All are timed by turns in one process, so
that whatever else the machine does meets each of them alike; a ratio is one of medians.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import Segment, displacer
from edge_agent.native.kernel import kernel_name
from edge_agent.noise import NoiseKey
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundRecord

__all__ = ["measure_passes", "medians"]

_PERTURBATIONS = 16
_TURN_S = 0.01


def medians(
    works: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
    least: int = 3,
) -> dict[str, float]:
    """Return the median time of each work in seconds, all done by turns after a first turn for warmth.

    A short work is repeated within its turn, so that it finds in the caches what it left there.

    Args:
        works: Functions by name.
        seconds: How long to go on in all, by the wall.
        clock: CPU time of this process, which other processes do not move much.
        least: Turns at least.
    """
    repeats: dict[str, int] = {}
    for name, work in works.items():
        start = time.perf_counter()
        work()
        repeats[name] = max(1, round(_TURN_S / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or time.perf_counter() < end:
        turns += 1
        for name, work in works.items():
            start = clock()
            for _ in range(repeats[name]):
                work()
            times[name].append((clock() - start) / repeats[name])
    return {name: float(np.median(found)) for name, found in times.items()}


def measure_passes(*, size: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of a perturbation and of a replay of 16, plain and with bfloat16 curvature.

    Args:
        size: Weights, a multiple of 16; 125 million are those of OPT-125M.
        seconds: How long each half is measured.
        say: Told what is going on.
    """
    say(f"drawing {size:,} weights")
    segments = [Segment(0, size, 2)]
    weights = np.zeros(size, np.float32)
    found: dict[str, Any] = {"kernel": kernel_name(), "weights": size}
    for name, curvature in (("", None), ("_curved", np.full(size, 0x3F80, np.uint16))):
        say(f"timing a pass, a perturbation and a replay of {_PERTURBATIONS}{name.replace('_', ', ')}")
        times = medians(_works(weights, segments, curvature), seconds=seconds)
        seconds_of = {f"{work}{name}_s": round(time_s, 9) for work, time_s in times.items()}
        found[f"perturb{name}_over_memory_pass"] = round(times["perturb"] / times["pass"], 3)
        found[f"replay{_PERTURBATIONS}{name}_over_memory_pass"] = round(times["replay"] / times["pass"], 3)
        found |= seconds_of
        found[f"pass{name}_gbs"] = round(_bytes(weights, curvature) / times["pass"] / 1e9, 2)
    return found


def _bytes(vector: NDArray[np.float32], bits: NDArray[np.uint16] | None) -> int:
    return 2 * (vector.nbytes + (0 if bits is None else bits.nbytes))


def _works(
    vector: NDArray[np.float32], segments: list[Segment], bits: NDArray[np.uint16] | None
) -> dict[str, Callable[[], object]]:
    """Return one pass over the memory, a perturbation (there, and back at the next turn), and a replay."""
    method = METHODS["decomfl" if bits is None else "hiso"]
    replica = Replica(vector, segments, curvature=bits)
    displace = displacer(vector, segments, [NoiseKey(7, 0, 0, 0)], epsilon=1e-3, curvature=bits)
    sign = [1]
    scalars = np.linspace(-1, 1, _PERTURBATIONS, dtype=np.float32)[None]

    def memory_pass() -> None:
        np.add(vector, np.float32(0), out=vector)
        if bits is not None:
            np.bitwise_or(bits, np.uint16(0), out=bits)

    def perturb() -> None:
        displace(0, sign[0])
        sign[0] = -sign[0]

    def replay() -> None:
        plan = RoundPlan(replica.round, 7, method.code, 1, _PERTURBATIONS, 1e-3, 0.01, method.values({}))
        apply_record(replica, RoundRecord(plan, 0, False, scalars, 0), check=False)

    return {"pass": memory_pass, "perturb": perturb, "replay": replay}
