"""Pruning a torch module of one's own, which is told by no family's name.

Knows how a module is loaded from a Python file and how its units are chosen. Does not know data or boards.
"""

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from profiles.errors import ModelError
from pruning.fit import MemoryBudget, fit_structure
from pruning.gates import choose_units, split_scores
from pruning.modules import Coupling, declare_structure, trace_structure
from pruning.plan import Allowance, check_method, plan_widths, widths_by_scores
from pruning.prune import Pruned, describe_pruned, standardised
from pruning.saliency import make_probe
from pruning.shrink import narrow_module
from pruning.structure import Axis, Structure
from pruning.weights import Moments, derive_seed, draw_inputs, initialise

__all__ = ["Found", "check_module", "find_structure", "load_module", "prune_module", "unit_magnitudes"]

_Sizes = Callable[[Mapping[str, int]], Mapping[str, int]]


@dataclass(frozen=True)
class Found:
    """The groups of a module.

    Attributes:
        structure: Its groups and tensors.
        sizes: From new widths to attributes that must change too; None where none must.
        left_whole: Layers that keep their width since tracing could not follow them, and why.
    """

    structure: Structure
    sizes: _Sizes | None = None
    left_whole: Mapping[str, str] = field(default_factory=dict)


def find_structure(module: nn.Module, *, sample_shape: tuple[int, ...]) -> Found:
    """Return the groups that a module declares in its attribute ``couplings``; without it, trace it.

    Raises:
        ModelError: It cannot be traced, or what it declares does not fit it.
    """
    if hasattr(module, "couplings"):
        couplings = cast("Sequence[Coupling]", module.couplings)
        structure = declare_structure(module, couplings, sample_shape=sample_shape)
        return Found(structure, cast("_Sizes | None", getattr(module, "sizes_at", None)))
    traced = trace_structure(module, sample_shape=sample_shape)
    return Found(traced.structure, None, traced.left_whole)


