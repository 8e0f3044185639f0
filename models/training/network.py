"""The architecture of the bundled models, and the Hugging Face folders they live in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .vocabulary import END_OF_TEXT_ID, TOKENIZER_FILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama-architecture model with grouped-query attention and tied embeddings."""

    hidden: int = 256
    intermediate: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    context: int = 512

    def validate(self) -> None:
        """Raises ValueError where the sizes do not fit each other."""
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} is not an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


TARGET = Shape()
DRAFT = Shape(hidden=128, intermediate=384, layers=2, heads=2, kv_heads=1)


def build(shape: Shape, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in float32. Projections that write to the residual stream start smaller
    by sqrt(2 x layers), as in GPT-2."""
    shape.validate()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * shape.layers) ** -0.5)
    return model


def grow(model: LlamaForCausalLM, smaller: LlamaForCausalLM) -> None:
    """Start `model` from a shallower one of the same widths: each layer is copied from its place in it."""
    old = len(smaller.model.layers)
    state = {name: value for name, value in smaller.state_dict().items() if ".layers." not in name}
    new = len(model.model.layers)
    for index in range(new):
        for name, value in smaller.model.layers[index * old // new].state_dict().items():
            state[f"model.layers.{index}.{name}"] = value
    model.load_state_dict(state)


def move(model: nn.Module, to: torch.device | torch.dtype) -> None:
    """Bring a model's parameters and buffers to a device or a floating-point dtype, in place."""
    model.to(to)  # called as a plain module's: transformers' wrapper of it loses the types


def load(folder: Path) -> LlamaForCausalLM:
    """The model of a folder, in float32, ready to evaluate."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(model: LlamaForCausalLM, tokenizer: Path, folder: Path, record: Mapping[str, object]) -> None:
    """Write a complete Hugging Face folder in bfloat16, with `record` as training.json.

    The files are made beside the folder and moved in one by one, so a reader meets whole files only.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = LlamaForCausalLM(model.config)
    move(stored, torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID, do_sample=False
    )
    stored.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, partial / name)
    (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    partial.rmdir()
