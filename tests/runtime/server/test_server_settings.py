"""The configuration file: many models, aliases, fallbacks, and what is refused at the start."""

from __future__ import annotations

from pathlib import Path

import jsonschema_rs
import msgspec
import pytest
import yaml

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import simulated_caps
from llmc.runtime.server.config import ModelConfig, ServerConfig, config_schema, read_config
from llmc.runtime.server.models import runtime_config, with_artifacts
from llmc.spec.errors import UsageError

pytestmark = pytest.mark.pure

FILE = """
port: 0
vllm_metrics: true
models:
  - artifact: big.llmc
    name: large
    aliases: [gpt-large, default]
    fallback: little
    fallback_on: [overload]
    max_requests: 4
    channel: process
  - artifact: small/little.llmc
    tool_format: hermes
"""


def test_a_file_names_models_and_the_schema_agrees(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(FILE)
    config = read_config(file)
    assert [model.served_name for model in config.models] == ["large", "little"]
    assert config.models[0].aliases == ("gpt-large", "default")
    assert jsonschema_rs.is_valid(config_schema(), yaml.safe_load(FILE))
    for wrong in ("models: [{name: x}]", "models: [{artifact: a, mood: x}]", "prot: 1", "port: -1"):
        file.write_text(wrong)
        assert not jsonschema_rs.is_valid(config_schema(), yaml.safe_load(wrong))
        with pytest.raises(UsageError):
            read_config(file)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("[{artifact: a/x}, {artifact: b/x.llmc}]", "Two artifacts are called x"),
        ("[{artifact: x, aliases: [y]}, {artifact: y}]", "Two artifacts are called y"),
        ("[{artifact: x, aliases: [x]}]", "called x"),
        ("[{artifact: x, fallback: z}]", "no model of that name"),
        ("[{artifact: x, fallback: x}]", "leads back"),
        ("[{artifact: x, fallback: y}, {artifact: y, fallback: x}]", "leads back"),
        ("[{artifact: x, fallback_on: [boredom]}]", "fallback_on"),
    ],
)
def test_models_that_do_not_fit_together(tmp_path, models, words):
    file = tmp_path / "server.yaml"
    file.write_text(f"models: {models}\n")
    with pytest.raises(UsageError, match=words):
        read_config(file)


def test_artifacts_of_the_command_line_join_those_of_the_file():
    config = ServerConfig(models=(ModelConfig(artifact="a.llmc"),))
    names = [model.served_name for model in with_artifacts(config, [Path("b.llmc")]).models]
    assert names == ["a", "b"]
    named = with_artifacts(ServerConfig(served_name="mine"), [Path("b.llmc")])
    assert named.models[0].served_name == "mine"
    with pytest.raises(UsageError, match="nothing to serve"):
        with_artifacts(ServerConfig(), [])
    with pytest.raises(UsageError, match="One name was given for 2"):
        with_artifacts(ServerConfig(served_name="mine"), [Path("a"), Path("b")])


def test_a_model_has_settings_of_its_own():
    config = ServerConfig(max_requests=8, timeout_s=5.0, max_waiting=3)
    own = runtime_config(ModelConfig(artifact="a", max_requests=2), config)
    assert (own.max_requests, own.timeout_s, own.max_waiting) == (2, 5.0, 5)
    assert runtime_config(ModelConfig(artifact="a"), config).max_requests == 8
    turns = ServerConfig(fairness=False, long_prompt_tokens=512, long_share=0.25, max_wait_s=60.0)
    own = runtime_config(ModelConfig(artifact="a", long_share=0.75), turns)
    assert (own.fairness, own.long_prompt_tokens, own.long_share, own.max_wait_s) == (False, 512, 0.75, 60.0)


@pytest.fixture
def with_fallback(run_server):
    """`small` has room for one request of 32 tokens and falls back to `large`."""
    models = (
        ModelConfig(artifact="small", aliases=("tiny",), fallback="large"),
        ModelConfig(artifact="large"),
    )
    config = ServerConfig(port=0, max_waiting=0, models=models, vllm_metrics=True)
    sizes = {
        "small": (simulated_caps(max_context=32, max_rows=1), RuntimeConfig(max_requests=1)),
        "large": (simulated_caps(max_context=128), RuntimeConfig(max_requests=2)),
    }
    return run_server(config, {"small": plain, "large": plain}, sizes)


def plain(channel):
    return channel


def test_aliases_and_fallbacks(with_fallback):
    running = with_fallback
    post = running.post
    assert post("/v1/completions", model="tiny", prompt="a", max_tokens=1).json()["model"] == "small"
    assert [each["id"] for each in running.http.get(f"{running.url}/v1/models").json()["data"]] == [
        "small",
        "tiny",
        "large",
    ]
    long = post("/v1/completions", model="small", prompt="a" * 60, max_tokens=2)
    assert (long.status_code, long.json()["model"]) == (200, "large")
    wide = post("/v1/completions", model="small", prompt="a", max_tokens=60)
    assert (wide.status_code, wide.json()["model"]) == (200, "large")
    plain = post("/v1/completions", model="large", prompt="a" * 60, max_tokens=2, seed=1).json()
    again = post("/v1/completions", model="small", prompt="a" * 60, max_tokens=2, seed=1).json()
    assert again["choices"] == plain["choices"]
    assert running.metric("llmc:request_fallbacks_total", model_name="small", reason="long_prompt") == 3
    too_long = post("/v1/completions", model="small", prompt="a" * 200)
    assert too_long.json()["error"]["code"] == "request.prompt_too_long"
    two = post("/v1/completions", model="small", prompt=["a", "b"], max_tokens=2)
    assert (two.status_code, two.json()["model"]) == (200, "large")
    three = post("/v1/completions", model="small", prompt=["a", "b", "c"], max_tokens=2)
    assert (three.status_code, three.json()["error"]["code"]) == (503, "server.overloaded")
    assert int(three.headers["retry-after"]) >= 1
    assert running.metric("llmc:request_fallbacks_total", reason="overload") == 1
    text = running.http.get(f"{running.url}/metrics").text
    assert 'vllm:prompt_tokens_total{model_name="large"}' in text
    assert "vllm:request_queue_time_seconds_bucket" in text
    assert "vllm:engine_steps" not in text


def test_the_schema_knows_every_setting():
    schema = config_schema()
    for kind in (ServerConfig, ModelConfig):
        definition = schema["$defs"][kind.__name__]
        assert definition["additionalProperties"] is False
        assert set(definition["properties"]) == set(kind.__struct_fields__)
    assert msgspec.convert({}, ServerConfig) == ServerConfig()
