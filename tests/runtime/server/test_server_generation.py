"""What the routes answer, through the real client: texts, streams, choices, logprobs, usage."""

from __future__ import annotations

import itertools
import threading

import pytest

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.params import SamplingParams

pytestmark = pytest.mark.pure


def complete(running, prompt="hello", **fields):
    """The client's own types allow no null for finish_reason, which every stream has until its end, nor for
    the logprob of the first token of an echo, which has none: these alone are read without strictness."""
    loose = fields.get("stream") or fields.get("echo")
    return running.client(strict=not loose).completions.create(
        model="letters", prompt=prompt, **{"max_tokens": 12, "temperature": 0, **fields}
    )


def chat(running, content="hello", **fields):
    return running.client().chat.completions.create(
        model="letters",
        messages=[{"role": "user", "content": content}],
        **{"max_tokens": 12, "temperature": 0, **fields},
    )


def test_a_completion_is_what_the_model_says(shared):
    got = complete(shared)
    own = shared.llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=12))[0]
    assert got.choices[0].text == own.text
    assert got.choices[0].finish_reason == own.finish_reason.value
    assert got.model == "letters"
    assert got.id.startswith("cmpl-")
    assert got.usage.prompt_tokens == 5
    assert got.usage.completion_tokens == len(own.token_ids)
    assert got.usage.total_tokens == 5 + len(own.token_ids)


def test_all_forms_of_a_prompt(shared):
    text = complete(shared, "abc").choices[0].text
    assert complete(shared, [0, 1, 2]).choices[0].text == text
    several = complete(shared, ["abc", "xyz"])
    assert [each.index for each in several.choices] == [0, 1]
    assert several.choices[0].text == text
    assert several.usage.prompt_tokens == 6
    ids = complete(shared, [[0, 1, 2], [23, 24, 25]])
    assert [each.text for each in ids.choices] == [each.text for each in several.choices]


def test_defaults_and_effective_parameters_are_shown(shared):
    got = shared.post("/v1/completions", prompt="hello").json()
    assert got["sampling"]["max_tokens"] == 16
    assert got["sampling"]["temperature"] == 0.0
    assert isinstance(got["sampling"]["seed"], int)
    seeded = {"prompt": "hello", "temperature": 1.0, "max_tokens": 30, "ignore_eos": True}
    first = shared.post("/v1/completions", **seeded).json()
    again = shared.post("/v1/completions", **seeded, seed=first["sampling"]["seed"]).json()
    assert again["choices"] == first["choices"]
    assert (
        shared.post("/v1/completions", prompt="a", max_tokens=1, request_id="mine").json()["id"]
        == "cmpl-mine"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1, "seed": 5},
        {"logprobs": 2},
        {"logprobs": 0, "echo": True},
        {"logprobs": 3, "echo": True, "n": 2, "temperature": 1, "seed": 9},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"stop": ["k", "q"], "extra_body": {"return_token_ids": True}},
        {"prompt": ["abc", "hello hello"], "n": 2, "temperature": 1, "seed": 1, "echo": True, "logprobs": 1},
    ],
    ids=str,
)
def test_a_streamed_completion_is_the_whole_one(shared, fields):
    whole = complete(shared, **fields)
    joined = {
        choice.index: {"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice in whole.choices
    }
    usage = None
    stream = complete(shared, **fields, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts = joined[choice.index]
            assert "finish_reason" not in parts, "a choice spoke after its ending"
            parts["text"] += choice.text
            if choice.logprobs:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    parts[name] += getattr(choice.logprobs, name)
            if choice.finish_reason:
                parts["finish_reason"] = choice.finish_reason
    for choice in whole.choices:
        parts = joined[choice.index]
        assert parts["text"] == choice.text
        assert parts["finish_reason"] == choice.finish_reason
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert parts[name] == getattr(choice.logprobs, name)
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_legacy_logprobs_are_in_the_shape_that_harnesses_read(shared):
    """Echo, one token, one alternative: the request that scores a text."""
    prompt = [7, 4, 11, 11, 14, 26, 22]
    got = complete(shared, prompt, echo=True, logprobs=1, max_tokens=1, seed=1234)
    told = got.choices[0].logprobs
    assert got.choices[0].text.startswith("hello w")
    assert told.tokens[:7] == list("hello w")
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 8
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert told.text_offset == list(range(8))
    own = shared.llm.generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=True)
    )[0]
    assert told.token_logprobs[1:7] == [each.logprob for each in own.prompt_logprobs]
    for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert value <= max(top.values()) <= 0
        assert value in top.values()


def test_echo_without_output_is_the_prompt_alone(shared):
    got = complete(shared, "abc", echo=True, max_tokens=0, logprobs=2)
    assert got.choices[0].text == "abc"
    assert got.choices[0].finish_reason == "length"
    assert got.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert got.usage.completion_tokens == 0


