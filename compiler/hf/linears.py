"""Which modules of a transformers model are linears, and which of them makes the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .quiet import quiet


class Linears(NamedTuple):
    """Names of all linears, the head among them, in the order of the model; `head` is "" where there is
    none."""

    names: tuple[str, ...]
    head: str


def model_linears(config: Any) -> Linears:
    """The linears of the model that `config` describes; makes no weights."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = next((name for name, module in found.items() if module is output), "")
    return Linears(tuple(found), head)
