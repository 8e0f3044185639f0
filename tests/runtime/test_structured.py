"""Answers in a form: what is refused before it runs, and that every sample has its form, drafted or not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("llguidance")

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps, simulated_spec
from llmc.runtime.grammar import build_mask, mask_words
from llmc.runtime.grammar_compiler import GrammarCompiler, Vocabulary
from llmc.runtime.llm import LLM
from llmc.runtime.params import SamplingParams
from llmc.runtime.request import FinishReason
from llmc.runtime.structured import StructuredOutput
from llmc.runtime.tokenizer import Tokenizer
from llmc.spec.errors import RequestError

pytestmark = pytest.mark.pure

MODEL = Path(__file__).resolve().parents[2] / "models" / "stories-7m"
VOCAB = 4096
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(MODEL)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(Vocabulary.of(tokenizer, VOCAB, tokenizer.eos_token_ids))


def answers(tokenizer, structured, count, speculation="none", max_in_flight=1, **params):
    """Completions of a model of noise, which knows no form: every token is about as likely as any other."""
    caps = simulated_caps(
        groups=[("full", 0, 16, 400)],
        vocab_size=VOCAB,
        max_context=512,
        max_in_flight=max_in_flight,
        can_propose=True,
    )
    config = RuntimeConfig(max_requests=8, max_step_tokens=64, speculation=speculation, ngram_min=1)
    with LLM(SimulatedExecutor(caps), tokenizer, simulated_spec(caps, (0,)), config) as llm:
        wanted = SamplingParams(
            temperature=1.0, seed=5, n=count, max_tokens=300, structured=structured, **params
        )
        return llm.generate(["Once"], wanted)[0].completions


@pytest.mark.parametrize(
    ("speculation", "count"),
    [("none", 30), ("ngram", 8), pytest.param("ngram", 120, marks=pytest.mark.slow)],
)
def test_every_sample_fits_the_schema_drafted_or_not(tokenizer, speculation, count):
    for completion in answers(tokenizer, StructuredOutput.from_schema(SCHEMA), count, speculation):
        value = json.loads(completion.text)
        assert set(value) == {"name", "age", "tags"}
        assert 0 <= value["age"] <= 120
        assert len(value["name"]) <= 8
        assert set(value["tags"]) <= {"red", "green"}
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason is None


def test_drafts_and_steps_in_flight_change_no_token(tokenizer):
    wanted = StructuredOutput(regex="([a-z]{2,5} ){3}[a-z]{2}")
    plain = answers(tokenizer, wanted, 4)
    assert all(re.fullmatch("([a-z]{2,5} ){3}[a-z]{2}", each.text) for each in plain)
    for speculation, max_in_flight in (("ngram", 1), ("draft", 1), ("none", 3)):
        found = answers(tokenizer, wanted, 4, speculation, max_in_flight)
        assert [each.token_ids for each in found] == [each.token_ids for each in plain]


def test_choices_and_grammars(tokenizer):
    choices = ("yes", "no", 'per"haps\n')
    for each in answers(tokenizer, StructuredOutput(choice=choices), 6):
        assert each.text in choices
    for each in answers(tokenizer, StructuredOutput(grammar='start: "a" start "b" | "ab"'), 4):
        half = len(each.text) // 2
        assert each.text == "a" * half + "b" * half
    [cut] = answers(tokenizer, StructuredOutput(regex="a{500}"), 1)
    assert cut.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (StructuredOutput.from_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (StructuredOutput.from_schema({"type": "strng"}), "strng"),
        (StructuredOutput.from_schema({"$ref": "#/nowhere"}), "nowhere"),
        (StructuredOutput.from_schema(False), "schema false"),
        (StructuredOutput(regex="(?=a)b"), "look-around"),
        (StructuredOutput(grammar="start: missing"), "missing"),
    ],
)
def test_what_cannot_be_compiled_is_named(compiler, wanted, what):
    with pytest.raises(RequestError, match=what) as caught:
        compiler.compile(wanted)
    assert caught.value.code == f"request.structured.{wanted.kind}"
    assert "\n" not in caught.value.why


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "None of the forms"),
        ({"regex": "a", "choice": ("b",)}, "regex and choice"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": "3"}, "A schema is a JSON object"),
        ({"choice": ("a", "")}, "at least one character"),
        ({"regex": ""}, "at least one character"),
    ],
)
def test_forms_that_make_no_sense_are_refused(fields, what):
    with pytest.raises(RequestError, match=what):
        StructuredOutput(**fields)


def test_forms_travel_as_messages():
    params = SamplingParams(structured=StructuredOutput(choice=["a", "b"]))
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params


def test_masks_of_a_step(compiler, tokenizer):
    """Rows of segments without a form allow all; a drafted position has the mask behind its draft."""
    state = compiler.compile(StructuredOutput(choice=("no", "yes"))).start()
    yes = next(
        token
        for token in range(VOCAB)
        if state.count_allowed([token]) and tokenizer.decode([token])[:1] == "y"
    )
    assert build_mask([(None, (1, 2)), (None, ())], VOCAB) is None
    mask = build_mask([(None, (7,)), (state, (yes,)), (None, ())], VOCAB)
    assert mask.shape == (5, mask_words(VOCAB))
    assert (mask[[0, 1, 4]] == 0xFFFFFFFF).all()
    allowed = np.unpackbits(mask[2].view(np.uint8), bitorder="little")
    assert allowed[yes]
    assert allowed.sum() < 20
    assert not np.array_equal(mask[2], mask[3])
    assert state.count_allowed([yes, 1, 1]) == 1
    before = mask[2].copy()
    assert np.array_equal(build_mask([(state, ())], VOCAB)[0], before)
    state.accept(1)
    assert state.error
    assert not build_mask([(state, ())], VOCAB).any()
