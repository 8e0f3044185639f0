"""What is promised of every request, on the CPU target with the bundled pair: the transparency matrix with a
draft model and coded keys and values, and answers that always have their form."""

from __future__ import annotations

import json
import random
import re
import shutil
from itertools import product
from typing import NamedTuple

import jsonschema_rs
import pytest

pytest.importorskip("llguidance")

from llmc.compiler.driver import compile_model
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.load import load
from llmc.runtime.params import SamplingParams
from llmc.runtime.protocol import RowDiff, SamplingState
from llmc.runtime.request import FinishReason
from llmc.runtime.structured import StructuredOutput

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
NUM_PAGES = 40
PAGE_TOKENS = 32
SAMPLINGS = (
    SamplingState(),
    SamplingState(temperature=0.9, seed=7, top_p=0.95),
    SamplingState(temperature=1.2, seed=2**63 + 5, top_k=40, min_p=0.01, repetition_penalty=1.2),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, stories_7m, cpu_artifact):
    """The bundled model with int4 weights and int8 keys and values, and its draft with float32 ones."""
    big = tmp_path_factory.mktemp("pair") / "big.llmc"
    compile_model(stories_7m, output=big, target="cpu", quant="int4", kv_dtype="int8", verify="off")
    return big, cpu_artifact


@pytest.fixture(autouse=True)
def always_drafts(monkeypatch):
    """Without a cost table every step drafts, whether it pays on this machine or not."""
    monkeypatch.setattr("llmc.runtime.load.measure_costs", lambda executor, config: None)


class Cell(NamedTuple):
    """One combination of what a request may meet."""

    company: str
    cache: str
    speculation: str
    preempted: bool


CELLS = [
    Cell(*values)
    for values in product(
        ("alone", "batch"), ("cold", "warm", "evicted"), ("none", "ngram", "draft"), (False, True)
    )
]


def drive(engine, requests, rng=None, preempts=False):
    """Requests that arrive in between steps, until all have ended; every few steps one that runs is
    preempted."""
    pending, ended, num_steps = list(requests), {}, 0
    while pending or engine.has_work():
        while pending and (rng is None or not engine.has_work() or rng.random() < 0.4):
            engine.add_request(pending.pop(0))
        for output in engine.step():
            if output.finished is not None:
                ended[output.request_id] = output.finished
        num_steps += 1
        if preempts and engine._running and num_steps % 5 == 2:
            engine._preempt(rng.choice(list(engine._running.values())))
    engine.blocks.check()
    assert engine.blocks.used() == [0] * len(engine.blocks.groups)
    assert all(finished.reason is FinishReason.LENGTH for finished in ended.values())
    return ended


def in_cell(executor, cell, requests, fillers, rng):
    """Tokens by request, and the engine that made them."""
    config = RuntimeConfig(
        max_requests=8,
        max_step_tokens=rng.choice((16, 48, 512)),
        speculation=cell.speculation,
        ngram_min=1,
        draft_tokens=rng.choice((2, 4)),
    )
    engine = Engine(executor, config)
    if cell.cache != "cold":
        drive(engine, requests)
    if cell.cache == "evicted":
        drive(engine, fillers)
    ended = {}
    for group in [requests] if cell.company == "batch" else [[request] for request in requests]:
        ended |= drive(engine, group, rng, cell.preempted)
        if cell.cache == "evicted" and cell.company == "alone":
            drive(engine, fillers)
    if not cell.preempted and cell.company == "alone":
        hits = [ended[request.request_id].num_cached_tokens for request in requests]
        assert all(hits) if cell.cache == "warm" else not any(hits) or cell.cache == "cold"
    assert (engine.stats.num_preemptions > 0) is cell.preempted
    assert (sum(engine.stats.accepted_at) > 0) is (cell.speculation != "none")
    executor.apply(RowDiff(leave=tuple(range(config.max_requests))))
    return {number: finished.output_token_ids for number, finished in ended.items()}


