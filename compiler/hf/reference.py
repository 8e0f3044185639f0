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

# Matrices get this much over the square root of their width, so that activations keep their scale and
# attention scores spread far enough for a lost soft cap or scale to show; vectors get an absolute share.
_MATRIX_NOISE, _VECTOR_NOISE = 1.2, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Sequences, and what the eager model says to each alone: logits `[tokens, vocab]` in float32.

    `sensitivity` is how far logits move, over the largest of them, when every weight is changed by about
    one unit in its last place: no two ways to compute the model can be expected to agree better.
    """

    token_ids: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    sensitivity: float

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
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _shake(model)
        moved = [_logits(model, sequence) for sequence in ids]
    largest = max(float(part.abs().max()) for part in logits)
    change = max(float((a - b).abs().max()) for a, b in zip(moved, logits, strict=True))
    return Reference(
        token_ids=tuple(tuple(int(token) for token in sequence) for sequence in ids),
        logits=tuple(logits),
        weights=weights,
        sensitivity=change / largest,
    )


def _disturb(model: nn.Module) -> None:
    """Add noise to all that a checkpoint stores, so that norms, biases and sinks are not all 1 and 0."""
    for tensor in _stored(model):
        share = _VECTOR_NOISE if tensor.dim() < 2 else _MATRIX_NOISE / tensor.shape[-1] ** 0.5
        tensor.add_(torch.randn_like(tensor) * share)


def _shake(model: nn.Module) -> None:
    """Change every stored value by about one unit in its last place."""
    for tensor in _stored(model):
        tensor.mul_(1 + torch.randn_like(tensor) * torch.finfo(tensor.dtype).eps)


def _stored(model: nn.Module) -> list[Tensor]:
    """The floating-point tensors of a checkpoint of `model`, tied ones once."""
    found = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return [tensor for tensor in found.values() if tensor.is_floating_point()]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    output: Any = model(**adapter.forward_arguments(ids[None], positions[None], None))
    return output.logits[0]
