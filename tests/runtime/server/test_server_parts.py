"""Parts by themselves: admission arithmetic, messages as bytes, settings, logs, the OpenAPI document."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.admission import EngineLimits
from llmc.runtime.outputs import StreamChunk
from llmc.runtime.params import SamplingParams
from llmc.runtime.protocol import TokenLogprob
from llmc.runtime.request import FinishReason
from llmc.runtime.server import messages
from llmc.runtime.server.backlog import MAX_RETRY_S, MIN_RETRY_S, Backlog
from llmc.runtime.server.config import ModelConfig, ServerConfig, read_config
from llmc.runtime.server.errors import ServingError
from llmc.runtime.server.fields import CHAT_FIELDS, COMPLETION_FIELDS, Use
from llmc.runtime.server.logs import JsonFormatter
from llmc.runtime.server.metric_table import METRICS, PREFIX
from llmc.runtime.server.openapi import openapi_document
from llmc.spec.errors import UsageError

pytestmark = pytest.mark.pure
SERVING_DOC = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.floats(0, 5)), max_size=40))
def test_the_backlog_never_exceeds_its_bounds_and_balances(events):
    clock = Clock()
    backlog = Backlog(6, 4, clock)
    places = []
    for key, count, seconds in events:
        clock.now_s += seconds
        own = sum(place.num_sequences for place in places if place.key == key)
        total = sum(place.num_sequences for place in places)
        if own + count <= 4 and total + count <= 6:
            places.append(backlog.enter(key, count))
            continue
        with pytest.raises(ServingError) as refused:
            backlog.enter(key, count)
        assert refused.value.status == (429 if own + count > 4 else 503)
        assert MIN_RETRY_S <= refused.value.retry_after_s <= MAX_RETRY_S
        backlog.leave(places.pop(0))
        assert backlog.num_sequences == sum(place.num_sequences for place in places) <= 6
    for place in places:
        backlog.leave(place)
        backlog.leave(place)
    assert backlog.num_sequences == 0


def test_the_advice_is_the_backlog_over_the_rate():
    clock = Clock()
    backlog = Backlog(10, None, clock)
    places = [backlog.enter("", 1) for _ in range(10)]
    with pytest.raises(ServingError) as first:
        backlog.enter("", 1)
    assert first.value.retry_after_s == MIN_RETRY_S
    for place in places[:5]:
        clock.now_s += 10.0
        backlog.leave(place)
    for _ in range(5):
        backlog.enter("", 1)
    with pytest.raises(ServingError) as later:
        backlog.enter("", 3)
    assert later.value.retry_after_s == pytest.approx(30.0)


def test_idle_time_does_not_slow_the_advice():
    clock = Clock()
    backlog = Backlog(1, None, clock)
    for _ in range(4):
        place = backlog.enter("", 1)
        clock.now_s += 5.0
        backlog.leave(place)
        clock.now_s += 1000.0
    backlog.enter("", 1)
    with pytest.raises(ServingError) as refused:
        backlog.enter("", 1)
    assert refused.value.retry_after_s == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            messages.Generate(
                request_id="r1",
                prompt_token_ids=(1, 2),
                params=SamplingParams(max_tokens=3, stop=("a",), logit_bias={5: -1.5}, seed=2**64 - 1),
                timeout_s=1.5,
                owner="alice",
            ),
            messages.Command,
        ),
        (messages.Abort(request_id="r1"), messages.Command),
        (
            messages.Said(
                StreamChunk(
                    request_id="r1",
                    text="é",
                    token_ids=(1,),
                    logprobs=(TokenLogprob(token_id=1, logprob=-0.5, rank=0, top=((1, -0.5), (2, -3.0))),),
                    finish_reason=FinishReason.STOP,
                    stop_reason="a",
                )
            ),
            messages.Event,
        ),
        (messages.Failed(request_id="r1", status=400, code="c", what="w", why="y", fix="f"), messages.Event),
        (
            messages.EngineFacts(
                executor="x",
                limits=EngineLimits(
                    vocab_size=1, max_requests=2, max_step_tokens=3, max_model_len=4, max_waiting=5
                ),
                defaults=SamplingParams(),
            ),
            messages.EngineFacts,
        ),
        (
            messages.EngineSnapshot(
                num_running=1,
                num_waiting=2,
                kv_usage=0.5,
                num_steps=3,
                num_failed_steps=0,
                num_preemptions=1,
                num_computed_tokens=9,
                accepted_at=(3, 1),
            ),
            messages.EngineSnapshot,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_message_goes_through_bytes(message, kind):
    for codec in (msgspec.msgpack, msgspec.json):
        assert codec.decode(codec.encode(message), type=kind) == message


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nmax_waiting: 5\napi_keys: keys.txt\n")
    config = read_config(file)
    assert (config.port, config.max_waiting, config.api_keys) == (9000, 5, "keys.txt")
    file.write_text("")
    assert read_config(file) == ServerConfig()
    for text, words in (
        ("prot: 9000", "unknown field `prot`"),
        ("port: high", "port"),
        ("port: 70000", "65535"),
        ("drain_timeout_s: -1", "drain_timeout_s"),
        ("tls_key: a.pem", "Only one of"),
        ("[1, 2", "cannot be used"),
        ("- 1", "cannot be used"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_config(file)
    with pytest.raises(UsageError, match="absent"):
        read_config(tmp_path / "absent.yaml")


def test_json_logs_are_objects():
    try:
        raise ValueError("deep")
    except ValueError:
        record = logging.LogRecord("llmc", logging.WARNING, "f", 1, "two %s", ("lines\n",), sys.exc_info())
    entry = json.loads(JsonFormatter().format(record))
    assert entry["message"] == "two lines\n"
    assert entry["level"] == "warning"
    assert "ValueError: deep" in entry["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])


def test_the_openapi_document_is_whole():
    document = openapi_document()
    text = json.dumps(document)
    for reference in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert reference in document["components"]["schemas"]
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(properties) == set(CHAT_FIELDS)
    assert document["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False


def test_the_documentation_lists_every_field_metric_and_setting():
    text = SERVING_DOC.read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`\s]+)`", text))
    for table in (COMPLETION_FIELDS, CHAT_FIELDS):
        for use in Use:
            missing = {name for name, field in table.items() if field.use is use} - named
            assert not missing, (use, missing)
    assert {PREFIX + metric.name for metric in METRICS} <= named
    assert {*ServerConfig.__struct_fields__, *ModelConfig.__struct_fields__} <= named
