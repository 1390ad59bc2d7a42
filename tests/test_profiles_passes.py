"""What a pass asks of the allocator, on hand-worked lists, graphs and boards."""

import pytest
from onnx import TensorProto, helper

from profiles.arena import Arena
from profiles.cost import graph_pass
from profiles.errors import ModelError
from profiles.passes import Pass, read_pass, runnable_passes

MIB = 2**20


def graph(nodes, *, shape=("n", 8), weights=(), initializers=()):
    """Build a model of x and weights whose output is ``out``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in weights]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializer=list(initializers))
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft.nchwc", 1)]
    return helper.make_model(
        made, opset_imports=[*domains, helper.make_opsetid("scalarfed", 1)], ir_version=9
    )


def node(kind, *names, domain="", **attributes):
    """Build a node whose last name is its output."""
    return helper.make_node(kind, list(names[:-1]), [names[-1]], domain=domain, **attributes)


def test_buffers_grow_with_the_batch_and_scratch_with_the_threads():
    """10 samples of 4 bytes beside 100; 64 bytes for each thread, of which one sample keeps two busy."""
    asked = Pass(((4, 100), (0, 64, 2), (1,), (0,)))

    assert asked.live_bytes(10) == 140 + 64
    assert asked.live_bytes(10, threads=4) == 140 + 4 * 64
    assert asked.live_bytes(1, threads=4) == 104 + 2 * 64


def test_what_is_resident_is_what_the_arena_holds():
    """Two buffers of 3 MiB that live together, by way of a manifest."""
    asked = read_pass(Pass(((3 * MIB, 0), (3 * MIB, 0), (0,), (1,))).as_list())
    arena = Arena()
    arena.take(3 * MIB)
    arena.take(3 * MIB)

    assert asked.resident_bytes(1) == arena.resident_bytes


def test_a_pass_that_was_tried_leaves_its_regions():
    """Two samples first: the arena begins with regions of their size, and the batch needs further ones."""
    requests = ((MIB // 2, 0), (MIB // 2, 0), (0,), (1,))

    assert Pass(requests, tried=2).resident_bytes(64) > Pass(requests).resident_bytes(64)


@pytest.mark.parametrize(
    "unsound", [[[0]], [[8, 0], [0], [0]], [[-1, 0]], [[1, 2, 3, 4]], [[]], [3], [["a"]]]
)
def test_requests_that_no_graph_makes_are_refused(unsound):
    """Given back before it was taken, or twice; less than nothing; too many numbers, none, or no number."""
    with pytest.raises(ModelError, match="not sound"):
        read_pass(unsound)


def passes_of(*names):
    """Return a manifest's passes, each told apart by what its one buffer takes a sample."""
    return {name: [[number, 0], [0]] for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        ({"arch": "aarch64"}, {"", "fused"}),
        ({"arch": "x86_64"}, {"", "@16", "fused", "blocked8", "blocked16"}),
        ({}, {"", "@16", "fused", "blocked8", "blocked16"}),
        ({"kernel": False}, {"", "@16"}),
        ({"kernel": False, "image_block": 8}, {""}),
        ({"kernel": True, "image_block": 16}, {"blocked16"}),
        ({"kernel": True, "image_block": 0}, {"fused"}),
        ({"kernel": True, "arch": "aarch64"}, {"fused"}),
    ],
    ids=str,
)
def test_a_board_runs_what_its_processor_can(board, expected):
    """Blocks on x86-64 alone, by what is known of the board; nothing known is everything possible."""
    names = ("", "@16", "fused", "blocked8", "blocked16")
    found = {names[asked.requests[0][0]] for asked in runnable_passes(passes_of(*names), **board)}

    assert found == expected


def test_a_bundle_without_variants_runs_its_plain_graph():
    """With the kernel too; and one of an earlier release has no passes at all."""
    assert len(runnable_passes(passes_of(""), kernel=True, image_block=16)) == 1
    assert runnable_passes({}) == ()


def test_blocked_images_hold_whole_blocks():
    """Four channels of 6 x 6 are laid out as sixteen, beside the filter; laid back, they are four again."""
    nodes = [
        node("BlockFilter", "w", "f", domain="scalarfed", block=16, narrow=1),
        node("Conv", "x", "f", "b", domain="com.microsoft.nchwc", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("ReorderOutput", "b", "out", domain="com.microsoft.nchwc", channels=4),
    ]
    made = graph(nodes, shape=("n", 2, 6, 6), weights=[("w", (4, 2, 3, 3))])

    assert graph_pass(made).live_bytes(5) == 5 * 4 * 36 * (16 + 4)
    assert graph_pass(made).requests[0] == (0, 4 * 16 * 2 * 9)


@pytest.mark.parametrize(("channels", "copies"), [(16, 2), (12, 0)])
def test_pools_of_whole_blocks_are_laid_out_and_back(channels, copies):
    """On x86-64: a copy of the image and one of the pooled image; not so where the channels fill no block."""
    nodes = [node("Exp", "x", "a"), node("MaxPool", "a", "p", kernel_shape=[2, 2], strides=[2, 2])]
    made = graph([*nodes, node("Exp", "p", "out")], shape=("n", channels, 8, 8))

    assert len(graph_pass(made, block=16).requests) - len(graph_pass(made).requests) == 2 * copies
    if copies:
        image = 4 * channels * 64
        assert graph_pass(made, block=16).live_bytes(3) == 3 * 2 * image


def test_a_convolution_unfolds_pieces_or_the_whole_image():
    """64 KiB a thread; with more filters than positions, all patches of a sample; a 1 x 1 one, nothing."""

    def scratch(weight, shape):
        made = graph(
            [node("Conv", "x", "w", "a"), node("Exp", "a", "out")], shape=shape, weights=[("w", weight)]
        )
        return [request for request in graph_pass(made).requests if len(request) == 3]

    assert scratch((8, 3, 3, 3), ("n", 3, 10, 10)) == [(0, 2**16, 1)]
    assert scratch((32, 3, 3, 3), ("n", 3, 6, 6)) == [(4 * 16 * 27, 0, 0)]
    assert scratch((8, 3, 1, 1), ("n", 3, 10, 10)) == []


def test_a_dead_buffer_serves_again_where_shapes_are_known():
    """A row of values lies in two buffers by turns, beside the output; behind unknown shapes, in one each."""
    row = [node("Exp", "x", "a"), node("Exp", "a", "b"), node("Exp", "b", "c"), node("Exp", "c", "out")]
    shape = [node("Shape", "y0", "s"), node("Reshape", "x", "s", "r"), node("Exp", "r", "a")]
    known = graph_pass(graph(row))
    unknown = graph_pass(graph([node("Exp", "x", "y0"), *shape, *row[1:]]))

    def taken(asked):
        return sum(len(request) > 1 and request[0] == 32 for request in asked.requests)

    assert (taken(known), taken(unknown)) == (3, 6)
