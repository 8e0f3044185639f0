"""How far a compiled model is from the unquantised one, on a few prompts: the two programs' logits compared.

Knows programs and prompts; nothing of passes or schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ir.program import Program
from ..runtime.tokenizer import Tokenizer
from ..spec.errors import CheckFailed

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
    share of positions with the same likeliest token, perplexities are of the prompts' own next tokens.
    """

    prompts: int
    tokens: int
    max_abs: float
    kl_mean: float
    kl_p99: float
    same_top: float
    perplexity: float
    reference_perplexity: float

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
    targets = _next_tokens(prompts)
    bands = [
        _compare_band(
            expected[start : start + _BAND], found[start : start + _BAND], targets[start : start + _BAND]
        )
        for start in range(0, expected.shape[0], _BAND)
    ]
    divergence = torch.cat([band.divergence for band in bands])
    return Quality(
        prompts=len(prompts),
        tokens=int(expected.shape[0]),
        max_abs=max(band.max_abs for band in bands),
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        same_top=sum(band.num_same for band in bands) / int(expected.shape[0]),
        perplexity=_perplexity(torch.cat([band.found_nll for band in bands])),
        reference_perplexity=_perplexity(torch.cat([band.expected_nll for band in bands])),
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


class _Band(NamedTuple):
    """The comparison of a few rows. Entries of the `nll` are NaN where a prompt has no next token."""

    max_abs: float
    num_same: int
    divergence: Tensor
    expected_nll: Tensor
    found_nll: Tensor


def _compare_band(expected: Tensor, found: Tensor, targets: Tensor) -> _Band:
    """Rows `[n, vocab]` in float64: few at a time, since vocabularies are large."""
    wide, other_wide = expected.double(), found.double()
    reference, other = torch.log_softmax(wide, dim=-1), torch.log_softmax(other_wide, dim=-1)
    return _Band(
        max_abs=float((wide - other_wide).abs().max()),
        num_same=int((reference.argmax(-1) == other.argmax(-1)).sum()),
        divergence=(reference.exp() * (reference - other)).sum(-1).clamp_min(0),
        expected_nll=_nll(reference, targets),
        found_nll=_nll(other, targets),
    )


def _next_tokens(prompts: Sequence[Sequence[int]]) -> Tensor:
    """The token that follows each row, -1 behind the last of a prompt."""
    return torch.tensor([token for ids in prompts for token in (*ids[1:], -1)])


def _nll(logprobs: Tensor, targets: Tensor) -> Tensor:
    chosen = -logprobs.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return chosen.masked_fill(targets < 0, math.nan)


def _perplexity(nll: Tensor) -> float:
    return math.exp(float(nll.nanmean()))
