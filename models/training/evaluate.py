"""How good a model is, and how good a draft is for it, on text that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import LlamaForCausalLM

from .vocabulary import END_OF_TEXT_ID


class TextLoss(NamedTuple):
    """Mean negative log-likelihood in nats a token, over `tokens` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Acceptance(NamedTuple):
    """What greedy speculation would have done: draft tokens proposed and accepted, calls of the target,
    and the tokens they yielded."""

    proposed: int
    accepted: int
    calls: int
    tokens: int


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, rows: NDArray[np.int64], batch: int = 8) -> TextLoss:
    """The loss over packed rows int64 `[rows, width + 1]`, in the model's own dtype."""
    total = 0.0
    for start in range(0, len(rows), batch):
        tokens = torch.from_numpy(rows[start : start + batch]).to(model.device)
        logits = model(tokens[:, :-1], use_cache=False).logits
        flat = logits.flatten(0, 1).float()
        total += functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum").item()
    count = rows.shape[0] * (rows.shape[1] - 1)
    return TextLoss(total / count, count)


@torch.no_grad()
def acceptance(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: Sequence[NDArray[np.int64]],
    *,
    num_tokens: int,
    k: int,
) -> Acceptance:
    """What greedy speculation with `k` draft tokens a step would do on the continuations of `prompts`.

    Accepted drafts are the target's own tokens, so the draft's guess at a position follows from the target's
    greedy continuation alone: one pass of the draft over it tells which guesses hold.
    """
    generate = cast(Any, target).generate  # bound through a mixin whose annotations exclude this class
    total = Acceptance(0, 0, 0, 0)
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None].to(target.device)
        whole = generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=END_OF_TEXT_ID)
        start = len(prompt)
        guesses = draft(whole[:, :-1], use_cache=False).logits[0, start - 1 :].argmax(-1)
        one = replay((guesses == whole[0, start:]).tolist(), k)
        total = Acceptance(*(a + b for a, b in zip(total, one, strict=True)))
    return total


def replay(holds: Sequence[bool], k: int) -> Acceptance:
    """Speculation over one continuation, where `holds[i]` says whether the draft guesses token i of it from
    the tokens before. A step proposes up to `k` tokens, and one more comes from the target itself."""
    position = proposed = accepted = calls = 0
    while position < len(holds):
        window = holds[position : position + k]
        kept = next((i for i, hold in enumerate(window) if not hold), len(window))
        proposed += len(window)
        accepted += kept
        calls += 1
        position = min(position + kept + 1, len(holds))
    return Acceptance(proposed, accepted, calls, len(holds))
