"""Tools, thoughts and forms through the real client: what the model is told, and how its answer is read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import openai
import pytest

from llmc.runtime.request import FinishReason
from llmc.runtime.server.config import ModelConfig, ServerConfig

pytestmark = pytest.mark.pure

_spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells it.",
            "parameters": {"type": "object", "properties": {"in": {"type": "string"}}, "required": ["in"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
ASK = [{"role": "user", "content": "hello"}]
CALLS = '<think>hm</think>Well. <tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call>'


@pytest.fixture
def told(run_server):
    """A server over a scripted engine that writes as `form`, and the engine."""

    def start(form="hermes", text="", **options):
        channel = scripted.ScriptedChannel(text, **options)
        model = ModelConfig(artifact="m", tool_format=form, reasoning_format="think")
        running = run_server(ServerConfig(port=0, models=(model,)), {"m": lambda _: channel})
        return running, channel

    return start


def streamed(client, **fields):
    """A stream as one message, put together as clients do."""
    content, thought, calls, reason, usage = "", "", [], None, None
    stream = client.chat.completions.create(
        model="m", stream=True, stream_options={"include_usage": True}, **fields
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            content += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(calls)
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
    return content, thought, [tuple(call) for call in calls], reason, usage.completion_tokens


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", CALLS, "Well.", [("weather", '{"in": "Rome"}')]),
        (
            "llama3",
            '{"name": "weather", "parameters": {"in": "x"}}; {"name": "time", "parameters": {}}',
            "",
            [("weather", '{"in": "x"}'), ("time", "{}")],
        ),
        ("mistral", 'So[TOOL_CALLS][{"name": "time", "arguments": {}}]', "So", [("time", "{}")]),
        ("hermes", "nothing to call", "nothing to call", []),
    ],
)
def test_calls_are_the_same_whole_and_streamed(told, form, text, content, calls):
    running, channel = told(form, text)
    client = running.client()
    asked = {"messages": ASK, "tools": TOOLS}
    whole = client.chat.completions.create(model="m", **asked)
    message = whole.choices[0].message
    assert (message.content or "") == content
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls or ()] == calls
    assert whole.choices[0].finish_reason == ("tool_calls" if calls else "stop")
    got = streamed(client, **asked)
    thought = "hm" if "<think>" in text else ""
    assert got[:4] == (content, thought, calls, whole.choices[0].finish_reason)
    assert got[4] == whole.usage.completion_tokens
    assert channel.sent[0].params.structured is None
    assert channel.sent[0].params.skip_special_tokens is (form == "hermes")


def test_thoughts_can_be_left_out(told):
    running, _ = told(text="<think>secret</think>\n\nplain")
    shown = running.client().chat.completions.create(model="m", messages=ASK)
    assert shown.choices[0].message.reasoning_content == "secret"
    hidden = running.client().chat.completions.create(
        model="m", messages=ASK, extra_body={"include_reasoning": False}
    )
    assert hidden.choices[0].message.content == shown.choices[0].message.content == "plain"
    assert not hasattr(hidden.choices[0].message, "reasoning_content")


def test_a_cut_call_is_told_as_far_as_it_came(told):
    running, _ = told(text='<tool_call>{"name": "time", "arguments": {"a"', reason=FinishReason.LENGTH)
    got = running.client().chat.completions.create(model="m", messages=ASK, tools=TOOLS).choices[0]
    assert got.finish_reason == "length"
    assert got.message.tool_calls[0].function.arguments == '{"a"'


def test_a_named_function_is_demanded_by_its_schema(told):
    running, channel = told("none", '{"in": "Oslo"}')
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"messages": ASK, "tools": TOOLS, "tool_choice": choice}
    got = running.client().chat.completions.create(model="m", **asked).choices[0]
    assert got.message.tool_calls[0].function.name == "weather"
    assert json.loads(got.message.tool_calls[0].function.arguments) == {"in": "Oslo"}
    schema = json.loads(channel.sent[0].params.structured.json_schema)
    assert schema == TOOLS[0]["function"]["parameters"]
    assert streamed(running.client(), **asked)[2] == [("weather", '{"in": "Oslo"}')]


def test_required_calls_are_demanded_as_a_list(told):
    text = '[{"name": "time", "parameters": {}}, {"name": "time", "parameters": {}}]'
    running, channel = told("none", text)
    asked = {"messages": ASK, "tools": TOOLS, "tool_choice": "required"}
    got = running.client().chat.completions.create(model="m", **asked).choices[0]
    assert [call.function.name for call in got.message.tool_calls] == ["time", "time"]
    assert len({call.id for call in got.message.tool_calls}) == 2
    schema = json.loads(channel.sent[0].params.structured.json_schema)
    assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == ["weather", "time"]
    assert "maxItems" not in schema
    one = running.client().chat.completions.create(model="m", **asked, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    assert json.loads(channel.sent[1].params.structured.json_schema)["maxItems"] == 1


def test_choice_none_shows_no_tools(told):
    running, _ = told("hermes", CALLS)
    got = running.client().chat.completions.create(model="m", messages=ASK, tools=TOOLS, tool_choice="none")
    assert got.choices[0].message.tool_calls is None
    assert "<tool_call>" in got.choices[0].message.content


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


@pytest.mark.parametrize(
    ("form", "fields", "words"),
    [
        ("none", {"tools": TOOLS}, "way of calling them is not known"),
        ("hermes", {"tool_choice": "required"}, "there are no tools"),
        ("hermes", {"tools": [tool(), tool()]}, "Two tools are called 'f'"),
        (
            "hermes",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "names the function 'x'",
        ),
        ("hermes", {"tools": [tool(strict=True)]}, "strict"),
        ("hermes", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "form"),
        ("hermes", {"response_format": {"type": "json_schema"}}, "holds no schema"),
        (
            "hermes",
            {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
            "both say",
        ),
        ("hermes", {"extra_body": {"structured_outputs": {}}}, "None of the forms"),
        (
            "hermes",
            {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
            "regex and choice",
        ),
        ("hermes", {"extra_body": {"guided_json": "{"}}, "no JSON"),
        (
            "hermes",
            {
                "tools": [
                    tool("f", parameters={"$defs": {"d": {"type": "null"}}}),
                    tool("g", parameters={"$defs": {"d": {"type": "string"}}}),
                ],
                "tool_choice": "required",
            },
            "define 'd' differently",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_demanded(told, form, fields, words):
    running, channel = told(form)
    with pytest.raises(openai.BadRequestError, match=words):
        running.client().chat.completions.create(model="m", messages=ASK, **fields)
    assert not channel.sent


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "null"}},
                }
            },
            {"json_schema": '{"type": "null"}'},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json_schema": '{"type": "null"}'}),
        ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"guided_json": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
        ({"response_format": {"type": "text"}}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_forms_reach_the_engine(told, path, fields, expected):
    running, channel = told(text="<think>no thoughts")
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": ASK}
    answer = running.post(path, **base, **fields)
    assert answer.status_code == 200, answer.text
    made = channel.sent[0].params.structured
    if expected is None:
        assert made is None
        return
    assert {name: getattr(made, name) for name in expected} == expected
    choice = answer.json()["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == "<think>no thoughts"
