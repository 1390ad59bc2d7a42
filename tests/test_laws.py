"""The laws of the house, seen at work: the same bits from records alone, and nothing left behind."""

import math

import numpy as np
import pytest

from edge_agent.bundle import flat_layout
from edge_agent.estimator import estimate
from edge_agent.grid import plan_segments, snap
from edge_agent.noise import NoiseKey, hash_words, values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record, apply_records
from edge_agent.wire import RoundRecord, decode_record, encode_record
from profiles.errors import DigestError, EstimateError

TENSORS, SIZE = flat_layout([("first", (3000, 11)), ("bias", (7,)), ("last", (10, 5))])


def replica(seed: int = 0, largest: float = 0.4) -> Replica:
    """Return a replica of round 0 whose tensors lie on grids of their own; the last one is the head."""
    weights = np.zeros(SIZE, np.float32)
    rng = np.random.default_rng(seed)
    for scale, tensor in zip((1.0, 8.0, 64.0), TENSORS, strict=True):
        weights[tensor.offset : tensor.offset + tensor.size] = (
            rng.uniform(-1, 1, tensor.size) * scale * largest
        )
    starts = [tensor.offset for tensor in TENSORS]
    segments = plan_segments(weights, list(zip(starts, [*starts[1:], SIZE], strict=True)))
    assert len(segments) > 1
    snap(weights, segments)
    spans = tuple((tensor.offset, tensor.offset + tensor.size) for tensor in TENSORS)
    return Replica(weights, segments, tensors=spans, head=spans[-1:])


def plan(method: str, round_: int, *, steps: int = 1) -> RoundPlan:
    """Return a plan with the method's defaults, and the scalars' RMS taken into account."""
    constants = METHODS[method].values({"smoothing": 0.9})
    exact = 7 if METHODS[method].head else 0
    return RoundPlan(round_, 77, METHODS[method].code, steps, 6, 1e-3, 0.02, constants, exact)


def curved_loss(one: Replica):
    """Return a loss with a slope everywhere, evaluated at the replica's present weights."""
    target = np.sin(np.arange(SIZE))

    return lambda: float(np.mean((one.weights - target) ** 2))


def head_gradient(one: Replica):
    """Return what tells the last tensor's gradient of that loss."""
    start, stop = one.head[0]
    target = np.sin(np.arange(SIZE))[start:stop]

    return lambda: (2 / SIZE * (one.weights[start:stop] - target)).astype(np.float32)


def train(method: str, rounds: int, *, steps: int = 1) -> tuple[Replica, list[RoundRecord]]:
    """Return a replica after some rounds of one agent, and the records that led there."""
    one, records = replica(), []
    for round_ in range(rounds):
        asked = plan(method, round_, steps=steps)
        one.prepare(asked.method)
        made = estimate(
            one, asked, lambda batch: curved_loss(one), central=True, head_gradient=head_gradient(one)
        )
        record = RoundRecord(asked, 1, False, made.scalars, 0)
        apply_record(one, record, check=False)
        records.append(RoundRecord(asked, 1, False, made.scalars, one.digest()))
    return one, records


@pytest.mark.parametrize("method", METHODS)
def test_records_are_all_that_replay_needs(method):
    """Law 1: a fresh replica and the bytes of the records give every bit that training gave."""
    trained, records = train(method, 5, steps=2)
    again = replica()

    apply_records(again, [decode_record(encode_record(record)) for record in records])

    assert again.weights.tobytes() == trained.weights.tobytes()
    assert again.digest() == trained.digest()
    assert not np.array_equal(again.weights, replica().weights)


@pytest.mark.parametrize("method", METHODS)
def test_a_changed_scalar_is_noticed(method):
    """Law 3: a replica that replays another scalar than was logged does not have the logged digest."""
    _, records = train(method, 2)
    scalars = records[1].scalars.copy()
    scalars[0, 3] = np.float32(scalars[0, 3] * np.float32(-1.01))
    other = replica()
    apply_record(other, records[0])

    with pytest.raises(DigestError):
        apply_record(other, RoundRecord(records[1].plan, 1, False, scalars, records[1].digest))


@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_leaves_no_trace(method, steps, central):
    """Law 2: after the losses of many perturbations and private moves the replica has the bits it had."""
    one, _ = train(method, 3)
    before, curvature, digest = one.weights.copy(), one.curvature, one.digest()
    seen = []

    def loss_of_step(step):
        def loss():
            seen.append(one.weights.copy())
            return curved_loss(one)()

        return loss

    made = estimate(
        one, plan(method, 3, steps=steps), loss_of_step, central=central, head_gradient=head_gradient(one)
    )

    extra = METHODS[method].losses
    assert made.forwards == len(seen) == steps * ((12 if central else 7) + extra)
    assert any(not np.array_equal(weights, before) for weights in seen)
    assert one.weights.tobytes() == before.tobytes()
    assert one.curvature is curvature
    assert one.digest() == digest


@pytest.mark.parametrize("fails_at", [0, 1, 4, 9, 17])
def test_a_failed_estimate_leaves_no_trace(fails_at):
    """Law 2: a loss that is not finite, wherever it comes up, leaves the replica's bits as they were."""
    one, _ = train("hiso", 2)
    before, calls = one.weights.copy(), iter(range(100))

    with pytest.raises(EstimateError):
        estimate(
            one,
            plan("hiso", 2, steps=3),
            lambda step: lambda: math.nan if next(calls) == fails_at else curved_loss(one)(),
            central=True,
        )

    assert one.weights.tobytes() == before.tobytes()


def test_pieces_of_noise_equal_the_whole():
    """Law 4: whoever asks for a piece of a perturbation gets what stands at that place in the whole."""
    key = NoiseKey(2**64 - 1, 3, 0, 5)
    whole = hash_words(key, 0, 5000)

    for start, size in [(0, 1), (1023, 2), (1, 4095), (4999, 1), (700, 0)]:
        assert np.array_equal(hash_words(key, start, size), whole[start : start + size])


def test_no_two_keys_meet():
    """Law 4: keys that differ in one field only, or trade the values of two fields, give unlike noise."""
    keys = [
        NoiseKey(5, 4, 1, 0),
        NoiseKey(6, 1, 4, 0),
        NoiseKey(5, 4, 0, 1),
        NoiseKey(5, 1, 4, 0),
        NoiseKey(4, 5, 1, 0),
    ]
    size = 1 << 16
    noise = [values(key, 0, size).astype(float) for key in keys]

    correlation = np.corrcoef(noise) - np.eye(len(keys))

    # The correlation of independent values has a standard deviation of 1 / sqrt(size); ten pairs.
    assert np.abs(correlation).max() < 5 / math.sqrt(size)
