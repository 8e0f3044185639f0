"""What every judge's driver shares: its arguments, the tokens, and the folder that it leaves.

Runs in the judge's own environment, so it knows torch, transformers and safetensors alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

# The model as the judge left it, and the dequantised weights of its linears by module name.
Quantised = tuple[Any, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Work:
    """What a judge is asked for: symmetric codes of `bits` in groups, by `method`, after seeing `tokens`."""

    folder: Path
    tokens: torch.Tensor
    method: str
    bits: int
    group_size: int


def drive(methods: tuple[str, ...], quantise: Callable[[Work, Any], Quantised]) -> None:
    """Parse the arguments, let `quantise` work, write the folder and the seconds that it took: by the clock,
    and of all its threads on a core."""
    parser = argparse.ArgumentParser(description="Quantise a model with another toolkit.")
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="JSON: a list of token sequences of one length.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    work = Work(
        arguments.model,
        torch.tensor(json.loads(arguments.tokens.read_text(encoding="utf-8"))),
        arguments.method,
        arguments.bits,
        arguments.group_size,
    )
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32).eval()
    started, own_started = time.perf_counter(), time.process_time()
    done, weights = quantise(work, model)
    took = {"quantise_s": time.perf_counter() - started, "cpu_s": time.process_time() - own_started}
    _write(work.folder, arguments.output, done, weights)
    (arguments.output / "judge.json").write_text(json.dumps(took) + "\n", encoding="utf-8")


def _write(folder: Path, output: Path, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """A copy of `folder` with the model's values and, for the modules in `weights`, those, in float32.

    Raises ValueError unless every linear inside the blocks was quantised, and nothing else was.
    """
    expected = {name for name, module in model.named_modules() if ".layers." in name and _is_linear(module)}
    if set(weights) != expected:
        raise ValueError(f"not quantised: {expected - set(weights)}; unasked: {set(weights) - expected}")
    shutil.copytree(folder, output)
    path = output / "model.safetensors"
    with safe_open(path, "pt") as stored:
        names = list(stored.keys())
    state = model.state_dict()
    tensors = {
        name: weights.get(name.removesuffix(".weight"), state[name]).detach().float().contiguous().clone()
        for name in names
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or "Linear" in type(module).__name__
