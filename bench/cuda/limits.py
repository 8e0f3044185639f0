"""What the device itself can do: copy, matrix products, empty launches. Everything else is a share of
these."""

from __future__ import annotations

import torch
from device import DEVICE, captured, device_name, replay_seconds, seconds_of

# Bytes that are copied, and the sides of the matrices.
COPIED_BYTES = 2 << 30
SIDE = 8192


def machine_limits() -> dict:
    """GB/s of a copy (bytes read and written), TFLOP/s of a large bfloat16 product, us of a launch in a
    graph."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source))
    a = torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    product = seconds_of(lambda: a @ a)
    tiny = torch.zeros(1, device=DEVICE)

    def many() -> None:
        for _ in range(200):
            tiny.add_(1)

    return {
        "device": device_name(),
        "copy_gb_s": 2 * source.nbytes / copy / 1e9,
        "bf16_tflop_s": 2 * SIDE**3 / product / 1e12,
        "graph_node_us": replay_seconds(captured(many)) / 200 * 1e6,
    }
