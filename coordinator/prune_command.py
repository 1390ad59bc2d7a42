"""What ``scalarfed prune`` does: options checked, net pruned, bundle and picture written.

Knows what the options mean together. Does not know how a net is pruned, nor the command line.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coordinator.gate_scores import find_pretrained, is_run, sum_scores
from coordinator.out_folder import all_at_once, check_out
from coordinator.progress import Observer
from coordinator.prune_picture import BudgetLine, prune_picture
from coordinator.scalar_log import ScalarLog
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import load_samples, to_inputs
from edge_agent.optimizer import METHODS
from profiles.budget import predict_peak_mib
from profiles.cost import Cost, graph_cost
from profiles.device import Profile, load_profile
from profiles.errors import ConfigError, ModelError
from profiles.passes import runnable_passes

if TYPE_CHECKING:
    from pruning.fit import MemoryBudget
    from pruning.plan import Allowance

__all__ = ["Problem", "PruneRequest", "find_problem", "prune_to_bundle"]

_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)*")
_LABELLED = 256  # samples that snip and grasp look at
_BUDGETS = ("density", "params", "macs", "fit")


@dataclass(frozen=True)
class PruneRequest:
    """The options of ``scalarfed prune``, as typed.

    Attributes:
        model: A reference net, or ``FILE.py:FUNCTION``.
        out: The bundle's folder.
        data: An ``.npz`` of samples.
        shape: Shape of a sample, such as ``1x28x28``; follows from ``data``.
        classes: Number of classes; follows from ``data``.
        density: Fraction of the parameters that stays.
        params: Parameters that may stay.
        macs: Multiply-accumulates that a forward of one sample may take.
        fit: A profile whose memory the training may use.
        batch_size: Samples of a forward pass, for ``fit`` and the picture.
        kernel: Whether the board has the compiled kernel, whose passes take other memory; None if it may.
        trained_by: The update rule that will train the net, for ``fit`` and the picture.
        method: One of :data:`pruning.plan.METHODS`, or ``autoflip``; what trained best if None: ``uniform``
            for narrower layers, ``ntk`` for masks.
        explored: For ``autoflip``, the folder of a run in which the agents explored.
        mode: ``structured`` or ``mask``.
        draws: Draws of the saliency per step.
        seed: Names the draws and the fresh weights.
        scores: Files of gate scores, or folders of them; the model is then a pretrained one.
    """

    model: str
    out: Path
    data: Path | None = None
    shape: str | None = None
    classes: int | None = None
    density: float | None = None
    params: float | None = None
    macs: float | None = None
    fit: str | None = None
    batch_size: int = 32
    kernel: bool | None = None
    trained_by: str = "headstep"
    method: str | None = None
    explored: Path | None = None
    mode: str = "structured"
    draws: int = 5
    seed: int = 0
    scores: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What a net is for.

    Attributes:
        sample_shape: Shape of one input.
        classes: Number of classes.
        inputs: Samples as a net takes them; None without a data file.
        labels: Theirs.
    """

    sample_shape: tuple[int, ...]
    classes: int
    inputs: NDArray[np.float32] | None
    labels: NDArray[np.int64] | None


def prune_to_bundle(request: PruneRequest, *, observer: Observer) -> dict[str, Any]:
    """Prune, write the bundle and ``pruning.svg`` beside it, and return what was done.

    Raises:
        ConfigError: Options contradict each other or are missing.
        ModelError: The net cannot be pruned or exported as asked.
        DataError: The data file is missing or malformed.
        ProfileError: There is no such profile.
    """
    if request.method is None:
        default = "gates" if request.scores else "ntk" if request.mode == "mask" else "uniform"
        request = dataclasses.replace(request, method=default)
    _check(request)
    problem = find_problem(request.model, data=request.data, shape=request.shape, classes=request.classes)
    profile = load_profile(request.fit) if request.fit else None
    allowed_mib = profile.memory_mib.value if profile else None
    observer.stage(f"pruning {request.model} by {request.method}")
    write = _write_scored if request.scores else _write_mask if request.mode == "mask" else _write_narrow
    with all_at_once(request.out) as folder:
        try:
            bundle = write(request, problem, profile, folder, observer)
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "not enough memory" not in str(error):  # torch's words
                raise
            raise ModelError(
                f"{request.model} for samples of the shape {problem.sample_shape} "
                "does not fit this machine's memory",
                hint="Give a smaller --shape or another model; the dense net is made before it is pruned.",
            ) from error
        facts = {**_facts(bundle, request, profile), "bundle": str(request.out)}
        line = BudgetLine(request.fit or "", allowed_mib) if allowed_mib is not None else None
        (folder / "pruning.svg").write_text(prune_picture(facts, line), encoding="utf-8")
    for text in _lines(facts, request):
        observer.line(text)
    return facts


