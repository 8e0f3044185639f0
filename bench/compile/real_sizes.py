"""Seconds and peak memory of compiling checkpoints of real size with random weights, each in a new process.

usage: real_sizes.py [--only NAME] [--layers N] [--quant PRESET | --recipe FILE] [--target T]
                     [--keep FOLDER] [--record NAME]
       real_sizes.py --only NAME [--layers N] --make FOLDER

With --layers a model has only so many of its layers, in their real shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench"))
from common import Record  # noqa: E402 - the folder above must be on the path first

TOKENIZER = REPOSITORY / "models" / "stories-7m"
CONFIGS = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
# What runs without --only: the bigger ones take long and much room.
USUAL = ("qwen2.5-0.5b", "llama-3.2-1b")


def make_checkpoint(name: str, layers: int | None, folder: Path) -> Path:
    """Write a sharded bfloat16 checkpoint of the configuration `name`, one shard a layer, into `folder`."""
    config = CONFIGS[name] if layers is None else CONFIGS[name] | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shard_shapes(config)):
        shard = f"model-{number:05}.safetensors"
        tensors = {key: random_tensor(key, shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def shard_shapes(config):
    """The parameters of a Llama or Qwen2 model: first the table and a head of its own, if it has one, then
    layer by layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        yield {"lm_head.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        if config["model_type"] == "qwen2":
            sizes = {"q": queries, "k": keys, "v": keys}
            shapes |= {f"self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
        yield {f"model.layers.{layer}.{key}": shape for key, shape in shapes.items()}


def random_tensor(key, shape, generator):
    """Norm weights of one, everything else normal with the usual deviation."""
    if "norm" in key:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def measure(folder: Path, quant: list[str], target: str, out: Path) -> dict[str, object]:
    """Compile in a fresh process: its own report, wall seconds and peak resident size."""
    command = [sys.executable, "-m", "llmc.cli", "compile", str(folder), *quant]
    command += ["--target", target, "-o", str(out), "--json", "--force"]
    started, before = time.monotonic(), os.times()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = time.monotonic() - started, os.times()
    processor_seconds = sum(after[2:4]) - sum(before[2:4])
    report = json.loads(done.stdout)
    # The largest child so far; sizes are measured in rising order, so that each is seen.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    kept = ("size_bytes", "bits_per_weight", "quality", "ledger")
    return {
        "wall_s": round(seconds, 1),
        "processor_s": round(processor_seconds, 1),
        "peak_rss_bytes": peak,
        **{key: report[key] for key in kept},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CONFIGS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--record", default="compile_real_sizes", help="name of the result file")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--recipe", type=Path, help="in place of --quant")
    parser.add_argument("--target", default="reference")
    parser.add_argument("--keep", type=Path, help="make checkpoints here and leave them")
    parser.add_argument("--make", type=Path, help="make the checkpoint of --only there, and no more")
    arguments = parser.parse_args()
    if arguments.make is not None:
        make_checkpoint(arguments.only, arguments.layers, arguments.make)
        return
    record = Record(arguments.record)
    quant = ["--quant", arguments.quant]
    if arguments.recipe is not None:
        quant = ["--recipe", str(arguments.recipe)]
    results: dict[str, object] = {"quant": Path(quant[1]).name, "target": arguments.target}
    depth = [] if arguments.layers is None else ["--layers", str(arguments.layers)]
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        for name in [arguments.only] if arguments.only else USUAL:
            folder = root / "-".join([name, *depth[1:]])
            if not folder.exists():
                # In a process of its own: a child's peak is never below what its parent has taken.
                script = [sys.executable, __file__, "--only", name, *depth, "--make", str(folder)]
                subprocess.run(script, check=True)
            out = Path(temporary) / f"{name}.llmc"
            results[folder.name] = found = measure(folder, quant, arguments.target, out)
            times = f"{found['wall_s']} s, {found['processor_s']} s of processor"
            print(f"{folder.name}: {times}, peak {found['peak_rss_bytes'] / 2**30:.2f} GiB")
            shutil.rmtree(out)
    print(record.write(results))


if __name__ == "__main__":
    main()
