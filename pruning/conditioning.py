"""Conditioning: widths at which a net's own neural tangent kernel is as even as a budget allows.

Knows the kernel of a net at given widths, and how to seek widths under an allowance by changing one group
at a time. Does not know budgets' units, reference nets, or data.

The kernel K = J J' of a few Gaussian inputs says how fast each direction in the space of outputs is learned.
Its trace says how fast they are learned on average, which a learning rate can say as well; what no rate can
mend is that some directions are learned a thousand times more slowly than others. So nets of the same cost
are compared by the mean logarithm of the kernel's eigenvalues less the logarithm of their mean: the ratio of
geometric and arithmetic mean, 0 for an even kernel. Of the outputs only the differences between classes
count, since a loss after softmax does not see the rest.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pruning.structure import Structure
from pruning.weights import Moments, derive_seed, draw_inputs, initialise

__all__ = ["evenness", "kernel_spectrum", "seek_widths"]

_STEPS = (4.0, 2.0, 2**0.5)  # by which a group grows or shrinks against the others


def kernel_spectrum(net: nn.Module, inputs: Tensor) -> Tensor:
    """Return the eigenvalues of a net's tangent kernel on ``inputs``, ascending, relative to their mean.

    One for each input and each difference of classes, so (classes - 1) * len(inputs).

    Args:
        net: Its outputs are (n, classes); it is not changed.
        inputs: As the net takes them, (n, *sample_shape).
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for sample in inputs:
        outputs = net(sample[None])[0]
        for output in outputs - outputs.mean():
            gradients = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    jacobian = torch.stack(rows)
    classes = len(jacobian) // len(inputs)
    values = torch.linalg.eigvalsh((jacobian @ jacobian.T).double())[len(inputs) :]
    if classes < 2:
        raise ValueError("a net of one output has no differences of classes")
    return values.clamp_min(0.0) / values.mean()


def evenness(
    build: Callable[[Mapping[str, int]], nn.Module],
    widths: Mapping[str, int],
    *,
    sample_shape: tuple[int, ...],
    draws: int = 4,
    inputs: int = 8,
    seed: int = 0,
    moments: Moments | None = None,
) -> float:
    """Return the mean of log(geometric mean / arithmetic mean) of the kernel's eigenvalues, at most 0.

    Args:
        build: Makes the net at given widths; its weights are drawn anew.
        widths: Units per group.
        sample_shape: Shape of one input.
        draws: Weights and inputs that are drawn, the same for all widths where shapes agree.
        inputs: Gaussian inputs of each draw.
        seed: Names the draws.
        moments: Mean and deviation of the inputs; 0 and 1 if None.
    """
    net = build(widths).eval()
    found = []
    for draw in range(draws):
        initialise(net, seed=derive_seed("kernel weights", seed, draw))
        generator = torch.Generator().manual_seed(derive_seed("kernel inputs", seed, draw))
        spectrum = kernel_spectrum(
            net, draw_inputs(inputs, sample_shape, generator=generator, moments=moments)
        )
        found.append(float(spectrum.clamp_min(1e-9).log().mean()))
    return math.fsum(found) / draws


def seek_widths(
    structure: Structure,
    allocate: Callable[[Mapping[str, float]], dict[str, int]],
    merit: Callable[[Mapping[str, int]], float],
    *,
    most: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Return the widths of the highest merit that steps of one group lead to, from one factor for all groups.

    Args:
        structure: The net's groups.
        allocate: Turns fractions of units that groups would like to keep into widths that meet the budget.
        merit: Of a net at given widths; higher is better.
        most: Nets that are looked at.
        progress: Called with the nets looked at and ``most``.
    """
    known: dict[tuple[int, ...], float] = {}

    def look(fractions: Mapping[str, float]) -> tuple[float, dict[str, int]]:
        top = max(fractions.values())
        widths = allocate({name: fraction / top for name, fraction in fractions.items()})
        key = tuple(widths.values())
        if key not in known:
            if len(known) >= most:
                return -math.inf, widths
            known[key] = merit(widths)
            if progress is not None:
                progress(len(known), most)
        return known[key], widths

    fractions = dict.fromkeys(structure.dense, 1.0)
    best, widths = look(fractions)
    for step in _STEPS:
        while True:
            trials = [
                {**fractions, name: fractions[name] * factor}
                for name in fractions
                for factor in (step, 1 / step)
            ]
            found = [(*look(trial), trial) for trial in trials]
            merits = [one[0] for one in found]
            if max(merits) <= best:
                break
            best, widths, fractions = found[merits.index(max(merits))]
    if progress is not None:
        progress(most, most)
    return widths