def _check(request: PruneRequest) -> None:
    given = [name for name in _BUDGETS if getattr(request, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"--{' and --'.join(given)} say how small in {len(given)} ways", hint="Give one of them."
        )
    if given and request.method == "none":
        raise ConfigError(
            f"--method none leaves the net as it is, --{given[0]} asks for less",
            hint="Leave one of them out.",
        )
    for name in ("params", "macs"):
        amount = getattr(request, name)
        if amount is not None and not (math.isfinite(amount) and amount > 0):
            raise ConfigError(
                f"--{name} {amount:g} is no number above 0", hint="Give how many may stay, like 20000 or 2e4."
            )
    if request.mode not in ("structured", "mask"):
        raise ConfigError(f"--mode {request.mode} is unknown", hint="Write structured or mask.")
    if request.mode == "mask" and given not in ([], ["density"]):
        raise ConfigError(
            "--mode mask takes --density only: a mask saves neither MACs nor memory",
            hint="Leave --mode out for narrower layers.",
        )
    if (request.method == "autoflip") != (request.explored is not None):
        raise ConfigError(
            f"--method {request.method} and --explored {request.explored} do not go together",
            hint="Give --method autoflip, and --explored with the folder of a run of the net, not pruned.",
        )
    if request.method == "autoflip" and (request.mode == "mask" or ":" in request.model):
        raise ConfigError(
            "--method autoflip makes narrower layers of a reference net", hint="Leave --mode out."
        )
    if request.trained_by not in METHODS:
        raise ConfigError(
            f"--trained-by {request.trained_by} is no update rule", hint=f"There are {', '.join(METHODS)}."
        )
    if is_run(request.model) and not request.scores:
        raise ConfigError(
            f"{request.model} is a run, whose net has learnt: it is narrowed by what its units are worth",
            hint="Give --scores of the boards, see `scalarfed gates`; or the name of a net to start afresh.",
        )
    if request.scores and (request.method != "gates" or request.mode == "mask"):
        raise ConfigError(
            "--scores choose the widths themselves, and keep whole units",
            hint="Leave --method and --mode out.",
        )
    check_out(request.out)


def find_problem(model: str, *, data: Path | None, shape: str | None, classes: int | None) -> Problem:
    """Return what a net is for: a run's is known, else ``--data``, ``--shape`` and ``--classes`` say it.

    Raises:
        ConfigError: They are missing, malformed, or contradict each other.
        DataError: The data file is missing or malformed.
    """
    if is_run(model):
        if (data, shape, classes) != (None, None, None):
            raise ConfigError(
                f"the run {model} knows its net's input and output",
                hint="Leave --data, --shape, --classes out.",
            )
        bundle = read_bundle(Path(model) / "bundle")
        return Problem(bundle.sample_shape, bundle.classes, None, None)
    if shape is not None and not _SHAPE.fullmatch(shape):
        raise ConfigError(f"--shape {shape} is no shape", hint="Write 64 or 1x28x28.")
    sizes = None if shape is None else tuple(int(size) for size in shape.split("x"))
    if data is None:
        if sizes is None or classes is None:
            raise ConfigError(
                "the net's input and output are not known", hint="Give --data, or --shape and --classes."
            )
        return Problem(sizes, classes, None, None)
    samples = load_samples(data, "train")
    inputs = to_inputs(samples.x)
    if sizes is not None and sizes != inputs.shape[1:]:
        raise ConfigError(
            f"--shape {shape} and the samples of {data} differ: they are of the shape "
            f"{'x'.join(map(str, inputs.shape[1:]))}",
            hint="Leave --shape out.",
        )
    classes = classes or int(samples.y.max()) + 1
    if samples.y.max() >= classes:
        raise ConfigError(
            f"--classes {classes} and the labels of {data} differ: they go up to {samples.y.max()}",
            hint="Leave --classes out, or count from 0.",
        )
    return Problem(inputs.shape[1:], classes, inputs, samples.y)


def _allowance(request: PruneRequest) -> "Allowance | None":
    from pruning.plan import Allowance

    for unit, amount in (("params", request.params), ("macs", request.macs)):
        if amount is not None:
            return Allowance(unit, amount)
    return None


def _memory(request: PruneRequest, profile: Profile | None) -> "MemoryBudget | None":
    from pruning.fit import MemoryBudget

    if profile is None:
        return None
    return MemoryBudget(
        profile.memory_mib.value,
        batch_size=request.batch_size,
        curvature_bytes_per_param=METHODS[request.trained_by].bytes_per_weight,
        arch=profile.arch,
        kernel=request.kernel,
    )


def _write_narrow(
    request: PruneRequest, problem: Problem, profile: Profile | None, folder: Path, observer: Observer
) -> Bundle:
    from pruning.fit import fit_memory
    from pruning.models import moments, standardisation
    from pruning.prune import prune_model, write_pruned
    from pruning.prune_module import load_module, prune_module

    allowance, memory = _allowance(request), _memory(request, profile)
    density = 0.5 if request.density is None else request.density
    if ":" in request.model:
        pruned = prune_module(
            load_module(request.model, seed=request.seed),
            sample_shape=problem.sample_shape,
            classes=problem.classes,
            name=request.model.rpartition(":")[2],
            method=str(request.method),
            density=density,
            allowance=allowance,
            draws=request.draws,
            seed=request.seed,
            labelled=_labelled(problem),
            moments=None if problem.inputs is None else moments(problem.inputs),
            memory=memory,
            progress=observer.pruning,
        )
    else:
        densities, hidden = _explored(request, density)
        problem_of: dict[str, Any] = {
            "sample_shape": problem.sample_shape,
            "classes": problem.classes,
            "standardise": None if problem.inputs is None else standardisation(problem.inputs),
        }
        if memory is not None:
            allowance = fit_memory(memory, request.model, **problem_of)
        pruned = prune_model(
            request.model,
            **problem_of,
            method=str(request.method),
            density=density,
            allowance=allowance,
            draws=request.draws,
            seed=request.seed,
            labelled=_labelled(problem),
            densities=densities,
            hidden=hidden,
            progress=observer.pruning,
        )
    return write_pruned(pruned, folder, cost=_cost)


def _write_scored(
    request: PruneRequest, problem: Problem, profile: Profile | None, folder: Path, observer: Observer
) -> Bundle:
    from pruning.pretrained import narrow_pretrained
    from pruning.prune import write_pruned

    net = find_pretrained(
        request.model, sample_shape=problem.sample_shape, classes=problem.classes, seed=request.seed
    )
    total, facts = sum_scores(net, request.scores, draws=request.draws, seed=request.seed)
    observer.line(f"scores of {facts['boards']} boards, {facts['samples_scored']:,} samples")
    pruned = narrow_pretrained(
        net,
        total,
        density=0.5 if request.density is None else request.density,
        allowance=_allowance(request),
        memory=_memory(request, profile),
        seed=request.seed,
    )
    return write_pruned(pruned, folder, cost=_cost, facts=facts)


def _explored(
    request: PruneRequest, density: float
) -> tuple[dict[str, float] | None, tuple[int, ...] | None]:
    """Return the densities that the agents' own scalars of a run tell, and the hidden widths of its MLP."""
    if request.explored is None:
        return None, None
    from pruning.autoflip import guided_densities

    bundle = read_bundle(request.explored / "bundle")
    if bundle.pruning["params"] != bundle.pruning["params_dense"] or bundle.stops:
        raise ConfigError(
            f"the net of {request.explored} was pruned before: {bundle.pruning['params']:,} of "
            f"{bundle.pruning['params_dense']:,} parameters",
            hint="Let the agents explore with pruning.method=none.",
        )
    if request.model not in ("auto", bundle.model):
        raise ConfigError(
            f"the run {request.explored} has the net {bundle.model}, not {request.model}",
            hint=f"Write {bundle.model}, or auto.",
        )
    with ScalarLog.open(request.explored / "log.sqlite") as log:
        found = guided_densities(bundle, log.explorations(), density=density)
    widths = bundle.pruning["widths_dense"]
    return found, tuple(widths.values()) if bundle.model == "mlp" else None


def _write_mask(
    request: PruneRequest, problem: Problem, profile: Profile | None, folder: Path, observer: Observer
) -> Bundle:
    from pruning.masked import mask_model, mask_module, write_masked
    from pruning.models import moments, standardisation
    from pruning.prune_module import load_module

    asked: dict[str, Any] = {
        "sample_shape": problem.sample_shape,
        "classes": problem.classes,
        "method": str(request.method),
        "density": 0.5 if request.density is None else request.density,
        "draws": request.draws,
        "seed": request.seed,
        "labelled": _labelled(problem),
        "progress": observer.pruning,
    }
    if ":" in request.model:
        module = load_module(request.model, seed=request.seed)
        taken = None if problem.inputs is None else moments(problem.inputs)
        masked = mask_module(module, name=request.model.rpartition(":")[2], moments=taken, **asked)
    else:
        standardise = None if problem.inputs is None else standardisation(problem.inputs)
        masked = mask_model(request.model, standardise=standardise, **asked)
    return write_masked(masked, folder, cost=_cost)


def _labelled(problem: Problem) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    if problem.inputs is None or problem.labels is None:
        return None
    return problem.inputs[:_LABELLED], problem.labels[:_LABELLED]


def _cost(graph: bytes) -> Mapping[str, int]:
    return graph_cost(graph).as_dict()


def _facts(bundle: Bundle, request: PruneRequest, profile: Profile | None) -> dict[str, Any]:
    """Return the manifest's pruning, with predicted memory and FLOPs before and after."""
    pruning = dict(bundle.pruning)
    passes = pruning.pop("passes_dense", {}), bundle.passes
    dense_cost = {key.removesuffix("_dense"): pruning[key] for key in pruning if f"{key}".endswith("_dense")}
    fields = {key: dense_cost[key] for key in bundle.cost if key in dense_cost}
    before = Cost.from_dict(fields, params=pruning["params_dense"])
    after = Cost.from_dict(bundle.cost, params=bundle.params)
    lengths = pruning["graph_bytes_dense"], bundle.graph_path.stat().st_size
    peaks = [
        predict_peak_mib(
            cost,
            batch_size=request.batch_size,
            passes=runnable_passes(asked, arch=profile.arch if profile else "", kernel=request.kernel),
            curvature_bytes_per_param=METHODS[request.trained_by].bytes_per_weight,
            graph_bytes=length,
        ).total_mib
        for cost, length, asked in zip((before, after), lengths, passes, strict=True)
    ]
    return {
        **pruning,
        "identity": bundle.identity,
        "batch_size": request.batch_size,
        "forward_flops": bundle.cost["forward_flops"],
        "predicted_peak_mib_dense": peaks[0],
        "predicted_peak_mib": peaks[1],
    }


def _lines(facts: Mapping[str, Any], request: PruneRequest) -> list[str]:
    lines = [
        f"parameters {facts['params_dense']:,} -> {facts['params']:,} "
        f"({facts['params'] / facts['params_dense']:.1%})"
    ]
    if request.mode == "mask":
        lines.append("a mask lowers the variance of the steps; FLOPs and memory are the dense net's")
    else:
        lines.append(f"FLOPs of a forward {facts['forward_flops_dense']:,} -> {facts['forward_flops']:,}")
        lines.append(
            f"predicted peak memory {facts['predicted_peak_mib_dense']:.1f} -> "
            f"{facts['predicted_peak_mib']:.1f} MiB at batch {facts['batch_size']}"
        )
        widths = (f"{k} {facts['widths_dense'][k]}->{w}" for k, w in facts["widths"].items())
        lines.append(f"widths {', '.join(widths)}")
        lines += [f"{name} keeps its width: {why}" for name, why in facts.get("left_whole", {}).items()]
    return [*lines, f"bundle {facts['bundle']}", f"picture {request.out / 'pruning.svg'}"]
