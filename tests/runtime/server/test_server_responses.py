"""/v1/responses through the real client: items, events, and what is refused."""

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

SAID = '<think>hm</think>\n\nWell. <tool_call>{"name": "time", "arguments": {"at": "Rome"}}</tool_call>'
TOOL = {"type": "function", "name": "time", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
def told(run_server):
    def start(text=SAID, **options):
        channel = scripted.ScriptedChannel(text, **options)
        model = ModelConfig(artifact="m", tool_format="hermes", reasoning_format="think")
        running = run_server(ServerConfig(port=0, models=(model,)), {"m": lambda _: channel})
        return running.client(), channel

    return start


def test_items_come_in_their_order(told):
    client, channel = told()
    got = client.responses.create(model="m", input="hello", tools=[TOOL], max_output_tokens=99)
    assert [item.type for item in got.output] == ["reasoning", "message", "function_call"]
    thought, message, call = got.output
    assert thought.content[0].text == "hm"
    assert message.content[0].text == got.output_text == "Well."
    assert (call.name, json.loads(call.arguments)) == ("time", {"at": "Rome"})
    assert (got.status, got.max_output_tokens) == ("completed", 99)
    assert got.usage.total_tokens == got.usage.input_tokens + got.usage.output_tokens
    assert 0 < got.usage.output_tokens_details.reasoning_tokens < got.usage.output_tokens
    assert channel.sent[0].params.max_tokens == 99


def test_events_add_up_to_the_whole(told):
    client, _ = told()
    asked = {"model": "m", "input": [{"role": "user", "content": "hello"}], "tools": [TOOL]}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    text = {"message": "", "reasoning": "", "function_call": ""}
    for event in events:
        if event.type == "response.output_item.added":
            kind = event.item.type
            assert event.item.status == "in_progress"
        elif event.type.endswith(".delta"):
            text[kind] += event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == text[kind]
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == text[kind]
        elif event.type == "response.output_item.done":
            assert event.item.status == "completed"
    assert text == {"message": "Well.", "reasoning": "hm", "function_call": '{"at": "Rome"}'}
    final = events[-1].response
    assert final.usage == whole.usage
    plain = [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    assert [item.model_dump(exclude={"id", "call_id"}) for item in final.output] == plain


def test_a_cut_answer_is_incomplete(told):
    client, _ = told("one two", reason=FinishReason.LENGTH)
    got = client.responses.create(model="m", input="hello")
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model="m", input="hello", stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_conversation_goes_on(told):
    """What an answer held can be sent back with what the tools said."""
    client, channel = told("fine")
    client.responses.create(
        model="m",
        instructions="be good",
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "short"}]},
            {"role": "user", "content": "hello"},
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "h"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "noon", "annotations": []}]},
            {"role": "user", "content": "bye"},
        ],
    )  # fmt: skip
    text = client.post(
        "../detokenize", cast_to=object, body={"tokens": list(channel.sent[0].prompt_token_ids)}
    )["prompt"]
    assert text == "s be good\ns short\nu hello\na \nt noon\na noon\nu bye\na "


def test_forms_and_forced_calls(told):
    client, channel = told('{"at": 1}')
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    assert client.responses.create(model="m", input="hello", text=form).output_text == '{"at": 1}'
    assert channel.sent[0].params.structured.json_schema == '{"type": "object"}'
    got = client.responses.create(
        model="m", input="hello", tools=[TOOL], tool_choice={"type": "function", "name": "time"}
    )
    assert (got.output[0].name, got.output[0].arguments) == ("time", '{"at": 1}')


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": []}, "no messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "not known here"),
        ({"input": [{"role": "user"}]}, r"input\[0\]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input_image",
        ),
        ({"input": "a", "previous_response_id": "resp_1"}, "stores nothing"),
        ({"input": "a", "store": True}, "stores nothing"),
        ({"input": "a", "background": True}, "client waits"),
        ({"input": "a", "truncation": "auto"}, "Nothing is ever truncated"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "web_search"),
        ({"input": "a", "extra_body": {"mood": 1}}, "mood"),
    ],
    ids=str,
)
def test_what_cannot_be_answered(told, fields, words):
    client, channel = told()
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(model="m", **fields)
    assert not channel.sent


def test_a_failure_behind_the_first_events_is_an_event(serve):
    running = serve()
    running.executor.delay_s = 0.01
    text = ""
    fields = {"input": "hello", "max_output_tokens": 90, "stream": True}
    with running.http.stream("POST", f"{running.url}/v1/responses", json=fields) as response:
        for line in response.iter_lines():
            text += line + "\n"
            if "output_text.delta" in line:
                running.executor.faults.on_collect = lambda plan: 1 / 0
    running.executor.faults.on_collect = None
    assert text.rstrip().splitlines()[-2] == "event: error"
    assert "engine.request_failed" in text
    assert "response.completed" not in text
