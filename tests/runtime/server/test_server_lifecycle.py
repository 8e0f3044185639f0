"""Load, keys, clients that leave or do not read, failures of the engine, and the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time

import httpx2 as httpx
import openai
import pytest

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.keys import read_keys
from llmc.runtime.server.metric_table import METRICS, PREFIX
from llmc.runtime.server.process import listen
from llmc.spec.errors import TargetError, UsageError

pytestmark = pytest.mark.pure

LONG = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}


def streaming(running, **fields):
    return running.http.stream(
        "POST", f"{running.url}/v1/completions", json={**LONG, "stream": True, **fields}
    )


def in_background(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_keys_are_asked_for_everywhere_but_where_machines_look(serve, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may\nalice: first-key\n\nsecond-key\n")
    running = serve()
    running.state.keys = read_keys(file)
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert running.http.get(running.url + path).status_code == 200
    for key in ("none", "first-ke", "first-key2", "Bearer", "alice", "alice: first-key"):
        response = running.http.post(
            f"{running.url}/v1/completions", json=LONG, headers={"authorization": f"Bearer {key}"}
        )
        assert response.status_code == 401, key
        assert response.json()["error"]["code"] == "auth.invalid_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert running.http.get(f"{running.url}/v1/models").status_code == 401
    assert running.post("/tokenize", prompt="a").status_code == 401
    basic = {"authorization": "Basic first-key"}
    assert running.http.get(f"{running.url}/v1/models", headers=basic).status_code == 401
    for key in ("first-key", "second-key"):
        assert running.client(api_key=key).models.list().data[0].id == "letters"
    with pytest.raises(openai.AuthenticationError):
        running.client(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# only words\n", "holds no key"),
        ("a: k\nk\n", "twice"),
        ("a:\n", "Line 1 has no key"),
    ],
)
def test_key_files_that_cannot_be(tmp_path, text, words):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_keys(file)
    with pytest.raises(UsageError, match="cannot be used"):
        read_keys(tmp_path / "absent")


def test_too_much_at_a_time_is_turned_away_and_comes_back(serve):
    running = serve(runtime=None, caps={"max_rows": 2}, max_waiting=1)
    running.executor.delay_s = 0.01
    assert running.state.models["letters"].backlog.max_sequences == 3
    held = [in_background(lambda: running.post("/v1/completions", **LONG).status_code) for _ in range(3)]
    wait_for(lambda: running.state.num_open == 3)
    refused = running.post("/v1/completions", **LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server.overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert running.metric("llmc:request_rejections_total", code="server.overloaded") == 1
    with pytest.raises(openai.InternalServerError, match="It takes 3 at a time"):
        running.client().completions.create(model="letters", prompt="a")
    patient = running.client(max_retries=5).completions.create(model="letters", prompt="a", max_tokens=2)
    assert patient.choices[0].finish_reason in ("length", "stop")
    for thread, results in held:
        thread.join()
        assert results == [200]


def test_a_key_has_its_own_bound(serve):
    running = serve(max_concurrency_per_key=2)
    running.executor.delay_s = 0.01
    thread, results = in_background(lambda: running.post("/v1/completions", **LONG, n=2).status_code)
    wait_for(lambda: running.state.num_open == 1)
    refused = running.post("/v1/completions", **LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "limit.concurrency")
    assert int(refused.headers["retry-after"]) >= 1
    thread.join()
    assert results == [200]
    assert running.post("/v1/completions", **LONG).status_code == 200
    too_many = running.post("/v1/completions", **LONG, n=3)
    assert too_many.status_code == 429


def test_two_keys_share_the_engine_by_what_they_were_served(serve, tmp_path):
    """Requests carry their key's owner into the engine, and one key's queue does not hold up another's."""
    file = tmp_path / "keys"
    file.write_text("greedy: first-key\nmodest: second-key\n")
    running = serve(runtime=None, caps={"max_rows": 1})
    running.state.keys = read_keys(file)
    running.executor.delay_s = 0.05
    order = []

    def ask(key):
        headers = {"authorization": f"Bearer {key}"}
        answer = running.http.post(f"{running.url}/v1/completions", json=LONG, headers=headers)
        order.append((key, answer.status_code))

    engine = running.llm.engine
    held = [in_background(lambda: ask("first-key")) for _ in range(6)]
    wait_for(lambda: engine.num_waiting + engine.num_running == 6)
    held.append(in_background(lambda: ask("second-key")))
    wait_for(lambda: engine.num_waiting + engine.num_running == 7)
    running.executor.delay_s = 0.0
    for thread, _ in held:
        thread.join(30)
    assert ("second-key", 200) in order[:3]
    assert order.count(("first-key", 200)) == 6
    assert 6 * 200 < engine.fairness.served("greedy") <= 6 * (200 + 5)
    assert engine.fairness.served("modest") > 200
    assert engine.fairness.served("") == 0.0


