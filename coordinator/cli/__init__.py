"""The command ``scalarfed``: one module per verb, and what all of them do with an error.

Knows the verbs and exit codes. Everything heavy is imported by the verb that needs it, when it runs, so
that ``scalarfed --help`` answers at once.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from coordinator.cli import (
    bench,
    ctl,
    devices,
    doctor,
    enrol,
    fit,
    flash,
    gates,
    log,
    profile,
    prune,
    replay,
    report,
    serve,
    simulate,
    swarm,
    testbed,
    tune,
    update,
)
from profiles.errors import ScalarfedError

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    name="scalarfed",
    help="Prune first. Then train a fleet of small boards with forward passes only, and send only scalars.",
    epilog="Start here: scalarfed testbed run examples/digits.toml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(testbed.app, name="testbed")
app.add_typer(flash.app, name="flash")
app.add_typer(devices.app, name="devices")
app.command(name="update", epilog=update.EXAMPLE)(update.update)
devices.app.command(name="certificates", epilog=enrol.LIST_EXAMPLE)(enrol.certificates)
devices.app.command(name="revoke", epilog=enrol.REVOKE_EXAMPLE)(enrol.revoke)
app.command(name="serve", epilog=serve.EXAMPLE)(serve.serve)
app.command(name="enrol", epilog=enrol.EXAMPLE)(enrol.enrol)
app.command(name="ctl", epilog=ctl.EXAMPLE)(ctl.ctl)
app.command(name="doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.command(name="simulate", epilog=simulate.EXAMPLE)(simulate.simulate)
app.command(name="tune", epilog=tune.EXAMPLE)(tune.tune)
app.add_typer(log.app, name="log")
app.command(name="replay", epilog=replay.EXAMPLE)(replay.replay)
app.command(name="report", epilog=report.EXAMPLE)(report.report)
app.command(name="prune", epilog=prune.EXAMPLE)(prune.prune)
app.command(name="gates", epilog=gates.EXAMPLE)(gates.gates)
app.add_typer(profile.app, name="profile")
app.command(name="fit", epilog=fit.EXAMPLE)(fit.fit)
app.add_typer(bench.app, name="bench")
app.command(name="swarm", epilog=swarm.EXAMPLE)(swarm.swarm)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: Without the program's name; those of this process where left out.

    Returns:
        0 if all went well, 1 for a trouble of the operating system, 2 for a wrong option, the error's own
        code for whatever a user caused, 130 after Ctrl-C.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="scalarfed")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except ScalarfedError as error:
        _say(str(error), error.hint)
        return error.exit_code
    except OSError as error:
        _say(str(error), "Look at the named file or folder, its rights and the space on its disk.")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _say(message: str, hint: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), hint))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"scalarfed {version('scalarfed')}")
        except PackageNotFoundError:
            typer.echo("scalarfed, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
