"""Reads, checks and writes experiment files.

Knows TOML, overrides and what the keys demand of each other. Does not know whether the data file exists,
what the net will cost or who runs it: those who use a value look at the world.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from coordinator.experiment import (
    BrokerChoice,
    Data,
    Device,
    Evaluation,
    Experiment,
    Fleet,
    Health,
    Method,
    Model,
    Privacy,
    Pruning,
)
from coordinator.overrides import override
from coordinator.schema import Faults, Number, RefusedError, read_table
from edge_agent.optimizer import METHODS
from profiles.device import load_profile
from profiles.errors import ConfigError, ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["dump", "load_experiment", "with_settings"]

_MOST_SCALARS = 16384
"""Scalars of a round: four such records still fit one message of 1 MiB."""

_LARGEST_MASKED = 100
"""Agents of a masked cohort: each sends a share to each, and the sums fit 63 bits."""

_OPEN_RANGES = {
    **dict.fromkeys(
        ("smoothing", "nu", "momentum", "beta1", "beta2", "average", "decay", "memory"), (0.0, 1.0)
    ),
    **dict.fromkeys(("floor", "head_rate", "stabiliser", "clip"), (0.0, 1e6)),
    "kept": (1e-6, 1.0),
    "rank": (1.0, 17.0),
    "levels": (1.0, 17.0),
    "shares": (1.0, 256.0),
    "layers": (1.0, 256.0),
}
"""Where the constants of the methods work: from the first number up to, and not with, the second."""

_SECTIONS: dict[str, type[Any]] = {
    "model": Model,
    "data": Data,
    "pruning": Pruning,
    "method": Method,
    "fleet": Fleet,
    "broker": BrokerChoice,
    "evaluation": Evaluation,
    "health": Health,
    "privacy": Privacy,
}


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override, check and resolve an experiment file.

    Args:
        path: A TOML file.
        overrides: Each ``key.path=value``, such as ``method.epsilon=1e-2``, ``devices.0.count=8`` or
            ``data.path=/x/y.npz``. The value is read as TOML, and as a bare string where it is none. Naming
            another method drops the constants that the file gives for its own.

    Raises:
        ConfigError: The file cannot be read, or it or an override has faults: all of them are listed.
    """
    table = _read(path)
    table.setdefault("name", path.stem)
    return _resolved(table, overrides, source=str(path))


