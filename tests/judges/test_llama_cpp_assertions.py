"""What the tests of llama.cpp's server ask of OpenAI's routes, as assertions on this server: over a bundled
model that was given a chat template."""

from __future__ import annotations

import concurrent.futures
import json

import httpx2 as httpx
import pytest

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}},
    "required": ["done"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "finish", "parameters": SCHEMA}}
HELLO = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
STORY = "Once upon a time there was a little"


@pytest.fixture(scope="module")
def url(chatty, serve_artifact):
    return serve_artifact(chatty)[0]


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=60) as client:
        yield client


@pytest.fixture
def ask(http, url):
    """A function from a route and fields to (status, body)."""

    def post(path, **fields):
        response = http.post(f"{url}{path}", json=fields)
        return response.status_code, response.json()

    return post


@pytest.fixture
def stream(http, url):
    """A function from a route and fields to the events of a stream, which must end with [DONE]."""

    def post(path, **fields):
        with http.stream("POST", f"{url}{path}", json={"stream": True, **fields}) as response:
            assert response.status_code == 200
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    return post


def text_of(ask, **fields):
    status, body = ask("/v1/completions", **{"prompt": STORY, "max_tokens": 16, **fields})
    assert status == 200
    return body["choices"][0]["text"]


def test_a_server_has_its_model_and_is_healthy(http, url):
    assert http.get(f"{url}/health").status_code == 200
    models = http.get(f"{url}/v1/models").json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["object"], model["id"]) == ("model", "stories")


@pytest.mark.parametrize("seeds", [(7, 7), (7, 8)], ids=["same", "different"])
def test_seeds_decide_what_is_sampled(ask, seeds):
    texts = [text_of(ask, temperature=1.0, seed=seed) for seed in seeds for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert (texts[0] == texts[2]) == (seeds[0] == seeds[1])


def test_no_seed_matters_without_temperature(ask):
    assert len({text_of(ask, temperature=0.0, seed=seed) for seed in range(4)}) == 1


def test_a_prompt_in_the_cache_gives_the_same(ask):
    prompt = STORY + " girl who liked to play in the park with her dog and her friends"
    assert len({text_of(ask, prompt=prompt, temperature=0.0) for _ in range(3)}) == 1


def test_many_at_a_time_get_what_each_gets_alone(ask):
    prompts = [f"{STORY} {word}" for word in ("girl", "boy", "dog", "cat", "bird", "car", "ball", "tree")]
    alone = [text_of(ask, prompt=prompt, temperature=0.0) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: text_of(ask, prompt=prompt, temperature=0.0), prompts))
    assert together == alone
    status, body = ask("/v1/completions", prompt=prompts, max_tokens=16, temperature=0.0)
    assert status == 200
    assert [choice["text"] for choice in body["choices"]] == alone


def test_a_stop_text_is_not_shown(ask):
    whole = text_of(ask, temperature=0.0)
    status, body = ask("/v1/completions", prompt=STORY, max_tokens=16, temperature=0.0, stop=[whole[4:7]])
    assert status == 200
    assert body["choices"][0]["text"] == whole[: whole.index(whole[4:7])]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_prompt_beyond_the_context_is_refused_with_its_length(ask, stream):
    for path, fields in (
        ("/v1/completions", {"prompt": "little " * 600}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "little " * 600}]}),
    ):
        for more in ({}, {"stream": True}):
            status, body = ask(path, **fields, **more)
            assert (status, body["error"]["code"]) == (400, "request.prompt_too_long")
            assert "512" in body["error"]["message"]


def test_a_chat_ends_where_it_was_told_to(ask):
    status, body = ask("/v1/chat/completions", messages=HELLO, max_tokens=8, temperature=0.0, ignore_eos=True)
    assert status == 200
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 8


