"""The agent process: options, the link, the samples, and the loop that feeds the state machine."""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edge_agent.admission import Renewal, admit
from edge_agent.agent import Agent, Report
from edge_agent.agreement import PrivateKey
from edge_agent.bundle import Bundle, check_signed, read_bundle
from edge_agent.commands import Commands
from edge_agent.credentials import Credentials, client_context
from edge_agent.data import Samples, load_samples, to_inputs
from edge_agent.estimator import Estimate
from edge_agent.fetch import fetch
from edge_agent.footprint import give_back
from edge_agent.forward import Forward
from edge_agent.heartbeat import Heartbeat
from edge_agent.link import Connected, Disconnected, Link, Message, MqttLink
from edge_agent.masked_wire import Unmask, decode_masked, encode_masked, is_masked
from edge_agent.measure import forward_for, measure
from edge_agent.offer import decode_offer, is_offer
from edge_agent.replay import Replica
from edge_agent.seal import HearingLink
from edge_agent.state import load_replica, read_replica, save_replica
from edge_agent.telemetry import read_telemetry
from edge_agent.topics import Topics, is_name, shard_of
from edge_agent.veil import Veil
from edge_agent.wire import Reply, RoundOpen, SliceRequest, encode
from profiles.errors import ConfigError, FetchError, ScalarfedError, StateError, WireError
from profiles.limit import Enforcement, enforce
from profiles.memory import current_rss_mib, peak_rss_mib, pss_mib

if TYPE_CHECKING:
    from edge_agent.torch_forward import TorchForward

__all__ = ["main"]

