"""Tests of edge_agent.bundle and edge_agent.state: what lies on a disk is checked before it is used."""

import hashlib
import json

import numpy as np
import pytest

from edge_agent.bundle import flat_layout, read_bundle, write_bundle
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import apply_record
from edge_agent.state import load_replica, save_replica
from edge_agent.wire import RoundRecord
from profiles.errors import BundleError, StateError


@pytest.fixture
def bundle(tmp_path):
    tensors, size = flat_layout([("a", (3, 5)), ("b", ()), ("c", (100,))])
    weights = np.zeros(size, np.float32)
    for tensor in tensors:
        weights[tensor.offset : tensor.offset + tensor.size] = np.linspace(-0.3, 0.2, tensor.size)
    return write_bundle(
        tmp_path / "bundle",
        graph=b"a graph",
        weights=weights,
        tensors=tensors,
        model="made",
        classes=3,
        sample_shape=(5,),
        cost={"forward_flops": 10},
        pruning={},
    )


def test_tensors_begin_on_64_bytes(bundle):
    """Offsets and the whole are multiples of 16 floats, and the replica's memory begins on one too."""
    assert [tensor.offset for tensor in bundle.tensors] == [0, 16, 32]
    assert bundle.size == 144
    assert bundle.replica().weights.ctypes.data % 64 == 0


def test_weights_lie_on_the_grid(bundle):
    """A bundle's weights are whole grid steps, so that digest 0 is that of the file."""
    weights = bundle.replica().weights
    assert np.array_equal(weights * 2.0**22, np.rint(weights * 2.0**22))
    assert np.abs(weights[:15] - np.linspace(-0.3, 0.2, 15)).max() <= 2.0**-23 * 1.1


def test_what_is_read_is_what_was_written(bundle):
    """Reading gives an equal bundle, with the same identity."""
    assert read_bundle(bundle.folder) == bundle


@pytest.mark.parametrize("name", ["graph.onnx", "weights.f32"])
def test_a_flipped_bit_is_found(bundle, name):
    """A file that was altered is named, with both hashes."""
    path = bundle.folder / name
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has SHA-256"):
        read_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["graph.onnx", "weights.f32", "manifest.json"])
def test_a_missing_file_is_found(bundle, name):
    """A bundle that is not whole is refused."""
    (bundle.folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle.folder)


def test_another_format_is_refused(bundle):
    """A manifest of a later release is not guessed at."""
    path = bundle.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(BundleError, match="format 9"):
        read_bundle(bundle.folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """The message names the tensor."""
    tensors, size = flat_layout([("good", (4,)), ("bad", (4,))])
    weights = np.zeros(size, np.float32)
    weights[tensors[1].offset] = np.inf
    rest = {"model": "m", "classes": 2, "sample_shape": (1,), "cost": {}, "pruning": {}}
    with pytest.raises(BundleError, match="not finite in bad"):
        write_bundle(tmp_path / "b", graph=b"", weights=weights, tensors=tensors, **rest)
    assert not (tmp_path / "b").exists()


def test_weights_of_the_wrong_size_are_refused(bundle):
    """A file that is shorter than the manifest's tensors is named, though its hash is right."""
    path, manifest = bundle.folder / "weights.f32", bundle.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-4])
    told = json.loads(manifest.read_text())
    told["files"]["weights.f32"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(told))
    with pytest.raises(BundleError, match=r"weights.f32 does not hold"):
        read_bundle(bundle.folder)


@pytest.fixture
def trained(bundle):
    """A replica after three rounds of HiSo."""
    replica = bundle.replica()
    rule = METHODS["hiso"]
    for round_ in range(3):
        plan = RoundPlan(round_, 7, rule.code, 1, 2, 1e-3, 0.1, rule.values({"smoothing": 0.9}))
        record = RoundRecord(plan, 1, False, np.array([[1.5, -2.5]], np.float32), 0)
        apply_record(replica, record, check=False)
    return replica


def test_a_saved_replica_comes_back(bundle, trained, tmp_path):
    """Weights, curvature, normaliser and round survive."""
    path = tmp_path / "replica.state"
    save_replica(path, trained, bundle_identity=bundle.identity, run="run")
    found = load_replica(path, bundle.replica(), bundle_identity=bundle.identity, run="run")
    assert (found.digest(), found.round) == (trained.digest(), 3)


@pytest.mark.parametrize("other", [{"run": "other"}, {"bundle_identity": "f" * 64}])
def test_a_replica_of_another_run_is_not_used(bundle, trained, tmp_path, other):
    """What belongs to another run or bundle counts as nothing."""
    path = tmp_path / "replica.state"
    names = {"bundle_identity": bundle.identity, "run": "run"}
    save_replica(path, trained, **names)
    assert load_replica(path, bundle.replica(), **{**names, **other}) is None


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:30], lambda data: data[:-5] + b"12345"]
)
def test_a_damaged_state_is_refused(bundle, trained, tmp_path, damage):
    """Cut short or altered: the digest that was written with it does not fit."""
    path = tmp_path / "replica.state"
    names = {"bundle_identity": bundle.identity, "run": "run"}
    save_replica(path, trained, **names)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError):
        load_replica(path, bundle.replica(), **names)


def test_a_failed_save_keeps_the_old_state(bundle, trained, tmp_path):
    """When the new file cannot be written, the one before is still there."""
    path = tmp_path / "replica.state"
    names = {"bundle_identity": bundle.identity, "run": "run"}
    save_replica(path, trained, **names)
    before = path.read_bytes()
    (tmp_path / "replica.new").mkdir()  # stands where the new file would be written
    with pytest.raises(StateError, match="cannot be written"):
        save_replica(path, trained, **names)
    assert path.read_bytes() == before
