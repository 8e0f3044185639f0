"""Forms that would take too long: refused in bounded time, in a process that is ended, and remembered; an
answer whose masks are slow ends alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance")

from llmc.runtime import grammar_compiler
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.grammar import mask_words
from llmc.runtime.grammar_compiler import GrammarCompiler, Vocabulary
from llmc.runtime.grammar_trial import Trial
from llmc.runtime.grammars import Grammars
from llmc.runtime.request import FinishReason
from llmc.runtime.structured import StructuredOutput
from llmc.runtime.tokenizer import Tokenizer
from llmc.spec.errors import RequestError, TargetError, UsageError

pytestmark = pytest.mark.pure

MODEL = Path(__file__).resolve().parents[2] / "models" / "stories-7m"
# Sixty patterns that must all hold: the library intersects them for minutes, in gigabytes.
ENDLESS = StructuredOutput.from_schema(
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string", "pattern": f"^(a|b|ab){{{count}}}$"}}}
            for count in range(1, 60)
        ]
    }
)


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = Tokenizer.from_folder(MODEL)
    return Vocabulary.of(tokenizer, 4096, tokenizer.eos_token_ids)


def seconds_of(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


def test_a_form_without_end_is_refused_and_remembered(vocabulary):
    grammars = Grammars(vocabulary, limit_s=1.0)
    try:
        grammars.compile(StructuredOutput(choice=("yes", "no")))

        def refuse():
            with pytest.raises(RequestError, match="takes more than 1 s to compile") as caught:
                grammars.compile(ENDLESS)
            assert caught.value.code == "request.structured.json_schema"

        assert 1.0 <= seconds_of(refuse) < 5.0
        assert seconds_of(refuse) < 0.9
        state = grammars.compile(StructuredOutput(choice=("red", "green"))).start()
        assert state.error is None
    finally:
        grammars.close()
    assert all(trial.pid is None for trial in grammars._all_trials)


def test_closing_does_not_wait_for_a_form_without_end(vocabulary):
    grammars = Grammars(vocabulary, limit_s=60.0)
    told = []

    def compile_it():
        try:
            grammars.compile(ENDLESS)
        except RequestError as error:
            told.append(error)

    grammars.compile(StructuredOutput(regex="[a-z]"))
    thread = threading.Thread(target=compile_it)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    assert seconds_of(grammars.close) < 5
    thread.join(5)
    assert told


def test_a_process_that_dies_is_started_again(vocabulary):
    trial = Trial(vocabulary, 30.0)
    try:
        trial.check(StructuredOutput(regex="a+"))
        first = trial.pid
        threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
        with pytest.raises(RequestError, match="more than 2 GiB to compile"):
            trial.check(ENDLESS)
        trial.check(StructuredOutput(regex="a+"))
        assert trial.pid not in (None, first)
        with pytest.raises(RequestError, match="look-around"):
            trial.check(StructuredOutput(regex="(?=a)b"))
    finally:
        trial.close()


def test_a_form_that_is_slow_at_every_token_is_refused(vocabulary):
    trial = Trial(vocabulary, 60.0)
    try:
        with pytest.raises(RequestError, match="what may come next takes"):
            trial.check(StructuredOutput(regex="(a{500}){500}"))
    finally:
        trial.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_request(vocabulary, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(TargetError, match="cannot be started"):
        Trial(vocabulary, 1.0).check(StructuredOutput(regex="a+"))


def test_what_is_kept_is_bounded(vocabulary, monkeypatch):
    monkeypatch.setattr("llmc.runtime.grammars._MAX_KEPT", 3)
    monkeypatch.setattr(Trial, "check", lambda self, wanted: None)
    grammars = Grammars(vocabulary, limit_s=1.0)
    forms = [StructuredOutput(regex="a" * (count + 1)) for count in range(4)]
    made = [grammars.compile(form) for form in forms]
    assert grammars.compile(forms[3]) is made[3]
    assert grammars.compile(forms[0]) is not made[0]
    assert len(grammars._kept) == 3
    assert grammars._kept_bytes == sum(form.num_bytes for form in grammars._kept)


def test_the_time_to_compile_has_a_range():
    with pytest.raises(UsageError, match="grammar_timeout_s is 0"):
        RuntimeConfig(grammar_timeout_s=0).validate()


class SlowMatcher:
    """Says yes to everything, and takes its time."""

    def __init__(self, delay_s):
        self.delay_s = delay_s

    def deep_copy(self):
        return self

    def compute_bitmask(self):
        end = time.thread_time() + self.delay_s
        while time.thread_time() < end:
            pass
        return b"\xff" * 4

    def is_error(self):
        return False

    is_stopped = is_error

    def consume_token(self, token_id):
        return True


def test_an_answer_with_slow_masks_ends_alone(request_of, drained):
    """Up to the mean is free however long the answer; beyond it there is half a second in all."""
    engine = Engine(SimulatedExecutor(simulated_caps()), RuntimeConfig())
    for number, delay_s in enumerate((0.06, 0.0005)):
        grammar = grammar_compiler.LlguidanceGrammar(SlowMatcher(delay_s), 29)
        engine.add_request(request_of(number, [1, 2, 3], 60, grammar=grammar))
    engine.add_request(request_of(2, [1, 2, 3], 60))
    ended = drained(engine)
    assert ended[0].reason is FinishReason.ERROR
    assert "masks take more than 20 ms each" in ended[0].error
    assert 5 <= len(ended[0].output_token_ids) <= 25
    assert {ended[number].reason for number in (1, 2)} == {FinishReason.LENGTH}


def test_masks_of_an_ordinary_form_are_fast(vocabulary):
    """A schema of twenty fields, a thousand masks: far below what an answer may take."""
    fields = {f"field_{index}": {"type": "string", "maxLength": 30} for index in range(20)}
    wanted = StructuredOutput.from_schema(
        {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    )
    state = GrammarCompiler(vocabulary).compile(wanted).start()
    draw = np.random.default_rng(0)
    mask = np.zeros((1, mask_words(4096)), dtype=np.uint32)
    started = time.thread_time()
    count = 0
    while not state.is_over and count < 1000:
        state.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))
        state.accept(int(draw.choice(allowed)))
        count += 1
    assert count > 100
    assert (time.thread_time() - started) / count < 0.005
    assert state.error is None
