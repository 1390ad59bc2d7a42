"""What a training agent holds over an ONNX Runtime process that only infers: ``scalarfed bench memory``.

Three fresh processes for each net: one makes the bundle (torch), one trains as an agent does, one infers with
the same imports and the weights bound by pointer. Peaks are the system's own count of resident memory.
"""

import sys
from pathlib import Path

import numpy as np

import edge_agent.__main__  # noqa: F401 - both processes hold what an agent imports
from coordinator.bench.child import tell
from edge_agent.bundle import read_bundle
from edge_agent.footprint import give_back
from edge_agent.forward import Forward
from profiles.memory import current_rss_mib, peak_rss_mib

__all__ = ["main"]


def _train(folder: Path, batch_size: int, method: str) -> None:
    from coordinator.bench.steps import make_step, samples

    bundle = read_bundle(folder)
    x, y = samples(bundle, batch_size)
    give_back()
    imports = current_rss_mib()
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)
    step = make_step(replica, lambda: forward.loss(x, y), method=method, perturbations=2)
    for _ in range(3):
        step()
    tell({"imports_mib": imports, "peak_mib": peak_rss_mib(), "now_mib": current_rss_mib()})


def _infer(folder: Path, batch_size: int, frugal: bool) -> None:
    """Infer as ONNX Runtime's documentation has it; or with what the agent does to hold less."""
    from coordinator.bench.steps import samples
    from profiles.runtime import ort

    bundle = read_bundle(folder)
    x, y = samples(bundle, batch_size)
    if frugal:
        give_back()
    weights = bundle.replica().weights
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = not frugal
    session = ort.InferenceSession(str(bundle.graph_path), options, providers=["CPUExecutionProvider"])
    if frugal:
        give_back()
    binding = session.io_binding()
    for tensor in bundle.tensors:
        pointer = weights.ctypes.data + 4 * tensor.offset
        binding.bind_input(tensor.name, "cpu", 0, np.float32, tensor.shape, pointer)
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_input("y", "cpu", 0, np.int64, y.shape, y.ctypes.data)
    loss = np.zeros((), np.float32)
    binding.bind_output("loss", "cpu", 0, np.float32, (), loss.ctypes.data)
    for _ in range(12):
        session.run_with_iobinding(binding)
    tell({"peak_mib": peak_rss_mib(), "now_mib": current_rss_mib()})


def main(arguments: list[str]) -> int:
    """Do one process's part: ``make MODEL``, ``train METHOD`` or ``infer plain|frugal``, FOLDER, BATCH."""
    what, how, folder, batch_size = arguments[0], arguments[1], Path(arguments[2]), int(arguments[3])
    if what == "make":
        from pruning.peers import build_peer, write_peer

        write_peer(build_peer(how), how, folder)
        tell({"weight_mib": 4 * read_bundle(folder).size / 2**20})
    elif what == "train":
        _train(folder, batch_size, how)
    else:
        _infer(folder, batch_size, how == "frugal")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
