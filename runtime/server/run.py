"""One HTTP request while it is generated: events in, pieces for the writer out, numbers counted, its place
given back exactly once. Knows neither JSON nor sockets."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET

from ..outputs import StreamChunk
from ..request import FinishReason
from .backlog import Backlog, Place
from .client import ClientGone, EngineClient
from .errors import ServingError, from_event
from .messages import Failed
from .metrics import ModelMetrics
from .plan import Plan
from .responses import CompletionTokensDetails, PromptTokensDetails, Usage

_ENDED_BADLY = {
    FinishReason.TIMEOUT: (
        504,
        "request.timeout",
        "The request was not done in time.",
        "It had a deadline, its own or the server's.",
        "Ask for fewer tokens, or give it more time.",
    ),
    FinishReason.ABORT: (
        503,
        "server.aborted",
        "The server ended the request.",
        "It is shutting down.",
        "Send the request again.",
    ),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """News of choice number `choice`, which continues prompt number `prompt`."""

    prompt: int
    choice: int
    chunk: StreamChunk


@dataclass(slots=True)
class _Sequence:
    """The times of one completion, on the engine's clock."""

    num_tokens: int = 0
    admitted_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    is_open: bool = True


class Run:
    """The generations of one request, in `live` while it lives. `close` it, whatever happened."""

    def __init__(
        self,
        plan: Plan,
        client: EngineClient,
        backlog: Backlog,
        place: Place,
        metrics: ModelMetrics,
        arrival_s: float,
        live: set[Run],
    ) -> None:
        self.plan = plan
        self._client = client
        self._backlog = backlog
        self._place = place
        self._metrics = metrics
        self.arrival_s = arrival_s
        self._live = live
        self._sequences = [_Sequence() for _ in range(plan.num_sequences)]
        self._cached_tokens = [0] * len(plan.prompts)
        self._num_drafted = 0
        self._num_accepted = 0
        self._num_open = plan.num_sequences
        self._is_closed = False
        self._mailbox = client.open(plan, place.key)
        for prompt, params in zip(plan.prompts, plan.params, strict=True):
            metrics.request_prompt_tokens.observe(len(prompt))
            metrics.max_tokens.observe(params.max_tokens or 0)
            metrics.recent.prompt_lengths.add(len(prompt))
        metrics.n.observe(plan.n)
        live.add(self)

    @property
    def num_output_tokens(self) -> int:
        """Over all sequences, so far."""
        return sum(each.num_tokens for each in self._sequences)

    @property
    def is_over(self) -> bool:
        return not self._num_open

    def abandon(self) -> None:
        """The client has gone."""
        self._mailbox.abandon()

    def gave_up_reader(self) -> None:
        """The client is there and reads nothing: counted as gone."""
        self._metrics.disconnects.inc()

    async def take(self) -> list[Piece]:
        """What has come, at least one piece. ServingError when a sequence ended badly; ClientGone."""
        try:
            events = await self._mailbox.take()
        except ClientGone:
            self._metrics.disconnects.inc()
            raise
        pieces: list[Piece] = []
        for event in events:
            if isinstance(event, Failed):
                self._metrics.rejected(event.code)
                raise from_event(event)
            prompt = self._mailbox.names[event.request_id]
            piece = Piece(prompt, prompt * self.plan.n + event.chunk.index, event.chunk)
            self._count(piece)
            pieces.append(piece)
        return pieces

    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt = sum(map(len, self.plan.prompts))
        num_output = 0 if self.plan.hides_output else self.num_output_tokens
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached_tokens)),
            completion_tokens_details=self._draft_details() if self._client.facts.speculates else UNSET,
        )

    def _draft_details(self) -> CompletionTokensDetails:
        """What became of drafts so far. A hidden output has none."""
        drafted, accepted = (0, 0) if self.plan.hides_output else (self._num_drafted, self._num_accepted)
        return CompletionTokensDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted
        )

    def close(self) -> None:
        """Aborts what still runs and gives the place back. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._live.discard(self)
        n = self.plan.n
        open_names = [
            name
            for name, index in self._mailbox.names.items()
            if any(each.is_open for each in self._sequences[index * n : (index + 1) * n])
        ]
        self._client.close(self._mailbox, open_names)
        self._backlog.leave(self._place)

    def _count(self, piece: Piece) -> None:
        chunk, metrics = piece.chunk, self._metrics
        sequence = self._sequences[piece.choice]
        if chunk.token_ids:
            if not sequence.num_tokens:
                self._count_first(piece, sequence)
            else:
                metrics.itl_s.observe(chunk.time_s - sequence.last_s)
                metrics.recent.itl_s.append(chunk.time_s - sequence.last_s)
            sequence.last_s = chunk.time_s
            sequence.num_tokens += len(chunk.token_ids)
            self._num_drafted += chunk.num_drafted
            self._num_accepted += min(chunk.num_accepted, len(chunk.token_ids))
            metrics.generation_tokens.inc(len(chunk.token_ids))
            metrics.recent.tokens.add(len(chunk.token_ids))
        reason = chunk.finish_reason
        if reason is None:
            return
        sequence.is_open = False
        self._num_open -= 1
        metrics.finished(reason.value)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise _bad_ending(reason, chunk.error)
        self._count_end(chunk.time_s, sequence)

    def _count_end(self, end_s: float, sequence: _Sequence) -> None:
        metrics = self._metrics
        metrics.e2e_s.observe(end_s - self.arrival_s)
        metrics.request_generation_tokens.observe(sequence.num_tokens)
        metrics.recent.output_lengths.add(sequence.num_tokens)
        if sequence.num_tokens:
            metrics.decode_s.observe(end_s - sequence.first_s)
            metrics.inference_s.observe(end_s - sequence.admitted_s)
        if sequence.num_tokens > 1:
            metrics.tpot_s.observe((end_s - sequence.first_s) / (sequence.num_tokens - 1))
        if not self._num_open:
            metrics.longest_generation.observe(max(each.num_tokens for each in self._sequences))

    def _count_first(self, piece: Piece, sequence: _Sequence) -> None:
        chunk, metrics = piece.chunk, self._metrics
        sequence.first_s = chunk.time_s
        sequence.admitted_s = chunk.time_s if chunk.admitted_s is None else chunk.admitted_s
        metrics.ttft_s.observe(chunk.time_s - self.arrival_s)
        metrics.queue_s.observe(max(0.0, sequence.admitted_s - self.arrival_s))
        metrics.prefill_s.observe(chunk.time_s - sequence.admitted_s)
        metrics.recent.ttft_s.append(chunk.time_s - self.arrival_s)
        if not chunk.is_replayed:
            metrics.prefix_queries.inc(len(self.plan.prompts[piece.prompt]))
            metrics.prefix_hits.inc(chunk.num_cached_tokens)
            metrics.recent.num_prefix_queries += len(self.plan.prompts[piece.prompt])
            metrics.recent.num_prefix_hits += chunk.num_cached_tokens
        if chunk.index == 0:
            metrics.prompt_tokens_cached.inc(chunk.num_cached_tokens)
            metrics.recent.prompt_tokens.add(len(self.plan.prompts[piece.prompt]))
            metrics.prompt_tokens.inc(len(self.plan.prompts[piece.prompt]))
            self._cached_tokens[piece.prompt] = chunk.num_cached_tokens


def _bad_ending(reason: FinishReason, error: str | None) -> ServingError:
    if reason in _ENDED_BADLY:
        return ServingError(
            *_ENDED_BADLY[reason], retry_after_s=1.0 if reason is FinishReason.ABORT else None
        )
    return ServingError(
        500,
        "engine.request_failed",
        "The engine could not finish the request.",
        f"{(error or 'It gave no reason').rstrip('.')}.",
        "Send it again; if that fails too, check the artifact with `llmc verify`.",
    )
