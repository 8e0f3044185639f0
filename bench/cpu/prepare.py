"""Checkpoints of real shapes with random weights, and their artifacts, for end_to_end.py.

python bench/cpu/prepare.py [SHAPE ...]; what exists under build/bench-cpu is kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "bench-cpu"
TOKENIZER = ROOT / "models" / "stories-7m"

# Config class of transformers, and what its published config says.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "Qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
}
# Options of `llmc compile`.
VARIANTS: dict[str, tuple[str, ...]] = {
    "accurate": ("--quant", "int4-fast"),
    "fast": ("--quant", "int4-fast", "--set", "select_kernels.inputs=fast"),
}


def artifact_path(shape: str, variant: str) -> Path:
    """Where an artifact lies."""
    return FOLDER / f"{shape}-{variant}.llmc"


def make_checkpoint(shape: str) -> Path:
    """A bfloat16 checkpoint with random weights and a small real tokenizer; kept when it exists."""
    import torch
    import transformers

    folder = FOLDER / shape
    if folder.exists():
        return folder
    family, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, partial)
    partial.rename(folder)
    return folder


def main() -> None:
    for shape in sys.argv[1:] or list(SHAPES):
        checkpoint = make_checkpoint(shape)
        for variant, options in VARIANTS.items():
            artifact = artifact_path(shape, variant)
            if not artifact.exists():
                command = [sys.executable, "-m", "llmc.cli", "compile", str(checkpoint), *options]
                # Random weights have no quality to lose; libraries are held to the oracle all the same.
                command += ["--target", "cpu", "--verify", "off"]
                subprocess.run([*command, "-o", str(artifact)], check=True)


if __name__ == "__main__":
    main()
