"""The tools of a request: what the template is told, what the model is held to, how its answer is read."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..structured import StructuredOutput
from .errors import ServingError, bad_request
from .requests import ChatRequest, Tool, ToolChoice
from .speech import SpeechStyle, ToolFormat, detect_thinking, detect_tools

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one model writes calls and thoughts."""

    tool_format: ToolFormat = ToolFormat.NONE
    thinks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """`shown` goes to the template; `structure` is what output is held to where calls are demanded."""

    shown: tuple[dict[str, Any], ...] | None = None
    structure: StructuredOutput | None = None
    style: SpeechStyle


def dialect_of(template: str | None, tool_format: str, reasoning_format: str) -> Dialect:
    """The settings' word; where they say `auto`, what the chat template gives away."""
    return Dialect(
        tool_format=detect_tools(template) if tool_format == "auto" else ToolFormat(tool_format),
        thinks=detect_thinking(template) if reasoning_format == "auto" else reasoning_format == "think",
    )


def tool_use(request: ChatRequest, dialect: Dialect) -> ToolUse:
    """What the tools and the choice of a request come to. A 400 for what cannot be done as asked."""
    tools = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    _check_tools(tools, choice)
    plain = SpeechStyle(thinks=dialect.thinks)
    if choice == "none" or not tools:
        return ToolUse(style=plain)
    names = tuple(tool.function.name for tool in tools)
    shown = tuple(template_tool(tool) for tool in tools)
    if isinstance(choice, ToolChoice):
        name = choice.function.name
        (chosen,) = [tool for tool in tools if tool.function.name == name]
        return ToolUse(
            shown=shown,
            structure=StructuredOutput.from_schema(chosen.function.parameters or _ANY_OBJECT),
            style=SpeechStyle(tool_format=ToolFormat.ARGUMENTS, tools=(name,)),
        )
    one_call = not request.parallel_tool_calls
    if choice == "required":
        return ToolUse(
            shown=shown,
            structure=StructuredOutput.from_schema(_list_schema(tools, one_call)),
            style=SpeechStyle(tool_format=ToolFormat.LIST, tools=names, one_call=one_call),
        )
    if dialect.tool_format is ToolFormat.NONE:
        raise _refused(
            "tools",
            "The request has tools, and this model's way of calling them is not known.",
            "Its chat template shows none of the known formats.",
            "Set tool_choice to required or to a function, or tool_format in the server's settings.",
        )
    return ToolUse(
        shown=shown,
        style=SpeechStyle(
            tool_format=dialect.tool_format, tools=names, thinks=dialect.thinks, one_call=one_call
        ),
    )


def template_tool(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it: what was sent, in the order that models were trained with."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}


def draw_call_id(form: ToolFormat) -> str:
    """A new name for a call. Mistral's templates want nine letters and digits."""
    if form is ToolFormat.MISTRAL:
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def _check_tools(tools: Sequence[Tool], choice: str | ToolChoice) -> None:
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise _refused(
                "tools",
                f"Two tools are called {name[:100]!r}.",
                "A call names its function.",
                "Give them different names.",
            )
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise _refused(
            "tool_choice",
            f"tool_choice names the function {choice.function.name[:100]!r}.",
            f"The tools of the request are {', '.join(names) if names else 'none'}.",
            "Name one of them.",
        )
    if choice == "required" and not tools:
        raise _refused(
            "tool_choice",
            "tool_choice is required and there are no tools.",
            "A choice is among the tools of the request.",
            "Send tools, or leave tool_choice out.",
        )
    if choice == "auto" and any(tool.function.strict for tool in tools):
        raise _refused(
            "tools",
            "A tool is strict and tool_choice is auto.",
            "Arguments are held to their schema only where a call is demanded.",
            "Set tool_choice to required or to the function, or leave strict out.",
        )


def _list_schema(tools: Sequence[Tool], one_call: bool) -> dict[str, Any]:
    """A list of calls. Definitions that a schema refers to from its root move to the common root."""
    definitions: dict[str, Any] = {}
    kinds: list[dict[str, Any]] = []
    for tool in tools:
        schema = dict(tool.function.parameters or _ANY_OBJECT)
        for name, definition in schema.pop("$defs", {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise _refused(
                    "tools",
                    f"Two tools define {name[:100]!r} differently.",
                    "With tool_choice required their schemas become one.",
                    "Name the definitions differently.",
                )
        kinds.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": kinds}}
    if one_call:
        whole["maxItems"] = 1
    return {**whole, "$defs": definitions} if definitions else whole


def _refused(field: str, what: str, why: str, fix: str) -> ServingError:
    return bad_request(f"request.{field}", what, why, fix, field)
