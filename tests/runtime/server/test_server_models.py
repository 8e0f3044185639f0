"""Several models in one server, an engine behind bytes, and https."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import msgspec
import pytest

from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.messages import Command, EngineFacts, EngineSnapshot, Event

pytestmark = pytest.mark.pure


class BytesChannel:
    """Every message is written as bytes and read back, as between processes."""

    def __init__(self, channel):
        self._channel = channel
        self._wire = msgspec.msgpack
        self.num_messages = 0

    def _through(self, message, kind):
        self.num_messages += 1
        return self._wire.decode(self._wire.encode(message), type=kind)

    @property
    def facts(self):
        return self._through(self._channel.facts, EngineFacts)

    def connect(self, deliver):
        self._channel.connect(lambda events: deliver([self._through(event, Event) for event in events]))

    def send(self, command):
        self._channel.send(self._through(command, Command))

    def snapshot(self):
        return self._through(self._channel.snapshot(), EngineSnapshot)

    def close(self):
        self._channel.close()


@pytest.fixture
def pair(run_server):
    """Two models under two names, the second behind bytes."""
    wires = []

    def wired(channel):
        wires.append(BytesChannel(channel))
        return wires[0]

    return run_server(ServerConfig(port=0), {"plain": lambda channel: channel, "wired": wired}), wires[0]


def test_models_are_chosen_by_name(pair):
    running, wire = pair
    assert [each["id"] for each in running.http.get(f"{running.url}/v1/models").json()["data"]] == [
        "plain",
        "wired",
    ]
    nameless = running.post("/v1/completions", prompt="a")
    assert nameless.json()["error"]["code"] == "request.missing_field"
    assert "plain, wired" in nameless.json()["error"]["message"]
    before = wire.num_messages
    assert running.post("/v1/completions", model="plain", prompt="a").json()["model"] == "plain"
    assert wire.num_messages == before


def test_an_engine_behind_bytes_says_the_same(pair):
    running, wire = pair
    asked = {"prompt": "hello", "max_tokens": 30, "temperature": 1, "logprobs": 2, "echo": True, "n": 2}

    def ask(model, seed):
        return running.post("/v1/completions", model=model, seed=seed, **asked).json()["choices"]

    with ThreadPoolExecutor(8) as pool:
        plain = list(pool.map(lambda seed: ask("plain", seed), range(8)))
        wired = list(pool.map(lambda seed: ask("wired", seed), range(8)))
    assert plain == wired
    assert wire.num_messages > 8
    refused = running.post("/v1/completions", model="wired", prompt="a", stop_token_ids=[99])
    assert refused.json()["error"]["code"] == "request.stop_token_ids"


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_https(run_server, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        ["openssl", "req", *options.split(), *names, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    config = ServerConfig(port=0, tls_certificate=str(certificate), tls_key=str(key))
    running = run_server(config, {"letters": lambda channel: channel})
    trusted = ssl.create_default_context(cafile=certificate)
    url = running.url.replace("http:", "https:")
    with httpx.Client(verify=trusted) as client:
        assert client.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