def with_settings(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the experiment with keys changed and everything checked again; as :func:`load_experiment`.

    Raises:
        ConfigError: An override has faults: all of them are listed.
    """
    return _resolved(tomllib.loads(dump(experiment)), overrides, source=" ".join(overrides))


def _resolved(table: dict[str, Any], overrides: Sequence[str], *, source: str) -> Experiment:
    written_for = _get(table, "method", "name")
    asked = {override(table, assignment, paths=_paths(assignment)) for assignment in overrides}
    if isinstance(method := table.get("method"), dict):
        for constant in _constants_of(written_for).keys() - _constants_of(method.get("name")).keys():
            if f"method.{constant}" not in asked:  # what was asked for by name is refused, not dropped
                method.pop(constant, None)
    faults = Faults()
    experiment = _experiment(table, faults)
    _check_together(experiment, faults)
    faults.raise_if_any(source)
    return experiment


def dump(experiment: Experiment) -> str:
    """Return the experiment as TOML with every key, from which an equal experiment can be loaded."""
    table: dict[str, Any] = {key: getattr(experiment, key) for key in ("name", "seed", "rounds")}
    for name in _SECTIONS:
        table[name] = _plain(getattr(experiment, name))
    table["method"] |= table["method"].pop("constants")
    devices = [f"\n[[devices]]\n{tomli_w.dumps(_plain(device))}" for device in experiment.devices]
    return tomli_w.dumps(table) + "".join(devices)


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.",
            hint="Name an experiment file, such as examples/digits.toml.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}.", hint="Mend that line; texts need quotes."
        ) from error
    for section, key in (("data", "path"), ("model", "name")):
        named = _get(table, section, key)
        if isinstance(named, str) and named and f"{section}.{key}" in _paths(named):
            table[section][key] = str((path.parent / Path(named).expanduser()).resolve())
    return table


def _paths(text: str) -> set[str]:
    """Return the keys whose values are paths: also a model's name, where it names a file."""
    return {"data.path", "model.name"} if ".py:" in text else {"data.path"}


def _get(table: Mapping[str, Any], section: str, key: str) -> object:
    found = table.get(section)
    return found.get(key) if isinstance(found, Mapping) else None


def _constants_of(name: object) -> Mapping[str, float]:
    name = Method.name if name is None else name
    return METHODS[name].constants if isinstance(name, str) and name in METHODS else {}


def _experiment(table: Mapping[str, Any], faults: Faults) -> Experiment:
    homes = _homes()
    given: dict[str, Any] = {}
    for name, cls in _SECTIONS.items():
        nested: dict[str, Any] = {"constants": _constants(table, faults)} if cls is Method else {}
        given[name] = read_table(
            cls,
            table.get(name, {}),
            where=name,
            faults=faults,
            given=nested,
            extra=tuple(nested.get("constants", ())),
            homes=homes,
        )
    given["devices"] = tuple(_devices(table.get("devices"), faults, homes))
    experiment = read_table(
        Experiment, table, where="", faults=faults, given=given, extra=(*_SECTIONS, "devices"), homes=homes
    )
    if experiment.pruning.method == "none":
        experiment = replace(experiment, pruning=replace(experiment.pruning, density=1.0))
    if faults.clear("data.path"):
        experiment = replace(experiment, data=replace(experiment.data, path=Path(experiment.data.path)))
    return experiment


def _homes() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, cls in [("devices", Device), *reversed(_SECTIONS.items())]:
        found |= {item.name: f"under [{name}]" for item in fields(cls)}
    found |= dict.fromkeys(Device.__annotations__, "under [[devices]]")
    found |= dict.fromkeys(("seed", "rounds"), "at the top, before the first [table]")
    return {key: home for key, home in found.items() if key != "name"}


def _constants(table: Mapping[str, Any], faults: Faults) -> dict[str, float]:
    name = _get(table, "method", "name")
    if name is not None and name not in METHODS:
        # Which constants are right is unknown: let every method's pass.
        return {key: value for method in METHODS.values() for key, value in method.constants.items()}
    values = dict(_constants_of(name))
    for key in values:
        given = _get(table, "method", key)
        if given is not None:
            try:
                values[key] = Number()(given)
            except RefusedError as refused:
                faults.refuse(f"method.{key}", given, str(refused))
    return values


def _devices(entries: object, faults: Faults, homes: Mapping[str, str]) -> Iterator[Device]:
    if not isinstance(entries, list) or not entries:
        faults.add(
            "devices", 'is missing: write at least one [[devices]] with profile = "pi-zero-2w" below it.'
        )
        return
    for index, entry in enumerate(entries):
        where = f"devices.{index}"
        device = read_table(Device, entry, where=where, faults=faults, given={}, homes=homes)
        if not faults.clear(where):
            yield device
            continue
        try:
            allowed = float(load_profile(device.profile).memory_mib.value)
        except ProfileError as error:
            faults.refuse(f"{where}.profile", device.profile, f"will not do. {error} {error.hint}")
            yield device
            continue
        yield replace(device, memory_mib=allowed if device.memory_mib is None else device.memory_mib)


def _check_together(experiment: Experiment, faults: Faults) -> None:
    fleet = experiment.fleet
    if faults.clear("devices"):
        _check_names(experiment.devices, faults)
        agents = sum(device.count for device in experiment.devices)
        if faults.clear("fleet.cohort") and experiment.cohort_size > agents:
            faults.refuse(
                "fleet.cohort",
                fleet.cohort,
                f"asks more agents than exist: the [[devices]] make {agents}. "
                'Lower it, write "all", or add devices.',
            )
        if faults.clear("fleet") and experiment.quorum_size > experiment.cohort_size:
            faults.refuse(
                "fleet.quorum",
                fleet.quorum,
                f"is above the cohort of {experiment.cohort_size}: no round could close. "
                'Lower it, or write "all".',
            )
    if faults.clear("fleet", "privacy.masks") and fleet.collectors:
        _check_collectors(experiment, faults)
    if faults.clear("method"):
        _check_method(experiment.method, faults)
    if faults.clear("privacy", "fleet", "method", "devices") and experiment.privacy.masks != "none":
        _check_masks(experiment, faults)
    if faults.clear("pruning.widths", "method.name"):
        rule = METHODS[experiment.method.name]
        if experiment.pruning.widths and not rule.nested:
            faults.refuse(
                "pruning.widths",
                list(experiment.pruning.widths),
                f'needs `method.name = "nested"`: `{rule.name}` trains one net on all boards.',
            )
        elif experiment.pruning.widths and faults.clear("fleet") and fleet.aggregation != "mean":
            faults.refuse(
                "fleet.aggregation",
                fleet.aggregation,
                "compares agents that hold the same net. With `pruning.widths` it must be mean.",
            )
    if faults.clear("method", "fleet.aggregation"):
        shares = experiment.method.constants.get("shares", 1.0)
        if shares > 1 and fleet.aggregation != "mean":
            faults.refuse(
                "fleet.aggregation",
                fleet.aggregation,
                f"compares agents that measured the same; with `method.shares` = {shares:g} they do not. "
                'Set it to "mean", or `method.shares` to 1.',
            )
    if faults.clear("privacy") and experiment.privacy.noise and not experiment.privacy.clip:
        faults.refuse(
            "privacy.noise",
            experiment.privacy.noise,
            "is counted in clips, and `privacy.clip` is 0. Set it to a length that most replies have.",
        )
    if faults.clear("fleet.deadline_s", "fleet.resend_s") and fleet.resend_s > fleet.deadline_s:
        faults.refuse(
            "fleet.resend_s",
            fleet.resend_s,
            f"must not exceed `fleet.deadline_s` = {fleet.deadline_s:g}. Lower it.",
        )


def _check_collectors(experiment: Experiment, faults: Faults) -> None:
    fleet = experiment.fleet
    if fleet.collectors > fleet.shards:
        faults.refuse(
            "fleet.collectors",
            fleet.collectors,
            f"is more than there are shards to read. Set `fleet.shards` to {fleet.collectors} or more.",
        )
    if experiment.privacy.masks != "none":
        faults.refuse(
            "fleet.collectors",
            fleet.collectors,
            'will not do with `privacy.masks` = "pairwise": the coordinator reads masked replies itself. '
            "Set it to 0.",
        )


def _check_masks(experiment: Experiment, faults: Faults) -> None:
    asked = experiment.cohort_size
    if experiment.fleet.aggregation != "mean":
        faults.refuse(
            "fleet.aggregation",
            experiment.fleet.aggregation,
            'compares replies, and `privacy.masks` = "pairwise" hides them. Set one of them to its default.',
        )
    if experiment.method.constants.get("shares", 1.0) > 1:
        faults.refuse(
            "method.shares",
            experiment.method.constants["shares"],
            'deals agents into shares, and `privacy.masks` = "pairwise" shows one sum alone. Set it to 1.',
        )
    if experiment.pruning.widths:
        faults.refuse(
            "pruning.widths",
            list(experiment.pruning.widths),
            'wants one mean for each width, and `privacy.masks` = "pairwise" shows one sum alone. '
            "Leave one of them out.",
        )
    if METHODS[experiment.method.name].nested:
        faults.refuse(
            "method.name",
            experiment.method.name,
            'sums each width by itself; `privacy.masks` = "pairwise" shows one sum alone. Choose another.',
        )
    if not 3 <= asked <= _LARGEST_MASKED:
        faults.refuse(
            "fleet.cohort",
            asked,
            f"will not do with masks: 3 to {_LARGEST_MASKED} agents hide each other. Choose such a cohort.",
        )


def _check_method(method: Method, faults: Faults) -> None:
    rule = METHODS[method.name]
    shares = int(method.constants.get("shares", 1))
    scalars = shares * method.perturbations + (method.exact if rule.head else 0) + rule.losses
    if scalars * method.local_steps > _MOST_SCALARS:
        faults.refuse(
            "method.perturbations",
            method.perturbations,
            f"makes {scalars} scalars a step; times `method.local_steps` = {method.local_steps} that is more "
            f"than {_MOST_SCALARS}. Lower one of them.",
        )
    if rule.reuse and method.perturbations < 2:
        faults.refuse(
            "method.perturbations",
            method.perturbations,
            f"will not do: `{method.name}` compares each perturbation with the others. Set it to 2 or more.",
        )
    if rule.stateful_steps and method.local_steps > 1:
        faults.refuse(
            "method.local_steps",
            method.local_steps,
            f"will not do: `{method.name}` makes one step a round. Leave it at 1.",
        )
    for name, (low, high) in _OPEN_RANGES.items():
        value = method.constants.get(name)
        if value is not None and not low <= value < high:
            faults.refuse(f"method.{name}", value, f"must be at least {low:g} and less than {high:g}.")
        elif value is not None and name in ("shares", "layers", "rank") and value != int(value):
            faults.refuse(f"method.{name}", value, "must be a whole number.")


def _check_names(devices: Sequence[Device], faults: Faults) -> None:
    # File systems that ignore case would give two such agents one log file.
    first: dict[str, int] = {}
    for index, device in enumerate(devices):
        prefix = (device.name or device.profile).casefold()
        earlier = first.setdefault(prefix, index)
        if earlier != index and (device.name or devices[earlier].name):
            faults.refuse(
                f"devices.{index}.name" if device.name else f"devices.{index}.profile",
                device.name or device.profile,
                f"names agents like those of `devices.{earlier}`: the names would be the same. "
                "Choose another `name`.",
            )


def _plain(section: Any) -> dict[str, Any]:
    plain: dict[type, Any] = {tuple: list, dict: dict}
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    return {
        key: str(value) if isinstance(value, Path) else plain.get(type(value), lambda same: same)(value)
        for key, value in values.items()
        if value is not None
    }
