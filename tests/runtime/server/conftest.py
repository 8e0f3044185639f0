"""A server on loopback in a thread, over a simulated model that reads and writes letters."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import httpx2 as httpx
import pytest
import tokenizers
from openai import OpenAI
from tokenizers import decoders, models, pre_tokenizers

from llmc.runtime.chat import ChatTemplate
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.llm import LLM
from llmc.runtime.server.channel import LocalChannel
from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.process import Server, listen
from llmc.runtime.server.state import make_state
from llmc.runtime.tokenizer import GenerationDefaults, Tokenizer
from llmc.spec.model import ModelSpec

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'evil' %}{{ raise_exception('No evil here') }}{% endif %}"
    "{{ m['role'][:1] + ' ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
SPEC = ModelSpec(
    family="simulated",
    architecture="Simulated",
    num_layers=1,
    hidden_size=1,
    vocab_size=29,
    max_context=128,
    compute_dtype="float32",
    tied_head=False,
    num_parameters=0,
    attention=(),
    eos_token_ids=(28,),
)


class SlowExecutor(SimulatedExecutor):
    """Waits before each step, as long as it is told to."""

    delay_s = 0.0

    def submit(self, plan):
        if self.delay_s:
            time.sleep(self.delay_s)
        return super().submit(plan)


def letters(template=TEMPLATE):
    """Ids 0 to 27 are a to z, space and newline; 28 ends a text."""
    symbols = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ"]
    backend = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    chat = ChatTemplate(template, {}) if template else None
    return Tokenizer(backend, {"eos_token": "<eos>"}, GenerationDefaults(eos_token_ids=(28,)), chat)


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
def serving(template=TEMPLATE, runtime=None, tokenizer=True, caps=None, **settings):
    executor = SlowExecutor(simulated_caps(max_in_flight=2, **(caps or {})))
    llm = LLM(executor, letters(template) if tokenizer else None, SPEC, runtime or RuntimeConfig())
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
def shared():
    """One server for all tests of a module that leave it as it was."""
    with serving() as running:
        yield running


@pytest.fixture
def serve():
    """A function that starts a server with its own settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(**options))


@pytest.fixture
def run_server():
    """A function from settings and names to a server over fresh simulated models, one a name; `wrap` may
    stand between server and engine; `sizes` are (caps, settings) of an engine by name."""
    with contextlib.ExitStack() as stack:

        def start(config, wraps, sizes=None):
            engines = []
            for name, wrap in wraps.items():
                caps, runtime = (sizes or {}).get(name, (simulated_caps(max_in_flight=2), RuntimeConfig()))
                llm = LLM(SlowExecutor(caps), letters(), SPEC, runtime)
                stack.callback(llm.close)
                engines.append((name, wrap(LocalChannel(llm)), llm.tokenizer))
            running = Running(config, engines)
            stack.callback(running.stop)
            return running

        yield start
