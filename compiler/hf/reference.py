"""What transformers itself says: logits of its eager model with random weights, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import adapter
from .quiet import quiet
from .rotary import settle_longrope

_NOISE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Sequences, and what the eager model says to each alone: logits `[tokens, vocab]` in float32."""

    token_ids: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """The largest logit by magnitude."""
        return max(float(part.abs().max()) for part in self.logits)


def eager_reference(config: Any, lengths: Sequence[int], *, max_context: int, seed: int) -> Reference:
    """Run transformers' eager model of `config` on random sequences of `lengths` tokens.

    Its weights are drawn from `seed`. `max_context` settles longrope as it does in a trace.
    """
    with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
        torch.manual_seed(seed)
        model = adapter.build_model(config, torch.float32, implementation="eager")
        settle_longrope(model, max_context)
        _disturb(model)
        vocab = adapter.vocab_size(config)
        ids = [torch.randint(min(3, vocab - 1), vocab, (length,)) for length in lengths]
        logits = [_logits(model, sequence) for sequence in ids]
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    token_ids = tuple(tuple(int(token) for token in sequence) for sequence in ids)
    return Reference(token_ids=token_ids, logits=tuple(logits), weights=weights)


def _disturb(model: nn.Module) -> None:
    """Add noise to all that a checkpoint stores, so that norms, biases and sinks are not all 1 and 0."""
    stored = model.state_dict()
    tensors = {id(tensor): tensor for tensor in stored.values()}
    seen: set[int] = set()
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensor.add_(torch.randn_like(tensor) * _NOISE)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    output: Any = model(**adapter.forward_arguments(ids[None], positions[None], None))
    return output.logits[0]