def test_stops_and_token_ids(shared):
    plain = complete(shared, max_tokens=20, extra_body={"ignore_eos": True})
    stop = plain.choices[0].text[5:8]
    got = complete(
        shared, max_tokens=20, stop=stop, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    choice = got.choices[0]
    assert choice.text == plain.choices[0].text[: plain.choices[0].text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    assert choice.prompt_token_ids == [7, 4, 11, 11, 14]
    assert got.usage.completion_tokens == len(choice.token_ids)


def test_logit_bias_forces_a_token(shared):
    got = complete(shared, max_tokens=5, logit_bias={"25": 100})
    assert got.choices[0].text == "zzzzz"


def test_chat_follows_the_models_template(shared):
    got = chat(shared, "hello")
    own = shared.llm.chat(
        [{"role": "user", "content": "hello"}], SamplingParams(temperature=0.0, max_tokens=12)
    )
    assert got.choices[0].message.content == own.text
    assert got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len("u hello\na ")
    parts = shared.client().chat.completions.create(
        model="letters",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_completion_tokens=12,
        temperature=0,
    )
    assert parts.choices[0].message.content == own.text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1, "seed": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"logprobs": True, "stop": "e"},
    ],
    ids=str,
)
def test_a_streamed_chat_is_the_whole_one(shared, fields):
    whole = chat(shared, **fields)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    logprobs = {index: [] for index in texts}
    roles, ends, usage = {}, {}, None
    for chunk in chat(shared, **fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                assert choice.index not in roles
                roles[choice.index] = choice.delta.role
            if choice.logprobs:
                logprobs[choice.index] += choice.logprobs.content
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert ends[choice.index] == choice.finish_reason
        assert roles[choice.index] == "assistant"
        assert logprobs[choice.index] == (choice.logprobs.content if choice.logprobs else [])
    assert usage == whole.usage


def test_continuous_usage_counts_up(shared):
    stream = complete(
        shared,
        stream=True,
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == complete(shared).usage.completion_tokens


def test_the_usage_tells_what_became_of_drafts(serve, shared):
    assert complete(shared).usage.completion_tokens_details is None
    running = serve(runtime=RuntimeConfig(speculation="ngram", ngram_min=1))
    fields = {"prompt": "abcabcabcabc", "max_tokens": 60, "temperature": 0.3, "seed": 2, "n": 3}
    options = {"ignore_eos": True}
    whole = complete(running, **fields, extra_body=options).usage
    stats = running.llm.engine.stats
    told = whole.completion_tokens_details
    assert told.accepted_prediction_tokens == sum(stats.accepted_at) > 0
    assert told.rejected_prediction_tokens == sum(stats.drafted_at) - sum(stats.accepted_at) > 0
    *_, last = complete(
        running, **fields, extra_body=options, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.completion_tokens_details == told
    text = complete(running, **fields, extra_body=options).choices[0].text
    cut = complete(running, **fields, stop=[text[1:3]], extra_body=options)
    told = cut.usage.completion_tokens_details
    assert told.accepted_prediction_tokens <= cut.usage.completion_tokens
    hidden = complete(running, "abcabc", echo=True, max_tokens=0, logprobs=0).usage.completion_tokens_details
    assert (hidden.accepted_prediction_tokens, hidden.rejected_prediction_tokens) == (0, 0)


def test_sixteen_at_a_time_say_what_each_says_alone(shared):
    def ask(seed):
        return complete(shared, "once", seed=seed, temperature=1, max_tokens=40).choices[0].text

    alone = [ask(seed) for seed in range(16)]
    together = [None] * 16

    def ask_into(seed):
        together[seed] = ask(seed)

    threads = [threading.Thread(target=ask_into, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) == 16


def test_models_and_tokens(shared):
    client = shared.client()
    assert [model.id for model in client.models.list()] == ["letters"]
    assert client.models.retrieve("letters").max_model_len == 128
    got = shared.post("/tokenize", prompt="a b", return_token_strs=True).json()
    assert got == {"count": 3, "max_model_len": 128, "tokens": [0, 26, 1], "token_strs": ["a", " ", "b"]}
    messages = [{"role": "user", "content": "hi"}]
    got = shared.post("/tokenize", model="letters", messages=messages).json()
    assert shared.post("/detokenize", tokens=got["tokens"]).json() == {"prompt": "u hi\na "}
    bare = shared.post("/tokenize", messages=messages, add_generation_prompt=False).json()
    assert shared.post("/detokenize", tokens=bare["tokens"]).json() == {"prompt": "u hi\n"}


def test_a_cached_prefix_is_told(serve):
    running = serve()
    prompt = "the same start of all prompts "
    for expected, ending in zip((0, 28), "xy", strict=True):
        got = complete(running, prompt + ending)
        assert got.usage.prompt_tokens_details.cached_tokens == expected
    assert running.metric("llmc:prefix_cache_hits_total") == 28
    assert running.metric("llmc:prefix_cache_queries_total") == 2 * len(prompt) + 2


def test_a_model_without_a_tokenizer_takes_ids(serve):
    running = serve(tokenizer=False)
    got = running.post(
        "/v1/completions", prompt=[1, 2], max_tokens=4, return_token_ids=True, logprobs=1
    ).json()
    assert len(got["choices"][0]["token_ids"]) == 4
    assert got["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    got = running.post("/v1/completions", prompt="text")
    assert (got.status_code, got.json()["error"]["code"]) == (400, "request.no_tokenizer")


def test_pairs_of_parameters_do_not_disturb_each_other(shared):
    """Every pair of options gives the text that the engine gives for the same parameters."""
    options = {"n": 2, "stop": "m", "logprobs": 1, "echo": True}
    plain = complete(shared).choices[0].text
    for pair in itertools.combinations(options, 2):
        got = complete(shared, **{name: options[name] for name in pair}).choices[0].text
        expected = plain.split("m")[0] if "stop" in pair else plain
        assert got == ("hello" if "echo" in pair else "") + expected
