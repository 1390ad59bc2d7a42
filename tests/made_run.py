"""Run folders made by hand, for those who only look back.

One has a scalar log with invented figures; the other is small, and every digest in it is true.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from coordinator.scalar_log import ScalarLog
from edge_agent.bundle import flat_layout, write_bundle
from edge_agent.plan import RoundPlan
from edge_agent.replay import apply_record
from edge_agent.wire import Reply, RoundRecord
from profiles.cost import graph_cost

__all__ = ["make_replayable_run", "make_run"]

PROFILES = ["pi-zero-2w", "pi-zero-2w", "pi-3b-plus", "pi-4-2gb", "jetson-nano", "jetson-orin-nano"]
BUDGETS = [128.0, 96.0, 256.0, 400.0, 512.0, 700.0]


def make_run(folder: Path, *, rounds: int = 120, agents: int = 6, ended: bool = True) -> Path:
    """Make a run in ``folder``: agent 1 misses some rounds and is restarted, round 40 is skipped.

    Args:
        folder: Made if it is not there.
        rounds: Rounds in the log.
        agents: Size of the fleet.
        ended: Whether there are a summary and a manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    kinds = [n % len(PROFILES) for n in range(agents)]
    names = [f"{PROFILES[kind]}-{n + 1}" for n, kind in enumerate(kinds)]
    began = 1_760_000_000.0
    meta = {"bundle": "b" * 32, "name": "digits", "broker": "mosquitto 2.0.11"}
    with ScalarLog.create(folder / "log.sqlite", meta) as log:
        log.set_agents(
            [(n, name, PROFILES[kinds[n]], BUDGETS[kinds[n]], 66.0) for n, name in enumerate(names)]
        )
        log.add_event("coordinator started", "", "epoch 1, round 0", at=began)
        for round_ in range(rounds):
            at = began + 0.2 * round_
            skipped = round_ == 40
            size = 2.0 * np.exp(-round_ / 80) + 0.3
            plan = RoundPlan(round_, 7, 2, 1, 8, 1e-3, 0.01, (0.05, 1e-4, 0.0))
            scalars = rng.normal(0, size, (1, 8)).astype(np.float32) * (not skipped)
            replies = {}
            for n, name in enumerate(names):
                if (n == 1 and 50 <= round_ < 58) or (skipped and n < agents - 1):
                    log.add_event("missed", name, f"round {round_}", at=at)
                    continue
                own = rng.normal(0, size, 8).astype(np.float32)
                replies[name] = (Reply(1, round_, 0, 16, size, 68_000 + 900 * n, 1, own), not skipped, at)
            log.append(
                RoundRecord(plan, 1, skipped, scalars, round_),
                loss=None if skipped else size + float(rng.normal(0, 0.1)),
                opened_at=at,
                closed_at=at + 0.2,
                replies=replies,
            )
            if (round_ + 1) % 10 == 0:
                log.add_evaluation(round_ + 1, size, 0.95 - 0.85 * float(np.exp(-round_ / 50)))
        if agents > 1 and rounds > 70:
            log.add_event("agent ended", names[1], "exit code -9; starting it again", at=began + 10.1)
            log.add_event("broker ended", "", "starting mosquitto 2.0.11 again", at=began + 14.1)
    (folder / "experiment.toml").write_text('name = "digits"\nseed = 7\n', encoding="utf-8")
    if ended:
        _end(folder, names, rounds)
    return folder


def _end(folder: Path, names: list[str], rounds: int) -> None:
    rows = [
        {
            "name": name,
            "peak_rss_mib": 67.0 + n,
            "samples": 240 - n,
            "flops_spent": 4.1e9,
            "rounds_missed": 8 * (n == 1),
        }
        for n, name in enumerate(names)
    ]
    summary = {
        "method": "hiso",
        "model": "mlp",
        "rounds": rounds,
        "params_dense": 6570,
        "params_pruned": 3284,
        "flops_per_step_dense": 3_364_000,
        "flops_per_step_pruned": 1_681_000,
        "bytes_up_per_agent_round": 102.4,
        "bytes_down_per_agent_round": 331.0,
        "payload_bytes_up_per_agent_round": 64.0,
        "payload_bytes_down_per_agent_round": 290.0,
        "digests_agree": True,
        "final_digest": "0123456789abcdef",
        "seconds_per_round": 0.2,
        "broker": "mosquitto 2.0.11",
        "messages_dropped": {"duplicate": 3},
        "machine": {"system": "Linux", "processor": "x86_64", "python": "3.11.7"},
        "agents": rows,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    pruning = {
        "method": "ntk",
        "density": 0.5,
        "widths_dense": {"hidden1": 64, "hidden2": 32},
        "widths": {"hidden1": 34, "hidden2": 24},
    }
    (folder / "bundle").mkdir()
    (folder / "bundle" / "manifest.json").write_text(json.dumps({"model": "mlp", "pruning": pruning}))


def make_replayable_run(folder: Path, *, rounds: int = 5, seed: int = 3) -> Path:
    """Make a run of a linear net with 4 inputs and 3 classes, whose records lead where they say."""
    tensors, size = flat_layout([("weight", (4, 3)), ("bias", (3,))])
    weights = np.zeros(size, np.float32)
    rng = np.random.default_rng(seed)
    for tensor in tensors:
        weights[tensor.offset : tensor.offset + tensor.size] = rng.normal(0, 0.5, tensor.size)
    bundle = write_bundle(
        folder / "bundle",
        graph=_linear_graph(),
        weights=weights,
        tensors=tensors,
        model="linear",
        classes=3,
        sample_shape=(4,),
        cost=graph_cost(_linear_graph()).as_dict(),
        pruning={},
    )
    replica = bundle.replica()
    with ScalarLog.create(folder / "log.sqlite", {"bundle": bundle.identity, "name": "linear"}) as log:
        for round_ in range(rounds):
            plan = RoundPlan(round_, 7, 2, 1, 4, 1e-3, 0.05, (0.05, 1e-4, 0.0))
            scalars = rng.normal(0, 1, (1, 4)).astype(np.float32)
            apply_record(replica, RoundRecord(plan, 1, False, scalars, 0), check=False)
            record = RoundRecord(plan, 1, False, scalars, replica.digest())
            log.append(record, loss=1.0, opened_at=round_, closed_at=round_ + 1, replies={})
    return folder


def _linear_graph() -> bytes:
    nodes = [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["logits"]),
        helper.make_node("SoftmaxCrossEntropyLoss", ["logits", "y"], ["loss"], reduction="mean"),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Equal", ["best", "y"], ["right"]),
        helper.make_node("Cast", ["right"], ["ones"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["ones"], ["correct"], keepdims=0),
    ]
    inputs = [("x", TensorProto.FLOAT, ["n", 4]), ("y", TensorProto.INT64, ["n"])]
    inputs += [("weight", TensorProto.FLOAT, [4, 3]), ("bias", TensorProto.FLOAT, [3])]
    outputs = [("loss", TensorProto.FLOAT, []), ("correct", TensorProto.INT64, [])]
    outputs += [("logits", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
