"""``scalarfed bench``: what the passes, the steps and the processes cost on this machine."""

import json
from typing import Annotated, Any

import typer

from coordinator.cli.parameters import Json

__all__ = ["app", "kernel", "memory", "step"]

_MODELS = ("lenet", "resnet20", "minilm", "opt125m")

app = typer.Typer(
    help="Measure this machine: the passes over the weights, whole steps, and memory.\n\n"
    "Every figure is a ratio to a peer or a limit that was measured beside it in the same run, so that a "
    "busy machine moves both. Times are CPU time on one thread.",
    no_args_is_help=True,
)

_Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="|".join(_MODELS), help="Measure this net only; may be repeated."),
]
_Limit = Annotated[float, typer.Option(min=1, help="Give a net up after so many seconds.")]
_KERNEL = "Example: scalarfed bench kernel --weights 10000000"
_STEP = "Example: scalarfed bench step --model lenet --model resnet20"
_MEMORY = "Example: scalarfed bench memory --model opt125m --json"


@app.command(name="kernel", epilog=_KERNEL)
def kernel(
    weights: Annotated[
        int, typer.Option(min=1024, help="Weights of the flat vector; 125 million need 1 GiB of memory.")
    ] = 125_000_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each of the two halves.")] = 15,
    as_json: Json = False,
) -> None:
    """Time a perturbation and a replay of 16 against one pass over the same bytes.

    perturb_over_memory_pass: w += epsilon z, read and written once. replay16_over_memory_pass: a record of 16
    perturbations applied. The pass is numpy's w += 0. The curved figures are those with bfloat16 curvature.
    """
    from coordinator.bench.passes import measure_passes

    found = measure_passes(size=weights // 16 * 16, seconds=seconds, say=_say)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['weights']:,} weights by {found['kernel']}; a pass moves {found['pass_gbs']} GB/s")
    typer.echo(f"  perturbation:    {found['perturb_over_memory_pass']} passes", nl=False)
    typer.echo(f" ({found['perturb_curved_over_memory_pass']} with curvature)")
    typer.echo(f"  replay of 16:    {found['replay16_over_memory_pass']} passes", nl=False)
    typer.echo(f" ({found['replay16_curved_over_memory_pass']} with curvature)")


@app.command(name="step", epilog=_STEP)
def step(
    model: _Models = None,
    perturbations: Annotated[
        int | None,
        typer.Option(min=1, help="Perturbations of a step.", show_default="8; 4 of minilm, 2 of opt125m"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each comparison.")] = 5,
    limit_s: _Limit = 600,
    as_json: Json = False,
) -> None:
    """Time whole steps against their bare forwards, and forwards against ONNX Runtime's best and torch.

    step_over_forwards: estimate, record, replay and digest, over as many forwards alone.
    forward_over_constant: our forward with trainable weights over ONNX Runtime with the weights as constants.
    torch_cpu_over_own: the same estimate in torch (torch.randn, in place, eager). Needs the extra `prune`.
    """
    from coordinator.bench.run import measure_steps

    found = measure_steps(
        _chosen(model), perturbations=perturbations, seconds=seconds, limit_s=limit_s, say=_say
    )
    if as_json:
        typer.echo(json.dumps(found))
        return
    _table(found, ("step_over_forwards", "forward_over_constant", "torch_cpu_over_own"))


@app.command(name="memory", epilog=_MEMORY)
def memory(model: _Models = None, limit_s: _Limit = 600, as_json: Json = False) -> None:
    """Compare the peak memory of a training agent with that of ONNX Runtime that only infers.

    Each in a fresh process with the same imports. train_rss_over_inference: both peaks' ratio.
    train_peak_rss_mib: the agent's peak. over_frugal_inference: the same ratio where the inference process
    also gives back what its start needed. hiso: with elementwise curvature, two bytes a weight more.
    """
    from coordinator.bench.run import measure_memory

    found = measure_memory(_chosen(model), limit_s=limit_s, say=_say)
    if as_json:
        typer.echo(json.dumps(found))
        return
    _table(found, ("train_rss_over_inference", "train_peak_rss_mib", "over_frugal_inference"))


def _chosen(models: list[str] | None) -> list[str]:
    for name in models or ():
        if name not in _MODELS:
            raise typer.BadParameter(f"{name} is none of {', '.join(_MODELS)}", param_hint="--model")
    return list(dict.fromkeys(models or _MODELS))


def _table(found: dict[str, Any], columns: tuple[str, ...]) -> None:
    typer.echo(" ".join([f"{'':10}", *columns]))
    for name in found[columns[0]]:
        cells = (f"{found[column].get(name, ''):>{len(column)}}" for column in columns)
        typer.echo(" ".join([f"{name:10}", *cells]))


def _say(text: str) -> None:
    typer.echo(text, err=True)
