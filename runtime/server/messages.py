"""All that server and engine say to each other: plain structs that msgspec can write as bytes and read back.
Knows no socket and no thread, so that the engine may as well live in another process."""

from __future__ import annotations

import msgspec

from ..admission import EngineLimits
from ..outputs import StreamChunk
from ..params import SamplingParams


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Generate `params.n` completions of one prompt under the name `request_id`, unique among the living.
    `timeout_s` counts from when the engine reads this; `seed_is_drawn` where the caller has chosen none.
    `owner` is the name of the API key it came with, empty without keys."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    timeout_s: float | None = None
    seed_is_drawn: bool = False
    owner: str = ""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a request. One that has ended already changes nothing."""

    request_id: str


class Said(msgspec.Struct, frozen=True, tag=True):
    """News of one request. Every completion ends with a chunk that has a `finish_reason`, or `Failed`."""

    chunk: StreamChunk

    @property
    def request_id(self) -> str:
        return self.chunk.request_id


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request was refused, or ended by a failure: nothing more will be said of it."""

    request_id: str
    status: int
    code: str
    what: str
    why: str
    fix: str


Command = Generate | Abort
Event = Said | Failed


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives. `defaults` are the model's own generation settings;
    `speculates` says whether tokens are drafted; `details` are the executor's own, by name."""

    executor: str
    limits: EngineLimits
    defaults: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    num_blocks: tuple[int, ...] = ()
    page_tokens: tuple[int, ...] = ()
    speculates: bool = False
    details: dict[str, str] = {}


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine stands. Counts are since its start; `kv_usage` is the share of pages in use in the
    fullest cache group; `num_preempted` of those waiting have run before; `failure` is set when the engine
    serves no more, `is_starting` while it is being started again, `last_death` says why it had to be.
    `response_bytes` are held by the response
    cache, which had so many hits and misses."""

    num_running: int
    num_waiting: int
    num_preempted: int = 0
    kv_usage: float
    num_steps: int
    num_failed_steps: int
    num_preemptions: int
    num_computed_tokens: int
    num_corrupted: int = 0
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    failure: str | None = None
    is_starting: bool = False
    num_restarts: int = 0
    last_death: str | None = None
    num_response_hits: int = 0
    num_response_misses: int = 0
    response_bytes: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first words of an engine in a process of its own. `seconds` is where its start went."""

    facts: EngineFacts
    seconds: dict[str, float]


class NotReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Its only words when it cannot start: the error, with the name of its class."""

    kind: str
    code: str
    what: str
    why: str
    fix: str


class News(msgspec.Struct, frozen=True, tag=True):
    """What has happened since the last news, and where the engine stands."""

    events: tuple[Said | Failed, ...]
    snapshot: EngineSnapshot
