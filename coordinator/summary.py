"""What came out of a run, as numbers: ``summary.json``.

Every figure is read from the log, the bundle, or what agents measured of themselves; nothing here is
predicted, except what is called so.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.experiment import Experiment
from coordinator.privacy import epsilon
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from edge_agent.bundle import Bundle
from edge_agent.optimizer import METHODS
from profiles.budget import flops_per_step
from profiles.cost import Cost

__all__ = ["write_summary"]


def write_summary(
    out: Path,
    experiment: Experiment,
    family: Sequence[Bundle],
    log: ScalarLog,
    service: Service,
    *,
    widths: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write ``summary.json`` into the run folder and return what it holds.

    Args:
        out: The run folder.
        experiment: What was run.
        family: What was trained; the narrowest first where there are several widths.
        log: All of it.
        service: With the last status of every agent.
        widths: What each width of a family can.
    """
    bundle = family[-1]
    settings = experiment.method
    digests = [f"{digest:016x}" for digest in service.replica.digests()]
    last_round = len(log)
    evaluation = log.last_evaluation()
    dense_cost = {key.removesuffix("_dense"): value for key, value in bundle.pruning.items()}
    costs = {
        "dense": Cost.from_dict(
            {field: dense_cost[field] for field in bundle.cost if field != "params"},
            params=bundle.pruning["params_dense"],
        ),
        "pruned": Cost.from_dict(bundle.cost, params=bundle.params),
        **{f"{level}": Cost.from_dict(one.cost, params=one.params) for level, one in enumerate(family)},
    }
    step_flops = {
        which: flops_per_step(
            cost,
            batch_size=settings.batch_size,
            perturbations=settings.perturbations,
            difference=settings.difference,
            size=cost.params,
            extra_forwards=METHODS[settings.name].losses,
        )
        for which, cost in costs.items()
    }
    statuses = service.statuses
    agents = []
    for row, level in zip(log.fleet(), service.levels, strict=True):
        status = statuses.get(row.name, {})
        agents.append(
            {
                "name": row.name,
                "profile": row.profile,
                "budget_mib": row.budget_mib,
                "predicted_peak_mib": row.predicted_mib,
                "peak_rss_mib": status.get("peak_rss_mib"),
                "enforcement": status.get("enforcement"),
                "samples": status.get("samples"),
                "flops_spent": log.replies_of(row.name) * settings.local_steps * step_flops[f"{level}"],
                "rounds_missed": log.count_events("missed", row.name),
                "restarts": log.count_events("agent ended", row.name),
                "digest": status.get("digest"),
                "round": status.get("round"),
            }
        )
    privacy = experiment.privacy
    most = max((log.replies_of(row.name) for row in log.fleet()), default=0)
    agree = bool(agents) and all(
        agent["digest"] == digests[level] and agent["round"] == last_round
        for agent, level in zip(agents, service.levels, strict=True)
    )
    summary: dict[str, Any] = {
        "name": experiment.name,
        "method": settings.name,
        "test_accuracy": None if evaluation is None else evaluation[1],
        "test_loss": None if evaluation is None else evaluation[0],
        "rounds": last_round,
        "rounds_skipped": log.skipped(),
        "params_dense": bundle.pruning["params_dense"],
        "params_pruned": bundle.params,
        "density": bundle.params / bundle.pruning["params_dense"],
        "flops_per_step_dense": step_flops["dense"],
        "flops_per_step_pruned": step_flops["pruned"],
        **_traffic(service.traffic),
        **(
            {
                "privacy": {
                    "clip": privacy.clip,
                    "noise": privacy.noise,
                    "delta": privacy.delta,
                    "replies": most,
                    "epsilon": epsilon(privacy.noise, most, delta=privacy.delta) if privacy.noise else None,
                }
            }
            if privacy.clip
            else {}
        ),
        "digests_agree": agree,
        "final_digest": digests[-1],
        "seconds_per_round": log.seconds_per_round(),
        "broker": log.meta().get("broker", ""),
        "messages_dropped": service.counts(),
        "agents": agents,
        **({"widths": list(widths)} if widths else {}),
        "model": bundle.model,
        "bundle": bundle.identity,
        "seed": experiment.seed,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _traffic(traffic: Mapping[tuple[str, int], Mapping[str, int]]) -> dict[str, float]:
    """Return bytes per agent and round, as the agents' links counted them, message by message."""
    rounds = sum(counts["rounds"] for counts in traffic.values())

    def rate(key: str) -> float:
        return round(sum(counts[key] for counts in traffic.values()) / max(1, rounds), 1)

    return {
        "bytes_up_per_agent_round": rate("packet_up"),
        "bytes_down_per_agent_round": rate("packet_down"),
        "payload_bytes_up_per_agent_round": rate("payload_up"),
        "payload_bytes_down_per_agent_round": rate("payload_down"),
    }
