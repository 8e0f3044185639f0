"""Any history of admitting, stepping, aborting, failing and timing out: every request ends exactly once, with
a reason, the pages come back, and who was not hit by a failure keeps its tokens."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import Faults, SimulatedExecutor, simulated_caps
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import FinishReason, Request

pytestmark = pytest.mark.pure

GROUPS = {
    "full": [("full", 0, 4, 18)],
    "full and window": [("full", 0, 4, 18), ("window", 6, 4, 12)],
    "chunk": [("chunk", 8, 4, 9), ("full", 0, 2, 40)],
    "no page to spare": [("full", 0, 4, 9), ("window", 6, 4, 3), ("chunk", 8, 4, 3)],
}
EXPECTED: dict[tuple, tuple[int, ...]] = {}


class DeviceError(Exception):
    """What an executor might raise."""


def run_alone(groups, prompt, max_tokens, sampling):
    """The tokens of a request without company, remembered over examples."""
    key = (groups, prompt, max_tokens, sampling)
    if key not in EXPECTED:
        engine = Engine(
            SimulatedExecutor(simulated_caps(groups=GROUPS[groups], max_context=36)),
            RuntimeConfig(prefix_cache=False),
        )
        engine.add_request(
            Request(request_id=0, prompt_token_ids=prompt, max_tokens=max_tokens, sampling=sampling)
        )
        tokens: list[int] = []
        while engine.has_work():
            for output in engine.step():
                tokens.extend(output.token_ids)
        EXPECTED[key] = tuple(tokens)
    return EXPECTED[key]


class History(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(sorted(GROUPS)),
        speculation=st.sampled_from(["none", "ngram", "draft"]),
        max_in_flight=st.integers(1, 3),
        max_step_tokens=st.sampled_from([4, 9, 40]),
        prefix_cache=st.booleans(),
        long_prompt_tokens=st.sampled_from([0, 6]),
        max_wait_s=st.sampled_from([None, 5.0]),
    )
    def start(
        self,
        groups,
        speculation,
        max_in_flight,
        max_step_tokens,
        prefix_cache,
        long_prompt_tokens,
        max_wait_s,
    ):
        self.groups = groups
        self.clock = 0.0
        self.fail_submit = self.fail_collect = False
        caps = simulated_caps(
            groups=GROUPS[groups], max_context=36, max_rows=4, max_in_flight=max_in_flight, can_propose=True
        )
        self.executor = SimulatedExecutor(caps, Faults(self.on_submit, self.on_collect))
        config = RuntimeConfig(
            max_requests=4,
            max_step_tokens=max_step_tokens,
            speculation=speculation,
            prefix_cache=prefix_cache,
            ngram_min=1,
            long_prompt_tokens=long_prompt_tokens,
            max_wait_s=max_wait_s,
        )
        self.engine = Engine(self.executor, config, lambda: self.clock)
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}
        self.hit: set[int] = set()

    def on_submit(self, plan):
        if self.fail_submit:
            self.fail_submit = False
            self.note_hit(plan)
            raise DeviceError("submit")

    def on_collect(self, plan):
        if self.fail_collect:
            self.fail_collect = False
            self.note_hit(plan)
            raise DeviceError("collect")

    def note_hit(self, plan):
        """Requests of a failing step. Rows are looked up as the engine has them now."""
        rows = {segment.row for segment in plan.segments}
        living = self.engine._running.values()
        self.hit |= {each.request.request_id for each in living if each.row in rows}

    @rule(
        stem=st.integers(0, 2),
        tail=st.lists(st.integers(0, 28), min_size=1, max_size=5),
        max_tokens=st.integers(1, 14),
        seed=st.sampled_from([None, 1, 2]),
        timeout=st.sampled_from([None, 3.0, 30.0]),
    )
    def add(self, stem, tail, max_tokens, seed, timeout):
        self.queue((*range(stem, stem * 8), *tail), max_tokens, seed, timeout)

    @precondition(lambda self: any(self.tokens.values()))
    @rule(data=st.data(), tail=st.lists(st.integers(0, 28), min_size=1, max_size=2))
    def follow_up(self, data, tail):
        """The next turn of a conversation: prompt and answer so far, as a prompt."""
        number = data.draw(st.sampled_from(sorted(n for n, tokens in self.tokens.items() if tokens)))
        prompt = (*self.requests[number].prompt_token_ids, *self.tokens[number], *tail)
        if len(prompt) <= 30:
            self.queue(prompt, 6, None, None)

    def queue(self, prompt, max_tokens, seed, timeout):
        number = len(self.requests)
        sampling = SamplingState() if seed is None else SamplingState(temperature=0.9, seed=seed)
        request = Request(
            request_id=number,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            arrival_s=self.clock,
            key="abc"[number % 3],
            deadline_s=None if timeout is None else self.clock + timeout,
        )
        self.engine.add_request(request)
        self.requests[number] = request
        self.tokens[number] = []

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            if self.engine.has_work():
                self.take(self.engine.step())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        number = data.draw(st.sampled_from(sorted(self.requests)))
        was_living = number not in self.ended and not self.is_ending(number)
        assert self.engine.abort(number) == was_living

    @rule(seconds=st.sampled_from([0.5, 4.0, 1e9]))
    def wait(self, seconds):
        self.clock += seconds

    @rule(where=st.sampled_from(["submit", "collect"]))
    def fail(self, where):
        setattr(self, f"fail_{where}", True)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def corrupt(self, data):
        self.executor.faults.nan_requests.add(data.draw(st.sampled_from(sorted(self.requests))))

    def is_ending(self, number):
        return any(each.request_id == number and each.finished for each in self.engine._outputs)

    def take(self, outputs):
        for output in outputs:
            number = output.request_id
            assert number not in self.ended
            self.tokens[number].extend(output.token_ids)
            if output.finished is not None:
                self.ended[number] = output.finished.reason
                assert output.finished.output_token_ids == tuple(self.tokens[number])
                self.check_reason(number, output.finished)

    def check_reason(self, number, finished):
        if finished.reason is FinishReason.ERROR:
            assert number in self.hit or number in self.executor.faults.nan_requests, finished.error
        if finished.reason is FinishReason.TIMEOUT:
            assert self.clock >= self.requests[number].deadline_s
        if finished.reason is FinishReason.LENGTH:
            assert len(finished.output_token_ids) == self.requests[number].max_tokens

    @invariant()
    def books_balance(self):
        if hasattr(self, "engine"):
            self.engine.blocks.check()

    @invariant()
    def tokens_are_those_it_gets_alone(self):
        for number, tokens in getattr(self, "tokens", {}).items():
            request = self.requests[number]
            expected = run_alone(self.groups, request.prompt_token_ids, request.max_tokens, request.sampling)
            assert tuple(tokens) == expected[: len(tokens)]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.take(self.engine.step())
        assert set(self.ended) == set(self.requests)
        assert self.engine.blocks.used() == [0] * len(GROUPS[self.groups])
        assert self.engine.blocks.available() == list(self.executor.caps.num_blocks)
        assert sum(self.engine.stats.finished.values()) == len(self.requests)
        assert sorted(self.engine._rows) == [0, 1, 2, 3]
        assert not self.engine.fairness._waiting
        self.engine.close()


TestHistory = pytest.mark.pure(History.TestCase)
TestHistory.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