def test_operators_bounds_on_tokens(serve):
    running = serve(max_prompt_tokens=10, max_output_tokens=20, max_sequences=4)
    for fields, code in (
        ({"prompt": "a" * 11}, "request.prompt_too_long"),
        ({"prompt": "a", "max_tokens": 21}, "request.output_too_long"),
        ({"prompt": "a", "max_tokens": 11, "n": 2}, "request.output_too_long"),
        ({"prompt": "a", "max_tokens": 1, "n": 5}, "request.too_many_sequences"),
    ):
        refused = running.post("/v1/completions", **fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    assert running.post("/v1/completions", prompt="a" * 10, max_tokens=20).status_code == 200


@pytest.mark.parametrize("num_chunks", [0, 1, 3, 10])
def test_a_client_that_leaves_frees_its_pages(serve, num_chunks):
    running = serve()
    running.executor.delay_s = 0.01
    with streaming(running, n=2) as response:
        lines = response.iter_lines()
        for _ in range(num_chunks):
            next(lines)
    running.wait_until_idle()
    assert running.metric("llmc:client_disconnects_total") == 1
    assert running.executor.num_tokens_run < 150
    assert running.post("/v1/completions", prompt="a").status_code == 200


def test_a_client_may_leave_behind_any_chunk(serve):
    """Of a short stream, at each of its events in turn: nothing is held, and the next one says the same."""
    running = serve()
    running.executor.delay_s = 0.003
    with streaming(running, max_tokens=10) as response:
        whole = [line for line in response.iter_lines() if line]
    for count in range(len(whole) + 1):
        with streaming(running, max_tokens=10) as response:
            lines = (line for line in response.iter_lines() if line)
            list(itertools.islice(lines, count))  # a slow reader gets fewer and larger pieces
        running.wait_until_idle()
    with streaming(running, max_tokens=10) as response:
        texts = [
            json.loads(line[6:])["choices"] for line in response.iter_lines() if line.startswith("data: {")
        ]
    first = [json.loads(line[6:])["choices"] for line in whole if line.startswith("data: {")]
    assert "".join(each[0]["text"] for each in texts) == "".join(each[0]["text"] for each in first)


def test_a_jump_of_the_wall_clock_disturbs_nobody(serve, monkeypatch):
    """Times of requests are those of the steady clock: a deadline is neither met early nor missed."""
    running = serve()
    running.executor.delay_s = 0.005
    expected = running.post("/v1/completions", **LONG).json()["choices"]
    for jump_s in (10 * 365 * 86400.0, -10 * 365 * 86400.0):
        now_s = time.time()
        with monkeypatch.context() as patched:
            thread, results = in_background(
                lambda: running.post("/v1/completions", **LONG, timeout_s=60).json()["choices"]
            )
            patched.setattr(time, "time", lambda at_s=now_s + jump_s: at_s)
            late = running.post("/v1/completions", **LONG, timeout_s=0.02)
            assert late.json()["error"]["code"] == "request.timeout"
            thread.join(30)
        assert results == [expected]
    assert running.metric("llmc:e2e_request_latency_seconds_sum") < 120


def test_a_client_that_leaves_before_any_answer(serve):
    running = serve()
    running.executor.delay_s = 0.02
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{running.url}/v1/completions", json=LONG, timeout=0.15)
    running.wait_until_idle()
    assert running.metric("llmc:client_disconnects_total") == 1
    assert running.metric("llmc:request_success_total", finished_reason="stop") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_gives_its_place_back(serve, stream):
    running = serve(caps={"max_rows": 1}, max_waiting=1)
    running.executor.delay_s = 0.03
    thread, _ = in_background(lambda: running.post("/v1/completions", **LONG))
    wait_for(lambda: running.state.num_open == 1)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{running.url}/v1/completions", json={**LONG, "stream": stream}, timeout=0.2)
    wait_for(lambda: running.state.num_open == 1, 1)
    assert thread.is_alive()
    running.executor.delay_s = 0.0
    thread.join()


def test_a_reader_that_does_not_read_is_given_up(serve):
    running = serve(send_timeout_s=0.3, caps={"max_context": 40000, "groups": (("full", 0, 64, 640),)})
    body = json.dumps({"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True, "logprobs": 20})
    host, port = running.url.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.closing(reader):
        reader.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall((head + body).encode())
        wait_for(lambda: running.metric("llmc:client_disconnects_total") == 1, 20)
        running.wait_until_idle()


def test_deadlines(serve):
    running = serve()
    running.executor.delay_s = 0.02
    late = running.post("/v1/completions", **LONG, timeout_s=0.1)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request.timeout")
    with streaming(running, timeout_s=1.0) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert json.loads(events[-1])["error"]["code"] == "request.timeout"
    assert "choices" in json.loads(events[0])
    with pytest.raises(openai.APIError, match="not done in time"):
        for _ in running.client(strict=False).completions.create(
            model="letters", stream=True, prompt="a", max_tokens=100, extra_body={"timeout_s": 0.3}
        ):
            pass


def test_a_failing_step_fails_its_requests_alone(serve):
    running = serve()

    def fail(plan):
        raise RuntimeError("the device is on fire")

    running.executor.faults.on_collect = fail
    broken = running.post("/v1/completions", **LONG)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "engine.request_failed")
    assert "on fire" in broken.json()["error"]["message"]
    running.executor.faults.on_collect = None
    assert running.post("/v1/completions", **LONG).status_code == 200
    assert running.http.get(f"{running.url}/health").status_code == 200
    assert running.metric("llmc:engine_failed_steps_total") >= 1


def test_an_engine_that_does_not_move_is_not_healthy(serve, caplog):
    running = serve(watchdog_s=0.2)
    gate = threading.Event()
    running.executor.faults.on_submit = lambda plan: gate.wait(10)
    thread, _ = in_background(lambda: running.post("/v1/completions", **LONG))
    try:
        wait_for(lambda: running.http.get(f"{running.url}/health").status_code == 503)
        assert "has not moved" in running.http.get(f"{running.url}/ready").json()["why"]
        wait_for(lambda: any("Its state" in each.getMessage() for each in caplog.records))
        (told,) = [each.getMessage() for each in caplog.records if "Its state" in each.getMessage()]
        state = json.loads(told.partition("Its state: ")[2])
        assert state["engine"]["num_running"] == 1
        assert [each["prompt_tokens"] for each in state["requests"]] == [5]
        assert any("submit" in line for stack in state["threads"] for line in stack)
    finally:
        gate.set()
    thread.join()
    assert running.http.get(f"{running.url}/health").status_code == 200


def test_draining_lets_running_requests_finish(serve):
    running = serve()
    expected = running.post("/v1/completions", **LONG).json()["choices"]
    running.executor.delay_s = 0.02
    thread, results = in_background(lambda: running.post("/v1/completions", **LONG).json()["choices"])
    wait_for(lambda: running.state.num_open == 1)
    with httpx.Client() as other:
        assert other.get(f"{running.url}/ready").status_code == 200
        running.drain()
        wait_for(lambda: running.state.is_draining)
        ready = other.get(f"{running.url}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert other.get(f"{running.url}/health").status_code == 200
        refused = other.post(f"{running.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server.draining")
        assert "retry-after" in refused.headers
    thread.join()
    assert results == [expected]
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_draining_is_bounded(serve):
    running = serve(drain_timeout_s=0.1)
    running.executor.delay_s = 0.05
    thread, results = in_background(lambda: running.post("/v1/completions", **LONG))
    wait_for(lambda: running.state.num_open == 1)
    running.drain()
    thread.join(10)
    assert (results[0].status_code, results[0].json()["error"]["code"]) == (503, "server.aborted")
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_a_second_signal_ends_at_once(serve):
    running = serve(drain_timeout_s=60)
    running.executor.delay_s = 0.05
    thread, _ = in_background(lambda: _quietly(lambda: running.post("/v1/completions", **LONG)))
    wait_for(lambda: running.state.num_open == 1)
    started = time.monotonic()
    running.drain()
    running.drain()
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert time.monotonic() - started < 5
    thread.join(10)


def _quietly(call):
    with contextlib.suppress(httpx.HTTPError):
        return call()


def test_an_address_in_use_is_an_error(serve):
    running = serve()
    with pytest.raises(TargetError, match="cannot listen on 127"):
        listen(ServerConfig(port=running.server.port))
    with pytest.raises(TargetError, match="cannot listen"):
        listen(ServerConfig(host="no.such.host.invalid"))


# These move where there is another process or another model: see test_process_channel, test_server_settings.
ELSEWHERE = ("engine_restarts", "request_fallbacks", "response_cache_hits", "response_cache_misses")


def test_every_metric_is_exposed_and_moves(serve):
    runtime = RuntimeConfig(speculation="ngram")
    running = serve(runtime=runtime, caps={"max_rows": 3, "groups": (("full", 0, 4, 40),)})
    before = _samples(running)
    running.executor.delay_s = 0.003
    running.post("/v1/completions", prompt="abcdefgh", max_tokens=60, ignore_eos=True, logit_bias={"3": 100})
    held = [in_background(lambda: running.post("/v1/completions", **LONG)) for _ in range(4)]
    seen = dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), 0.0)
    while any(thread.is_alive() for thread, _ in held):
        for name in seen:
            seen[name] = max(seen[name], running.metric(PREFIX + name))
    running.post("/v1/completions", prompt="abcdefgh", max_tokens=4)
    running.post("/v1/completions", prompt="a" * 500)
    running.executor.delay_s = 0.01
    with streaming(running):
        pass
    running.wait_until_idle()
    running.executor.faults.on_collect = lambda plan: 1 / 0
    running.post("/v1/completions", **LONG)
    running.executor.faults.on_collect = None
    running.executor.faults.nan_requests.update(range(1000))
    assert running.post("/v1/completions", prompt="a").json()["error"]["code"] == "engine.request_failed"
    running.executor.faults.nan_requests.clear()
    text = running.http.get(f"{running.url}/metrics").text
    after = _samples(running)
    assert all(seen.values()), seen
    for metric in METRICS:
        name = PREFIX + metric.name
        assert f"# HELP {name}" in text
        if metric.kind == "gauge" or metric.name in ELSEWHERE:
            continue
        suffix = "_total" if metric.kind == "counter" else "_count"
        assert after.get(name + suffix, 0) > before.get(name + suffix, 0), f"{name} did not move"


def _samples(running):
    totals = {}
    for family in running.state.metrics.registry.collect():
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals
