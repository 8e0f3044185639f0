"""Does a compiled program compute what transformers computes? Asked of a small model of the same kind, with
random weights, each time something is compiled. Knows no checkpoint and no artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Program
from ..ir.weights import Constant, Unbound
from ..passes.base import PAGED, Pass, PassContext
from ..passes.canonical import canonical_passes
from ..passes.kv_layout import KvLayout
from ..passes.manager import run_passes
from ..passes.paged_attention import PagedAttention
from ..spec.errors import CheckFailed, InternalError
from .facts import context_limit
from .hf.reference import Reference, eager_reference
from .schedule import run_mixed, run_packed
from .shrink import shrink
from .trace import trace_config

TOLERANCE = 1e-5
# Where rounding alone moves logits further than the tolerance, this many times as far is still no error.
_ROUNDINGS = 3
# Longer and shorter than the windows of a small config (8 tokens) and than a page; one single token.
_LENGTHS = (5, 23, 1, 40)
_PAGE_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheckReport:
    """How far a program is from transformers: `max|a - b| / max|b|` over all logits, in float32.

    `packed_error` is of the traced program in one packed step, `mixed_error` of the program after its
    passes in `num_steps` steps that mix chunks of prompts with single tokens. `sensitivity` is what
    changing every weight by one unit in its last place does; `tolerance` is what was allowed.
    """

    family: str
    num_layers: int
    num_nodes: int
    num_sequences: int
    num_tokens: int
    num_steps: int
    packed_error: float
    mixed_error: float
    sensitivity: float
    tolerance: float

    @property
    def max_rel_error(self) -> float:
        """The largest error seen."""
        return max(self.packed_error, self.mixed_error)


def default_passes() -> tuple[Pass, ...]:
    """What every recipe does: the canonical form, and attention over pages."""
    return (*canonical_passes(), KvLayout(page_tokens=_PAGE_TOKENS), PagedAttention())


def self_check(
    config: Any,
    *,
    max_context: int | None = None,
    passes: Sequence[Pass] | None = None,
    context: PassContext | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> SelfCheckReport:
    """Trace `config` shrunk, run `passes`, and compare with transformers' eager model in float32.

    `max_context` is the compile's (it settles longrope). `passes` must end in a paged program; the
    default is `default_passes()`. Takes seconds. Raises CheckFailed naming the first sequence and
    position that differ by more than `tolerance` of the largest logit (more where rounding alone does as
    much), ModelError as `trace_config` does.
    """
    limit = context_limit(config, max_context)
    small = shrink(config)
    traced = trace_config(small, dtype=torch.float32, max_context=limit)
    reference = eager_reference(small, _LENGTHS, max_context=limit, seed=seed)
    allowed = max(tolerance, _ROUNDINGS * reference.sensitivity)
    packed = run_packed(bind_weights(traced, reference.weights), reference.token_ids)
    packed_error = compare(reference, packed, allowed, "one packed step of the traced program")
    paged = run_passes(traced, default_passes() if passes is None else passes, context or PassContext())
    if PAGED not in paged.facts:
        raise InternalError(
            "check.not_paged",
            "The self-check was given passes that do not page attention.",
            f"The program has the facts {', '.join(sorted(paged.facts))}.",
            "Give it all passes up to paged_attention.",
        )
    mixed = run_mixed(bind_weights(paged, reference.weights), reference.token_ids, seed=seed)
    mixed_error = compare(reference, mixed.logits, allowed, "mixed steps of the paged program")
    return SelfCheckReport(
        family=traced.spec.family,
        num_layers=traced.spec.num_layers,
        num_nodes=traced.num_nodes,
        num_sequences=len(reference.token_ids),
        num_tokens=sum(len(ids) for ids in reference.token_ids),
        num_steps=mixed.num_steps,
        packed_error=packed_error,
        mixed_error=mixed_error,
        tolerance=allowed,
        sensitivity=reference.sensitivity,
    )


def bind_weights(program: Program, values: Mapping[str, Tensor]) -> Program:
    """`program` with every `Unbound` weight, inside expressions too, replaced by the value of its name."""
    store = program.weights
    return program.replace(weights=store.with_entries({name: _bound(store[name], values) for name in store}))


def _bound(expr: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(expr, Unbound):
        return Constant(values[expr.name])
    if isinstance(expr, tuple):
        return tuple(_bound(part, values) for part in expr)
    if isinstance(expr, Constant) or not is_dataclass(expr) or isinstance(expr, type):
        return expr
    return replace(expr, **{entry.name: _bound(getattr(expr, entry.name), values) for entry in fields(expr)})


def compare(reference: Reference, found: Sequence[Tensor], tolerance: float, where: str) -> float:
    """The largest difference over the largest logit. Raises CheckFailed when it exceeds `tolerance`."""
    scale, worst = reference.scale, 0.0
    for index, (expected, actual) in enumerate(zip(reference.logits, found, strict=True)):
        error = (actual - expected).abs().amax(-1) / scale
        if not bool((error <= tolerance).all()):
            position = int((~(error <= tolerance)).nonzero()[0])
            raise _difference(where, index, position, float(error.max()), tolerance)
        worst = max(worst, float(error.max()))
    return worst


def _difference(where: str, sequence: int, position: int, error: float, tolerance: float) -> CheckFailed:
    length = _LENGTHS[sequence]
    return CheckFailed(
        "check.self",
        "The compiled form of this model does not compute what transformers computes.",
        f"In {where}, sequence {sequence} of {length} tokens differs from position {position} on, by up to "
        f"{error:.1e} of the largest logit where {tolerance:.1e} is allowed.",
        "Report the model family; its compiled form would give wrong text.",
    )