_LOG = logging.getLogger("scalarfed-agent")
_STATUS_EVERY_S = 10.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scalarfed-agent",
        description="Train on this board's own samples with forward passes only; send scalars, nothing else.",
        epilog="example: scalarfed-agent --broker mqtt://laptop.local:1883 --run digits --name pi-1 "
        "--bundle ./bundle --data ./samples.npz --state ./state --memory-mib 128",
    )
    parser.add_argument(
        "--broker", required=True, metavar="URL", help="mqtt://HOST:PORT of the broker, or mqtts://"
    )
    parser.add_argument(
        "--security", type=Path, metavar="DIR", help="certificates, or the ticket for one; asks for mqtts://"
    )
    parser.add_argument("--namespace", default="scalarfed", help="first level of all topics (%(default)s)")
    parser.add_argument("--run", required=True, help="name of the run to take part in")
    parser.add_argument("--name", default=platform.node(), help="this board's name (%(default)s)")
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR", help="the bundle folder")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="NPZ", help="this board's x_train, y_train"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="where the replica survives a restart")
    parser.add_argument("--profile", default="", help="name of this board's profile, for the status")
    parser.add_argument("--memory-mib", type=float, metavar="MIB", help="end rather than use more memory")
    parser.add_argument("--threads", type=int, default=1, help="threads of a forward pass (%(default)s)")
    parser.add_argument(
        "--save-every-s", type=float, default=30.0, help="seconds between saves (%(default)s)"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--version", action="version", version=_version())
    return parser


def main(
    arguments: Sequence[str] | None = None,
    *,
    heart: Heartbeat | None = None,
    on_failure: Callable[[str], None] = lambda _: None,
    commands: Commands | None = None,
) -> int:
    """Run the agent until it is told to stop; return the exit code.

    Args:
        arguments: Options; those of this process where left out.
        heart: Told of every progress; one for this process's service manager where left out.
        on_failure: Told why the agent could not go on.
        commands: Obeys an operator; an agent that no service runs obeys nobody.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout
    )
    give_back()  # of the imports
    try:
        return _Process(options, heart or Heartbeat(), commands).run()
    except ScalarfedError as error:
        on_failure(str(error))
        _LOG.error("%s", error)
        _LOG.error("hint: %s", error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


class _Process:
    """Everything around the state machine that touches the machine: memory, files, clock, network."""

    def __init__(self, options: argparse.Namespace, heart: Heartbeat, commands: Commands | None) -> None:
        self.heart = heart
        self.commands = commands
        for what in ("run", "name", "namespace"):
            if not is_name(getattr(options, what)):
                raise ConfigError(
                    f"--{what} {getattr(options, what)!r} must be 1 to 63 letters, digits, dots, - or _",
                    hint=f"Choose another --{what}.",
                )
        self.options = options
        self.stopping = threading.Event()
        for signal_name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_name, lambda *_: self.stopping.set())
        self.topics = Topics(options.namespace, options.run)
        self.credentials: Credentials | None = None
        if options.security is not None:
            self.credentials = admit(options.security, stopping=self.stopping, on_wait=heart.progress)
        self.bundle: Bundle = read_bundle(options.bundle)
        if self.credentials is not None:
            check_signed(self.bundle, self.credentials.signing_key)
        self.samples: Samples = load_samples(options.data, "train", classes=self.bundle.classes)
        shape = to_inputs(self.samples.x[:1]).shape[1:]
        if shape != self.bundle.sample_shape:
            raise ConfigError(
                f"{options.data} has samples of shape {shape}; the bundle takes {self.bundle.sample_shape}",
                hint="Use the data that the bundle was made for, or make a bundle for this data.",
            )
        self.enforcement: Enforcement | None = None
        if options.memory_mib is not None:
            self.enforcement = enforce(options.memory_mib)
        self.state_path: Path | None = None
        if options.state is not None:
            try:
                options.state.mkdir(parents=True, exist_ok=True)
                self.state_path = options.state / "replica.state"
            except OSError as error:
                _LOG.warning("%s cannot be used: %s; going on without", options.state, error)
        self.agent = Agent(
            name=options.name,
            bundle_identity=self.bundle.family or self.bundle.identity,
            replica=self._first_replica(),
            fresh_replica=self.bundle.replica,
            estimate=self._estimate,
            peak_kib=lambda: int(peak_rss_mib() * 1024),
            secret=os.urandom,
            restore=self._restore,
        )
        self.forward: Forward | TorchForward | None = None
        self.forward_of: Replica | None = None
        self.saved_round = self.agent.replica.round
        self.saved_at = time.monotonic()
        self.status_at = 0.0
        self.veil: Veil | None = None
        self.flops = 0
        self.state = "starting"
        self.text = ""

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT."""
        _LOG.info(
            "%s: %s, %d parameters, %d samples, %s",
            self.options.name,
            self.bundle.model,
            self.bundle.params,
            len(self.samples),
            self.enforcement.detail if self.enforcement else "no memory limit",
        )
        will = json.dumps({"name": self.options.name, "state": "offline"}).encode()
        mine = self.credentials
        tls = None if mine is None else client_context(mine.ca, mine.certificate, mine.key)
        carrier = MqttLink(
            self.options.broker,
            client_id=f"{self.options.run}-{self.options.name}",
            will=(self.topics.status(self.options.name), will),
            tls=tls,
        )
        link: Link = carrier
        renewal: Renewal | None = None
        if mine is not None:
            memory = self.state_path.with_name("heard.json") if self.state_path else None
            link = HearingLink(
                carrier, self.topics, key=mine.signing_key, memory=memory, dropped=self.agent.dropped
            )
            renewal = Renewal(self.options.security)
        link.subscribe(self.topics.control)
        link.subscribe(self.topics.answer(self.options.name))
        if self.commands is not None:
            link.subscribe(self.topics.command(self.options.name))
        self.heart.ready(f"{self.bundle.model} loaded, not yet in run {self.options.run}")
        try:
            while not self.stopping.is_set():
                self._handle(link, link.receive(0.5))
                self.heart.progress()
                if renewal is not None and renewal.tick() and mine is not None and tls is not None:
                    tls.load_cert_chain(mine.certificate, mine.key)  # counts from the next connection on
        finally:
            self.heart.stopping()
            self._save(force=True)
            self.state = "offline"
            self._publish_status(link)
            carrier.flush(2.0)
            carrier.close()
        return 0

    def _handle(self, link: Link, event: Message | Connected | Disconnected | None) -> None:
        now = time.monotonic()
        if isinstance(event, Connected):
            _LOG.info("connected to %s", self.options.broker)
            self.heart.connected()
            outgoing = self.agent.on_connected(now)
            self.status_at = 0.0
        elif isinstance(event, Disconnected):
            _LOG.warning("disconnected: %s", event.reason)
            self.heart.disconnected(event.reason)
            outgoing = []
        elif event is None:
            outgoing = self.agent.on_tick(now)
        elif event.topic == self.topics.control:
            outgoing = self._on_control(link, event.payload, now)
        elif self.commands is not None and event.topic == self.topics.command(self.options.name):
            self.commands.obey(event.payload)
            self.status_at = 0.0
            outgoing = []
        elif is_offer(event.payload):
            outgoing = self._fetch_snapshot(event.payload, now)
        elif self.veil is not None and is_masked(event.payload):
            outgoing = self._tell_masks(link, self.veil, event.payload)
        else:
            outgoing = self.agent.on_message(event.payload, now)
        for message in outgoing:
            self._send(link, message)
        self._save(force=False)
        if self.commands is not None:
            self.commands.tick()
        if time.monotonic() - self.status_at >= _STATUS_EVERY_S:
            self._publish_status(link)

    def _on_control(self, link: Link, payload: bytes, now: float) -> list[Reply | SliceRequest | Report]:
        try:
            control: dict[str, Any] = json.loads(payload)
        except (ValueError, RecursionError):
            control = {}
        if "keys" in control:
            if self.veil is None:
                try:
                    self.veil = Veil(self.options.run, PrivateKey(), os.urandom)
                except ConfigError as error:
                    return [Report("refused", str(error))]
            self.veil.on_control(control)
        outgoing = self.agent.on_control(control, now)
        if self.agent.shards:
            link.subscribe(self.topics.round(shard_of(self.options.name, self.agent.shards)))
        return outgoing

    def _send(self, link: Link, message: Reply | SliceRequest | Report) -> None:
        name = self.options.name
        if isinstance(message, Reply):
            payload: bytes | None = encode(message)
            opened, number = self.agent.opened, self.agent.number
            if self.veil is not None and not message.failed and opened is not None and number is not None:
                covered = self.veil.cover(message, opened, number)
                payload = None if covered is None else encode_masked(covered)
            if payload is not None:
                link.publish(self.topics.reply(shard_of(name, self.agent.shards), name), payload)
        elif isinstance(message, SliceRequest):
            _LOG.info("asking for the log from round %d", message.first)
            link.publish(self.topics.request(name), encode(message))
        else:
            if message.text:
                _LOG.warning("%s: %s", message.state, message.text)
            self.state, self.text = message.state, message.text
            if self.agent.shards:
                self.heart.join(f"in run {self.options.run} as {name}")
            self._publish_status(link)

    def _fetch_snapshot(self, payload: bytes, now: float) -> list[Reply | SliceRequest | Report]:
        """Fetch a replica that is too large for a message, if it was asked for."""
        if self.state_path is None or not self.agent.wants_records:
            return []
        mine, path = self.credentials, self.state_path.with_name("snapshot")
        try:
            offer = decode_offer(payload)
            tls = None if mine is None else client_context(mine.ca, mine.certificate, mine.key)
            if offer.secured is (tls is None):
                raise FetchError("the snapshot is offered in the clear, or wants a certificate")
            url = offer.url(urlsplit(self.options.broker).hostname or "")
            _LOG.info("fetching the replica of round %d, %d bytes, from %s", offer.round, offer.size, url)
            fetch(
                url,
                path,
                sha256=offer.sha256.hex(),
                size=offer.size,
                tls=tls,
                attempts=3,
                on_bytes=lambda _: self.heart.progress(),
            )
            found = load_replica(
                path, self.bundle.replica(), bundle_identity=self.bundle.identity, run=self.options.run
            )
        except (WireError, FetchError, StateError) as error:
            _LOG.warning("%s; asking for records", error)
            return []
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return self.agent.adopt(found, now)

    def _tell_masks(self, link: Link, veil: Veil, payload: bytes) -> list[Reply | SliceRequest | Report]:
        """Tell what undoes the masks of a round, if that does not say too much."""
        name = self.options.name
        try:
            request = decode_masked(payload)
        except WireError:
            self.agent.dropped["undecodable"] += 1
            return []
        answer = veil.tell(request) if isinstance(request, Unmask) else None
        if answer is not None:
            link.publish(self.topics.reply(shard_of(name, self.agent.shards), name), encode_masked(answer))
        return []

    def _estimate(self, replica: Replica, opened: RoundOpen, number: int) -> Estimate:
        if self.forward is None or self.forward_of is not replica:
            self.forward = None  # two sessions at once would be the peak of the agent's memory
            self.forward = forward_for(self.bundle, replica, opened.plan, threads=self.options.threads)
            self.forward_of = replica
        made = measure(self.forward, self.samples, replica, opened, number, on_pass=self.heart.progress)
        self.flops += made.forwards * opened.batch_size * self.bundle.cost["forward_flops"]
        self.flops += 2 * self.bundle.size * (made.forwards + 1)  # each forward moved the weights before it
        return made

    def _first_replica(self) -> Replica:
        if self.state_path is not None:
            try:
                saved = load_replica(
                    self.state_path,
                    self.bundle.replica(),
                    bundle_identity=self.bundle.identity,
                    run=self.options.run,
                )
                if saved is not None:
                    _LOG.info("going on from the saved replica of round %d", saved.round)
                    return saved
            except StateError as error:
                _LOG.warning("%s; starting from the bundle", error)
        return self.bundle.replica()

    def _restore(self, state: bytes) -> Replica | None:
        return read_replica(
            io.BytesIO(state),
            self.bundle.replica(),
            bundle_identity=self.bundle.identity,
            run=self.options.run,
            name="the snapshot",
        )

    def _save(self, *, force: bool) -> None:
        due = force or time.monotonic() - self.saved_at >= self.options.save_every_s
        if self.state_path is None or not due or self.agent.replica.round == self.saved_round:
            return
        try:
            save_replica(
                self.state_path,
                self.agent.replica,
                bundle_identity=self.bundle.identity,
                run=self.options.run,
            )
        except StateError as error:
            _LOG.warning("%s; going on without", error)
        self.saved_round, self.saved_at = self.agent.replica.round, time.monotonic()

    def _publish_status(self, link: Link) -> None:
        self.status_at = time.monotonic()
        traffic = link.traffic
        telemetry = read_telemetry(disk=self.options.state)
        status = {
            "name": self.options.name,
            "state": self.state,
            "text": self.text[:200],
            "version": _version(),
            "profile": self.options.profile,
            "pid": os.getpid(),
            "epoch": self.agent.epoch,
            "round": self.agent.replica.round,
            "digest": f"{self.agent.replica.digest():016x}",
            "rss_mib": round(current_rss_mib(), 2),
            "peak_rss_mib": round(peak_rss_mib(), 2),
            "pss_mib": None if (pss := pss_mib()) is None else round(pss, 2),
            "budget_mib": self.options.memory_mib,
            "enforcement": self.enforcement.rung if self.enforcement else "none",
            "samples": len(self.samples),
            "estimates": self.agent.estimates,
            "forwards": self.agent.forwards,
            "flops": self.flops,
            **({} if self.veil is None else {"key": self.veil.public.hex()}),
            "counted": self.agent.counted,
            "uncounted": self.agent.uncounted,
            "dropped": dict(self.agent.dropped),
            "traffic": vars(traffic).copy(),
            "temperature_c": telemetry.get("temperature_c"),
            "battery_percent": telemetry.get("battery_percent"),
            "telemetry": telemetry,
            **(self.commands.status() if self.commands else {}),
        }
        link.publish(self.topics.status(self.options.name), json.dumps(status).encode(), retain=True)


def _version() -> str:
    try:
        return version("scalarfed")
    except PackageNotFoundError:
        return "unpacked"


if __name__ == "__main__":
    sys.exit(main())
