"""What the engine needs of a grammar: the tokens it allows next, and how far it has come. Knows no notation;
who compiles one is `grammar_compiler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint32]
ALL_ALLOWED = np.uint32(0xFFFFFFFF)


class Grammar(Protocol):
    """A compiled form of answers, shared by the completions of a request."""

    def start(self) -> GrammarState:
        """The state before the first token of an answer."""
        ...


class GrammarState(Protocol):
    """How far one answer has come. Once `error` is set, nothing is allowed any more."""

    @property
    def is_over(self) -> bool:
        """The answer is whole and can go no further."""
        ...

    @property
    def error(self) -> str | None:
        """Why the state cannot go on, in one line."""
        ...

    def fill(self, mask: Mask, draft_ids: Sequence[int] = ()) -> None:
        """Writes the tokens allowed next, and behind each draft, into `mask` uint32
        `[1 + len(draft_ids), words]`; all drafts must be allowed. The state does not change."""
        ...

    def count_allowed(self, draft_ids: Sequence[int]) -> int:
        """How many of `draft_ids` may follow one after the other."""
        ...

    def accept(self, token_id: int) -> None:
        """The answer goes on with `token_id`."""
        ...


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits that a mask of the vocabulary has."""
    return -(-vocab_size // 32)


def build_mask(segments: Sequence[tuple[GrammarState | None, Sequence[int]]], vocab_size: int) -> Mask | None:
    """The mask rows of a step's segments, each its state (None: all tokens are allowed) and its drafts;
    None when no segment has a state."""
    if not any(state is not None for state, _ in segments):
        return None
    num_rows = sum(1 + len(draft_ids) for _, draft_ids in segments)
    mask = np.full((num_rows, mask_words(vocab_size)), ALL_ALLOWED, dtype=np.uint32)
    row = 0
    for state, draft_ids in segments:
        end = row + 1 + len(draft_ids)
        if state is not None:
            state.fill(mask[row:end], draft_ids)
        row = end
    return mask
