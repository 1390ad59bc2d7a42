"""``scalarfed profile``: what is known of the boards."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Json

__all__ = ["app", "import_", "list_profiles", "measure", "show"]

app = typer.Typer(no_args_is_help=True, help="What is known of the boards: memory, speed, system.")


@app.command(name="list", epilog="Example: scalarfed profile list")
def list_profiles(
    as_json: Json = False,
) -> None:
    """List the known boards, built-in and your own."""
    from profiles.device import load_profile, profile_names

    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        typer.echo(json.dumps({profile.name: dataclasses.asdict(profile) for profile in profiles}))
        return
    width = max(len(profile.name) for profile in profiles)
    typer.echo(f"{'name':{width}}  {'budget':>9}  {'RAM':>9}  cores  GFLOP/s  board")
    for profile in profiles:
        typer.echo(
            f"{profile.name:{width}}  {profile.memory_mib.value:5.0f} MiB  {profile.ram_mib.value:5.0f} MiB"
            f"  {profile.cores.value:5.0f}  {profile.fp32_gflops.value:7.4g}  {profile.title}"
        )


@app.command(epilog="Example: scalarfed profile show pi-zero-2w")
def show(
    name: Annotated[str, typer.Argument(help="As `scalarfed profile list` prints it.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show every figure of a board with its source, as the TOML of its profile."""
    from profiles.device import format_profile, load_profile

    profile = load_profile(name)
    typer.echo(json.dumps(dataclasses.asdict(profile)) if as_json else format_profile(profile).rstrip())


@app.command(epilog="Example: scalarfed profile measure --out my-board.toml")
def measure(
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="How long to measure.")] = 5.0,
    like: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Take what is not measured from this one.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="NAME.toml", help="Write the profile there, ready for import.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the measured figures as one object.")
    ] = False,
) -> None:
    """Measure GFLOP/s, bandwidth, RAM and temperature of this machine, and print its profile."""
    from datetime import date

    from profiles.device import format_profile, load_profile
    from profiles.selftest import measure as measure_machine
    from profiles.selftest import profile_of_this_machine, with_measurements

    known = load_profile(like) if like else None
    typer.echo(f"measuring for {seconds:g} s; leave the machine alone meanwhile", err=True)
    measured = measure_machine(seconds=seconds)
    today = date.today().isoformat()
    name = out.stem if out else "this-machine"
    profile = (
        with_measurements(known, measured, date=today)
        if known
        else profile_of_this_machine(measured, name=name, date=today)
    )
    if out is not None:
        out.write_text(format_profile(profile), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(measured))
    elif out is None:
        typer.echo(format_profile(profile).rstrip())
    else:
        typer.echo(f"{out}: now `scalarfed profile import {out}`")


@app.command(name="import", epilog="Example: scalarfed profile import my-board.toml")
def import_(
    path: Annotated[Path, typer.Argument(help="A profile, TOML; called like the board.", show_default=False)],
) -> None:
    """Check a profile of your own and keep it, so that experiments can name it."""
    from profiles.device import import_profile, profile_folder

    profile = import_profile(path)
    typer.echo(f"{profile.name}: {profile.title}, kept in {profile_folder()}")
