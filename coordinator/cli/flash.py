"""``scalarfed flash``: an agent onto a card, into images, over SSH, or on this machine."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coordinator.flash.plan import Plan
    from coordinator.flash.volume import BootVolume

__all__ = ["app", "card", "check", "flash", "image", "local", "ssh", "undo"]

app = typer.Typer(help="Put an agent onto a board: by its card, an image, SSH, or on this machine.")

_Broker = Annotated[
    str,
    typer.Option(
        metavar="URL", help="Where the board finds the broker, mqtt://HOST:PORT.", show_default=False
    ),
]
_Bundle = Annotated[
    Path, typer.Option(metavar="DIR", help="The pruned net, folder `bundle` of a run.", show_default=False)
]
_Name = Annotated[
    str, typer.Option(metavar="NAME", help="The board's name; pi-{01..08} is eight.", show_default=False)
]
_Run = Annotated[
    str, typer.Option(metavar="NAME", help="The run to join.", show_default="that of the bundle")
]
_Data = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="The board's samples: an .npz to take along ({name} is the board's), or board:/path there.",
        show_default="/var/lib/scalarfed/data.npz on the board",
    ),
]
_Profile = Annotated[
    str,
    typer.Option(metavar="NAME", help="What board it is, see `scalarfed profile list`.", show_default=False),
]
_Memory = Annotated[
    float | None,
    typer.Option(metavar="MIB", help="The agent's memory.", show_default="the profile's, else 128"),
]
_Replace = Annotated[
    str, typer.Option(metavar="NAME", help="A name in use that this board takes over.", show_default=False)
]
_Python = Annotated[
    str,
    typer.Option(metavar="3.X", help="The board's Python, where the card does not tell.", show_default=False),
]
_Format = Annotated[
    str,
    typer.Option(
        "--format", metavar="NAME", help="systemd or cloud-init, if you know better.", show_default=False
    ),
]
_Again = Annotated[bool, typer.Option("--again", help="Take a card that has been booted.")]
_Ssid = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="A Wi-Fi; its password is read from SCALARFED_WIFI_PASSWORD.", show_default=False
    ),
]
_Country = Annotated[
    str, typer.Option(metavar="CC", help="The Wi-Fi's country, two letters.", show_default=False)
]
_Enrol = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="Where a board of an mqtts:// broker gets its certificate.",
        show_default="https at port 8443 of the broker's host",
    ),
]
_Wait = Annotated[
    float, typer.Option("--wait", metavar="S", help="How long to wait for the board's first message.")
]


@app.callback(invoke_without_command=True, epilog="Example: scalarfed flash")
def flash(context: typer.Context) -> None:
    """Put an agent onto a board; without a sub-command, ask four questions and do it."""
    if context.invoked_subcommand is None:
        _ask()


@app.command(
    epilog="Example: scalarfed flash card --name pi-1 --broker mqtt://192.168.1.5 --bundle runs/a/bundle"
)
def card(
    path: Annotated[
        Path | None, typer.Argument(help="Where the boot partition is mounted.", show_default="the only one")
    ] = None,
    *,
    name: _Name,
    broker: _Broker,
    bundle: _Bundle,
    run: _Run = "",
    data: _Data = "",
    profile: _Profile = "",
    memory_mib: _Memory = None,
    replace: _Replace = "",
    enrol: _Enrol = "",
    python: _Python = "",
    format_: _Format = "",
    again: _Again = False,
    wifi_ssid: _Ssid = "",
    wifi_country: _Country = "",
    wait: _Wait = 0.0,
) -> None:
    """Add the agent to a card that Raspberry Pi Imager has just written; its settings stay.

    Every line is ticked only after what was written has been read back.
    """
    from coordinator.flash.plan import make_plan, next_free, only_card, wifi_of
    from coordinator.flash.volume import FolderVolume

    place = path or only_card()
    (plan,) = make_plan(
        next_free(name) if name != replace else [name],
        broker=broker,
        bundle=bundle,
        run=run,
        data=data,
        profile=profile,
        memory_mib=memory_mib,
        replace=replace,
        enrol=enrol,
    )
    wifi = wifi_of(wifi_ssid, wifi_country)
    volume = FolderVolume(place)
    _write(volume, plan, way="card", where=str(place), python=python, format_=format_, again=again, wifi=wifi)
    typer.echo(
        f"Eject the card, put it into the board and power it: {plan.settings.name} reports in by itself."
    )
    _await(plan, wait)


@app.command(
    epilog="Example: scalarfed flash image raspios.img.xz -o cards --name 'pi-{01..08}' "
    "--broker mqtt://192.168.1.5 --bundle runs/a/bundle"
)
def image(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An .img or .img.xz.", show_default=False)],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The image; for several names a folder.", show_default=False)
    ],
    name: _Name,
    broker: _Broker,
    bundle: _Bundle,
    run: _Run = "",
    data: _Data = "",
    profile: _Profile = "",
    memory_mib: _Memory = None,
    replace: _Replace = "",
    enrol: _Enrol = "",
    python: _Python = "",
    format_: _Format = "",
    again: _Again = False,
    wifi_ssid: _Ssid = "",
    wifi_country: _Country = "",
) -> None:
    """Make card images with the agent in them, one per name, from an image that stays as it is.

    Needs no root and mounts nothing.
    """
    from coordinator.flash.card import look
    from coordinator.flash.image import copy_image
    from coordinator.flash.payload import Target
    from coordinator.flash.plan import make_plan, wifi_of
    from coordinator.flash.settings import expand_names
    from coordinator.flash.volume import boot_volume_of_image

    plans = make_plan(
        expand_names(name),
        broker=broker,
        bundle=bundle,
        run=run,
        data=data,
        profile=profile,
        memory_mib=memory_mib,
        replace=replace,
        enrol=enrol,
    )
    wifi = wifi_of(wifi_ssid, wifi_country)
    if source.suffix != ".xz":  # a packed one must be unpacked before it can be looked at
        with boot_volume_of_image(source, writable=False) as fresh:
            Target(python or look(fresh, forced=format_, again=again).python)
    if len(plans) > 1:
        out.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        target = out / f"{plan.settings.name}.img" if len(plans) > 1 or out.is_dir() else out
        copy_image(source, target)
        try:
            with boot_volume_of_image(target, writable=True) as volume:
                _write(
                    volume,
                    plan,
                    way="image",
                    where=str(target),
                    python=python,
                    format_=format_,
                    again=again,
                    wifi=wifi,
                )
        except BaseException:
            target.unlink(missing_ok=True)  # half an image is none
            raise
        typer.echo(f"{target}: write it to a card with Raspberry Pi Imager (no customisation) or dd.")


@app.command(
    epilog="Example: scalarfed flash ssh nano@orin.local --broker mqtt://192.168.1.5 --bundle runs/a/bundle "
    "--data board:/home/nano/samples.npz"
)
def ssh(
    host: Annotated[
        str, typer.Argument(metavar="USER@HOST", help="As you would say it to ssh.", show_default=False)
    ],
    *,
    broker: _Broker,
    bundle: _Bundle,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The board's name.", show_default="its host's name")
    ] = "",
    run: _Run = "",
    data: _Data = "",
    profile: _Profile = "",
    memory_mib: _Memory = None,
    replace: _Replace = "",
    enrol: _Enrol = "",
    port: Annotated[int, typer.Option(help="The SSH port.")] = 22,
    option: Annotated[
        list[str] | None,
        typer.Option("--ssh-option", metavar="KEY=VALUE", help="For ssh -o.", show_default=False),
    ] = None,
    root: Annotated[
        str, typer.Option(metavar="DIR", help="Install into another root there, start nothing.")
    ] = "",
    wait: _Wait = 60.0,
) -> None:
    """Install the agent as a service on a running machine: a Jetson, Armbian, a Pi, any Linux with systemd.

    Run again it repairs, or updates: the former release stays, and the board returns to it by itself if the
    new one does not join its run.
    """
    from coordinator.flash.payload import make_payload
    from coordinator.flash.plan import make_plan, record
    from coordinator.flash.ssh import Host

    words = ["-p", str(port), *(word for text in option or [] for word in ("-o", text))]
    with Host(host, options=words, root=root) as machine_there:
        machine = machine_there.look()
        chosen = name or machine.hostname.partition(".")[0].lower()
        known = chosen if replace in ("", chosen) and _is_at(chosen, host) else replace
        (plan,) = make_plan(
            [chosen],
            broker=broker,
            bundle=bundle,
            run=run,
            data=data,
            profile=profile,
            memory_mib=memory_mib,
            replace=known,
            enrol=enrol,
        )
        target = machine.target(memory_mib=plan.settings.memory_mib)
        _tick(f"{host} is {machine.arch}, Python {machine.python}, {machine.ram_mib:.0f} MiB of RAM")
        payload = make_payload(target, plan.settings, bundle=plan.bundle, data=plan.data)
        machine_there.install(payload, machine, tick=_tick)
        record(plan, way="ssh", where=host, release=payload.release)
        if not machine.memory_cgroup:
            typer.echo(
                "  !  the kernel there limits no memory yet: add cgroup_enable=memory to its command line"
            )
        if not root:
            _await(plan, wait)
            typer.echo(machine_there.log())


@app.command(epilog="Example: scalarfed flash local --name laptop --bundle runs/a/bundle --data samples.npz")
def local(
    *,
    name: _Name,
    bundle: _Bundle,
    data: _Data = "",
    broker: Annotated[str, typer.Option(metavar="URL", help="The broker.")] = "mqtt://127.0.0.1:1883",
    run: _Run = "",
    profile: _Profile = "",
    memory_mib: _Memory = None,
    replace: _Replace = "",
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it lives.", show_default="per user")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running when it has joined.")] = False,
    wait: _Wait = 30.0,
) -> None:
    """Make this machine a board: an agent within an enforced budget, joined when this says so.

    It runs until Ctrl-C, or with --detach until `scalarfed flash undo` on its folder.
    """
    from coordinator.flash.local import end_local, local_folder, prepare_local, start_local
    from coordinator.flash.plan import make_plan, record
    from coordinator.flash.settings import expand_names
    from coordinator.presence import await_status
    from profiles.errors import FlashError

    known = replace or (name if _is_at(name, "this machine") else "")
    (plan,) = make_plan(
        expand_names(name)[:1],
        broker=broker,
        bundle=bundle,
        run=run,
        data=data,
        profile=profile,
        memory_mib=memory_mib,
        replace=known,
        local=True,
    )
    told = plan.settings
    home = folder or local_folder(told.name)
    prepare_local(told, bundle=plan.bundle, data=plan.data, folder=home)
    _tick(f"settings, bundle and samples in {home}")
    child = start_local(told, home)
    try:
        status = await_status(
            told.broker,
            namespace=told.namespace,
            run=told.run,
            name=told.name,
            within_s=wait,
            wanted=lambda status: status.get("pid") == child.pid and status.get("state") != "starting",
        )
        if status is None or status.get("state") not in ("ready", "closed"):
            state = status.get("state") if status else "silent"
            tail = (
                (home / "agent.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            )
            raise FlashError(
                f"{told.name} did not join run {told.run} within {wait:g} s: it is {state}; {' '.join(tail)}",
                hint="Does the coordinator run, and does its experiment name this agent? "
                f"{home / 'agent.log'} tells more.",
            )
        _tick(f"{told.name} has joined run {told.run}: round {status['round']}, digest {status['digest']}")
        _tick(
            f"budget {told.memory_mib:g} MiB, held by {status['enforcement']}; uses {status['rss_mib']:g} MiB"
        )
        record(plan, way="local", where="this machine", release=str(status.get("version", "")))
        if detach:
            typer.echo(f"It goes on by itself; end it with: scalarfed flash undo {home}")
            return
        typer.echo("Ctrl-C ends it.")
        child.wait()
    except BaseException:
        end_local(home)
        raise


@app.command(epilog="Example: scalarfed flash check /media/you/bootfs")
def check(
    place: Annotated[Path, typer.Argument(help="A mounted boot partition, or an image.", show_default=False)],
) -> None:
    """Read a flashed card or image again, and compare every file with what was written."""
    from coordinator.flash.card import check_volume, read_receipt

    with _volume(place, writable=False) as volume:
        wrong = check_volume(volume)
        receipt = read_receipt(volume)
    for line in wrong:
        typer.echo(f"  ✗  {line}")
    if wrong:
        raise typer.Exit(1)
    count = len(receipt.hashes) if receipt else 0
    _tick(f"{count} files of {receipt.name if receipt else 'the board'} are as they were written")


@app.command(epilog="Example: scalarfed flash undo /media/you/bootfs")
def undo(
    place: Annotated[
        Path,
        typer.Argument(help="A mounted boot partition, an image, or an agent's folder.", show_default=False),
    ],
) -> None:
    """Take the agent off a card that was not booted yet, or off this machine: all is as before."""
    from coordinator.boards import forget_board
    from coordinator.flash.card import undo_volume
    from coordinator.flash.local import remove_local

    if (place / "board.json").is_file():
        name = remove_local(place)
    else:
        with _volume(place, writable=True) as volume:
            name = undo_volume(volume)
    forget_board(name)
    _tick(f"{name} is off {place}; the name is free again")


def _write(
    volume: "BootVolume",
    plan: "Plan",
    *,
    way: str,
    where: str,
    python: str,
    format_: str,
    again: bool,
    wifi: Any,
) -> None:
    from coordinator.flash.card import flash_volume, look
    from coordinator.flash.formats import FORMATS
    from coordinator.flash.payload import Target, make_payload
    from coordinator.flash.plan import record
    from profiles.errors import FlashError

    if format_ and format_ not in FORMATS:
        raise FlashError(f"there is no format {format_!r}", hint=f"Known are {' and '.join(FORMATS)}.")
    found = look(volume, forced=format_, again=again)
    _tick(f"first boot by {found.format}: {'; '.join(found.evidence) or 'as you say'}")
    payload = make_payload(Target(python or found.python), plan.settings, bundle=plan.bundle, data=plan.data)
    flash_volume(volume, payload, found, name=plan.settings.name, wifi=wifi, tick=_tick)
    record(plan, way=way, where=where, release=payload.release)
    _tick(
        f"{plan.settings.name}: {payload.release}, {plan.settings.memory_mib:g} MiB, run {plan.settings.run}"
    )


@contextlib.contextmanager
def _volume(place: Path, *, writable: bool) -> "Iterator[BootVolume]":
    from coordinator.flash.volume import FolderVolume, boot_volume_of_image

    if place.is_file():
        with boot_volume_of_image(place, writable=writable) as volume:
            yield volume
    else:
        yield FolderVolume(place)


def _is_at(name: str, where: str) -> bool:
    from coordinator.boards import read_book

    board = read_book().get(name)
    return board is not None and board.where == where


def _await(plan: "Plan", within_s: float) -> None:
    from coordinator.presence import await_status
    from profiles.errors import BrokerError

    if within_s <= 0:
        return
    told = plan.settings
    typer.echo(f"Waiting for the first message of {told.name} ...")
    try:
        status = await_status(
            told.broker,
            namespace=told.namespace,
            run=told.run,
            name=told.name,
            within_s=within_s,
            wanted=lambda status: status.get("state") not in ("offline", None),
        )
    except BrokerError as error:
        typer.echo(f"  !  {error}; the board will wait for it too")
        return
    if status is None:
        typer.echo(f"  !  none within {within_s:g} s: `scalarfed doctor {told.name}` tells more")
    else:
        _tick(f"{told.name} says it is {status['state']}, {status.get('rss_mib', 0):g} MiB in use")


def _ask() -> None:
    from coordinator.cli.wizard import ask
    from profiles.errors import FlashError

    if not sys.stdin.isatty():
        raise FlashError(
            "there is no terminal to ask questions on",
            hint="Use `scalarfed flash card`, `image`, `ssh` or `local` with options.",
        )
    said = ask()
    if said.place is None:
        ssh(said.host, name=said.name, broker=said.broker, bundle=said.bundle)
    else:
        card(said.place, name=said.name, broker=said.broker, bundle=said.bundle)


def _tick(text: str) -> None:
    typer.echo(f"  {'✓' if (sys.stdout.encoding or '').lower().startswith('utf') else 'ok'}  {text}")
