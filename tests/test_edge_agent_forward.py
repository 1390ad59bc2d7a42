"""Tests of edge_agent.forward: what it is handed is checked before ONNX Runtime sees a pointer."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_agent.bundle import Bundle, flat_layout, write_bundle
from edge_agent.forward import Forward
from edge_agent.grid import displacer
from edge_agent.noise import NoiseKey
from profiles.errors import BundleError, EstimateError


def made_bundle(folder, *, dtype: int = TensorProto.FLOAT, shape: tuple[int, ...] = (4, 3)) -> Bundle:
    """Write a bundle of a linear net; its graph takes the weight as given, where float32 (4, 3) is told."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["w32", "shape"], ["w43"]),
        helper.make_node("MatMul", ["x", "w43"], ["logits"]),
        helper.make_node("SoftmaxCrossEntropyLoss", ["logits", "y"], ["loss"]),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Equal", ["best", "y"], ["hit"]),
        helper.make_node("Cast", ["hit"], ["count"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["count"], ["correct"], keepdims=0),
    ]
    inputs = [
        value("x", TensorProto.FLOAT, ["n", 4]),
        value("y", TensorProto.INT64, ["n"]),
        value("w", dtype, shape),
    ]
    outputs = [
        value("loss", TensorProto.FLOAT, []),
        value("correct", TensorProto.INT64, []),
        value("logits", TensorProto.FLOAT, ["n", 3]),
    ]
    sizes = onnx.numpy_helper.from_array(np.array([4, 3], np.int64), "shape")
    graph = helper.make_graph(nodes, "linear", inputs, outputs, [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tensors, size = flat_layout([("w", (4, 3))])
    weights = np.zeros(size, np.float32)
    weights[:12] = np.linspace(-1, 1, 12)
    return write_bundle(
        folder,
        graph=model.SerializeToString(),
        weights=weights,
        tensors=tensors,
        model="made",
        classes=3,
        sample_shape=(4,),
        cost={},
        pruning={},
    )


X, Y = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), np.array([0, 2])


def test_a_loss_is_that_of_the_weights_at_the_time_of_the_call(tmp_path):
    """The mean cross-entropy in float64, before and after the vector changed in place."""
    bundle = made_bundle(tmp_path / "b")
    weights = bundle.replica().weights
    forward = Forward(bundle, weights)
    for _ in range(2):
        logits = X.astype(np.float64) @ weights[:12].reshape(4, 3)
        expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[[0, 1], Y])
        assert forward.loss(X, Y) == pytest.approx(expected, rel=1e-6)
        weights[:12] *= 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": TensorProto.FLOAT16}, r"w is tensor\(float16\)"),
        ({"dtype": TensorProto.DOUBLE}, r"w is tensor\(double\)"),
        ({"shape": (3, 4)}, r"w .*\[3, 4\]"),
    ],
)
def test_a_weight_that_is_not_float32_of_its_shape_is_refused(tmp_path, given, message):
    """What the graph takes in place of what the manifest says is named; nothing is bound to it."""
    bundle = made_bundle(tmp_path / "b", **given)
    with pytest.raises(BundleError, match=message):
        Forward(bundle, bundle.replica().weights)


def test_a_buffer_of_the_wrong_size_or_kind_is_refused(tmp_path):
    """Too short, of float64, with gaps, or not on a multiple of four bytes."""
    bundle = made_bundle(tmp_path / "b")
    raw = np.zeros(4 * bundle.size + 1, np.uint8)
    for weights in (
        np.zeros(bundle.size - 1, np.float32),
        np.zeros(bundle.size),
        np.zeros(2 * bundle.size, np.float32)[::2],
        raw[1:].view(np.float32),
    ):
        with pytest.raises(ValueError, match="weights must be"):
            Forward(bundle, weights)


@pytest.mark.parametrize(
    "batch", [(X[:, :3], Y), (X, Y[:1]), (X.astype(np.float64), Y), (X, Y.astype(np.int32))]
)
def test_a_batch_of_another_shape_or_type_is_refused(tmp_path, batch):
    """Neither a pointer to too little memory nor to other numbers reaches the session."""
    bundle = made_bundle(tmp_path / "b")
    with pytest.raises(ValueError, match="a batch"):
        Forward(bundle, bundle.replica().weights).loss(*batch)


def test_a_label_beyond_the_classes_is_an_error(tmp_path):
    """ONNX Runtime's refusal in the middle of a pass is an error of the estimate."""
    bundle = made_bundle(tmp_path / "b")
    with pytest.raises(EstimateError, match="2 samples failed"):
        Forward(bundle, bundle.replica().weights).loss(X, np.array([0, 3]))


@pytest.mark.parametrize("kernel", ["", "numpy"])
def test_a_map_of_the_weight_file_serves_forwards_and_no_perturbation(tmp_path, monkeypatch, kernel):
    """The read-only map gives the replica's loss, refuses to be written to, and the file keeps its bytes."""
    monkeypatch.setenv("SCALARFED_KERNEL", kernel)
    bundle = made_bundle(tmp_path / "b")
    before = (bundle.folder / "weights.f32").read_bytes()
    mapped = bundle.mapped_weights()
    assert Forward(bundle, mapped).loss(X, Y) == Forward(bundle, bundle.replica().weights).loss(X, Y)
    with pytest.raises(ValueError, match=r"writeable|read-only"):
        displacer(mapped, bundle.segments, [NoiseKey(0, 0, 0, 0)], epsilon=1e-3)(0, 1)
    assert (bundle.folder / "weights.f32").read_bytes() == before
