"""Gate scores as a file: measured on a board by one command, carried to the coordinator by hand.

    python -m edge_agent.scores GATED DATA.npz -o scores.json

Knows the file and the command. What is measured, and why its sum over boards is meant, stands in
:mod:`edge_agent.gates`; how widths follow from it, in :mod:`pruning.plan`. The file holds one number per
unit of the net, how many samples they are of, and which gated bundle they belong to; no sample, no weight.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import batch_indices, load_samples, to_inputs
from edge_agent.footprint import give_back
from edge_agent.forward import Forward
from edge_agent.gates import GateScores, gate_scores, open_gates
from edge_agent.noise import NoiseKey
from profiles.errors import ConfigError, DataError, ScalarfedError

__all__ = ["BoardScores", "main", "measure_scores", "read_scores", "write_scores"]

_FORMAT = 1
_EPSILON = 0.01  # NTK-SAP's
_SAMPLES = 256
_REMEDY = "Make it on the board with `python -m edge_agent.scores GATED DATA.npz -o FILE`, and copy it here."
_TENTHS = 10  # how often a process without a terminal says how far it is


@dataclass(frozen=True)
class BoardScores:
    """What one board measured, and of what.

    Attributes:
        gated: Identity of the gated bundle.
        model: Its net's name, for messages.
        found: The scores.
    """

    gated: str
    model: str
    found: GateScores


def measure_scores(
    bundle: Bundle,
    data: Path,
    *,
    samples: int,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> BoardScores:
    """Score the units of a gated bundle's net on a board's own samples, by forward passes only.

    Args:
        bundle: With gates; it names the perturbations, so that they are the same on every board.
        data: An ``.npz`` with x_train and y_train.
        samples: How many of them are looked at; all where there are fewer.
        seed: Names which.
        threads: Of a forward pass.
        progress: Called with the forward passes done and all of them.

    Raises:
        BundleError: The bundle has no gates.
        ConfigError: The samples have another shape than the bundle takes.
        DataError: The samples cannot be read.
        EstimateError: A score is not finite.
    """
    gates = open_gates(bundle)
    own = load_samples(data, "train", classes=bundle.classes)
    shape = to_inputs(own.x[:1]).shape[1:]
    if shape != bundle.sample_shape:
        raise ConfigError(
            f"{data} has samples of shape {shape}; the bundle takes {bundle.sample_shape}",
            hint="Use the data that the bundle was made for, or make a gated bundle for this data.",
        )
    count = min(samples, len(own))
    x = to_inputs(own.pick(np.sort(batch_indices(seed, 0, 0, count, len(own)))).x)
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights, threads=threads, others=gates.inputs)
    keys = [NoiseKey(bundle.pruning["seed"], draw, 0, 0) for draw in range(bundle.pruning["draws"])]
    found = gate_scores(
        replica, gates, lambda: forward.logits(x), keys=keys, epsilon=_EPSILON, progress=progress
    )
    return BoardScores(bundle.identity, bundle.model, found)


def write_scores(path: Path, board: BoardScores) -> None:
    """Write what a board measured; the file appears when it is whole."""
    content = {
        "format": _FORMAT,
        "gated": board.gated,
        "model": board.model,
        "samples": board.found.samples,
        "forwards": board.found.forwards,
        "scores": [float(score) for score in board.found.scores],
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_scores(path: Path) -> BoardScores:
    """Read what a board measured.

    Raises:
        DataError: There is no such file, it is no file of scores, or a score is not finite.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, this release reads {_FORMAT}")
        scores = [float(score) for score in content["scores"]]
        samples, forwards = int(content["samples"]), int(content["forwards"])
        if samples < 1 or not all(math.isfinite(score) for score in scores):
            raise ValueError(f"{samples} samples, or a score that is not finite")
        found = GateScores(np.array(scores, np.float32), samples, forwards)
        return BoardScores(str(content["gated"]), str(content["model"]), found)
    except FileNotFoundError:
        raise DataError(f"there is no file of scores {path}", hint=_REMEDY) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path} holds no gate scores: {type(error).__name__}: {error}",
            hint=_REMEDY,
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a gated bundle on this board's samples; return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    give_back()  # of the imports
    try:
        if not options.out.parent.is_dir():
            raise ConfigError(
                f"there is no folder {options.out.parent} for the scores", hint="Name a file in another one."
            )
        with _progress() as progress:
            board = measure_scores(
                read_bundle(options.gated),
                options.data,
                samples=options.samples,
                seed=options.seed,
                threads=options.threads,
                progress=progress,
            )
        write_scores(options.out, board)
    except ScalarfedError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}\nhint: Look at the file's rights and the space on its disk.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{options.out}: {len(board.found.scores)} scores of {board.found.samples} samples of {board.model}, "
        f"by {board.found.forwards} forward passes. Copy it to the coordinator."
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edge_agent.scores",
        description="Find out what each channel, neuron and head of a pretrained net is worth on the samples "
        "of this board, with forward passes only. The file holds one number per unit and no sample.",
        epilog="The coordinator makes GATED with `scalarfed gates MODEL -o GATED`, and narrows the net with "
        "`scalarfed prune MODEL --scores FILE --density 0.5 -o BUNDLE`. Example: "
        "python -m edge_agent.scores gated samples.npz -o pi-1.json",
    )
    parser.add_argument("gated", type=Path, metavar="GATED", help="the gated bundle's folder")
    parser.add_argument("data", type=Path, metavar="DATA.npz", help="this board's x_train, y_train")
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="FILE.json", help="where the scores go"
    )
    parser.add_argument(
        "--samples",
        type=_natural,
        default=_SAMPLES,
        help="how many samples to look at; time grows with it (%(default)s)",
    )
    parser.add_argument("--seed", type=_whole, default=0, help="names which samples (%(default)s)")
    parser.add_argument("--threads", type=_natural, default=1, help="of a forward pass (%(default)s)")
    return parser


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least}")
    return int(text)


def _natural(text: str) -> int:
    return _whole(text, 1)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Give a function that says on stderr how far the passes are: on a line of a terminal, or each tenth."""
    terminal = sys.stderr.isatty()
    said = -1

    def tell(done: int, total: int) -> None:
        nonlocal said
        steps = 100 if terminal else _TENTHS
        if (now := done * steps // total) != said:
            said = now
            text = f"{now * (100 // steps):3d} %  {done:,} of {total:,} forward passes"
            print(
                f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True
            )

    try:
        yield tell
    finally:
        if terminal and said >= 0:
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
