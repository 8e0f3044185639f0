"""The reference executor under the engine: whatever else runs, a request's tokens are those it gets alone."""

from __future__ import annotations

import random

import pytest
import torch

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.reference import make_executor, source_of_program
from llmc.runtime.protocol import SamplingState

SHAPES = {
    "plain": {},
    "windows": {"windows": (0, 12, 12), "hidden": 36, "head_dim": 8},
    "experts": {"experts": 5, "ffn": 24},
    "generic": {"generic": True, "hidden": 1160, "head_dim": 20, "vocab": 131, "windows": (0,)},
    "odd widths": {"hidden": 76, "head_dim": 6, "ffn": 1111, "vocab": 67, "windows": (0,)},
    "int3 experts": {"experts": 5, "ffn": 24, "scheme": "int3_g32"},
    "int4": {"scheme": "int4_g32", "ffn": 72},
    "bfloat16": {"dtype": torch.bfloat16},
}
SAMPLINGS = [
    SamplingState(),
    SamplingState(temperature=0.9, seed=7, logprobs=2),
    SamplingState(temperature=1.3, seed=2**63 + 5, top_k=19, top_p=0.9, repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def sources(build_program):
    return {name: source_of_program(build_program(**fields)) for name, fields in SHAPES.items()}


def requests_for(request_of, vocab, seed=0, count=7):
    rng = random.Random(seed)
    stem = [rng.randrange(vocab) for _ in range(33)]
    return [
        request_of(
            number,
            [*stem[: rng.choice([0, 9, 33])], *(rng.randrange(vocab) for _ in range(rng.randrange(1, 30)))],
            rng.randrange(6, 16),
            SAMPLINGS[number % len(SAMPLINGS)],
        )
        for number in range(count)
    ]


def tokens_of(source, requests, drained, **fields):
    """Output tokens by request, and the engine that made them."""
    config = RuntimeConfig(num_threads=2, **fields)
    engine = Engine(make_executor(source, config), config)
    for request in requests:
        engine.add_request(request)
    ended = drained(engine)
    return {number: finished.output_token_ids for number, finished in ended.items()}, engine


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_do_not_depend_on_company(name, sources, request_of, drained):
    source = sources[name]
    requests = requests_for(request_of, source.spec.vocab_size)
    alone = {}
    for request in requests:
        alone |= tokens_of(source, [request], drained, prefix_cache=False)[0]
    tight = source.cache.bytes_per_token * 8 * 24
    cells = {
        "together": {},
        "chunked": {"max_step_tokens": 7, "max_requests": 5},
        "chunked, no prefix cache": {"max_step_tokens": 37, "prefix_cache": False, "max_requests": 3},
        "preempted": {"cache_bytes": tight, "max_step_tokens": 64, "max_model_len": 80},
        "drafted": {"speculation": "ngram", "ngram_min": 1, "max_step_tokens": 64},
    }
    stats = {}
    for cell, fields in cells.items():
        tokens, engine = tokens_of(source, requests, drained, **fields)
        assert tokens == alone, cell
        stats[cell] = engine.stats
    if name == "plain":
        assert stats["preempted"].num_preemptions > 0
        assert sum(stats["drafted"].drafted_at) > 0


@pytest.mark.parametrize(
    "model", ["stories_1m", pytest.param("stories_7m", marks=pytest.mark.slow)], ids=["1m", "7m"]
)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix cache", "no prefix cache"])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "preempted"])
def test_a_real_model_in_random_company(
    model, prefix_cache, tight, request, build_llama, request_of, drained
):
    """Requests arrive while others run, in chunks of every size, with pages for all or for few."""
    source = source_of_program(build_llama(request.getfixturevalue(model)))
    requests = requests_for(request_of, source.spec.vocab_size, seed=4, count=8)
    alone = {}
    for one in requests:
        alone |= tokens_of(source, [one], drained, prefix_cache=False)[0]
    preemptions = 0
    for seed in range(3):
        rng = random.Random(seed)
        config = RuntimeConfig(
            max_requests=rng.choice([4, 8]),
            max_step_tokens=rng.choice([9, 33, 150]),
            prefix_cache=prefix_cache,
            cache_bytes=source.cache.bytes_per_token * 16 * 12 if tight else 0,
            max_model_len=112,
            num_threads=2,
        )
        engine = Engine(make_executor(source, config), config)
        ended = {}
        for one in rng.sample(requests, len(requests)):
            engine.add_request(one)
            for _ in range(rng.randrange(3)):
                for output in engine.step():
                    if output.finished is not None:
                        ended[output.request_id] = output.finished
        ended |= drained(engine)
        preemptions += engine.stats.num_preemptions
        assert {number: finished.output_token_ids for number, finished in ended.items()} == alone
    assert bool(preemptions) == tight
