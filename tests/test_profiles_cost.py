"""What a graph costs, against torch's counter, hand-worked graphs, and allocations tracked in onnxruntime."""

import subprocess
import sys

import onnx
import profiles_nets
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from profiles.cost import Cost, graph_cost, graph_pass
from profiles.errors import ModelError
from profiles.passes import Pass


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[str, tuple[nn.Module, Cost]]:
    """Each net with the cost of its exported graph."""
    folder = tmp_path_factory.mktemp("graphs")
    nets = {name: profiles_nets.NETS[name]() for name in ("lenet", "resnet20", "minilm")}
    return {n: (net, graph_cost(profiles_nets.export(net, folder / f"{n}.onnx"))) for n, net in nets.items()}


@pytest.fixture(scope="module")
def passes(tmp_path_factory) -> dict[str, Pass]:
    """What each net's graph asks of the allocator."""
    folder = tmp_path_factory.mktemp("graphs")
    nets = {name: profiles_nets.NETS[name]() for name in ("lenet", "resnet20", "minilm")}
    return {n: graph_pass(profiles_nets.export(net, folder / f"{n}.onnx")) for n, net in nets.items()}


def graph(nodes, *, x=("n", 8), weights=(), y=None, initializers=(), opset=18) -> onnx.ModelProto:
    """Build a small model whose inputs are x and weights of the given shapes, and whose output is ``out``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in weights]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, y)]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializer=list(initializers))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(kind, *names, **attributes) -> onnx.NodeProto:
    """Build a node whose last name is its output."""
    return helper.make_node(kind, list(names[:-1]), [names[-1]], **attributes)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "minilm"])
def test_flops_are_those_of_torchs_counter(name, costs):
    """FLOPs of a sample equal FlopCounterMode's on a batch of four, divided by four (1 % is allowed)."""
    net, cost = costs[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(profiles_nets.sample(net, 4)[0])

    assert cost.forward_flops == pytest.approx(counter.get_total_flops() / 4, rel=0.01)
    assert cost.forward_flops == counter.get_total_flops() // 4


@pytest.mark.parametrize("name", ["lenet", "resnet20", "minilm"])
def test_parameters_are_those_of_torch(name, costs):
    """Every trainable tensor is counted, none twice."""
    net, cost = costs[name]
    params = sum(parameter.numel() for parameter in net.parameters())

    assert (cost.params, cost.weight_bytes) == (params, 4 * params)


@pytest.mark.parametrize(
    ("name", "tracked_mib"),
    [("lenet", 0.57421875), ("resnet20", 8.009750366210938), ("minilm", 39.01606750488281)],
)
def test_what_lives_is_what_onnxruntime_allocates(name, tracked_mib, passes):
    """At batch 32, within 1 % of the most bytes that onnxruntime 1.31.1 held without its arena.

    Recorded with a preloaded malloc that adds up what lives of every request of 2 KiB and more.
    """
    assert passes[name].live_bytes(32) / 2**20 == pytest.approx(tracked_mib, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), (8, 9, 7)),
        (nn.Conv1d(4, 6, 5, dilation=2), (4, 33)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (6, 5, 5)),
        (nn.Linear(7, 3), (7,)),
        (nn.Linear(7, 3, bias=False), (5, 7)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_layer_costs_what_torch_counts(layer, shape, tmp_path):
    """Groups, strides, dilation, transposed convolutions and matrix products of any rank."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(3, *shape))
    path = tmp_path / "layer.onnx"
    options = {"dynamo": False, "export_params": False, "opset_version": 18, "input_names": ["x"]}
    torch.onnx.export(layer, (torch.zeros(3, *shape),), str(path), dynamic_axes={"x": {0: "n"}}, **options)

    assert graph_cost(path).forward_flops * 3 == counter.get_total_flops()


def test_gemm_with_a_transposed_first_operand():
    """A (8 x n)' B (8 x 5): n rows, 8 products each, 5 columns."""
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("Gemm", "t", "w", "out", transA=1)]

    assert graph_cost(graph(nodes, weights=[("w", (8, 5))])).forward_flops == 2 * 8 * 5


def test_einsum_counts_every_index_once():
    """nk,km->nm with k = 8 and m = 3 costs 2 x 8 x 3 a sample."""
    nodes = [node("Einsum", "x", "w", "out", equation="nk,km->nm")]

    assert graph_cost(graph(nodes, weights=[("w", (8, 3))])).forward_flops == 48


def test_a_recurrent_layer_counts_its_four_gates():
    """An LSTM over 5 steps from 3 to 4: 2 x 5 x 4 gates x 4 x (3 + 4) a sample."""
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["out"], hidden_size=4)]
    made = graph(nodes, x=(5, 2, 3), weights=[("w", (1, 16, 3)), ("r", (1, 16, 4))])
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    # Here the first axis is time: what grows with it is one step of two samples.
    assert graph_cost(made).forward_flops == 2 * 2 * 16 * (3 + 4)


