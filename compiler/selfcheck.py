"""Does a traced program compute what transformers computes? Asked of a small model of the same kind, with
random weights, each time something is compiled. Knows no checkpoint and no artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.interpret import interpret
from ..ir.program import Program
from ..ir.weights import Constant, Unbound
from ..spec.errors import CheckFailed
from .facts import context_limit
from .hf import adapter
from .hf.rotary import settle_longrope
from .shrink import shrink
from .trace import quiet, trace_config

TOLERANCE = 1e-5
# Longer and shorter than the windows of a small config (8), than a page, and a single token.
_LENGTHS = (5, 23, 1, 40)
_NOISE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheckReport:
    """How far a traced program is from transformers: `max|a - b| / max|b|` over all logits, in float32.

    `packed_error` is of one packed step through `llmc.attention`.
    """

    family: str
    num_layers: int
    num_nodes: int
    num_sequences: int
    num_tokens: int
    packed_error: float
    tolerance: float

    @property
    def max_rel_error(self) -> float:
        """The largest error seen."""
        return self.packed_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Sequences, and what transformers' eager model says to each alone: logits `[tokens, vocab]`."""

    token_ids: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """The largest logit by magnitude."""
        return max(float(part.abs().max()) for part in self.logits)


def self_check(
    config: Any, *, max_context: int | None = None, tolerance: float = TOLERANCE, seed: int = 0
) -> SelfCheckReport:
    """Trace `config` shrunk, with random weights, and compare with transformers' eager model in float32.

    `max_context` is the compile's (it decides longrope factors). Raises CheckFailed naming the first
    sequence and position that differ by more than `tolerance` of the largest logit, ModelError as
    `trace_config` does.
    """
    context = context_limit(config, max_context)
    small = shrink(config)
    program = trace_config(small, dtype=torch.float32, max_context=context)
    reference = reference_logits(small, context, seed)
    bound = bind_weights(program, reference.weights)
    error = compare(reference, run_packed(bound, reference.token_ids), tolerance, "one packed step")
    return SelfCheckReport(
        family=program.spec.family,
        num_layers=program.spec.num_layers,
        num_nodes=program.num_nodes,
        num_sequences=len(reference.token_ids),
        num_tokens=sum(len(ids) for ids in reference.token_ids),
        packed_error=error,
        tolerance=tolerance,
    )


def reference_logits(config: Any, max_context: int, seed: int) -> Reference:
    """Run transformers' eager model of `config` on random sequences, its weights made non-trivial."""
    with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
        torch.manual_seed(seed)
        model = adapter.build_model(config, torch.float32, implementation="eager")
        settle_longrope(model, max_context)
        disturb(model)
        vocab = int(config.vocab_size)
        ids = [torch.randint(min(3, vocab - 1), vocab, (length,)) for length in _LENGTHS]
        logits = [_eager(model, sequence) for sequence in ids]
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Reference(
        token_ids=tuple(tuple(int(token) for token in sequence) for sequence in ids),
        logits=tuple(logits),
        weights=weights,
    )


def disturb(model: nn.Module) -> None:
    """Add noise to every parameter and stored bias, so that norms, biases and sinks are not 1 and 0."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * _NOISE)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * _NOISE)


def _eager(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    output: Any = model(**adapter.forward_arguments(ids[None], positions[None], None))
    return output.logits[0]


def bind_weights(program: Program, values: Mapping[str, Tensor]) -> Program:
    """`program` with every `Unbound` weight replaced by the value of its name."""
    store = program.weights
    entries = {name: Constant(values[name]) for name in store if isinstance(store[name], Unbound)}
    return program.replace(weights=store.with_entries(entries))


def run_packed(program: Program, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[tokens, vocab]` of each sequence, all of them run in one step."""
    lengths = [len(ids) for ids in sequences]
    inputs = {
        "input_ids": torch.tensor([token for ids in sequences for token in ids]),
        "positions": torch.cat([torch.arange(length) for length in lengths]),
        "out_rows": torch.arange(sum(lengths)),
    }
    logits: Tensor = interpret(program.graph, inputs, program.weights.evaluate)
    return list(logits.split(lengths))


def compare(reference: Reference, found: Sequence[Tensor], tolerance: float, how: str) -> float:
    """The largest difference over the largest logit. Raises CheckFailed when it exceeds `tolerance`."""
    scale, worst = reference.scale, 0.0
    for index, (expected, actual) in enumerate(zip(reference.logits, found, strict=True)):
        error = (actual - expected).abs().amax(-1) / scale
        if not bool((error <= tolerance).all()):
            position = int((~(error <= tolerance)).nonzero()[0])
            raise _difference(index, len(expected), position, float(error[position]), tolerance, how)
        worst = max(worst, float(error.max()))
    return worst


def _difference(
    sequence: int, length: int, position: int, error: float, tolerance: float, how: str
) -> CheckFailed:
    return CheckFailed(
        "check.self",
        "The traced model does not compute what transformers computes.",
        f"In {how}, logits of sequence {sequence} ({length} tokens) first differ at position {position}, "
        f"by {error:.1e} of the largest logit where {tolerance:.0e} is allowed.",
        "Report the model family; its compiled form would give wrong text.",
    )
