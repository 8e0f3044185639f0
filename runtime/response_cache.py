"""Finished responses of deterministic requests, replayed when the very same is asked again. Bounded in bytes,
the least recently used go first. Not thread-safe: the engine's thread owns it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import msgspec

from .outputs import StreamChunk
from .params import SamplingParams
from .protocol import TokenLogprob
from .request import FinishReason, Request

_GOOD_ENDINGS = (FinishReason.STOP, FinishReason.LENGTH)
_ARRAY_32 = b"\xdd"  # MessagePack's array with a count of four bytes, big-endian
_HEAD_BYTES = 5
_ENTRY_BYTES = 300  # of key, dictionary slot and object headers, rounded up


@dataclass(slots=True)
class ResponseStats:
    """Counts since the start, over requests that may be answered from the cache: others are in neither of
    hits and misses. `num_bytes` and `num_responses` are what is held now."""

    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_responses: int = 0
    num_bytes: int = 0


class ReplayChunk(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """What of a chunk does not depend on when, and for whom, it was made."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @classmethod
    def of(cls, chunk: StreamChunk) -> Self:
        """The lasting part of `chunk`."""
        return cls(
            chunk.index,
            chunk.text,
            chunk.token_ids,
            chunk.logprobs,
            chunk.prompt_logprobs,
            chunk.finish_reason,
            chunk.stop_reason,
        )


class Recorder:
    """Writes down a response while it is made, up to `max_bytes`: what is longer is let go."""

    def __init__(self, key: bytes, max_bytes: int) -> None:
        self.key = key
        self._left = max_bytes - _ENTRY_BYTES - _HEAD_BYTES
        self._data = bytearray()
        self._num_chunks = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._is_whole = True

    def add(self, chunk: StreamChunk) -> None:
        """The next chunk. One that ends badly spoils the whole response."""
        if not self._is_whole:
            return
        data = self._encoder.encode(ReplayChunk.of(chunk))
        self._left -= len(data)
        if self._left < 0 or chunk.finish_reason not in (None, *_GOOD_ENDINGS):
            self._is_whole = False
            self._data.clear()
            return
        self._data += data
        self._num_chunks += 1

    def response(self) -> bytes | None:
        """The response so far as bytes; None for one that must not be kept."""
        if not self._is_whole:
            return None
        return _ARRAY_32 + self._num_chunks.to_bytes(4, "big") + bytes(self._data)


class ResponseCache:
    """Responses by key, of at most `max_bytes` together with what holding them takes. Counts into `stats`."""

    def __init__(self, max_bytes: int, stats: ResponseStats) -> None:
        self._max_bytes = max_bytes
        self._stats = stats
        self._responses: OrderedDict[bytes, bytes] = OrderedDict()
        self._decoder = msgspec.msgpack.Decoder(tuple[ReplayChunk, ...])

    def get(self, key: bytes) -> tuple[ReplayChunk, ...] | None:
        """The response to a request with this key, chunk by chunk as it was made. Counts hit or miss."""
        response = self._responses.get(key)
        if response is None:
            self._stats.num_misses += 1
            return None
        self._responses.move_to_end(key)
        self._stats.num_hits += 1
        return self._decoder.decode(response)

    def join(self, recorder: Recorder) -> tuple[ReplayChunk, ...] | None:
        """What has come so far of a response that is being made, for somebody else who asks for it: a hit.
        None where it is not written down."""
        response = recorder.response()
        if response is None:
            return None
        self._stats.num_hits += 1
        return self._decoder.decode(response)

    def recorder(self, key: bytes) -> Recorder:
        """To write down the response to a request that was missed."""
        return Recorder(key, self._max_bytes)

    def keep(self, recorder: Recorder) -> None:
        """Takes a finished response, and lets older ones go for it. One that is held already stays: it is the
        same."""
        response = recorder.response()
        if response is None or recorder.key in self._responses:
            return
        self._responses[recorder.key] = response
        self._count(response, 1)
        while self._stats.num_bytes > self._max_bytes:
            _, oldest = self._responses.popitem(last=False)
            self._count(oldest, -1)
            self._stats.num_evictions += 1

    def _count(self, response: bytes, sign: int) -> None:
        self._stats.num_responses += sign
        self._stats.num_bytes += sign * (len(response) + _ENTRY_BYTES)


def is_deterministic(params: SamplingParams, seed_is_drawn: bool) -> bool:
    """Whether asking again gives the same: greedy, or with a seed that the caller chose."""
    return params.temperature == 0.0 or (params.seed is not None and not seed_is_drawn)


def response_key(artifact: str, requests: Sequence[Request], params: SamplingParams) -> bytes:
    """SHA-256 of all that the response to a deterministic request depends on: the artifact, the prompt's
    token ids, the parameters in effect of each completion, and how its text is read.

    `requests` are the engine requests of one caller, which differ in their seeds alone. A greedy request
    uses no seed; who asks, when, with what priority and deadline changes no token.
    """
    first = requests[0]
    seeds = () if first.sampling.temperature == 0.0 else tuple(each.sampling.seed for each in requests)
    asked = (
        artifact,
        first.prompt_token_ids,
        first.max_tokens,
        replace(first.sampling, seed=0),
        len(requests),
        seeds,
        sorted(first.stop_token_ids),
        first.prompt_logprobs,
        params.stop,
        params.skip_special_tokens,
        params.structured,
    )
    return hashlib.sha256(repr(asked).encode()).digest()
