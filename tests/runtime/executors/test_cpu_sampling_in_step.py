"""Samples and logprobs that generated code makes in a step are the oracle sampler's over the same logits."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from llmc.artifact.cpu import CPU_UNIT, decode_unit
from llmc.artifact.reader import open_artifact
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.cpu import open_model, processor_features, runnable_levels
from llmc.runtime.executors.cpu_sampling import CpuSampled
from llmc.runtime.executors.rows import Row, SegmentOutput
from llmc.runtime.executors.stepped import OracleSampled, draw_by_steps
from llmc.runtime.protocol import LogitsWanted, RowEntry, SamplingState, Segment

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
PAGES_EACH = 3


@pytest.fixture(scope="module")
def opened(cpu_artifact):
    """The generated code with one and with three threads, and the manifest."""
    artifact = open_artifact(cpu_artifact)
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    level = runnable_levels(unit, processor_features())[0]
    models = []
    for threads in (1, 3):
        config = RuntimeConfig(max_requests=80, max_step_tokens=512, num_threads=threads)
        models.append(open_model(artifact, unit, level, config)[0])
    yield models, artifact.manifest
    for model in models:
        model.close()


def random_state(rng, vocab):
    def sometimes(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    return SamplingState(
        temperature=float(rng.choice([0.0, 0.7, 1.0, 1.5])),
        top_k=sometimes(int(rng.integers(1, 300)), 0),
        top_p=sometimes(float(rng.uniform(0.05, 0.999)), 1.0),
        min_p=sometimes(float(rng.choice([1e-4, 0.05, 1.0])), 0.0),
        repetition_penalty=sometimes(float(rng.uniform(0.5, 2)), 1.0),
        presence_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        frequency_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        seed=int(rng.integers(0, 1 << 63)) * 2 + 1,
        min_tokens=int(rng.integers(0, 30)),
        banned_until_min=tuple(int(i) for i in rng.integers(0, vocab, 3)),
        logit_bias=tuple((int(i), float(rng.normal())) for i in rng.integers(0, vocab, 4)),
        logprobs=sometimes(int(rng.integers(0, 7)), None),
    )


def random_segment(rng, index, layout, vocab):
    """A row with its pages, a segment of it, and a grammar mask or None."""
    known = tuple(int(i) for i in rng.integers(0, vocab, int(rng.integers(1, 24))))
    entry = RowEntry(
        row=index,
        request_id=index,
        token_ids=known,
        num_prompt_tokens=int(rng.integers(1, len(known) + 1)),
        sampling=random_state(rng, vocab),
    )
    row = Row(entry, layout)
    for group in range(len(layout.groups)):
        for page in range(PAGES_EACH):
            row.set_page(group, page, index * PAGES_EACH + page)
    wanted = LogitsWanted(rng.choice([each.value for each in LogitsWanted]))
    drafts = ()
    if wanted is LogitsWanted.ALL:
        drafts = tuple(int(i) for i in rng.integers(0, vocab, int(rng.integers(0, 4))))
    length = len(known) if wanted is not LogitsWanted.NONE else int(rng.integers(1, len(known) + 1))
    segment = Segment(row=index, start=0, num_tokens=length + len(drafts), draft_ids=drafts, logits=wanted)
    mask = None
    if rng.random() < 0.4:
        mask = rng.integers(0, 1 << 32, (1 + len(drafts), -(-vocab // 32)), dtype=np.uint64).astype(np.uint32)
    if rng.random() < 0.05:
        mask = np.zeros((1 + len(drafts), -(-vocab // 32)), np.uint32)
    return SegmentOutput(segment, row), mask


def with_matching_draft(output, layout, token):
    """The segment again, its first draft the token that it samples there."""
    segment = output.segment
    drafts = (token, *segment.draft_ids[1:])
    row = Row(output.row.entry, layout)
    row.tables = output.row.tables
    fields = {name: getattr(segment, name) for name in segment.__struct_fields__}
    return SegmentOutput(Segment(**fields | {"draft_ids": drafts}), row)


def assert_same(ours, oracle):
    assert ours.token_ids == oracle.token_ids
    assert (ours.finite, ours.num_accepted) == (oracle.finite, oracle.num_accepted)
    for got, want in ((ours.logprobs, oracle.logprobs), (ours.prompt_logprobs, oracle.prompt_logprobs)):
        assert [(one.token_id, one.rank) for one in got] == [(one.token_id, one.rank) for one in want]
        assert [[i for i, _ in one.top] for one in got] == [[i for i, _ in one.top] for one in want]
        np.testing.assert_allclose(
            [one.logprob for one in got], [one.logprob for one in want], rtol=1e-11, atol=1e-11
        )


def test_step_samples_what_the_oracle_samples(opened):
    models, manifest = opened
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for trial in range(6):
        count = 70 if trial == 0 else int(rng.integers(1, 9))  # more rows of logits than one call takes
        made = [
            random_segment(rng, index, manifest.cache, manifest.spec.vocab_size) for index in range(count)
        ]
        outputs, masks = [list(part) for part in zip(*made, strict=True)]
        for model in models:
            repeated = [SegmentOutput(each.segment, each.row) for each in outputs]
            ours = CpuSampled(model).results(repeated, masks)
            # the oracle reads logits of at most 64 rows at a time
            oracle = [OracleSampled(model).results([SegmentOutput(each.segment, each.row)], [mask])[0]
                      for each, mask in zip(outputs, masks, strict=True)]  # fmt: skip
            for got, want in zip(ours, oracle, strict=True):
                assert_same(got, want)


def test_a_draft_is_accepted_exactly_when_it_is_the_sample(opened):
    models, manifest = opened
    rng = np.random.default_rng(5)
    accepted = 0
    for _ in range(60):
        output, mask = random_segment(rng, 0, manifest.cache, manifest.spec.vocab_size)
        if not output.segment.draft_ids:
            continue
        first = CpuSampled(models[0]).results([output], [mask])[0]
        if not first.token_ids:
            continue
        again = with_matching_draft(output, manifest.cache, first.token_ids[0])
        ours = CpuSampled(models[1]).results([again], [mask])[0]
        assert_same(ours, OracleSampled(models[0]).results([again], [mask])[0])
        accepted += ours.num_accepted
    assert accepted > 0


def test_a_row_remembers_its_tokens_between_steps(opened):
    models, manifest = opened
    state = SamplingState(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.4, logprobs=2)
    row = Row(
        RowEntry(row=0, request_id=0, token_ids=(5, 9), num_prompt_tokens=2, sampling=state), manifest.cache
    )
    for group in range(len(manifest.cache.groups)):
        for page in range(PAGES_EACH):
            row.set_page(group, page, page)
    sampler = CpuSampled(models[0])
    for _ in range(40):
        start = len(row.token_ids) - 1 if len(row.token_ids) > 2 else 0
        segment = Segment(row=0, start=start, num_tokens=len(row.token_ids) - start)
        ours = sampler.results([SegmentOutput(segment, row)], [None])[0]
        assert_same(ours, OracleSampled(models[0]).results([SegmentOutput(segment, row)], [None])[0])
        row.token_ids.extend(ours.token_ids)


def test_rounds_in_one_call_draw_what_steps_draw(opened):
    """Several tokens behind each row, fed back by generated code, against a step for each; with every
    parameter, over page boundaries, and with a row whose logits are masked away."""
    models, manifest = opened
    rng = np.random.default_rng(int(np.random.SeedSequence().generate_state(1)[0]))
    vocab = manifest.spec.vocab_size
    for model in models:
        for count, rounds in ((1, 4), (5, 14), (70, 3), (3, 1)):
            drawn = []
            outputs = [random_segment(rng, index, manifest.cache, vocab)[0] for index in range(count)]
            if count == 5:
                sampling = outputs[2].row.entry.sampling
                nowhere = replace(sampling, min_tokens=99, banned_until_min=tuple(range(vocab)))
                outputs[2].row.entry = replace(outputs[2].row.entry, sampling=nowhere)
            for draw in (CpuSampled.draw, draw_by_steps):
                rows = [Row(each.row.entry, manifest.cache) for each in outputs]
                for row, each in zip(rows, outputs, strict=True):
                    row.tables = each.row.tables
                draw(
                    CpuSampled(model),
                    [
                        SegmentOutput(Segment(row=0, start=0, num_tokens=len(row.token_ids)), row)
                        for row in rows
                    ],
                    rounds,
                )
                drawn.append([row.token_ids[len(row.entry.token_ids) :] for row in rows])
            assert drawn[0] == drawn[1]
            assert {len(tokens) for tokens in drawn[0]} <= {0, rounds}
