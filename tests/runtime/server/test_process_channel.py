"""An engine in a child process: the same tokens, a death that costs its own requests only, a new start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.process_channel import ProcessChannel, engine_command
from llmc.spec.errors import ArtifactError, TargetError

pytestmark = pytest.mark.pure

CHILD = str(Path(__file__).with_name("engine_child.py"))
LONG = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}


def child(mode="", **options):
    return ProcessChannel((sys.executable, CHILD, *([mode] if mode else [])), **options)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def two(run_server):
    """One model here, the same model in a child that dies of a prompt with z."""
    channels = []

    def elsewhere(channel):
        channels.append(child("fatal", max_restarts=2))
        return channels[0]

    config = ServerConfig(port=0, watchdog_s=1.0)
    running = run_server(config, {"here": lambda channel: channel, "there": elsewhere})
    yield running, channels[0]
    running.stop()
    channels[0].close()


def test_a_child_says_the_same_and_dies_alone(two):
    running, channel = two
    asked = {"prompt": "hello", "max_tokens": 30, "temperature": 1, "seed": 3, "logprobs": 2, "echo": True}
    here = running.post("/v1/completions", model="here", **asked).json()["choices"]
    assert running.post("/v1/completions", model="there", **asked).json()["choices"] == here

    first = channel.pid
    wait_for(lambda: channel.snapshot().num_steps > 0)
    results = {}

    def ask(name):
        results[name] = running.post("/v1/completions", model=name, **LONG)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("here", "there")]
    for thread in threads:
        thread.start()
    wait_for(lambda: channel.snapshot().num_running == 1)
    lost = running.post("/v1/completions", model="there", prompt="zzz")
    for thread in threads:
        thread.join(20)
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine.died")
    assert int(lost.headers["retry-after"]) >= 1
    assert results["there"].status_code == 503
    assert results["here"].status_code == 200
    assert not is_alive(first)
    running.client(max_retries=8).completions.create(model="there", prompt="a", max_tokens=2)
    assert channel.pid != first
    assert running.post("/v1/completions", model="there", **asked).json()["choices"] == here
    assert running.metric("llmc:engine_restarts_total", model_name="there") == 1
    wait_for(lambda: running.state.num_open == 0)
    assert all(model.backlog.num_sequences == 0 for model in running.state.models.values())


def test_a_child_that_stands_still_is_started_again(two):
    running, channel = two
    first = channel.pid
    lost = running.post("/v1/completions", model="there", prompt="yyy")
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine.died")
    running.client(max_retries=8).completions.create(model="there", prompt="a", max_tokens=2)
    assert channel.pid != first
    assert running.post("/v1/completions", model="here", prompt="a").status_code == 200


@pytest.mark.slow
def test_too_many_deaths_are_a_failure(two):
    running, channel = two
    for _ in range(3):
        wait_for(lambda: not channel.snapshot().is_starting)
        os.kill(channel.pid, signal.SIGKILL)
        wait_for(lambda: channel.snapshot().is_starting or channel.snapshot().failure)
    wait_for(lambda: channel.snapshot().failure)
    health = running.http.get(f"{running.url}/health")
    assert health.status_code == 503
    assert "died 3 times" in health.json()["why"]
    with pytest.raises(openai.InternalServerError, match="died 3 times"):
        running.client().completions.create(model="there", prompt="a")
    assert running.post("/v1/completions", model="here", prompt="a").status_code == 200


@pytest.mark.slow
def test_a_stream_says_that_its_engine_died(two):
    running, channel = two
    fields = {**LONG, "model": "there", "stream": True}
    with running.http.stream("POST", f"{running.url}/v1/completions", json=fields) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(channel.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert "engine.died" in rest[-1]
    assert "data: [DONE]" not in rest
    wait_for(lambda: running.http.get(f"{running.url}/ready").status_code == 200)


def test_a_client_that_leaves_ends_the_childs_work(two):
    running, channel = two
    fields = {**LONG, "model": "there", "stream": True}
    with running.http.stream("POST", f"{running.url}/v1/completions", json=fields):
        wait_for(lambda: channel.snapshot().num_running == 1)
    wait_for(lambda: channel.snapshot().num_running == 0)


def test_what_cannot_start_says_why(tmp_path):
    from llmc.runtime.config import RuntimeConfig

    with pytest.raises(TargetError, match="status 7"):
        child("broken")
    with pytest.raises(ArtifactError, match="no artifact at"):
        ProcessChannel(engine_command(tmp_path / "none", RuntimeConfig()))


def test_a_child_does_not_outlive_its_parent():
    code = (
        "import os, sys; from llmc.runtime.server.process_channel import ProcessChannel as P\n"
        f"c = P((sys.executable, {CHILD!r})); print(c.pid, flush=True); os._exit(9)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wait_for(lambda: not is_alive(int(out.stdout)))


@pytest.fixture
def lossy(run_server):
    """One model in a child whose device is lost in a step with a prompt that begins with z."""
    channels = []

    def elsewhere(channel):
        channels.append(child("device", max_restarts=2))
        return channels[0]

    running = run_server(ServerConfig(port=0), {"there": elsewhere})
    yield running, channels[0]
    running.stop()
    channels[0].close()


def test_a_lost_device_fails_its_requests_and_the_engine_serves_on(lossy):
    running, channel = lossy
    asked = {"model": "there", "prompt": "hello", "max_tokens": 12, "ignore_eos": True}
    before = running.post("/v1/completions", **asked).json()["choices"]
    assert running.http.get(f"{running.url}/health").json() == {"status": "ok", "why": None}
    first, results = channel.pid, []
    thread = threading.Thread(
        target=lambda: results.append(running.post("/v1/completions", model="there", **LONG))
    )
    thread.start()
    wait_for(lambda: channel.snapshot().num_running == 1)
    lost = running.post("/v1/completions", model="there", prompt="zzz")
    thread.join(20)
    for answer in (lost, *results):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    assert lost.json()["error"]["code"] == "cuda.device_lost"
    assert "The GPU failed in a step" in lost.json()["error"]["message"]
    wait_for(lambda: running.http.get(f"{running.url}/ready").json()["status"] != "ok")
    wait_for(lambda: running.http.get(f"{running.url}/ready").status_code == 200)
    assert channel.pid != first
    assert running.post("/v1/completions", **asked).json()["choices"] == before
    health = running.http.get(f"{running.url}/health").json()
    assert health["status"] == "ok"
    assert "The engine of there died 1 time" in health["why"]
    assert "status 5 after DeviceLostError: The GPU failed in a step." in health["why"]
    assert running.metric("llmc:engine_restarts_total", model_name="there") == 1


def test_a_device_that_is_lost_again_and_again_ends_the_engine_with_the_reason(lossy):
    running, channel = lossy
    for deaths in range(1, 4):
        wait_for(lambda: running.http.get(f"{running.url}/ready").status_code == 200)
        assert running.post("/v1/completions", model="there", prompt="zzz").status_code == 503
        wait_for(lambda deaths=deaths: channel.snapshot().num_restarts == deaths)
    wait_for(lambda: channel.snapshot().failure)
    health = running.http.get(f"{running.url}/health")
    assert health.status_code == 503
    assert "died 3 times in ten minutes" in health.json()["why"]
    assert "an illegal memory access was encountered" in health.json()["why"]
    refused = running.post("/v1/completions", model="there", prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine.failed")
    assert "illegal memory access" in refused.json()["error"]["message"]


def test_starts_that_fail_are_counted_and_told(run_server, tmp_path):
    channels = []

    def elsewhere(channel):
        channels.append(child(f"once={tmp_path / 'mark'}", max_restarts=1))
        return channels[0]

    running = run_server(ServerConfig(port=0), {"there": elsewhere})
    os.kill(channels[0].pid, signal.SIGKILL)
    wait_for(lambda: channels[0].snapshot().failure)
    why = running.http.get(f"{running.url}/health").json()["why"]
    assert "died 2 times" in why
    assert (
        "it could not be started again: The engine's process could not start. It ended with status 7" in why
    )
    running.stop()
    channels[0].close()
