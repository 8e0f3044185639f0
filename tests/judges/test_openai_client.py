"""The real openai client, checking strictly, at every route that OpenAI has too, and a plain client at the
others: over a bundled model that was given a chat template."""

from __future__ import annotations

import json

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def url(chatty, serve_artifact):
    return serve_artifact(chatty)[0]


@pytest.fixture
def client(url):
    return client_of(url, True)


def client_of(url, is_strict):
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=is_strict)


def test_completions(client, url):
    """The client's type of a completion has no room for the null that `finish_reason` is, at OpenAI as well,
    in all chunks of a stream but the last: there it does not check."""
    create = client.completions.create
    asked = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1, "seed": 3}
    whole = create(**asked, n=2, logprobs=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage.completion_tokens == 24
    assert len(whole.choices[0].logprobs.tokens) == 12
    streamed = client_of(url, False).completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)
    with pytest.raises(openai.BadRequestError) as caught:
        create(**{**asked, "max_tokens": 5000})
    assert (caught.value.code, caught.value.param) == ("request.max_tokens", "max_tokens")


def test_chat(client):
    create = client.chat.completions.create
    asked = {"model": "stories", "messages": HELLO, "max_completion_tokens": 12, "seed": 3, "temperature": 1}
    whole = create(**asked, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 12
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_chat_with_a_form_and_with_a_demanded_call(client):
    create = client.chat.completions.create
    asked = {"model": "stories", "messages": HELLO, "max_completion_tokens": 150, "temperature": 1}
    formed = create(**asked, seed=1, response_format=FORMAT)
    assert formed.choices[0].finish_reason == "stop"
    assert set(json.loads(formed.choices[0].message.content)) == {"name", "age"}
    demanded = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "note"}}}
    (call,) = create(**asked, seed=2, **demanded).choices[0].message.tool_calls
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("note", {"name", "age"})
    pieces = [
        delta.function.arguments or ""
        for chunk in create(**asked, seed=2, **demanded, stream=True)
        for choice in chunk.choices
        for delta in choice.delta.tool_calls or ()
    ]
    assert "".join(pieces) == call.function.arguments


def test_responses(client):
    asked = {"model": "stories", "input": "Tell me a story.", "max_output_tokens": 12, "temperature": 1}
    seeded = {"extra_body": {"seed": 3}}
    whole = client.responses.create(**asked, **seeded)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.output_text
    events = list(client.responses.create(**asked, **seeded, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_models_and_what_a_text_model_cannot_do(client):
    (card,) = client.models.list().data
    assert client.models.retrieve("stories") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="stories", input="text")
    assert caught.value.code == "request.no_embeddings"


def test_the_other_routes(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        tokens = http.post(
            "/tokenize", json={"prompt": "Once upon a time", "add_special_tokens": False}
        ).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "Once upon a time"
        chat = http.post("/tokenize", json={"messages": HELLO}).json()
        assert chat["count"] == len(chat["tokens"]) > len(tokens)
        for path, kind in (
            ("/health", "application/json"),
            ("/ready", "application/json"),
            ("/metrics", "text/plain"),
            ("/status.json", "application/json"),
            ("/", "text/html"),
        ):
            got = http.get(path)
            assert (got.status_code, got.headers["content-type"].startswith(kind)) == (200, True), path
        known = {
            *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/models"),
            *("/v1/models/{name}", "/tokenize", "/detokenize", "/health", "/ready"),
        }
        assert set(http.get("/openapi.json").json()["paths"]) >= known