def test_a_streamed_chat_begins_with_a_role_and_ends_once(ask, stream):
    fields = {"messages": HELLO, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    events = stream("/v1/chat/completions", **fields, stream_options={"include_usage": True})
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    *events, last = events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    ends = [event["choices"][0]["finish_reason"] for event in events]
    assert ends == [None] * (len(events) - 1) + ["length"]
    _, whole = ask("/v1/chat/completions", **fields)
    said = "".join(delta.get("content") or "" for delta in deltas)
    assert said == whole["choices"][0]["message"]["content"]


def test_logprobs_are_of_the_text(ask):
    status, body = ask(
        "/v1/chat/completions", messages=HELLO, max_tokens=5, temperature=0.0, logprobs=True, top_logprobs=10
    )
    assert status == 200
    told = body["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in told) == body["choices"][0]["message"]["content"]
    for each in told:
        assert bytes(each["bytes"]).decode(errors="replace") == each["token"]
        values = [top["logprob"] for top in each["top_logprobs"]]
        assert len(values) == 10
        assert values == sorted(values, reverse=True)
        assert each["logprob"] == values[0] <= 0.0


def test_a_token_that_is_biased_away_does_not_come(ask):
    plain = text_of(ask, temperature=0.0)
    _, body = ask("/tokenize", prompt=plain, add_special_tokens=False)
    banned = {str(token): -100 for token in body["tokens"]}
    status, body = ask(
        "/v1/completions",
        prompt=STORY,
        max_tokens=16,
        temperature=0.0,
        logit_bias=banned,
        return_token_ids=True,
    )
    assert status == 200
    assert not set(map(str, body["choices"][0]["token_ids"])) & set(banned)


@pytest.mark.parametrize(
    ("form", "holds"),
    [
        ({"type": "json_object"}, lambda told: isinstance(told, dict)),
        (
            {"type": "json_schema", "json_schema": {"name": "done", "schema": SCHEMA}},
            lambda told: told in ({"done": True}, {"done": False}),
        ),
    ],
    ids=["object", "schema"],
)
def test_forms_hold(ask, form, holds):
    for seed in range(3):
        status, body = ask(
            "/v1/chat/completions",
            messages=HELLO,
            max_tokens=100,
            temperature=1.0,
            seed=seed,
            response_format=form,
        )
        assert status == 200
        choice = body["choices"][0]
        if choice["finish_reason"] == "stop":
            assert holds(json.loads(choice["message"]["content"]))
        else:
            assert form["type"] == "json_object", "a form with bounds ends by itself"


@pytest.mark.parametrize(
    "form", [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 42}}}, {"type": "sound"}]
)
def test_forms_that_cannot_be_are_refused(ask, form):
    status, body = ask("/v1/chat/completions", messages=HELLO, response_format=form)
    assert status == 400
    assert body["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [None, {}, "hello", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}]],
    ids=str,
)
def test_messages_that_cannot_be_are_refused(ask, messages):
    status, body = ask("/v1/chat/completions", messages=messages)
    assert status == 400
    assert body["error"]["code"].startswith("request.")


def test_a_demanded_call_comes_and_a_forbidden_one_does_not(ask):
    fields = {"messages": HELLO, "tools": [TOOL], "max_tokens": 200, "temperature": 1.0, "seed": 1}
    status, body = ask("/v1/chat/completions", **fields, tool_choice="required", parallel_tool_calls=False)
    assert status == 200
    choice = body["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert not choice["message"].get("content")
    assert call["id"]
    assert call["function"]["name"] == "finish"
    assert isinstance(json.loads(call["function"]["arguments"])["done"], bool)
    _, body = ask("/v1/chat/completions", **fields, tool_choice="none")
    assert not body["choices"][0]["message"].get("tool_calls")


@pytest.mark.parametrize("text", ["What is the capital of France?", " two  blanks", "日本語 ü \U0001f600"])
def test_tokens_give_the_text_back(ask, text):
    status, body = ask("/tokenize", prompt=text, add_special_tokens=False)
    assert status == 200
    assert body["count"] == len(body["tokens"]) > 0
    assert ask("/detokenize", tokens=body["tokens"]) == (200, {"prompt": text})
