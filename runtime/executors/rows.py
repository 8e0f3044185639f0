"""What one row holds between steps, and what becomes of its segment's logits. Knows sampling and tokens,
no tensors: every rule of `runtime.protocol` about known tokens, drafts and logprobs is here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...spec.cache import CacheLayout
from ...spec.errors import InternalError
from ..protocol import LogitsWanted, RowEntry, RowResult, Segment, TokenLogprob
from ..sampling import History, is_finite, sample_segment, token_logprob
from .tiles import SequencePart

Logits = NDArray[np.float32]


class Row:
    """A request's tokens and its block table in each cache group."""

    def __init__(self, entry: RowEntry, layout: CacheLayout) -> None:
        self.entry = entry
        self.token_ids = list(entry.token_ids)
        self.tables: list[list[int]] = [[] for _ in layout.groups]
        self.num_page_changes = 0

    def set_page(self, group: int, index: int, page: int) -> None:
        """Entry `index` of the block table of `group` becomes `page`."""
        table = self.tables[group]
        table.extend([-1] * (index + 1 - len(table)))
        table[index] = page
        self.num_page_changes += 1


class SegmentOutput:
    """What a segment asks for; collects its logits and turns them into its result, where the model does
    not sample itself.

    Of a long prompt only logprobs are kept, never its logits. Raises InternalError for a segment that
    does not fit its row.
    """

    def __init__(self, segment: Segment, row: Row) -> None:
        self.segment = segment
        self.row = row
        num_known = segment.num_tokens - len(segment.draft_ids)
        known = row.token_ids[segment.start : segment.start + num_known]
        reaches_end = segment.start + num_known == len(row.token_ids)
        self._check(segment, known, num_known, reaches_end)
        self.token_ids = [*known, *segment.draft_ids]
        self.first_sample = num_known - 1
        self.samples = reaches_end and segment.logits is not LogitsWanted.NONE
        self._logits: list[Logits] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._is_finite = True

    @property
    def wanted(self) -> range:
        """Tokens of the segment whose logits are needed."""
        count = len(self.token_ids)
        if self.segment.logits is LogitsWanted.NONE:
            return range(0)
        return range(0 if self.segment.logits is LogitsWanted.PROMPT else self.first_sample, count)

    @property
    def sequence(self) -> SequencePart:
        """What the model computes for it."""
        return SequencePart(
            start=self.segment.start,
            token_ids=self.token_ids,
            block_tables=self.row.tables,
            wanted=self.wanted,
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether the known token behind each position gets a logprob."""
        return self.segment.logits is LogitsWanted.PROMPT

    def following(self, token: int) -> int | None:
        """The row's known token behind one of this segment's."""
        position = self.segment.start + token + 1
        return self.row.token_ids[position] if position < len(self.row.token_ids) else None

    def take(self, token: int, logits: Logits) -> None:
        """Accepts the logits `[vocab]` at one of `wanted`, in ascending order."""
        if self.scores_prompt:
            self._is_finite = self._is_finite and is_finite(logits)
            following = self.following(token)
            if self._is_finite and following is not None:
                num_top = self.row.entry.sampling.logprobs or 0
                self._prompt_logprobs.append(token_logprob(logits, following, num_top))
        if self.samples and token >= self.first_sample:
            self._logits.append(logits)

    def result(self, mask: NDArray[np.uint32] | None) -> RowResult:
        """Samples what the segment asks for, by the oracle. `mask` is `[1 + drafts, words]` or None."""
        prompt_logprobs = tuple(self._prompt_logprobs)
        if not self._is_finite:
            return RowResult(row=self.segment.row, finite=False)
        if not self.samples:
            return RowResult(row=self.segment.row, prompt_logprobs=prompt_logprobs)
        entry = self.row.entry
        history = History(token_ids=self.row.token_ids, num_prompt_tokens=entry.num_prompt_tokens)
        sampled = sample_segment(
            self.segment.row,
            np.stack(self._logits),
            entry.sampling,
            history,
            self.segment.draft_ids,
            mask,
        )
        return RowResult(
            row=sampled.row,
            token_ids=sampled.token_ids,
            num_accepted=sampled.num_accepted,
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            finite=sampled.finite,
        )

    @staticmethod
    def _check(segment: Segment, known: list[int], num_known: int, reaches_end: bool) -> None:
        problem = ""
        if num_known < 1 or len(known) != num_known:
            problem = f"it has tokens {segment.start} to {segment.start + num_known - 1}, the row has not"
        elif segment.token_ids not in ((), tuple(known)):
            problem = "its token ids are not those of the row"
        elif not reaches_end and segment.logits in (LogitsWanted.LAST, LogitsWanted.ALL):
            problem = "it asks for a sample before the row's last known token"
        elif segment.draft_ids and segment.logits is not LogitsWanted.ALL:
            problem = "it carries drafts and does not ask for all logits"
        if problem:
            raise InternalError(
                "runtime.segment",
                f"A segment does not fit row {segment.row}.",
                f"The contract between engine and executor was broken: {problem}.",
                "Report this with the request mix that led to it.",
            )
