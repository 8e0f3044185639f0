"""A server on loopback in a thread, over a simulated model that reads and writes letters."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import httpx2 as httpx
import pytest
from openai import OpenAI

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps, simulated_spec
from llmc.runtime.llm import LLM
from llmc.runtime.server.channel import LocalChannel
from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.process import Server, listen
from llmc.runtime.server.state import make_state

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'evil' %}{{ raise_exception('No evil here') }}{% endif %}"
    "{{ m['role'][:1] + ' ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


class SlowExecutor(SimulatedExecutor):
    """Waits before each step, as long as it is told to."""

    delay_s = 0.0

    def submit(self, plan):
        if self.delay_s:
            time.sleep(self.delay_s)
        return super().submit(plan)


class Running:
    """A served model: `url` for clients, `llm` and `executor` to look behind the scenes."""

    def __init__(self, config, engines, runtime=None):
        self.runtime = runtime
        self.state = make_state(config, engines)
        self.server = Server(self.state, listen(config))
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.loop = None
        self.http = httpx.Client(timeout=30)
        self.is_ready = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.is_ready.wait(10)

    def _run(self):
        async def serve():
            self.loop = asyncio.get_running_loop()
            self.server._on_ready = self.is_ready.set
            await self.server.serve(handle_signals=False)

        asyncio.run(serve())

    def drain(self):
        self.loop.call_soon_threadsafe(self.server.begin_drain)

    def stop(self):
        self.http.close()
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                self.drain()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def client(self, strict=True, **options):
        options.setdefault("api_key", "none")
        options.setdefault("max_retries", 0)
        return OpenAI(base_url=f"{self.url}/v1", _strict_response_validation=strict, **options)

    def post(self, path, **fields):
        return self.http.post(self.url + path, json=fields)

    def metric(self, name, **labels):
        """The sum of a sample over all label values that are not given."""
        total = 0.0
        for family in self.state.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def wait_until_idle(self, seconds=10.0):
        """Until no request is left anywhere; then every page must be free."""
        end = time.monotonic() + seconds
        engine = self.llm.engine
        while engine.num_running or engine.num_waiting or self.state.num_open:
            assert time.monotonic() < end, "a request never ended"
            time.sleep(0.005)
        time.sleep(0.01)
        assert engine.blocks.used() == [0] * len(engine.blocks.groups)
        assert next(iter(self.state.models.values())).backlog.num_sequences == 0


@contextlib.contextmanager
def serving(letters, template=TEMPLATE, runtime=None, tokenizer=True, caps=None, **settings):
    executor = SlowExecutor(simulated_caps(max_in_flight=2, **(caps or {})))
    spec = simulated_spec(executor.caps, (28,))
    llm = LLM(executor, letters(template) if tokenizer else None, spec, runtime or RuntimeConfig())
    config = ServerConfig(port=0, **settings)
    running = Running(config, [("letters", LocalChannel(llm), llm.tokenizer)])
    running.llm, running.executor = llm, executor
    try:
        yield running
        running.executor.delay_s = 0.0
        running.wait_until_idle()
    finally:
        running.stop()
        llm.close()


@pytest.fixture(scope="module")
def shared(letters):
    """One server for all tests of a module that leave it as it was."""
    with serving(letters) as running:
        yield running


@pytest.fixture
def serve(letters):
    """A function that starts a server with its own settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(letters, **options))


@pytest.fixture
def run_server(letters):
    """A function from settings and names to a server over fresh simulated models, one a name; `wrap` may
    stand between server and engine; `sizes` are (caps, settings) of an engine by name."""
    with contextlib.ExitStack() as stack:

        def start(config, wraps, sizes=None):
            engines = []
            for name, wrap in wraps.items():
                caps, runtime = (sizes or {}).get(name, (simulated_caps(max_in_flight=2), RuntimeConfig()))
                llm = LLM(SlowExecutor(caps), letters(TEMPLATE), simulated_spec(caps, (28,)), runtime)
                stack.callback(llm.close)
                engines.append((name, wrap(LocalChannel(llm)), llm.tokenizer))
            running = Running(config, engines)
            stack.callback(running.stop)
            return running

        yield start