def prune_module(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    name: str = "module",
    structure: Structure | None = None,
    sizes: _Sizes | None = None,
    method: str = "ntk",
    density: float = 0.5,
    allowance: Allowance | None = None,
    draws: int = 5,
    schedule_steps: int = 20,
    seed: int = 0,
    pretrained: bool = False,
    scores: NDArray[np.float32] | None = None,
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    moments: Moments | None = None,
    memory: MemoryBudget | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Return a module with narrower layers, checked against its masked twin.

    Args:
        module: Takes (n, *sample_shape) float32, gives (n, classes); it is left as it is. Where it has the
            attribute ``couplings``, these are its groups, and its ``sizes_at``, if it has that, is ``sizes``.
        sample_shape: Shape of one input.
        classes: Number of classes.
        name: For messages and the manifest.
        structure: The module's groups; those it declares if None, else traced by Torch-Pruning, unless the
            method is ``none``.
        sizes: From the new widths to attributes that must change too, see
            :func:`pruning.shrink.narrow_module`.
        method: See :func:`pruning.prune.prune_model`, and so are the following.
        density: Fraction of the parameters that stays.
        allowance: What the narrow net may cost.
        draws: Draws per step of the schedule.
        schedule_steps: Cuts until the density is reached.
        seed: Names all draws and the fresh weights.
        pretrained: Keep the weights, of the units with the largest magnitude. If False, draw them anew.
        scores: In the place of a method, what each unit of all groups is worth, in the order of the groups:
            the widths follow from them, and the units with the highest keep their weights.
        labelled: Inputs as the module takes them and labels, for ``snip`` and ``grasp``.
        moments: Mean and deviation of the values that the module takes; 0 and 1 if None.
        memory: In the place of ``allowance``, what training may hold on the board.
        progress: Called with the cuts done and all cuts.

    Raises:
        ModelError: The module gives another output than (n, classes), cannot be traced, shrunk or redrawn.
    """
    if scores is None:
        check_method(method)
    else:
        method, pretrained = "gates", True
    module = copy.deepcopy(module).eval()
    check_module(
        module,
        sample_shape=sample_shape,
        classes=classes,
        name=name,
        pretrained=pretrained,
        moments=moments,
    )
    left_whole: Mapping[str, str] = {}
    if structure is None and method == "none" and not hasattr(module, "couplings"):
        structure = declare_structure(module, [], sample_shape=sample_shape)
    if structure is None:
        found = find_structure(module, sample_shape=sample_shape)
        structure, sizes, left_whole = found.structure, sizes or found.sizes, found.left_whole
    ranks = unit_magnitudes(module, structure) if scores is None else split_scores(structure, scores)

    def narrowed(widths: Mapping[str, int]) -> nn.Module:
        return narrow_module(
            module,
            structure,
            choose_units(structure, ranks, widths),
            sample_shape=sample_shape,
            sizes=None if sizes is None else sizes(widths),
        )

    if memory is not None:
        allowance = fit_structure(memory, structure, narrowed, sample_shape=sample_shape, classes=classes)
    known = None if labelled is None else standardised(labelled, None, classes)
    densities: dict[str, float] = {}
    try:
        if scores is not None:
            widths = widths_by_scores(structure, ranks, name=name, density=density, allowance=allowance)
        else:
            widths, densities = plan_widths(
                structure,
                lambda: make_probe(
                    module, sample_shape=sample_shape, draws=draws, seed=seed, labelled=known, moments=moments
                ),
                narrowed,
                sample_shape=sample_shape,
                draws=draws,
                name=name,
                method=method,
                density=density,
                allowance=allowance,
                steps=schedule_steps,
                seed=seed,
                moments=moments,
                progress=progress,
            )
    except ModelError as error:
        if not left_whole:
            raise
        kept = "; ".join(f"{layer}: {reason}" for layer, reason in left_whole.items())
        raise ModelError(f"{error}. These keep their width: {kept}", hint=error.hint) from error
    except RuntimeError as error:  # torch's, about a module that it cannot differentiate
        raise ModelError(
            f"{name} cannot be looked at by {method}: {str(error).splitlines()[0]}",
            hint="Replace operations in place, or use --method uniform.",
        ) from error
    narrow = narrowed(widths)
    if not pretrained:
        initialise(narrow, seed=seed)
    return describe_pruned(
        narrow.eval(),
        module,
        structure,
        widths,
        sample_shape=sample_shape,
        classes=classes,
        name=name,
        method=method,
        density=density if allowance is None else None,
        seed=seed,
        densities=densities,
        left_whole=left_whole,
    )


def check_module(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    name: str,
    pretrained: bool = False,
    moments: Moments | None = None,
) -> None:
    """Raise ModelError unless a module can be pruned and trained for this problem.

    It has to turn (n, *sample_shape) into (n, classes), in float32 and the same each time, to use all its
    trainable parameters, and to give finite outputs on Gaussian inputs: with its own weights if
    ``pretrained``, else with redrawn ones. Lazy layers have their shapes afterwards; nothing else changes.
    """
    inputs = draw_inputs(2, sample_shape, generator=torch.Generator().manual_seed(0), moments=moments)
    training = module.training
    try:
        module.eval()(inputs)
        trial = copy.deepcopy(module)
        if not pretrained:
            initialise(trial, seed=0)
        outputs, again = trial(inputs), trial(inputs)
    except Exception as error:  # whatever the user's code raises
        raise ModelError(
            f"{name} cannot take samples of the shape {sample_shape}: {type(error).__name__}: {error}",
            hint="Give the shape that the module is made for.",
        ) from error
    finally:
        module.train(training)
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != (2, classes):
        raise ModelError(
            f"{name} gives an output of the shape {found} for 2 samples, expected {(2, classes)}",
            hint="Return one logit per class, and no more.",
        )
    if not torch.isfinite(outputs).all():
        raise ModelError(
            f"{name} gives outputs that are not finite under "
            f"{'its own' if pretrained else 'redrawn'} weights",
            hint="Add a norm after the layers whose output grows, or draw smaller weights.",
        )
    if not torch.equal(outputs, again):
        raise ModelError(
            f"{name} gives other outputs for the same inputs",
            hint="Let it draw nothing at random in evaluation: use nn.Dropout, not functional.dropout.",
        )
    wide = [key for key, p in trial.named_parameters() if p.dtype != torch.float32]
    if wide:
        raise ModelError(
            f"{name} has parameters that are not float32: {', '.join(wide)}", hint="Use .float()."
        )
    trained = {key: p for key, p in trial.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError(f"{name} has no parameters to train", hint="Give a module with a linear layer.")
    if outputs.requires_grad:
        try:
            gradients = torch.autograd.grad(outputs.sum(), [*trained.values()], allow_unused=True)
        except (
            RuntimeError
        ):  # operations in place: whoever needs derivatives says so, and the export looks again
            return
        trained = {key: p for (key, p), g in zip(trained.items(), gradients, strict=True) if g is None}
    if trained:
        raise ModelError(
            f"the output of {name} does not depend on {', '.join(trained)}",
            hint="Remove parameters that the forward does not use, or turn their requires_grad off.",
        )


def unit_magnitudes(module: nn.Module, structure: Structure) -> dict[str, NDArray[np.float32]]:
    """Return for every group the sum of squares of each unit's weights, incoming and outgoing.

    Measured without training on digits, from pretrained nets, this kept more accuracy at half of the widths
    than NTK gate scores, ablation losses or random units (docs/pruning.md).
    """
    parameters = dict(module.named_parameters())
    found = {group.name: np.zeros(group.width, np.float32) for group in structure.groups}
    for layer in structure.layers:
        squares = parameters[layer.name].detach().square()
        for place, axis in enumerate(layer.axes):
            if isinstance(axis, Axis):
                along = squares.movedim(place, 0).reshape(structure.dense[axis.group], -1)
                found[axis.group] += along.sum(1).numpy()
    return found


def load_module(reference: str, *, seed: int = 0) -> nn.Module:
    """Call a function of a Python file and return the module that it makes.

    Args:
        reference: ``FILE.py:FUNCTION``; the function takes no arguments. The file's code is run.
        seed: Torch's generator starts from it while the function runs: what it draws and we cannot redraw,
            such as a bare parameter, is then the same for the same seed.

    Raises:
        ModelError: There is no such file or function, it fails, or returns something else.
    """
    file, _, function = reference.rpartition(":")
    if not file or not Path(file).is_file():
        raise ModelError(f"{file or reference!r} is no Python file", hint="Write FILE.py:FUNCTION.")
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr):
            torch.manual_seed(derive_seed("module", seed))
            made = getattr(_run_file(Path(file)), function)()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ModelError(
            f"{reference} failed: {type(error).__name__}: {error}",
            hint="Call the function in a Python shell to see where it fails; it takes no arguments.",
        ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{reference} returned {type(made).__name__}, expected a torch module",
            hint="Name a function without arguments, or a class.",
        )
    return made


def _run_file(file: Path) -> ModuleType:
    """Run a Python file, which may import its neighbours, as a module that dataclasses can find."""
    name = f"scalarfed net {file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    sys.modules[name] = module
    sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
