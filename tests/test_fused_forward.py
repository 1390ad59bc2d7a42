"""The variants of a graph compute what the graph computes, on every path of the compiled kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_agent.bundle import Bundle, read_bundle
from edge_agent.forward import Forward
from edge_agent.native.build import SOURCES, build
from edge_agent.native.kernel import find_kernel, load_kernels
from edge_agent.native.library import library_name
from edge_agent.session import open_session
from profiles.errors import BundleError, EstimateError
from pruning.export import export_bundle
from pruning.fuse import block, fuse
from pruning.models import build_model, model_structure

IMAGES = {"lenet": (1, 28, 28), "resnet20": (3, 32, 32), "wrn10_2": (3, 16, 16), "dscnn": (1, 49, 10)}


@pytest.fixture(scope="session", autouse=True)
def _library() -> None:
    """The checkout's kernel is there, or nothing here can be tested."""
    if not load_kernels(SOURCES / library_name()):
        try:
            build(SOURCES / library_name())
        except FileNotFoundError as error:
            pytest.skip(str(error))
        load_kernels.cache_clear()


def export(folder: Path, model: str, *, narrow: bool = False) -> Bundle:
    """Export a net with random weights, at its dense widths or at about a third of them."""
    shape = IMAGES[model]
    structure = model_structure(model, sample_shape=shape, classes=5)
    widths = dict(structure.dense)
    if narrow:
        widths = {
            group.name: max(group.minimum, group.width // 3 // group.multiple * group.multiple)
            for group in structure.groups
        }
    net = build_model(model, sample_shape=shape, classes=5, widths=widths, seed=1)
    return export_bundle(
        net, folder, model=model, sample_shape=shape, classes=5, pruning={}, cost=lambda graph: {}
    )


def batch(bundle: Bundle, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random inputs and labels."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((size, *bundle.sample_shape)).astype(np.float32)
    return x, rng.integers(0, bundle.classes, size)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("model", IMAGES)
@pytest.mark.parametrize("path", ["scalar", "sse2", "avx2", "avx512", "neon"])
def test_variants_agree_with_the_plain_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, narrow: bool, path: str
):
    """Loss, count, logits and head gradient are the plain graph's to rounding, batch after batch."""
    bundle = export(tmp_path, model, narrow=narrow)
    weights = bundle.replica().weights
    weights *= np.float32(1.5)
    monkeypatch.setenv("SCALARFED_KERNEL", "numpy")
    plain = Forward(bundle, weights)
    monkeypatch.setenv("SCALARFED_KERNEL", path)
    if path not in load_kernels(SOURCES / library_name()):
        pytest.skip(f"this processor has no {path}")
    own = Forward(bundle, weights)

    assert plain.variant == ""
    assert own.variant == (f"blocked{find_kernel().image_block}" if find_kernel().image_block else "fused")
    for size in (1, 8, 3):
        x, y = batch(bundle, size)
        assert own.evaluate(x, y)[0] == pytest.approx(plain.evaluate(x, y)[0], rel=1e-5)
        assert own.evaluate(x, y)[1] == plain.evaluate(x, y)[1]
        np.testing.assert_allclose(own.logits(x), plain.logits(x), atol=1e-5)
        assert own.loss(x, y, head=True) == pytest.approx(plain.loss(x, y, head=True), rel=1e-5)
        np.testing.assert_allclose(own.head_gradient(), plain.head_gradient(), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", IMAGES)
def test_the_fused_graph_agrees_without_blocks(tmp_path: Path, model: str, threads: int):
    """The variant that boards run, with images as they are, gives the plain graph's outputs."""
    bundle = export(tmp_path, model)
    x, y = batch(bundle, 8)
    weights = bundle.replica().weights
    feeds = {t.name: weights[t.offset : t.offset + t.size].reshape(t.shape) for t in bundle.tensors}
    plain = open_session(bundle.graph_path).run(["loss", "logits"], feeds | {"x": x, "y": y})
    session = open_session(bundle.variant_path("fused"), threads=threads, operators=find_kernel().file)
    fused = session.run(["loss", "logits"], feeds | {"x": x, "y": y})

    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    np.testing.assert_allclose(fused[1], plain[1], atol=1e-5)


@pytest.mark.parametrize("model", IMAGES)
def test_every_tensor_moves_the_loss_of_a_variant(tmp_path: Path, model: str):
    """No weight is baked in: a change of any tensor changes the loss."""
    bundle = export(tmp_path, model)
    weights = bundle.replica().weights
    forward = Forward(bundle, weights)
    x, y = batch(bundle, 8)
    before = forward.loss(x, y)

    assert forward.variant
    for tensor in bundle.tensors:
        part = weights[tensor.offset : tensor.offset + tensor.size]
        kept = part.copy()
        part += np.random.default_rng(0).standard_normal(part.size).astype(np.float32)
        assert forward.loss(x, y) != before
        part[...] = kept
    assert forward.loss(x, y) == before


@pytest.mark.parametrize("lie", ["not a graph", "another net"])
def test_a_variant_that_does_not_agree_is_not_taken(tmp_path: Path, lie: str):
    """A broken variant, or one with another loss, is passed over for the next or the plain graph."""
    bundle = export(tmp_path / "a", "lenet")
    graph = onnx.load(bundle.variant_path("fused"))
    for node in graph.graph.node:
        swapped = {"norm2.weight": "norm2.bias", "norm2.bias": "norm2.weight"}
        node.input[:] = [swapped.get(name, name) for name in node.input]
    for variant in bundle.variants:
        bundle.variant_path(variant).write_bytes(
            b"no graph" if lie == "not a graph" else graph.SerializeToString()
        )
    weights = bundle.replica().weights

    assert Forward(bundle, weights).variant == ""
    assert np.isfinite(Forward(bundle, weights).loss(*batch(bundle, 2)))


def test_a_net_without_images_has_no_variants(tmp_path: Path):
    """An MLP has nothing to join: its bundle holds the plain graph alone."""
    net = build_model("mlp", sample_shape=(7,), classes=3)
    bundle = export_bundle(
        net, tmp_path, model="mlp", sample_shape=(7,), classes=3, pruning={}, cost=lambda graph: {}
    )

    assert bundle.variants == ()
    assert fuse(bundle.graph_path.read_bytes()) is None


def test_blocking_needs_images_that_stay_inside(tmp_path: Path):
    """A graph that is already blocked has no convolution left to block."""
    bundle = export(tmp_path, "lenet")

    assert block(bundle.variant_path("blocked16").read_bytes(), 16) is None


def test_the_operators_refuse_labels_beyond_the_classes(tmp_path: Path):
    """A label that is no class is an error of the forward, not a wild read."""
    bundle = export(tmp_path, "lenet")
    forward = Forward(bundle, bundle.replica().weights)
    x, _ = batch(bundle, 2)

    with pytest.raises(EstimateError, match="label"):
        forward.loss(x, np.array([0, 5]))


def test_variants_are_part_of_what_a_bundle_checks(tmp_path: Path):
    """An altered variant is noticed when the bundle is read."""
    bundle = export(tmp_path, "lenet")
    bundle.variant_path("fused").write_bytes(b"altered")

    with pytest.raises(BundleError, match=r"graph\.fused\.onnx"):
        read_bundle(tmp_path)


SHOW = """
import sys
from pathlib import Path

import numpy as np

from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward

bundle = read_bundle(Path(sys.argv[1]))
forward = Forward(bundle, bundle.replica().weights)
print(forward.variant, *forward.logits(np.load(sys.argv[2])).reshape(-1))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
@pytest.mark.parametrize(("model", "narrow"), [("lenet", False), ("lenet", True), ("resnet20", True)])
def test_blocks_of_eight_agree_on_an_emulated_processor(tmp_path: Path, model: str, narrow: bool):
    """On a processor with AVX2 alone the blocks have eight channels, and the logits are the same."""
    bundle = export(tmp_path / "bundle", model, narrow=narrow)
    x, _ = batch(bundle, 2)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "show.py").write_text(SHOW)
    printed = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "show.py", "bundle", "x.npy"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()

    assert printed[0] == "blocked8"
    expected = Forward(bundle, bundle.replica().weights).logits(x)
    np.testing.assert_allclose(np.array(printed[1:], float).reshape(expected.shape), expected, atol=1e-5)
