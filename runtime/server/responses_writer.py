"""Answers of /v1/responses: items, and the events that tell how they grow. Knows no engine."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ...spec.errors import InternalError, LlmcError
from ..params import SamplingParams
from ..request import FinishReason
from .plan import Plan
from .requests import ResponsesRequest
from .responses import Usage
from .run import Piece
from .speech import Call, CallEnds, Content, Part, Speech, Thought
from .writer import Heading

Status = Literal["in_progress", "completed", "incomplete"]


Grows = TypeVar("Grows", bound=msgspec.Struct)


class OutputText(msgspec.Struct, kw_only=True):
    type: Literal["output_text", "reasoning_text"] = "output_text"
    text: str = ""
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputItem(msgspec.Struct, kw_only=True):
    """A message, a call or a thought, by `type`."""

    type: Literal["message", "function_call", "reasoning"]
    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] | UnsetType = UNSET
    content: list[OutputText] | UnsetType = UNSET
    summary: list[str] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(msgspec.Struct, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """The whole, or where it stands. `sampling` are the parameters in effect; nothing is stored."""

    id: str
    created_at: int
    model: str
    status: Status
    output: list[OutputItem]
    sampling: SamplingParams
    tools: list[dict[str, Any]]
    tool_choice: Any
    parallel_tool_calls: bool
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    usage: ResponseUsage | None = None
    incomplete_details: Incomplete | None = None
    error: None = None
    metadata: dict[str, str] = {}
    store: bool = False
    object: Literal["response"] = "response"


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; what it holds depends on its `type`."""

    type: str
    sequence_number: int
    response: ResponseBody | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    logprobs: list[str] | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET

    @property
    def event_name(self) -> str:
        return self.type


