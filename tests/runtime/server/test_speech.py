"""Thoughts, content and tool calls out of a text, however it is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.server.call_scanner import CallScanner
from llmc.runtime.server.speech import (
    Call,
    CallEnds,
    Content,
    Speech,
    SpeechStyle,
    Thought,
    ToolFormat,
    detect_thinking,
    detect_tools,
)

pytestmark = pytest.mark.pure

TOOLS = ("weather", "time")


def style(form, **options):
    return SpeechStyle(tool_format=form, tools=TOOLS, **options)


HERMES = style(ToolFormat.HERMES, thinks=True)
LLAMA = style(ToolFormat.LLAMA3)
MISTRAL = style(ToolFormat.MISTRAL)
LIST = style(ToolFormat.LIST)


def heard(how, pieces):
    """(thought, content, [(name, arguments)]) with the number of whole calls."""
    speech = Speech(how)
    parts = [part for piece in pieces for part in speech.push(piece)]
    parts += speech.finish()
    calls = []
    for part in parts:
        if isinstance(part, Call):
            if part.name is not None:
                assert part.number == len(calls)
                calls.append([part.name, ""])
            calls[part.number][1] += part.arguments
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    content = "".join(part.text for part in parts if isinstance(part, Content))
    if how.tool_format is not ToolFormat.ARGUMENTS:
        assert speech.num_calls == sum(isinstance(part, CallEnds) for part in parts)
    return thought, content, [tuple(call) for call in calls], speech.num_calls


CASES = [
    (HERMES, "just text", ("", "just text", [], 0)),
    (HERMES, "a < b, a <t", ("", "a < b, a <t", [], 0)),
    (
        HERMES,
        (
            '<think>\nwell\n</think>\n\nNow: <tool_call>\n{"name": "weather", "arguments": {"in": "}{\\"", '
            '"x": [1, {}]}}\n</tool_call>\n<tool_call>{"arguments": {}, "name": "time"}</tool_call>'
        ),
        ("well", "Now:", [("weather", '{"in": "}{\\"", "x": [1, {}]}'), ("time", "{}")], 2),
    ),
    (HERMES, "<think>never ends", ("never ends", "", [], 0)),
    (
        HERMES,
        'x <tool_call> {"name": "other", "arguments": {}}</tool_call> y',
        ("", 'x <tool_call> {"name": "other", "arguments": {}}</tool_call> y', [], 0),
    ),
    (HERMES, "<tool_call>no json</tool_call>", ("", "<tool_call>no json</tool_call>", [], 0)),
    (HERMES, '<tool_call>{"name": "time"', ("", '<tool_call>{"name": "time"', [], 0)),
    (
        HERMES,
        '<tool_call>{"name": "time", "arguments": {"a": 1',
        ("", "", [("time", '{"a": 1')], 0),
    ),
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', ("", "", [("time", "{}")], 1)),
    (
        HERMES,
        '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", "", [("time", '{"a": 1}')], 1),
    ),
    (
        LLAMA,
        '{"name": "time", "parameters": {"zone": "x"}}; {"name": "weather", "parameters": null}',
        ("", "", [("time", '{"zone": "x"}'), ("weather", "{}")], 2),
    ),
    (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "time", "parameters": {}}',
        ("", "", [("time", "{}")], 1),
    ),
    (LLAMA, '{"answer": 42} is JSON', ("", '{"answer": 42} is JSON', [], 0)),
    (LLAMA, 'Use {"name": "time"}', ("", 'Use {"name": "time"}', [], 0)),
    (
        MISTRAL,
        'ok[TOOL_CALLS] [{"name": "time", "arguments": {"a": 1}}, {"name": "weather", "arguments": {}}]',
        ("", "ok", [("time", '{"a": 1}'), ("weather", "{}")], 2),
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]time[ARGS]{"a": {}}[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{}',
        ("", "", [("time", '{"a": {}}'), ("weather", "{}")], 2),
    ),
    (MISTRAL, "see [TOOL_CALLS]", ("", "see [TOOL_CALLS]", [], 0)),
    (MISTRAL, '[TOOL_CALLS]other{"a": 1}', ("", '[TOOL_CALLS]other{"a": 1}', [], 0)),
    (
        LIST,
        '[{"name": "time", "parameters": {}},\n {"name": "weather", "parameters": {"a": 1}}]',
        ("", "", [("time", "{}"), ("weather", '{"a": 1}')], 2),
    ),
    (
        SpeechStyle(tool_format=ToolFormat.ARGUMENTS, tools=("time",)),
        '{"zone": "utc"}',
        ("", "", [("time", '{"zone": "utc"}')], 1),
    ),
    (
        style(ToolFormat.HERMES, one_call=True),
        '<tool_call>{"name": "time"}</tool_call><tool_call>{"name": "time"}</tool_call>',
        ("", "", [("time", "{}")], 1),
    ),
    (
        SpeechStyle(thinks=True, starts_thinking=True),
        "so\nand so </think>\n\nhello",
        ("so\nand so", "hello", [], 0),
    ),
    (SpeechStyle(thinks=True), "  no thought <think>", ("", "  no thought <think>", [], 0)),
]


@pytest.mark.parametrize(("how", "text", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_every_cut_says_the_same(how, text, expected):
    for size in (1, 2, 3, 5, 8, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert heard(how, pieces) == expected, size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(), JSON, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from((None, 1)),
    st.lists(st.integers(1, 9), max_size=30),
)
def test_any_arguments_come_through(arguments, ascii_only, name_first, indent, cuts):
    fields = [("name", "time"), ("arguments", arguments)]
    body = json.dumps(dict(fields if name_first else fields[::-1]), ensure_ascii=ascii_only, indent=indent)
    text = f"<tool_call>\n{body}\n</tool_call>"
    pieces, start = [], 0
    for size in cuts:
        pieces.append(text[start : start + size])
        start += size
    thought, content, calls, count = heard(HERMES, [*pieces, text[start:]])
    assert (thought, content, count) == ("", "", 1)
    assert json.loads(calls[0][1]) == arguments


@given(st.text(alphabet='<>{}[]",:; \nabtool_callthink/nameargumentsTOOLCALLS|py'))
def test_no_text_is_lost_or_breaks_the_reader(text):
    """What is not a call comes out as it went in, but for blanks around markers."""
    for how in (HERMES, LLAMA, MISTRAL, LIST):
        thought, content, calls, _ = heard(how, list(text))
        if not calls and not thought:
            assert (
                "".join(content.split()) == "".join(text.split()).replace("</think>", "") or "<think>" in text
            )


def test_a_scanner_that_has_begun_ends_as_a_call():
    scanner = CallScanner(frozenset({"f"}))
    told = [part for char in '{"name": "f", "arguments": {"a": 1} oops' for part in scanner.push(char)]
    assert scanner.is_over
    assert not scanner.has_failed
    assert "".join(part.text for part in told[1:]) == '{"a": 1}'


def test_formats_are_known_by_their_templates():
    assert detect_tools("{% if tools %}<tool_call>{% endif %}") is ToolFormat.HERMES
    assert detect_tools("{% if tools %}[TOOL_CALLS]{% endif %}") is ToolFormat.MISTRAL
    assert detect_tools('{{ tools }} {"name": "x", "parameters": 1}') is ToolFormat.LLAMA3
    assert detect_tools("<tool_call><function=x>{{ tools }}") is ToolFormat.NONE
    assert detect_tools("{{ messages }}") is detect_tools(None) is ToolFormat.NONE
    assert detect_thinking("x</think>")
    assert not detect_thinking(None)
