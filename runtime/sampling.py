"""The oracle sampler: what every executor's sampler must equal, over numpy and `noise` alone.
Knows one row of logits and its request; nothing of batches, pages or steps.

Order of the filters, which is vLLM's: grammar mask, min_tokens mask, logit_bias, repetition then frequency
then presence penalty, (greedy choice here), temperature, min_p, top_k, top_p, Gumbel noise. Each filter is
a predicate on the value alone, so equal logits are kept or dropped together and no order of summation or
sorting enters. Probabilities are integers (units of 2^-40 of the top token's), so sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import noise
from .protocol import RowResult, SamplingState, TokenLogprob

Logits = NDArray[np.float32]
_WEIGHT_ONE = float(2**40)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What of a sequence sampling depends on: all its tokens so far, and how many of them were the
    prompt's. The token to be sampled takes position `len(token_ids)`."""

    token_ids: Sequence[int]
    num_prompt_tokens: int


def sample_token(
    logits: Logits, state: SamplingState, history: History, mask: NDArray[np.uint32] | None = None
) -> int | None:
    """The next token given float32 `logits` `[vocab]`; None when no token may be chosen.

    `mask` is uint32 `[ceil(vocab / 32)]`, bit set = allowed. None also for logits with NaN or +inf.
    """
    if not is_finite(logits):
        return None
    shaped = shape_logits(logits, state, history, mask)
    best = int(np.argmax(shaped))
    if shaped[best] == -np.inf:
        return None
    temperature = np.float32(state.temperature)
    if temperature == 0.0:
        return best
    scaled = (shaped - shaped[best]) / temperature
    kept = _keep(scaled, state)
    candidates = np.flatnonzero(kept & (scaled >= noise.MIN_NOISE - noise.MAX_NOISE))
    scores = scaled[candidates].astype(np.float64)
    scores += noise.gumbel(state.seed, len(history.token_ids), candidates)
    return int(candidates[np.argmax(scores)])


def is_finite(logits: Logits) -> bool:
    """Whether a row can be sampled: no NaN and no +inf. -inf is a token that can never come."""
    top = float(np.max(logits))
    return not (math.isnan(top) or top == math.inf)


def shape_logits(
    logits: Logits, state: SamplingState, history: History, mask: NDArray[np.uint32] | None
) -> Logits:
    """Masks, biases and penalties in float32, on a copy."""
    shaped = logits.astype(np.float32, copy=True)
    if mask is not None:
        shaped[~unpack_mask(mask, shaped.size)] = -np.inf
    generated = history.token_ids[history.num_prompt_tokens :]
    if len(generated) < state.min_tokens:
        shaped[list(state.banned_until_min)] = -np.inf
    for token_id, bias in state.logit_bias:
        shaped[token_id] += np.float32(bias)
    if state.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(history.token_ids, dtype=np.int64))
        penalty = np.float32(state.repetition_penalty)
        value = shaped[seen]
        shaped[seen] = np.where(value > 0, value / penalty, value * penalty)
    if (state.frequency_penalty != 0.0 or state.presence_penalty != 0.0) and len(generated):
        seen, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
        shaped[seen] -= np.float32(state.frequency_penalty) * counts.astype(np.float32)
        shaped[seen] -= np.float32(state.presence_penalty)
    return shaped


def unpack_mask(mask: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """The allowed tokens of one packed mask row, as booleans `[vocab_size]`."""
    as_bytes = np.ascontiguousarray(mask, dtype="<u4").view(np.uint8)
    return np.unpackbits(as_bytes, bitorder="little", count=vocab_size).astype(bool)


def _keep(scaled: Logits, state: SamplingState) -> NDArray[np.bool_]:
    """Tokens that min_p, top_k and top_p leave. `scaled` has its maximum at 0."""
    kept = scaled > -np.inf
    if state.min_p > 0.0:
        kept &= noise.exp(scaled.astype(np.float64)) >= state.min_p
    if 0 < state.top_k < int(np.count_nonzero(kept)):
        threshold = np.partition(scaled[kept], -state.top_k)[-state.top_k]
        kept &= scaled >= threshold
    if state.top_p < 1.0:
        kept &= scaled >= _nucleus_threshold(scaled[kept], state.top_p)
    return kept


def _nucleus_threshold(values: Logits, top_p: float) -> np.float32:
    """The lowest value that stays: the mass of all strictly greater ones is below top_p of the total."""
    weights = np.floor(noise.exp(values.astype(np.float64)) * _WEIGHT_ONE).astype(np.int64)
    distinct, where = np.unique(-values, return_inverse=True)
    mass = np.zeros(distinct.size, dtype=np.int64)
    np.add.at(mass, where.reshape(-1), weights)
    before = np.cumsum(mass) - mass
    limit = int(top_p * float(mass.sum()))
    num_kept = max(1, int(np.count_nonzero(before < limit)))
    return -distinct[num_kept - 1]


def token_logprob(logits: Logits, token_id: int, num_top: int) -> TokenLogprob:
    """The logprob of one token under the model's own distribution (before masks, temperature and
    filters), its rank, and the `num_top` best; equal logits rank by id."""
    values = logits.astype(np.float64)
    top = float(values.max())
    normaliser = top + math.log(float(np.exp(values - top).sum()))
    chosen = logits[token_id]
    rank = int(np.count_nonzero(logits > chosen)) + int(np.count_nonzero(logits[:token_id] == chosen))
    best = _top_ids(logits, num_top)
    return TokenLogprob(
        token_id=token_id,
        logprob=float(values[token_id]) - normaliser,
        rank=rank,
        top=tuple((int(index), float(values[index]) - normaliser) for index in best),
    )


def _top_ids(logits: Logits, count: int) -> NDArray[np.int64]:
    """The `count` best token ids, best first, lowest id first among equals."""
    count = min(count, logits.size)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= threshold)
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order[:count]]


def sample_segment(
    row: int,
    logits: Logits,
    state: SamplingState,
    history: History,
    draft_ids: Sequence[int] = (),
    mask: NDArray[np.uint32] | None = None,
) -> RowResult:
    """Samples a segment: `logits` `[1 + drafts, vocab]`, `mask` `[1 + drafts, words]` or None.

    Sample i sees the history and the drafts before it. A draft is accepted when it equals the sample
    at its place, which is the token plain decoding would have produced: same logits, same noise.
    Sampling ends at the first draft that differs, and fails as a whole when any row it reached cannot
    be sampled.
    """
    tokens = list(history.token_ids)
    sampled: list[int] = []
    logprobs: list[TokenLogprob] = []
    for index in range(1 + len(draft_ids)):
        so_far = History(token_ids=tokens, num_prompt_tokens=history.num_prompt_tokens)
        token = sample_token(logits[index], state, so_far, None if mask is None else mask[index])
        if token is None:
            return RowResult(row=row, finite=False)
        sampled.append(token)
        tokens.append(token)
        if state.logprobs is not None:
            logprobs.append(token_logprob(logits[index], token, state.logprobs))
        if index < len(draft_ids) and draft_ids[index] != token:
            break
    return RowResult(
        row=row, token_ids=tuple(sampled), num_accepted=len(sampled) - 1, logprobs=tuple(logprobs)
    )
