"""The response cache through the server: the same answers again, whole and streamed, and true numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.server.config import ModelConfig, ServerConfig, read_config
from llmc.runtime.server.models import runtime_config

pytestmark = pytest.mark.pure

ASK = {"prompt": "hello there", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
CACHING = RuntimeConfig(response_cache_bytes=1 << 20)


def lasting(body):
    """An answer without its name and time; the usage tells how much of the prompt was cached, apart."""
    return {name: value for name, value in body.items() if name not in ("id", "created", "usage", "sampling")}


def events(running, path, **fields):
    with running.http.stream("POST", running.url + path, json={**fields, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [lasting(json.loads(line)) for line in lines[:-1]]


def joined(chunks):
    return "".join(each["choices"][0]["text"] for each in chunks if each["choices"])


@pytest.mark.parametrize("extra", [{}, {"temperature": 1, "seed": 3, "n": 2, "logprobs": 2, "stop": ["e"]}])
def test_whole_answers_and_streams_are_the_same_again(serve, extra):
    running = serve(runtime=CACHING)
    asked = {**ASK, **extra}
    first = running.post("/v1/completions", **asked)
    num_steps = running.llm.engine.stats.num_steps
    again = running.post("/v1/completions", **asked)
    assert lasting(again.json()) == lasting(first.json())
    assert running.llm.engine.stats.num_steps == num_steps
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert usage["completion_tokens"] == first.json()["usage"]["completion_tokens"]
    if not extra:
        assert joined(events(running, "/v1/completions", **asked)) == first.json()["choices"][0]["text"]
    assert running.llm.engine.stats.num_steps == num_steps


def test_drawn_seeds_are_not_kept_and_greedy_is_without_one(serve):
    running = serve(runtime=CACHING)
    sampled = {**ASK, "temperature": 1}
    one, other = (running.post("/v1/completions", **sampled).json() for _ in range(2))
    assert one["choices"][0]["text"] != other["choices"][0]["text"]
    assert running.llm.engine.stats.responses.num_responses == 0
    for _ in range(2):
        running.post("/v1/completions", **ASK)
    assert running.metric("llmc:response_cache_hits_total") == 1
    assert running.metric("llmc:response_cache_misses_total") == 1
    assert running.metric("llmc:response_cache_bytes") == running.llm.engine.stats.responses.num_bytes > 0
    assert running.metric("llmc:prefix_cache_queries_total") == 3 * len("hello there")
    assert running.metric("llmc:generation_tokens_total") == 4 * 20
    (model,) = running.http.get(f"{running.url}/status.json").json()["models"]
    assert (model["response_hit_rate"], model["response_hits"], model["response_misses"]) == (0.5, 1, 1)
    assert model["response_bytes"] > 0


def test_every_prompt_of_a_request_and_chats_have_answers_of_their_own(serve):
    running = serve(runtime=CACHING)
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}
    assert (
        running.post("/v1/chat/completions", **chat).json()["choices"]
        == (running.post("/v1/chat/completions", **chat).json()["choices"])
    )
    running.post("/v1/completions", **{**ASK, "prompt": "ab"})
    two = running.post("/v1/completions", **{**ASK, "prompt": ["ab", "cd"]}).json()
    assert (running.llm.engine.stats.responses.num_hits, len(two["choices"])) == (2, 2)
    details = two["usage"]["prompt_tokens_details"]
    assert (details["cached_tokens"], two["usage"]["prompt_tokens"]) == (2, 4)


def test_the_setting_reaches_the_engine(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "response_cache_bytes: 1000\nmodels: [{artifact: a, response_cache_bytes: 0}, {artifact: b}]"
    )
    config = read_config(file)
    assert [runtime_config(each, config).response_cache_bytes for each in config.models] == [0, 1000]
    assert runtime_config(ModelConfig(artifact="a"), ServerConfig()).response_cache_bytes == 0
    command = [sys.executable, "-m", "llmc.cli", "serve", "none.llmc", "--response-cache", "-5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "response_cache_bytes" in done.stderr