@pytest.mark.parametrize("target", ["coded cache", "draft of itself"])
def test_the_matrix(pair, target, request_of, heldout_stories):
    """{alone, batch} × {cold, warm, evicted} × {plain, n-gram, draft} × {preempted or not}; and seeds."""
    big, small = pair
    path = big if target == "coded cache" else small
    with load(path, RuntimeConfig(num_threads=1)) as llm:
        per_token = llm.engine.blocks.groups[0].bytes_per_token
        groups = llm.engine.blocks.groups
        assert path is not big or {group.dtype for group in groups} == {"int8"}
        prompts = [
            llm.encode(story[:900])[: 40 + 9 * number] for number, story in enumerate(heldout_stories[:5])
        ]
    prompts.append((*prompts[0][:33], *prompts[1][:20]))
    requests = [
        request_of(number, prompt, 20 + number, SAMPLINGS[number % len(SAMPLINGS)])
        for number, prompt in enumerate(prompts)
    ]
    rng = random.Random(1)
    fillers = [request_of(100 + number, [rng.randrange(4096) for _ in range(220)], 1) for number in range(8)]
    config = RuntimeConfig(
        num_threads=1,
        max_requests=8,
        max_step_tokens=512,
        max_model_len=256,
        cache_bytes=per_token * PAGE_TOKENS * NUM_PAGES,
    )
    with load(path, config, draft=small) as llm:
        executor = llm.engine._executor
        assert executor.caps.num_blocks == (NUM_PAGES,)
        expected = in_cell(executor, CELLS[0], requests, fillers, rng)
        assert len(set(expected.values())) == len(requests)
        for cell in CELLS:
            assert in_cell(executor, cell, requests, fillers, rng) == expected, cell


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "age", "likes", "sure"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "where": {"$ref": "#/$defs/point"},
        "next": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    },
    "required": ["id", "where", "next"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {
                "x": {"type": "integer", "minimum": -999, "maximum": 999},
                "y": {"type": "integer", "minimum": -999, "maximum": 999},
            },
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}
LIST = {
    "type": "array",
    "minItems": 1,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {"k": {"enum": ["a", 1, None, True]}, "note": {"type": "string", "maxLength": 6}},
        "required": ["k"],
        "additionalProperties": False,
    },
}
# Every part has a bound, blanks included, so that no answer goes on for ever.
SCHEMAS = {"person": PERSON, "nested": NESTED, "list": LIST}
PATTERN = r"\{\"n\": [0-9]{1,6}, \"t\": \"[a-z ]{0,20}\"\}"
MAX_TOKENS = 480


def answers(llm, structured, count):
    wanted = SamplingParams(temperature=1.0, seed=11, n=count, max_tokens=MAX_TOKENS, structured=structured)
    return llm.generate(["Once upon a time"], wanted)[0].completions


@pytest.mark.parametrize("speculation", ["none", "ngram", "draft"])
def test_every_answer_has_its_form(pair, speculation, plain_answers):
    """500 seeded samples at temperature 1 of a model that never saw JSON; each whole and valid. Drafted ones
    are the same tokens."""
    big, small = pair
    config = RuntimeConfig(
        num_threads=1, max_requests=32, speculation=speculation if speculation == "ngram" else "none"
    )
    checked = 0
    with load(big, config, draft=small if speculation == "draft" else None) as llm:
        for name, count in (("person", 125), ("nested", 125), ("list", 125), ("pattern", 125)):
            form = (
                StructuredOutput.from_schema(SCHEMAS[name])
                if name in SCHEMAS
                else StructuredOutput(regex=PATTERN)
            )
            validator = jsonschema_rs.validator_for(SCHEMAS.get(name, {"type": "object"}))
            found = answers(llm, form, count)
            for completion in found:
                assert completion.finish_reason is FinishReason.STOP, completion.text
                value = json.loads(completion.text)
                assert validator.is_valid(value), completion.text
                assert name != "pattern" or re.fullmatch(PATTERN, completion.text)
                checked += 1
            tokens = [completion.token_ids for completion in found]
            assert len(set(tokens)) > len(tokens) // 4, "the samples are not all alike"
            known = plain_answers.setdefault(name, tokens)
            assert tokens == known
        stats = llm.engine.stats
        assert (sum(stats.accepted_at) > 0) is (speculation != "none")
    assert checked == 500


@pytest.fixture(scope="module")
def plain_answers():
    """Token ids by form, of the first run."""
    return {}


def test_an_answer_cut_off_says_so(pair):
    """`length` means: not whole, and valid as far as it goes."""
    with load(pair[0], RuntimeConfig(num_threads=1)) as llm:
        form = StructuredOutput.from_schema(PERSON)
        wanted = SamplingParams(temperature=1.0, seed=11, n=8, max_tokens=9, structured=form)
        cut = llm.generate(["Once upon a time"], wanted)[0].completions
        whole = answers(llm, form, 8)
    for short, long in zip(cut, whole, strict=True):
        assert (short.finish_reason, long.finish_reason) == (FinishReason.LENGTH, FinishReason.STOP)
        assert short.token_ids == long.token_ids[:9]
        with pytest.raises(ValueError, match=r"."):
            json.loads(short.text)
