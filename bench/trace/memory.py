"""Seconds and peak memory of tracing models of real size from their configs alone.

    python bench/trace/memory.py [NAME ...]

Each model is traced in a fresh process; results go to bench/results/trace_memory.json. The bar: a model of
70 billion parameters in less than 3 GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import Record, peak_memory_bytes  # noqa: E402

BAR_BYTES = 3 << 30
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama-70b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
}


def trace_one(name: str) -> None:
    """Trace one model in this process and print what it took as JSON."""
    import torch

    from llmc.compiler.hf.adapter import config_of
    from llmc.compiler.trace import trace_config

    torch.set_num_threads(1)
    before = peak_memory_bytes()
    started = time.monotonic()
    program = trace_config(config_of(*MODELS[name]), dtype=torch.bfloat16)
    result = {
        "parameters": program.spec.num_parameters,
        "layers": program.spec.num_layers,
        "nodes": program.num_nodes,
        "trace_s": round(time.monotonic() - started, 2),
        "imports_peak_bytes": before,
        "peak_bytes": peak_memory_bytes(),
    }
    print(json.dumps(result))


def main(names: list[str]) -> int:
    """Trace the named models, or all, each in a process of its own; fails above the bar."""
    record = Record("trace_memory")
    results: dict[str, object] = {}
    worst = 0
    for name in names or MODELS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        results[name] = found
        worst = max(worst, found["peak_bytes"])
        print(
            f"{name:<16}{found['parameters'] / 1e9:8.2f} G parameters {found['trace_s']:7.1f} s "
            f"{found['peak_bytes'] / 2**30:6.2f} GiB",
            flush=True,
        )
    path = record.write(results)
    print(path)
    return int(worst >= BAR_BYTES)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        trace_one(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
