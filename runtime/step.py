"""One step in the executor's terms: a plan from chunks, and the checks on what comes back. Knows how a
request maps to rows, segments and block changes; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..spec.errors import InternalError, LlmcError
from .blocks import BlockManager
from .grammar import Mask, build_mask
from .protocol import (
    BlockChange,
    LogitsWanted,
    RowDiff,
    RowEntry,
    Segment,
    StepPlan,
    StepResult,
    TokenSource,
)
from .request import RunningRequest
from .scheduler import Chunk


class Step(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A reserved step: pages and rows are taken, the executor has not been told."""

    plan: StepPlan
    diff: RowDiff
    chunks: Sequence[Chunk]


def row_entry(request: RunningRequest) -> RowEntry:
    return RowEntry(
        row=request.row,
        request_id=request.request.request_id,
        token_ids=tuple(request.token_ids),
        num_prompt_tokens=request.request.num_prompt_tokens,
        sampling=request.request.sampling,
    )


def build_plan(epoch: int, chunks: Sequence[Chunk], blocks: BlockManager, vocab_size: int) -> StepPlan:
    """Takes the pages the chunks need and puts them into the executor's words."""
    segments: list[Segment] = []
    changes: list[BlockChange] = []
    has_forms = False
    for request, start, num_tokens, draft_ids, samples in chunks:
        pages = request.blocks
        total = num_tokens + len(draft_ids)
        if start + total > pages.capacity:
            blocks.extend(pages, start + total)
        row = request.row
        has_forms = has_forms or request.grammar is not None
        if pages.unsent:
            changes.extend(
                BlockChange(group=group, row=row, index=index, block=block)
                for group, index, block in pages.unsent
            )
            pages.unsent.clear()
        is_last_sampled = request.num_pending > 0
        token_ids = () if is_last_sampled else tuple(request.token_ids[start : start + num_tokens])
        segments.append(
            Segment(
                row=row,
                start=start,
                num_tokens=total,
                source=TokenSource.LAST_SAMPLED if is_last_sampled else TokenSource.IDS,
                token_ids=token_ids,
                draft_ids=draft_ids,
                logits=_logits_wanted(request, start, bool(draft_ids), samples),
            )
        )
    return StepPlan(
        step_id=epoch,
        epoch=epoch,
        segments=tuple(segments),
        block_changes=tuple(changes),
        grammar_mask=_mask(chunks, vocab_size) if has_forms else None,
    )


def _mask(chunks: Sequence[Chunk], vocab_size: int) -> Mask | None:
    """What the forms of its requests allow in a step."""
    forms = [(chunk.request.grammar if chunk.samples else None, chunk.draft_ids) for chunk in chunks]
    return build_mask(forms, vocab_size)


def _logits_wanted(request: RunningRequest, start: int, has_drafts: bool, samples: bool) -> LogitsWanted:
    if has_drafts:
        return LogitsWanted.ALL
    spec = request.request
    if spec.prompt_logprobs:
        num_wanted = spec.num_prompt_tokens - 1
        if start < num_wanted and request.num_prompt_logprobs < num_wanted:
            return LogitsWanted.PROMPT
    return LogitsWanted.LAST if samples else LogitsWanted.NONE


def check_result(chunks: Sequence[Chunk], result: StepResult) -> None:
    """InternalError when an executor's answer does not fit what it was asked."""
    fits = len(result.rows) == len(chunks) and all(
        row.row == request.row
        and row.num_accepted <= len(draft_ids)
        and len(row.token_ids) == (1 + row.num_accepted if samples and row.finite else 0)
        for (request, _, _, draft_ids, samples), row in zip(chunks, result.rows, strict=True)
    )
    if not fits:
        raise InternalError(
            "runtime.executor_contract",
            f"Step {result.step_id} came back with results that do not fit its plan.",
            "Each segment that samples must yield one token more than the drafts it accepted.",
            "Report this with the executor's name.",
        )


def describe(error: Exception) -> str:
    """One line for the ending of a request."""
    if isinstance(error, LlmcError):
        return f"{error.what} {error.why}"
    return f"{type(error).__name__}: {error}"
