"""The public face of a loaded model: prompts in, texts out. Joins tokenizer, engine and the engine's thread;
decides nothing about order, pages or sampling."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from ..spec.errors import RequestError
from ..spec.model import ModelSpec
from .admission import EngineLimits, check_prompt, check_request
from .collector import Collector
from .config import RuntimeConfig
from .draft_policy import SpeculationCosts
from .engine import Engine
from .grammar import Grammar
from .loop import EngineLoop
from .outputs import GenerationOutput, StreamChunk
from .params import SamplingParams
from .protocol import Executor
from .request import Request
from .response_cache import is_deterministic, response_key
from .session import Session, Sink
from .structured import StructuredOutput
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .grammars import Grammars

Prompt = str | Sequence[int]


class LLM:
    """A model that generates text, for many requests at once.

    A prompt is text, which is tokenised as the model expects (with its beginning-of-text token where it
    has one), or token ids, which are taken as they are. An empty text is a RequestError even where a
    beginning-of-text token would make it one token long: send that token's id to generate from nothing.
    Without `params`, the model's own generation defaults hold, and output goes up to the context length.

    All methods may be called from any thread. `draw_seed` gives the seed of a request that has none; `costs`
    decide when speculation pays, and without them it always drafts. `digest` identifies the artifact.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        spec: ModelSpec,
        config: RuntimeConfig | None = None,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
        costs: SpeculationCosts | None = None,
        digest: str = "",
    ) -> None:
        self.engine = Engine(executor, config, costs=costs)
        self._executor_name, self._details = executor.caps.name, dict(executor.caps.details)
        self.tokenizer = tokenizer
        self.spec = spec
        own = tokenizer.eos_token_ids if tokenizer is not None else ()
        ends = dict.fromkeys((*own, *spec.eos_token_ids))
        # Some models list end tokens beyond their own vocabulary, which can never come.
        self.eos_token_ids = tuple(token for token in ends if token < self.limits.vocab_size)
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._loop = EngineLoop(self.engine)
        self._draw_seed = draw_seed
        self._digest = digest
        self._numbers = itertools.count()
        self._names = itertools.count()

    @property
    def executor_name(self) -> str:
        """What runs the model, for reports."""
        return self._executor_name

    @property
    def executor_details(self) -> Mapping[str, object]:
        """What it says of itself: device, threads, what it had to go without."""
        return self._details

    @property
    def limits(self) -> EngineLimits:
        """What can be served: context length, requests at a time, tokens a step."""
        return self.engine.limits

    @property
    def failure(self) -> Exception | None:
        """Why the engine serves no more; None while it does."""
        return self._loop.failure

    def default_params(self) -> SamplingParams:
        """The generation defaults the model came with; greedy when it came with none."""
        if self.tokenizer is None:
            return SamplingParams(temperature=0.0)
        return self.tokenizer.defaults.params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[GenerationOutput]:
        """Generates for all prompts together; results in their order.

        A lower `priority` is admitted first where the order is by priority. What is not done `timeout_s`
        after this call (the runtime's own setting where None) ends with reason TIMEOUT.
        All prompts are checked before the first runs: RequestError names what is wrong with one. A
        request that fails later ends with reason ERROR and does not touch the others.
        """
        told: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        gathered = [
            self._gather(prompt, params, told.put, priority, timeout_s) for prompt in _as_prompts(prompts)
        ]
        sessions = [session for session, _ in gathered]
        left = iter(sessions)
        size = max(1, self.limits.max_waiting // max((len(each.requests) for each in sessions), default=1))
        for session in itertools.islice(left, size):
            self._loop.submit(session)
        try:
            for _ in sessions:
                error = told.get()
                if error is not None:
                    raise error
                for session in itertools.islice(left, 1):
                    self._loop.submit(session)
        except BaseException:
            for session in sessions:
                self._loop.abort(session.request_id)
            raise
        return [collector.output() for _, collector in gathered]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        **template_values: Any,
    ) -> GenerationOutput:
        """Generates the next message of a conversation under the model's chat template."""
        return self.generate([self.encode_chat(messages, **template_values)], params)[0]

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """Chunks of text as they come, of all `n` completions, each ending with its `finish_reason`.

        Leaving the iteration aborts the request. `request_id` is the name `abort` knows it by;
        `priority` and `timeout_s` are those of `generate`.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[StreamChunk | Exception] = asyncio.Queue()

        def sink(chunk: StreamChunk | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop, and with it the reader, may be gone
                loop.call_soon_threadsafe(told.put_nowait, chunk)

        grammar = None
        if params is not None and params.structured is not None:
            grammar = await asyncio.to_thread(self.compile_form, params.structured)
        session = self.submit(
            prompt, params, sink, request_id, priority=priority, timeout_s=timeout_s, grammar=grammar
        )
        num_open = len(session.requests)
        try:
            while num_open:
                chunk = await told.get()
                if isinstance(chunk, Exception):
                    num_open = 0
                    raise chunk
                num_open -= chunk.finish_reason is not None
                yield chunk
        finally:
            if num_open:
                self._loop.abort(session.request_id)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        sink: Sink,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        seed_is_drawn: bool = False,
        owner: str = "",
        grammar: Grammar | None = None,
        arrival_s: float | None = None,
    ) -> Session:
        """Queues a request whose chunks go to `sink`, which the engine's thread calls and must not be held
        up by. An exception it is given is the end of the whole request. `seed_is_drawn`: the seed of `params`
        is nobody's choice, and the response need not be kept for a second time. Between
        requests of different `owner` the engine is fair. `grammar` is the form of `params` where it has been
        compiled already; deadlines count from `arrival_s` (now where None) on the engine's clock."""
        session = self._session(
            *(prompt, params, sink, request_id, priority, timeout_s),
            seed_is_drawn=seed_is_drawn,
            owner=owner,
            grammar=grammar,
            arrival_s=arrival_s,
        )
        self._loop.submit(session)
        return session

    def abort(self, request_id: str) -> None:
        """Ends a request from wherever; its stream ends with reason ABORT."""
        self._loop.abort(request_id)

    def compile_form(self, wanted: StructuredOutput) -> Grammar:
        """What `submit` takes as `grammar`. Takes up to the runtime's `grammar_timeout_s`: RequestError for a
        form that needs longer, or that cannot be used. Forms asked for lately are there at once."""
        from .grammar_compiler import Vocabulary
        from .grammars import Grammars  # a start without forms need not wait for it

        tokenizer = self._need_tokenizer("structured")
        with self._grammars_lock:
            if self._grammars is None:
                vocabulary = Vocabulary.of(tokenizer, self.limits.vocab_size, self.eos_token_ids)
                self._grammars = Grammars(vocabulary, self.engine.config.grammar_timeout_s)
        return self._grammars.compile(wanted)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, checked against the model: RequestError for an empty one, one that the
        context cannot hold (with both numbers), or ids outside of the vocabulary."""
        if isinstance(prompt, str):
            if not prompt:
                check_prompt((), self.limits)
            token_ids = self._need_tokenizer("prompt").encode(prompt)
        else:
            token_ids = tuple(_as_token_id(token_id) for token_id in prompt)
        check_prompt(token_ids, self.limits)
        return token_ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_values: Any) -> tuple[int, ...]:
        """Token ids of a conversation; the template places the special tokens."""
        tokenizer = self._need_tokenizer("chat")
        token_ids = tokenizer.encode(
            tokenizer.render_chat(messages, **template_values), add_special_tokens=False
        )
        check_prompt(token_ids, self.limits)
        return token_ids

    def close(self) -> None:
        """Aborts all requests and releases the executor. Idempotent."""
        self._loop.close()
        if self._grammars is not None:
            self._grammars.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _gather(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        tell: Callable[[Exception | None], None],
        priority: int,
        timeout_s: float | None,
    ) -> tuple[Session, Collector]:
        """A session, not yet queued, whose chunks the engine's thread collects. `tell` hears of its end or
        failure alone: waking the caller for each token costs as much as a small model's step."""

        def sink(chunk: StreamChunk | Exception) -> None:
            if isinstance(chunk, Exception):
                tell(chunk)
            elif collector.take(chunk):
                tell(None)

        session = self._session(prompt, params, sink, None, priority, timeout_s)
        collector = Collector(session, prompt)
        return session, collector

    def _session(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        sink: Sink,
        request_id: str | None,
        priority: int,
        timeout_s: float | None,
        *,
        seed_is_drawn: bool = False,
        owner: str = "",
        grammar: Grammar | None = None,
        arrival_s: float | None = None,
    ) -> Session:
        """A checked session, not yet queued."""
        params = params or self.default_params()
        token_ids = self.encode(prompt)
        if params.stop:
            self._need_tokenizer("stop")
        if arrival_s is None:
            arrival_s = self.engine.now_s()
        if grammar is None and params.structured is not None:
            grammar = self.compile_form(params.structured)
        if timeout_s is None:
            timeout_s = self.engine.config.timeout_s
        seed = self._draw_seed()
        max_tokens = params.max_tokens or self.limits.max_model_len - len(token_ids)
        requests = [
            Request(
                request_id=next(self._numbers),
                prompt_token_ids=token_ids,
                max_tokens=max_tokens,
                sampling=params.sampling_state(seed, self.limits.vocab_size, self.eos_token_ids, index),
                stop_token_ids=frozenset(params.stop_ids(self.eos_token_ids)),
                arrival_s=arrival_s,
                deadline_s=None if timeout_s is None else arrival_s + timeout_s,
                priority=priority,
                key=owner,
                prompt_logprobs=params.prompt_logprobs and index == 0,
                grammar=grammar,
            )
            for index in range(params.n)
        ]
        check_request(requests[0], self.limits, 0)
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        keeps = self.engine.config.response_cache_bytes > 0 and is_deterministic(params, seed_is_drawn)
        key = response_key(self._digest, requests, params) if keeps else None
        return Session(name, requests, params, self.tokenizer, sink, self.engine.now_s, key)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"request.{what}",
                f"The request has a {what} in text, and this model was loaded without a tokenizer.",
                "Only token ids can be used.",
                "Compile the model with its tokenizer, or use token ids.",
            )
        return self.tokenizer


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; one text or one list of ids is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [cast("list[int]", items)]
    return cast("list[Prompt]", items)


def _as_token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            "request.prompt",
            f"A prompt holds {value!r} where a token id was expected.",
            "A prompt is a text or a list of whole numbers.",
            "Send one of these.",
        )
    return value
