"""What must be known of launches and recorded launches on a device: do graphs give what launches give, what
does a node cost, and what is saved where a kernel may start before the last one ends."""

from __future__ import annotations

import torch
from device import DEVICE, CompiledOnDemand, replay_seconds, settled

from llmc.kernels.cuda.operators import CudaOperators
from llmc.runtime.executors.cuda_device import Device

# Short kernels in a row, each of which reads what the last one wrote.
NODES = 100


def recorded_launches(launcher: CompiledOnDemand) -> dict:
    """Microseconds a node of a chain of norms, recorded plainly and with early starts; launched and recorded
    must give the same bits."""
    device, operators = Device(DEVICE), CudaOperators(launcher)
    weight = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
    first = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    found: dict = {"nodes": NODES}
    results: dict[str, torch.Tensor] = {}
    for name, overlaps in (("plain", False), ("early", True)):
        launcher.overlaps = overlaps
        chain = [first]

        def work(chain: list[torch.Tensor] = chain) -> None:
            for _ in range(NODES):
                chain.append(operators.rms_norm(chain[-1], weight, 1e-6, 0.25, "scale_then_cast"))

        with device.scope(), device.own_memory():
            work()
            device.settle()
            results[f"{name} launched"] = chain[-1].clone()
            del chain[1:]
            graph = launcher.recorder(device)(work)
            found[f"{name}_us_a_node"] = replay_seconds(graph) / NODES * 1e6
            settled()
            results[f"{name} recorded"] = chain[-1].clone()
            graph.close()
    launcher.overlaps = False
    expected = results["plain launched"]
    same = {name: bool(torch.equal(result, expected)) for name, result in results.items()}
    if not all(same.values()):
        raise AssertionError(f"ways of launching differ: {same}")
    return found | {"same": same}
