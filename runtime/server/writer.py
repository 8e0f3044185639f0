"""What the two generation routes have in common when they answer. The whole answer is the sum of what a
stream would have said, so that both are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from ...spec.errors import LlmcError
from ..request import FinishReason
from .responses import Usage
from .run import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What every chunk repeats."""

    id: str
    created: int
    model: str


class Writer(Protocol):
    """Pieces of one request to bodies. `ends_with_done`: a stream ends with OpenAI's older mark."""

    ends_with_done: bool

    def failure(self, error: LlmcError) -> msgspec.Struct:
        """The last chunk of a stream that failed."""
        ...

    def chunks(self, pieces: Sequence[Piece]) -> list[msgspec.Struct]:
        """The chunks that a stream sends for them."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last chunk of a stream that was asked for usage."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> msgspec.Struct:
        """The answer in one body."""
        ...


def finish_of(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """OpenAI's name. Bad endings are errors and never come here."""
    if reason is None:
        return None
    return "stop" if reason is FinishReason.STOP else "length"
