"""How far a compiled model is from the unquantised one, on a few prompts: the two programs' logits compared.

Knows programs and prompts; nothing of passes or schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Program
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import CheckFailed
from .judgement import judge_tokens, token_values

# Everyday text of several kinds, so that both likely and unlikely tokens are met.
PROBE_TEXTS = (
    "Once upon a time there was a little girl who lived near the forest with her mother and a small dog.",
    "The committee will meet on Tuesday at ten o'clock to discuss the budget for the coming year.",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a high mountain.",
    "def add(first, second):\n    return first + second\n",
    '"Where are you going?" asked Tom. "To the park," said Lily, "because the sun is shining."',
    "1. Wash the apples.\n2. Cut them into pieces.\n3. Put everything into a large pot.",
)
# Multiply-adds spent on each of the two runs; one token costs one for every parameter.
_BUDGET = 60_000_000_000
_FEWEST, _MOST = 16, 256
_BAND = 16  # rows compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Logits of the compiled program against those of the model as traced, over `tokens` tokens of
    `prompts` built-in prompts. KL divergences are in nats, `max_abs` is over all logits, `same_top` the
    share of positions with the same likeliest token, `greedy_match` the mean number of positions from the
    start of a prompt until these first differ, perplexities are of the prompts' own next tokens. Intervals
    hold 95 % of what prompts drawn again would give.
    """

    prompts: int
    tokens: int
    max_abs: float
    kl_mean: float
    kl_p99: float
    same_top: float
    greedy_match: float
    perplexity: float
    reference_perplexity: float
    kl_mean_interval: tuple[float, float]
    same_top_interval: tuple[float, float]
    perplexity_interval: tuple[float, float]

    def sentence(self) -> str:
        """The same in words."""
        return (
            f"KL {self.kl_mean:.2g} (p99 {self.kl_p99:.2g}), same top token {100 * self.same_top:.1f} %, "
            f"max logit error {self.max_abs:.2g} over {self.tokens} tokens of {self.prompts} prompts"
        )

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def probe_prompts(tokenizer: Tokenizer, program: Program) -> tuple[tuple[int, ...], ...]:
    """Token ids of the built-in prompts: as many as the model's size and context leave time for."""
    affordable = _BUDGET // max(1, program.spec.num_parameters)
    left = min(_MOST, max(_FEWEST, affordable))
    prompts: list[tuple[int, ...]] = []
    for text in PROBE_TEXTS:
        ids = tuple(token for token in tokenizer.encode(text) if token < program.spec.vocab_size)[
            : min(left, program.spec.max_context)
        ]
        if len(ids) > 1:
            prompts.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return tuple(prompts)


def compare(expected: Tensor, found: Tensor, prompts: Sequence[Sequence[int]]) -> Quality:
    """`Quality` of logits `found` against `expected`, both `[tokens of all prompts, vocab]`."""
    sizes = [len(ids) for ids in prompts]
    pairs = zip(prompts, expected.split(sizes), found.split(sizes), strict=True)
    judged = judge_tokens([token_values(own, list(ids), other, 0) for ids, other, own in pairs])
    assert judged.kl_mean is not None
    assert judged.kl_p99 is not None
    assert judged.same_top is not None
    assert judged.greedy_match is not None
    assert judged.reference_perplexity is not None
    return Quality(
        prompts=len(prompts),
        tokens=judged.tokens,
        max_abs=_largest_difference(expected, found),
        kl_mean=judged.kl_mean.value,
        kl_p99=judged.kl_p99,
        same_top=judged.same_top.value,
        greedy_match=judged.greedy_match,
        perplexity=judged.perplexity.value,
        reference_perplexity=judged.reference_perplexity.value,
        kl_mean_interval=judged.kl_mean[1:],
        same_top_interval=judged.same_top[1:],
        perplexity_interval=judged.perplexity[1:],
    )


def check_quality(quality: Quality, max_kl: float | None) -> None:
    """Raises CheckFailed for logits that are not finite, and for a mean KL divergence above `max_kl`."""
    if not math.isfinite(quality.max_abs) or not math.isfinite(quality.kl_mean):
        raise CheckFailed(
            "quality.not_finite",
            "The compiled model gives logits that are not finite.",
            f"On {quality.tokens} tokens of the built-in prompts some are NaN or infinite.",
            "Compile in float32 (--dtype float32), or check the weights (`llmc inspect MODEL`).",
        )
    if max_kl is not None and quality.kl_mean > max_kl:
        raise CheckFailed(
            "quality.kl",
            f"The compiled model is too far from the original: mean KL divergence {quality.kl_mean:.3g}.",
            f"The limit is {max_kl:g}, measured on {quality.tokens} tokens of the built-in prompts.",
            "Choose a preset with more bits, calibrate on text like the model's own, or raise --max-kl.",
        )


def _largest_difference(expected: Tensor, found: Tensor) -> float:
    """In float64, few rows at a time, since vocabularies are large; NaN where any is."""
    pairs = zip(expected.split(_BAND), found.split(_BAND), strict=True)
    return float(torch.stack([(rows.double() - other.double()).abs().max() for rows, other in pairs]).max())
