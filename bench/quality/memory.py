"""Peak memory of compiling a model of the shape of Llama-2-7B to int4, from the checkpoint to the artifact.

    python bench/quality/memory.py SCRATCH_FOLDER [--layers 1] [--tokens 32768] [--quant int4]

Weights are random, written one layer a file and read lazily, so a few layers of full width meet all that
decides the peak: the largest matrices, their moments, and the activations of all tokens. Each depth in
`--layers` is compiled in a fresh process, whose peak resident size is what is reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record, peak_memory_bytes

from llmc.compiler.calibration_text import built_in_documents
from llmc.compiler.driver import compile_model

_BAR_BYTES = 6 << 30
_VOCAB, _HIDDEN, _FFN, _HEADS = 32000, 4096, 11008, 32
_TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "stories-1m"
_CHARACTERS_PER_TOKEN = 3


def write_model(folder: Path, layers: int) -> Path:
    """A Llama of `layers` layers with random bfloat16 weights, a file a layer."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in _TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    shapes = {f"self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (_FFN, _HIDDEN) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj": (_HIDDEN, _FFN)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (_HIDDEN,))
    files: dict[str, str] = {}
    for layer in range(layers):
        named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in (shapes | norms).items()}
        files |= _write(folder, f"layer-{layer:02d}.safetensors", named, layer)
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (_VOCAB, _HIDDEN))
    files |= _write(folder, "ends.safetensors", ends | {"model.norm.weight": (_HIDDEN,)}, layers)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write(folder: Path, file: str, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, str]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=torch.bfloat16) * shape[-1] ** -0.5
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def compile_here(folder: Path, quant: str, text: Path) -> dict[str, float]:
    """Compile in this process; seconds and peak bytes. A model of random weights has no quality to check."""
    started = time.perf_counter()
    compile_model(
        folder,
        output=folder.with_suffix(".llmc"),
        quant=quant,
        calibration=text,
        target="reference",
        verify="off",
        max_kl=1e9,
        cache=False,
    )
    return {"compile_s": time.perf_counter() - started, "peak_bytes": peak_memory_bytes()}


def calibration_file(path: Path, tokens: int) -> Path:
    """As much text as gives about so many tokens."""
    text = "\n\n".join(built_in_documents())
    path.write_text(text[: tokens * _CHARACTERS_PER_TOKEN], encoding="utf-8")
    return path


def main() -> None:
    """Measure each depth in a process of its own and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--layers", default="1", help="Depths, separated by commas.")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    text = arguments.scratch / "text.txt"
    if arguments.worker:
        print(json.dumps(compile_here(arguments.worker, arguments.quant, text)))
        return
    record = Record("quantise_memory")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    calibration_file(text, arguments.tokens)
    found: dict[str, dict[str, float]] = {}
    for layers in map(int, arguments.layers.split(",")):
        folder = write_model(arguments.scratch / f"layers-{layers}", layers)
        command = [sys.executable, __file__, str(arguments.scratch), "--quant", arguments.quant]
        done = subprocess.run(
            [*command, "--worker", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found[str(layers)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{layers} layers: {found[str(layers)]}", flush=True)
        peak = max(entry["peak_bytes"] for entry in found.values())
        shape = {"hidden": _HIDDEN, "ffn": _FFN, "vocabulary": _VOCAB, "text_tokens": arguments.tokens}
        bars = {"peak <= 6 GiB": peak <= _BAR_BYTES}
        record.write({"shape": shape, "quant": arguments.quant, "by_layers": found, "bars": bars})


if __name__ == "__main__":
    main()