class ResponsesWriter:
    """Items open one after the other, each closed before the next. The last event has the whole."""

    ends_with_done = False

    def __init__(self, heading: Heading, plan: Plan, asked: ResponsesRequest) -> None:
        self._heading = heading
        self._plan = plan
        self._asked = asked
        self._speech = Speech(plan.style)
        self._items: list[OutputItem] = []
        self._events: list[ResponseEvent] = []
        self._num_events = 0
        self._num_thought_tokens = 0
        self._reason: FinishReason | None = None

    def chunks(self, pieces: Sequence[Piece]) -> list[msgspec.Struct]:
        """The events for them; the first two say that the answer has begun."""
        if not self._num_events:
            for name in ("created", "in_progress"):
                self._tell(f"response.{name}", response=self._body("in_progress"))
        for piece in pieces:
            self._take(piece)
        events, self._events = self._events, []
        return list(events)

    def usage_chunk(self, usage: Usage) -> ResponseEvent:
        """The last event."""
        body = self._body(self._status, usage)
        self._tell(f"response.{self._status}", response=body)
        return self._events.pop()

    def failure(self, error: LlmcError) -> msgspec.Struct:
        self._tell("error", code=error.code, message=str(error), param=None)
        return self._events.pop()

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ResponseBody:
        self.chunks(pieces)
        if self._reason is None:
            raise InternalError(
                "server.no_ending",
                "The response has no ending.",
                "Its last piece carried no finish reason.",
                "Report this with the request.",
            )
        return self._body(self._status, usage)

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _take(self, piece: Piece) -> None:
        chunk = piece.chunk
        parts: list[Part] = self._speech.push(chunk.text)
        if chunk.finish_reason is not None:
            self._reason = chunk.finish_reason
            parts += self._speech.finish()
        for part in parts:
            self._add(part)
        if self._open is not None and self._open.type == "reasoning":
            self._num_thought_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._close(self._status)

    def _add(self, part: Part) -> None:
        if isinstance(part, CallEnds):
            self._close("completed")
        elif isinstance(part, Call):
            if part.name is not None:
                self._begin("function_call", name=part.name)
            self._grow_call(part.arguments)
        else:
            self._grow_text("reasoning" if isinstance(part, Thought) else "message", part)

    @property
    def _open(self) -> OutputItem | None:
        last = self._items[-1] if self._items else None
        return last if last is not None and last.status == "in_progress" else None

    def _begin(self, kind: Literal["message", "function_call", "reasoning"], name: str = "") -> OutputItem:
        self._close("completed")
        token = secrets.token_hex(12)
        if kind == "function_call":
            item = OutputItem(type=kind, id=f"fc_{token}", call_id=f"call_{token}", name=name, arguments="")
        elif kind == "message":
            item = OutputItem(type=kind, id=f"msg_{token}", role="assistant", content=[])
        else:
            item = OutputItem(type=kind, id=f"rs_{token}", content=[], summary=[])
        self._items.append(item)
        self._tell("response.output_item.added", output_index=self._place, item=_copy(item))
        if kind != "function_call":
            text = OutputText(type="output_text" if kind == "message" else "reasoning_text")
            item.content = [text]
            self._tell("response.content_part.added", **self._where(item), part=_copy(text))
        return item

    def _grow_text(self, kind: Literal["message", "reasoning"], part: Content | Thought) -> None:
        item = self._open
        if item is None or item.type != kind:
            item = self._begin(kind)
        _part_of(item).text += part.text
        name = "output_text" if kind == "message" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        self._tell(f"response.{name}.delta", **self._where(item), delta=part.text, **more)

    def _grow_call(self, arguments: str) -> None:
        item = self._open
        if item is None or not arguments:
            return
        item.arguments = f"{item.arguments}{arguments}"
        self._tell(
            "response.function_call_arguments.delta",
            output_index=self._place,
            item_id=item.id,
            delta=arguments,
        )

    def _close(self, status: Status) -> None:
        item = self._open
        if item is None:
            return
        item.status = status
        if item.type == "function_call":
            self._tell(
                "response.function_call_arguments.done",
                output_index=self._place,
                item_id=item.id,
                name=item.name,
                arguments=item.arguments,
            )
        else:
            part = _part_of(item)
            name = "output_text" if item.type == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if item.type == "message" else {}
            self._tell(f"response.{name}.done", **self._where(item), text=part.text, **more)
            self._tell("response.content_part.done", **self._where(item), part=_copy(part))
        self._tell("response.output_item.done", output_index=self._place, item=_copy(item))

    @property
    def _place(self) -> int:
        return len(self._items) - 1

    def _where(self, item: OutputItem) -> dict[str, Any]:
        return {"output_index": self._place, "item_id": item.id, "content_index": 0}

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append(ResponseEvent(type=kind, sequence_number=self._num_events, **fields))
        self._num_events += 1

    def _body(self, status: Status, usage: Usage | None = None) -> ResponseBody:
        asked, params = self._asked, self._plan.params[0]
        return ResponseBody(
            id=self._heading.id,
            created_at=self._heading.created,
            model=self._heading.model,
            status=status,
            output=[_copy(item) for item in self._items],
            sampling=params,
            tools=[msgspec.to_builtins(tool) for tool in asked.tools or ()],
            tool_choice=msgspec.to_builtins(asked.tool_choice or "auto"),
            parallel_tool_calls=asked.parallel_tool_calls,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            temperature=float(params.temperature),
            top_p=float(params.top_p),
            usage=None if usage is None else self._usage(usage),
            incomplete_details=Incomplete() if status == "incomplete" else None,
        )

    def _usage(self, usage: Usage) -> ResponseUsage:
        """Tokens of thoughts are those that came before the thoughts had ended."""
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(
                cached_tokens=cached, cache_write_tokens=usage.prompt_tokens - cached
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._num_thought_tokens),
            total_tokens=usage.total_tokens,
        )


def _part_of(item: OutputItem) -> OutputText:
    assert isinstance(item.content, list)
    return item.content[0]


def _copy(growing: Grows) -> Grows:
    """As it stands: it goes on growing before the event is written."""
    copied = copy.copy(growing)
    if isinstance(copied, OutputItem) and isinstance(copied.content, list):
        copied.content = [copy.copy(part) for part in copied.content]
    return copied
