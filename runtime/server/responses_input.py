"""A request of /v1/responses as the chat request it comes to. Knows no engine."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from .errors import ServingError, bad_request
from .requests import (
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionName,
    FunctionSpec,
    JsonSchema,
    ResponseFormat,
    ResponsesRequest,
    ResponsesToolChoice,
    Tool,
    ToolCall,
    ToolChoice,
)

T = TypeVar("T", bound=msgspec.Struct)
_Status = Literal["in_progress", "completed", "incomplete"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class _Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all items may have; it names them among stored ones, and nothing is stored here."""

    id: str | None = None
    status: _Status | None = None


class _Message(_Item, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str | list[_Part]
    type: Literal["message"] = "message"


class _Call(_Item, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class _Output(_Item, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Part]


class _Thought(_Item, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["reasoning"]
    summary: list[_Part] | None = None
    content: list[_Part] | None = None


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """Messages, tools and form in chat's words. A 400 for an item that is none."""
    choice = request.tool_choice
    if isinstance(choice, ResponsesToolChoice):
        choice = ToolChoice(type="function", function=FunctionName(name=choice.name))
    tools = None
    if request.tools is not None:
        tools = [
            Tool(
                type="function",
                function=FunctionSpec(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=tool.strict,
                ),
            )
            for tool in request.tools
        ]
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stream=request.stream,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request),
        priority=request.priority,
        request_id=request.request_id,
        timeout_s=request.timeout_s,
    )


def _format(request: ResponsesRequest) -> ResponseFormat | None:
    given = request.text.format if request.text is not None else None
    if given is None:
        return None
    schema = None
    if given.type == "json_schema":
        schema = JsonSchema(name=given.name or "answer", schema=given.schema)
    return ResponseFormat(type=given.type, json_schema=schema)


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    """Calls and thoughts belong to the assistant's message that they stand at."""
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*messages, ChatMessage(role="user", content=request.input)]
    thought: str | None = None
    for index, item in enumerate(request.input):
        kind = item.get("type", "message")
        if kind == "message":
            message = _convert(item, _Message, index)
            role = "system" if message.role == "developer" else message.role
            messages.append(ChatMessage(role=role, content=_text(message.content), reasoning_content=thought))
            thought = None
        elif kind == "function_call":
            _add_call(messages, _convert(item, _Call, index), thought)
            thought = None
        elif kind == "function_call_output":
            output = _convert(item, _Output, index)
            messages.append(
                ChatMessage(role="tool", content=_text(output.output), tool_call_id=output.call_id)
            )
        elif kind == "reasoning":
            told = _convert(item, _Thought, index)
            thought = _text(told.content or told.summary or [])
        else:
            raise _invalid(index, f"An item of type {str(kind)[:60]!r} is not known here")
    return messages


def _add_call(messages: list[ChatMessage], call: _Call, thought: str | None) -> None:
    made = ToolCall(id=call.call_id, function=FunctionCall(name=call.name, arguments=call.arguments))
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant" and thought is None:
        messages[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or ()), made])
    else:
        messages.append(ChatMessage(role="assistant", tool_calls=[made], reasoning_content=thought))


def _text(content: str | list[_Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _convert(item: dict[str, Any], kind: type[T], index: int) -> T:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise _invalid(index, str(error)) from error


def _invalid(index: int, why: str) -> ServingError:
    return bad_request(
        "request.invalid_field",
        f"The field input[{index}] is not acceptable.",
        f"{why.rstrip('.')}.",
        "Send messages, function_call, function_call_output and reasoning items.",
        "input",
    )
