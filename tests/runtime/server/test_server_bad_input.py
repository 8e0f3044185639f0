"""Whatever comes in: a 4xx with a code and a sentence, and the next request is served."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import typing

import httpx2 as httpx
import openai
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from llmc.runtime.server import fields, requests

pytestmark = pytest.mark.pure

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
HELLO = [{"role": "user", "content": "hello"}]


def raw(running, body, path=COMPLETIONS, **headers):
    headers.setdefault("content-type", "application/json")
    return running.http.post(running.url + path, content=body, headers=headers)


def assert_refused(response, code, status=400, words=""):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["message"].count(".") >= 2
    return error


@pytest.fixture(autouse=True)
def still_serves(shared):
    yield
    assert shared.post(COMPLETIONS, prompt="fine", max_tokens=2).status_code == 200
    shared.wait_until_idle()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "request.malformed_json"),
        (b"{", "request.malformed_json"),
        (b"nonsense", "request.malformed_json"),
        (b'{"prompt": "a"} trailing', "request.malformed_json"),
        (b'{"prompt": "\xff\xfe"}', "request.malformed_json"),
        (b'{"prompt": "\\ud800"}', "request.malformed_json"),
        (b'{"prompt": "a", "temperature": NaN}', "request.malformed_json"),
        (b'{"prompt": "a", "temperature": Infinity}', "request.malformed_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "request.invalid_field"),
        (b"[1, 2]", "request.not_an_object"),
        (b'"text"', "request.not_an_object"),
        (b"[" * 100_000, "request.nesting"),
        (b'{"a":' * 100_000, "request.nesting"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_are_no_request(shared, body, code):
    assert_refused(raw(shared, body), code)


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({}, "request.missing_field", "The field prompt is missing"),
        ({"prompt": None}, "request.missing_field", "The field prompt is missing"),
        ({"prompt": ""}, "request.empty_prompt", "The prompt is empty"),
        ({"prompt": []}, "request.prompt", "empty list"),
        ({"prompt": [[]]}, "request.empty_prompt", "The prompt is empty"),
        ({"prompt": ["a", 1]}, "request.prompt", "mixes"),
        ({"prompt": 5}, "request.invalid_field", "prompt"),
        ({"prompt": {"a": 1}}, "request.invalid_field", "prompt"),
        ({"prompt": [29]}, "request.token_out_of_range", "Token 0 of the prompt is 29"),
        ({"prompt": [-1]}, "request.token_out_of_range", "is -1"),
        ({"prompt": [2**70]}, "request.token_out_of_range", "is 1180591620717411303424"),
        ({"prompt": [1] * 128}, "request.prompt_too_long", "has 128 tokens, and the context is 128"),
        ({"prompt": "a" * 500}, "request.prompt_too_long", "has 500 tokens, and the context is 128"),
        ({"prompt": "a", "max_tokens": 128}, "request.max_tokens", "behind a prompt of 1 tokens"),
        ({"prompt": "a", "max_tokens": 0}, "request.max_tokens", "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": -5}, "request.invalid_field", "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "request.max_tokens", "exceed the context of 128"),
        ({"prompt": "a", "max_tokens": "5"}, "request.invalid_field", "max_tokens"),
        ({"prompt": "a", "max_tokens": 5.5}, "request.invalid_field", "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "request.invalid_field", "temperature"),
        ({"prompt": "a", "temperature": 1e300}, "request.invalid_field", "temperature"),
        ({"prompt": "a", "temperature": 1e-9}, "request.temperature", "1e-09"),
        ({"prompt": "a", "temperature": True}, "request.invalid_field", "temperature"),
        ({"prompt": "a", "top_p": 0}, "request.invalid_field", "top_p"),
        ({"prompt": "a", "top_k": -2}, "request.invalid_field", "top_k"),
        ({"prompt": "a", "n": 0}, "request.invalid_field", "n"),
        ({"prompt": "a", "n": 100}, "request.too_many_sequences", "asks for 100 sequences"),
        ({"prompt": ["a"] * 65}, "request.too_many_sequences", "asks for 65 sequences"),
        ({"prompt": "a", "seed": -1}, "request.invalid_field", "seed"),
        ({"prompt": "a", "seed": 2**64}, "request.seed", "seed is 18446744073709551616"),
        ({"prompt": "a", "logprobs": 101}, "request.invalid_field", "logprobs"),
        ({"prompt": "a", "logprobs": True}, "request.invalid_field", "logprobs"),
        ({"prompt": "a", "stop": ["x"] * 65}, "request.stop", "65 strings"),
        ({"prompt": "a", "stop": [""]}, "request.stop", "at least one character"),
        ({"prompt": "a", "stop": [1]}, "request.invalid_field", "stop"),
        ({"prompt": "a", "stop_token_ids": [29]}, "request.stop_token_ids", "is 29"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "request.logit_bias", "token ids in decimal"),
        ({"prompt": "a", "logit_bias": {"29": 1}}, "request.logit_bias", "is 29"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "request.invalid_field", "logit_bias"),
        ({"prompt": "a", "min_tokens": 20}, "request.min_tokens", "max_tokens = 16"),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "request.stream_options",
            "stream is not",
        ),
        (
            {"prompt": "a", "stream": True, "stream_options": {"x": 1}},
            "request.invalid_field",
            "stream_options",
        ),
        ({"prompt": "a", "timeout_s": 0}, "request.invalid_field", "timeout_s"),
        ({"prompt": "a", "request_id": "a\nb"}, "request.invalid_field", "request_id"),
        ({"prompt": "a", "temprature": 1}, "request.unknown_field", "Did you mean temperature"),
        ({"prompt": "a", "x" * 5000: 1}, "request.unknown_field", "Leave it out"),
        ({"prompt": "a", "suffix": "b"}, "request.unsupported_field", "fill one in"),
        ({"prompt": "a", "best_of": 2}, "request.unsupported_field", "Send 1, or leave it out"),
        ({"prompt": "a", "best_of": True}, "request.unsupported_field", "best_of"),
        ({"prompt": "a", "guided_json": {"type": "mood"}}, "request.structured.json_schema", "mood"),
        ({"prompt": "a", "guided_regex": "("}, "request.structured.regex", "cannot be compiled"),
        ({"prompt": "a", "guided_grammar": "nonsense"}, "request.structured.grammar", "cannot be compiled"),
        ({"prompt": "a", "guided_whitespace_pattern": " "}, "request.unsupported_field", "one way only"),
        (
            {"prompt": "a", "truncate_prompt_tokens": 5},
            "request.unsupported_field",
            "Nothing is ever truncated",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_completions_that_cannot_be(shared, given, code, words):
    before = shared.metric("llmc:generation_tokens_total")
    error = assert_refused(raw(shared, json.dumps(given)), code, words=words)
    if code.split(".")[1] in ("invalid_field", "missing_field", "unknown_field", "unsupported_field"):
        assert error["param"] in [*given, "prompt", ("x" * 5000)[:100]]
    streamed = raw(shared, json.dumps({"stream": True, **given}))
    if "stream_options" not in given:
        assert_refused(streamed, code)
        assert shared.metric("llmc:generation_tokens_total") == before


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"messages": []}, "request.messages", "There are no messages"),
        ({"messages": "hello"}, "request.invalid_field", "messages"),
        ({"messages": [{"content": "x"}]}, "request.missing_field", "role"),
        ({"messages": [{"role": "user"}]}, "request.messages", "Message 0 has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "request.invalid_field", "content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "request.invalid_field", "mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "request.invalid_field",
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "evil", "content": "x"}]}, "request.chat_template", "No evil here"),
        ({"messages": HELLO, "top_logprobs": 2}, "request.top_logprobs", "logprobs is not true"),
        ({"messages": HELLO, "logprobs": 2}, "request.invalid_field", "logprobs"),
        (
            {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4},
            "request.max_completion_tokens",
            "",
        ),
        ({"messages": HELLO, "chat_template_kwargs": {"tools": []}}, "request.chat_template_kwargs", "tools"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "request.missing_field", "function"),
        ({"messages": HELLO, "tools": [TOOL]}, "request.tools", "is not known"),
        ({"messages": HELLO, "functions": [{"name": "f"}]}, "request.unsupported_field", "Use tools"),
        (
            {
                "messages": HELLO,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "mood"}},
                },
            },
            "request.structured.json_schema",
            "cannot be compiled",
        ),
        ({"messages": HELLO, "modalities": ["text", "audio"]}, "request.unsupported_field", '["text"]'),
        ({"messages": HELLO, "prompt": "x"}, "request.unknown_field", "prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_chats_that_cannot_be(shared, given, code, words):
    assert_refused(raw(shared, json.dumps(given), CHAT), code, words=words)


def test_a_model_without_a_template_says_so(serve):
    running = serve(template=None)
    with pytest.raises(openai.BadRequestError, match="This model has no chat template"):
        running.client().chat.completions.create(model="letters", messages=HELLO)


def test_unknown_models_and_routes(shared):
    assert_refused(shared.post(COMPLETIONS, model="gpt-5", prompt="a"), "model_not_found", 404, "gpt-5")
    with pytest.raises(openai.NotFoundError, match="letters"):
        shared.client().models.retrieve("other")
    assert_refused(shared.post("/v1/moderations", input="x"), "http.404", 404, "/v1/moderations")
    assert_refused(shared.post("/v1/embeddings", input="x"), "request.no_embeddings", 400, "letters")
    assert_refused(httpx.get(shared.url + COMPLETIONS), "http.405", 405)


def test_large_bodies_and_other_types(shared):
    big = json.dumps({"prompt": "a" * 10_000_000})
    assert_refused(raw(shared, big), "request.body_too_large", 413, "4194304")

    def endless():
        for _ in range(100):
            yield b"x" * 100_000

    assert_refused(raw(shared, endless()), "request.body_too_large", 413)
    assert_refused(raw(shared, b"a=b", **{"content-type": "text/plain"}), "request.content_type", 415)
    many = json.dumps({"prompt": [[1]] * 100_000})
    assert_refused(raw(shared, many), "request.too_many_sequences")


def test_token_routes_are_as_strict(shared):
    assert_refused(shared.post("/tokenize"), "request.prompt")
    assert_refused(shared.post("/tokenize", prompt="a", messages=HELLO), "request.prompt")
    assert_refused(shared.post("/tokenize", prompt="a", more=1), "request.unknown_field")
    assert_refused(shared.post("/detokenize", tokens=[29]), "request.token_out_of_range")
    assert_refused(shared.post("/detokenize", tokens="a"), "request.invalid_field")


def exchange(running, data, then=b""):
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        if then:
            connection.sendall(then)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\x16\x03\x01nonsense\r\n\r\n", 400, "http.malformed"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400, "http.malformed"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400, "http.malformed"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000, 431, "http.headers_too_large"),
        (b"GET /" + b"y" * 70_000, 431, "http.headers_too_large"),
    ],
    ids=["tls", "header", "length", "headers", "address"],
)
def test_what_is_hardly_http(shared, data, status, code):
    head, _, body = exchange(shared, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head.lower()
    assert_refused(httpx.Response(status, content=body), code, status)


def test_a_flood_of_headers_is_cut_off(shared):
    flood = b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 100) for n in range(2000))
    with contextlib.suppress(OSError):  # it may be cut off while it sends
        assert b" 431 " in exchange(shared, flood).split(b"\r\n")[0]


def test_connections_have_a_bound(serve):
    running = serve(max_connections=2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            held = stack.enter_context(httpx.Client())
            assert held.get(f"{running.url}/health").status_code == 200
        refused = stack.enter_context(httpx.Client()).get(f"{running.url}/health")
        assert_refused(refused, "server.connections", 503, "It takes 2 at a time")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert refused.headers["connection"] == "close"
    end = time.monotonic() + 5
    while running.post(COMPLETIONS, prompt="a", max_tokens=1).status_code == 503:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sockets_that_are_half_closed(shared):
    """In the middle of a body nothing is computed; behind a whole request it is let go, or answered."""
    body = json.dumps({"prompt": "hello", "max_tokens": 40}).encode()
    lines = (b"POST /v1/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json")
    head = b"\r\n".join((*lines, b"Content-Length: %d", b"", b""))
    before = shared.metric("llmc:generation_tokens_total")
    cut = exchange(shared, head % (len(body) + 20) + body)
    assert not cut or b" 4" in cut.split(b"\r\n")[0]
    shared.wait_until_idle()
    assert shared.metric("llmc:generation_tokens_total") == before
    whole = exchange(shared, head % len(body) + body)
    assert not whole or b" 200 " in whole.split(b"\r\n")[0]
    shared.wait_until_idle()


def test_others_are_served_meanwhile(serve):
    """One of each kind of bad input while a stream runs: it says what it says alone."""
    running = serve()
    asked = {"prompt": "hello", "max_tokens": 100, "temperature": 1, "seed": 4, "ignore_eos": True}
    expected = running.post(COMPLETIONS, **asked).json()["choices"][0]["text"]
    running.executor.delay_s = 0.01
    bad = [
        (COMPLETIONS, b"{", 400),
        (COMPLETIONS, json.dumps({"prompt": "a" * 10_000_000}), 413),
        (COMPLETIONS, json.dumps({"prompt": "a", "mood": 1}), 400),
        (COMPLETIONS, json.dumps({"prompt": 5}), 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "max_tokens": -(10**30)}), 400),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "model": "gpt-5"}), 404),
        (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400),
        (COMPLETIONS, json.dumps({"prompt": [29]}), 400),
        (CHAT, json.dumps({"messages": []}), 400),
        (CHAT, json.dumps({"messages": [{"role": "evil", "content": "x"}]}), 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "guided_json": {"type": "mood"}}), 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "stop": ["x"] * 65}), 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "n": 64, "max_tokens": 10**9}), 400),
    ]
    seen = []
    with running.http.stream("POST", running.url + COMPLETIONS, json={**asked, "stream": True}) as response:
        lines = response.iter_lines()
        told = [next(lines)]
        with httpx.Client(timeout=30) as other:
            headers = {"content-type": "application/json"}
            for path, body, _ in bad:
                seen.append(other.post(running.url + path, content=body, headers=headers).status_code)
        told += lines
    assert seen == [status for _, _, status in bad]
    events = [json.loads(line[6:]) for line in told if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_half_a_request_is_given_up(serve):
    running = serve(body_timeout_s=0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head + b'{"prompt"')
        assert b" 408 " in connection.recv(4096)


def test_every_field_of_the_client_is_in_the_table():
    for params, table in (
        (completion_create_params.CompletionCreateParamsBase, fields.COMPLETION_FIELDS),
        (chat_create_params.CompletionCreateParamsBase, fields.CHAT_FIELDS),
        (response_create_params.ResponseCreateParamsBase, fields.RESPONSES_FIELDS),
        (embedding_create_params.EmbeddingCreateParams, fields.EMBEDDING_FIELDS),
    ):
        assert set(typing.get_type_hints(params)) <= set(table)


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (requests.CompletionRequest, fields.COMPLETION_FIELDS),
        (requests.ChatRequest, fields.CHAT_FIELDS),
        (requests.ResponsesRequest, fields.RESPONSES_FIELDS),
        (requests.EmbeddingRequest, fields.EMBEDDING_FIELDS),
        (requests.TokenizeRequest, fields.TOKENIZE_FIELDS),
        (requests.DetokenizeRequest, fields.DETOKENIZE_FIELDS),
    ],
)
def test_what_is_honoured_is_what_the_request_holds(kind, table):
    honoured = {name for name, field in table.items() if field.use is fields.Use.HONOURED}
    assert honoured == set(kind.__struct_fields__)
    assert all(field.why for field in table.values() if field.use is not fields.Use.HONOURED)


def test_neutral_values_change_nothing(shared):
    plain = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "seed": 1}
    expected = shared.post(COMPLETIONS, **plain).json()["choices"]
    for name, field in fields.COMPLETION_FIELDS.items():
        if field.use is fields.Use.HONOURED:
            continue
        values = ["x"] if field.neutral is fields.ANY else [None, *field.neutral]
        for value in values:
            got = shared.post(COMPLETIONS, **plain, **{name: value})
            assert got.json().get("choices") == expected, (name, value)