def test_elementwise_work_is_told_apart():
    """A Relu of 8 values is 8 elementwise FLOPs and none of the counter's."""
    cost = graph_cost(graph([node("Relu", "x", "out")]))

    assert (cost.forward_flops, cost.elementwise_flops) == (0, 8)


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        # a lives while b is made; then b while out is made
        ([node("Exp", "x", "a"), node("Exp", "a", "b"), node("Exp", "b", "out")], 16),
        # a is read again at the end: a, b, c
        (
            [
                node("Exp", "x", "a"),
                node("Exp", "a", "b"),
                node("Exp", "b", "c"),
                node("Add", "a", "c", "out"),
            ],
            24,
        ),
        # an activation function writes into its input
        (
            [node("Exp", "x", "a"), node("Relu", "a", "b"), node("Tanh", "b", "c"), node("Exp", "c", "out")],
            16,
        ),
        # but never into what the caller wants to have, which has a buffer of its own
        ([node("Exp", "x", "a"), node("Relu", "a", "out")], 16),
        # but not if somebody else still reads it
        ([node("Exp", "x", "a"), node("Relu", "a", "b"), node("Add", "a", "b", "out")], 24),
        # and never into the caller's x
        ([node("Relu", "x", "out")], 8),
        # a view is no buffer, and keeps the one below alive
        (
            [
                node("Exp", "x", "a"),
                node("Identity", "a", "b"),
                node("Exp", "b", "c"),
                node("Add", "b", "c", "out"),
            ],
            24,
        ),
        ([node("Exp", "x", "a"), node("Identity", "a", "b"), node("Add", "a", "b", "out")], 16),
        # what the caller wants to have stays to the end
        ([node("Exp", "x", "out"), node("Exp", "out", "b"), node("Exp", "b", "c")], 24),
        # HardSwish runs as two operators, with a buffer between them
        ([node("Exp", "x", "a"), node("HardSwish", "a", "out")], 24),
        # a value that nobody reads is freed at once
        ([node("Exp", "x", "a"), node("Exp", "x", "b"), node("Exp", "b", "out")], 16),
    ],
    ids=[
        "chain",
        "skip",
        "in-place",
        "own-output",
        "read-twice",
        "input",
        "view-alive",
        "view",
        "kept",
        "two-steps",
        "unread",
    ],
)
def test_the_peak_of_hand_worked_graphs(nodes, values):
    """Eight float32 values a sample in every buffer; the peak is counted by hand."""
    cost = graph_cost(graph(nodes))

    assert cost.live_bytes_per_sample == 4 * values


def test_a_transposed_weight_costs_nothing_if_only_a_product_reads_it():
    """Onnxruntime reads through the transposition; another reader makes it a buffer of its own."""
    fused = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x", "t", "out")]
    weights = [("w", (100, 8))]
    free = graph_cost(graph(fused, weights=weights))
    read = graph_cost(
        graph([*fused[:1], node("Exp", "t", "u"), node("MatMul", "x", "u", "out")], weights=weights)
    )

    assert free.live_bytes_per_sample == 400
    assert free.activation_bytes_fixed < 3200 + 2**15  # a table beside the arena's first MiB
    assert read.activation_bytes(7) >= 2 * 3200


def test_what_does_not_grow_with_the_batch_is_the_fixed_part():
    """A buffer of 1000 weights beside 8 values a sample."""
    nodes = [node("Exp", "w", "a"), node("ReduceSum", "a", "s", keepdims=0), node("Exp", "x", "b")]
    cost = graph_cost(graph([*nodes, node("Add", "b", "s", "out")], weights=[("w", (1000,))]))

    assert cost.activation_bytes(1) == pytest.approx(2**15 + 4004, abs=400)  # a table, and the buffers
    assert cost.params == 1000


def test_a_manifest_gives_the_same_cost_back(costs):
    """as_dict and from_dict are inverses; a missing field is named."""
    cost = costs["lenet"][1]
    fields = cost.as_dict()
    assert Cost.from_dict(fields, params=cost.params) == cost

    del fields["weight_bytes"], fields["elementwise_flops"]
    with pytest.raises(ModelError, match="lacks weight_bytes"):
        Cost.from_dict(fields, params=cost.params)


def test_bytes_and_paths_cost_the_same(tmp_path):
    """A graph may be given as a model, its bytes or its path, and is not changed."""
    made = graph([node("MatMul", "x", "w", "out")], weights=[("w", (8, 3))])
    before = made.SerializeToString()
    path = tmp_path / "g.onnx"
    path.write_bytes(before)

    assert graph_cost(made) == graph_cost(before) == graph_cost(path)
    assert made.SerializeToString() == before


def test_what_is_no_onnx_is_said_so(tmp_path):
    """Noise, and a file that is not there, are ModelErrors."""
    with pytest.raises(ModelError, match="not an ONNX model"):
        graph_cost(b"\xff\xff\xff\xff")
    with pytest.raises(ModelError, match="cannot be told"):
        graph_cost(tmp_path / "absent.onnx")


def test_a_shape_that_does_not_follow_is_named():
    """NonZero makes as many rows as the data want: the node is named."""
    nodes = [node("NonZero", "x", "a"), node("Cast", "a", "out", to=TensorProto.FLOAT)]
    nodes[0].name = "find"

    with pytest.raises(ModelError, match="`find` \\(NonZero\\)"):
        graph_cost(graph(nodes))


def test_control_flow_is_refused():
    """What an If costs depends on the data."""
    empty = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    branch = helper.make_graph([node("Exp", "x", "b")], "branch", [], empty)
    whether = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [helper.make_node("If", ["yes"], ["out"], name="fork", then_branch=branch, else_branch=branch)]

    with pytest.raises(ModelError, match="`fork` \\(If\\) is control flow"):
        graph_cost(graph(nodes, initializers=[whether]))


def test_a_graph_that_contradicts_itself_is_refused():
    """A product of 8 columns with 7 rows."""
    with pytest.raises(ModelError, match="cannot be told"):
        graph_cost(graph([node("MatMul", "x", "w", "out")], weights=[("w", (7, 3))]))


def test_importing_the_module_loads_no_onnx():
    """An agent may read a manifest's cost without the package onnx."""
    script = "import sys, profiles.cost; print('onnx' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]
