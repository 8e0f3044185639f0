"""Forms over HTTP: compiled beside the event loop and the engine, so that a slow one holds up nobody else."""

from __future__ import annotations

import itertools
import json
import threading
import time

import httpx2 as httpx
import pytest

pytest.importorskip("llguidance")

from llmc.runtime.config import RuntimeConfig

pytestmark = pytest.mark.pure

ENDLESS = {
    "allOf": [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": f"^(a|b|ab){{{count}}}$"}}}
        for count in range(1, 60)
    ]
}
ASK = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True, "stream": True}


def gaps_while(running, call):
    """Seconds between the events of streams that run for as long as `call` does in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    gaps = []
    while thread.is_alive():
        times = []
        with running.http.stream("POST", f"{running.url}/v1/completions", json=ASK) as response:
            for line in response.iter_lines():
                if line:
                    times.append(time.monotonic())
        gaps += [after - before for before, after in itertools.pairwise(times)]
    thread.join()
    return gaps, results[0]


def test_streams_go_on_while_a_form_is_compiled(serve):
    """A real form that the library never finishes with, and a limit of 1.5 s."""
    running = serve(runtime=RuntimeConfig(grammar_timeout_s=1.5))
    running.executor.delay_s = 0.005

    def ask():
        return running.post("/v1/completions", prompt="a", max_tokens=5, guided_json=ENDLESS)

    gaps, refused = gaps_while(running, ask)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "request.structured.json_schema"
    assert "takes more than 1.5 s to compile" in error["message"]
    assert len(gaps) > 10
    assert max(gaps) < 1.2  # a stream that waited for the compile would show a gap of 1.5 s
    again = time.monotonic()
    assert ask().status_code == 400
    assert time.monotonic() - again < 1.2
    fine = running.post("/v1/completions", prompt="a", max_tokens=5, guided_choice=["yes", "no"])
    assert fine.json()["choices"][0]["text"] in ("yes", "no")


@pytest.fixture
def held(serve):
    """A server whose forms are not compiled until `gate` is set."""
    running = serve()
    gate = threading.Event()
    compile_form = running.llm.compile_form

    def slow(wanted):
        assert gate.wait(20)
        return compile_form(wanted)

    running.llm.compile_form = slow
    yield running, gate
    gate.set()


def test_a_deliberately_slow_compile_stalls_nobody(held):
    running, gate = held
    running.executor.delay_s = 0.005
    threading.Timer(1.0, gate.set).start()

    def ask():
        return running.post("/v1/completions", prompt="a", max_tokens=5, guided_choice=["yes", "no"])

    gaps, answer = gaps_while(running, ask)
    assert answer.json()["choices"][0]["text"] in ("yes", "no")
    assert max(gaps) < 0.8


def test_who_leaves_during_a_compile_is_not_served(held):
    running, gate = held
    asked = {"prompt": "a", "max_tokens": 5, "guided_choice": ["yes", "no"]}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{running.url}/v1/completions", json=asked, timeout=1.0)
    running.wait_until_idle()
    before = running.executor.num_tokens_run
    gate.set()
    assert running.post("/v1/completions", **asked).status_code == 200
    running.wait_until_idle()
    assert 0 < running.executor.num_tokens_run - before <= 8
    assert running.metric("llmc:client_disconnects_total") == 1


def test_a_deadline_counts_the_compile(held):
    running, gate = held
    threading.Timer(0.4, gate.set).start()
    late = running.post("/v1/completions", prompt="a", max_tokens=5, guided_choice=["yes"], timeout_s=0.2)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request.timeout")


def test_the_end_does_not_wait_for_a_compile(held):
    running, _ = held
    answers = []

    def ask():
        answers.append(running.post("/v1/completions", prompt="a", max_tokens=5, guided_choice=["yes"]))

    thread = threading.Thread(target=ask)
    thread.start()
    end = time.monotonic() + 5
    while not running.state.num_open:
        assert time.monotonic() < end
        time.sleep(0.005)
    running.loop.call_soon_threadsafe(running.state.models["letters"].client.abort_all)
    thread.join(5)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "server.aborted"
    assert int(answers[0].headers["retry-after"]) >= 1


def test_a_stream_with_a_form_that_cannot_be_is_a_400(serve):
    running = serve()
    refused = running.post("/v1/completions", **ASK, guided_regex="(")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "request.structured.regex"
    with running.http.stream(
        "POST", f"{running.url}/v1/completions", json={**ASK, "guided_regex": "[ab]{3}"}
    ) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events if event["choices"])
    assert len(text) == 3
    assert set(text) <= {"a", "b"}
