"""Sampling on the device gives the oracle's tokens, on fresh random logits, with every filter alone and
together, ties, cut vocabularies, drafts and rows that cannot be sampled."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmc.kernels.cuda.row_state import (
    FREQUENCY,
    HAS_FAILED,
    LAST_TOKEN,
    LENGTH,
    MIN_P,
    MIN_TOKENS,
    NUM_PROMPT,
    PRESENCE,
    REPETITION,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    USES,
    row_record,
)
from llmc.kernels.cuda.sampler import DeviceSampler, Samples, make_space, make_tables
from llmc.runtime.protocol import SamplingState
from llmc.runtime.sampling import History, sample_segment

DEVICE = "cuda" if os.environ.get("LLMC_TEST_DEVICE") == "cuda" else "cpu"


def empty(shape, dtype):
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=DEVICE)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def entered(tables, row, state, history):
    """Writes a row as an executor does."""
    uses = bool(state.logit_bias) | 6
    record = row_record(
        {
            LENGTH: len(history.token_ids),
            LAST_TOKEN: history.token_ids[-1],
            NUM_PROMPT: history.num_prompt_tokens,
            MIN_TOKENS: state.min_tokens,
            TOP_K: state.top_k,
            SEED: state.seed,
            USES: uses,
        },
        {
            TEMPERATURE: state.temperature,
            REPETITION: state.repetition_penalty,
            PRESENCE: state.presence_penalty,
            FREQUENCY: state.frequency_penalty,
            MIN_P: state.min_p,
            TOP_P: state.top_p,
        },
    )
    tables.state[row] = torch.tensor(record, device=DEVICE)
    vocab = tables.counts.shape[1]
    prompt = np.bincount(history.token_ids[: history.num_prompt_tokens], minlength=vocab) > 0
    generated = np.bincount(history.token_ids[history.num_prompt_tokens :], minlength=vocab)
    tables.counts[row] = torch.tensor(2 * generated + prompt, dtype=torch.int32, device=DEVICE)
    for token, bias in state.logit_bias:
        tables.bias[row, token] = bias
    bits = np.zeros(tables.banned.shape[1] * 32, np.uint8)
    bits[list(state.banned_until_min)] = 1
    tables.banned[row] = torch.tensor(np.packbits(bits, bitorder="little").view(np.int32), device=DEVICE)


def random_case(rng, vocab, ties):
    logits = rng.normal(size=vocab) * rng.choice([0.1, 1, 4])
    logits = np.round(logits) if ties else logits
    logits[rng.random(vocab) < 0.1] = -np.inf
    history = rng.integers(0, vocab, size=rng.integers(1, 12)).tolist()
    pick = lambda off, *values: off if rng.random() < 0.5 else rng.choice(values)  # noqa: E731
    state = SamplingState(
        temperature=float(pick(0.7, 0.0, 1e-3, 1.0, 3.0, 1e38)),
        top_k=int(pick(0, 1, 2, 7, vocab, vocab + 5)),
        top_p=float(pick(1.0, 0.0, 1e-9, 0.3, 0.9, 0.999999)),
        min_p=float(pick(0.0, 0.01, 0.5, 1.0)),
        repetition_penalty=float(pick(1.0, 1.3, 0.7)),
        presence_penalty=float(pick(0.0, 0.6, -0.2)),
        frequency_penalty=float(pick(0.0, 0.3, -1.1)),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        min_tokens=int(pick(0, 3, 30)),
        banned_until_min=tuple(rng.integers(0, vocab, size=3).tolist()),
        logit_bias=tuple((t, float(rng.normal() * 5)) for t in sorted({1, int(rng.integers(vocab))}))
        if rng.random() < 0.5
        else (),
    )
    return (
        logits.astype(np.float32),
        state,
        History(token_ids=history, num_prompt_tokens=int(rng.integers(0, len(history) + 1))),
    )


class Batch:
    """Segments of rows in reversed order, with their drafts and masks, beside nobody's logit row."""

    def __init__(self, vocab, cases, drafts, masks):
        self.vocab = vocab
        self.cases, self.drafts = cases, drafts
        self.tables = make_tables(empty, len(cases) + 2, vocab, ())
        row_of, ahead, follow, first, count = [-1], [0], [-1], [0], [1]
        for index, (_, state, history) in enumerate(cases):
            entered(self.tables, self.row(index), state, history)
            own = drafts[index]
            first.append(len(row_of))
            count.append(1 + len(own))
            row_of += [self.row(index)] * (1 + len(own))
            ahead += list(range(1 + len(own)))
            follow += [*own, -1]
        width = self.tables.banned.shape[1]
        held = np.zeros((len(row_of), width), np.uint32) if masks is None else np.concatenate(masks)
        mask_of = [-1] * len(row_of) if masks is None else [-1, *range(len(row_of) - 1)]
        self.samples = Samples(
            row_of=int32(row_of),
            ahead=int32(ahead),
            drafts=int32(follow),
            mask_of=int32(mask_of),
            masks=torch.tensor(held.view(np.int32), device=DEVICE),
            first=int32(first),
            count=int32(count),
        )

    def row(self, index):
        return len(self.cases) - index

    def run(self, launch, chunk, filtered=True, spoiled=None):
        logits = [np.full((1, self.vocab), np.nan, np.float32)]
        for index, (values, _, _) in enumerate(self.cases):
            logits += [np.roll(values, place)[None] for place in range(1 + len(self.drafts[index]))]
        stacked = torch.tensor(np.concatenate(logits), device=DEVICE)
        if spoiled is not None:
            stacked[spoiled] = float("nan")
        space = make_space(empty, stacked.shape[0], self.vocab, chunk)
        results = empty((len(self.cases) + 1, 8), "int32")
        sampler = DeviceSampler(launch, chunk)
        sampler.sample(stacked, self.samples, self.tables, space, results, filtered=filtered)
        assert not space.bins.any()
        assert int(results[0, 0]) == 0
        return results[1:].cpu().numpy()

    def expected(self, index, mask=None):
        values, state, history = self.cases[index]
        own = self.drafts[index]
        logits = np.stack([np.roll(values, place) for place in range(1 + len(own))])
        return sample_segment(0, logits, state, history, own, mask)


def check(batch, index, found, mask=None):
    expected = batch.expected(index, mask)
    state = batch.tables.state[batch.row(index)].cpu()
    _, settings, history = batch.cases[index]
    if not expected.finite:
        assert found[0] == -1, settings
        assert state[HAS_FAILED] == 1
        return
    assert tuple(found[1 : 1 + found[0]].tolist()) == expected.token_ids, settings
    assert state[LENGTH] == len(history.token_ids) + len(expected.token_ids)
    assert state[LAST_TOKEN] == expected.token_ids[-1]
    generated = [*history.token_ids[history.num_prompt_tokens :], *expected.token_ids]
    counts = batch.tables.counts[batch.row(index)].cpu() >> 1
    assert counts.tolist() == np.bincount(generated, minlength=batch.vocab).tolist()


@pytest.mark.parametrize(("vocab", "chunk", "ties"), [(50, 32, False), (77, 64, True)])
def test_sampled_tokens_are_the_oracles(launch, vocab, chunk, ties):
    rng = np.random.default_rng()
    cases = [random_case(rng, vocab, ties) for _ in range(8)]
    batch = Batch(vocab, cases, [()] * len(cases), None)
    for index, found in enumerate(batch.run(launch, chunk)):
        check(batch, index, found)


def test_drafts_masks_and_rows_that_cannot_be_sampled(launch):
    rng = np.random.default_rng()
    vocab = 64
    cases = [random_case(rng, vocab, index % 2 == 0) for index in range(4)]
    # Right drafts as far as the first, so that some are accepted.
    plain = Batch(vocab, cases, [()] * len(cases), None)
    right = [plain.expected(index) for index in range(len(cases))]
    drafts = [(*(each.token_ids or (0,)), 5) if i % 3 else () for i, each in enumerate(right)]
    masks = [rng.integers(0, 2**32, (1 + len(own), 2), dtype=np.uint32) for own in drafts]
    masks[2][:] = 0
    for held in (None, masks):
        batch = Batch(vocab, cases, drafts, held)
        for index, found in enumerate(batch.run(launch, 32)):
            check(batch, index, found, None if held is None else masks[index])


def test_a_row_that_failed_stays_failed_and_others_do_not_notice(launch):
    rng = np.random.default_rng(5)
    cases = [random_case(rng, 30, False) for _ in range(3)]
    batch = Batch(30, cases, [()] * 3, None)
    found = batch.run(launch, 16, spoiled=(2, 7))
    assert found[1, 0] == -1
    check(batch, 0, found[0])
    again = batch.run(launch, 16)
    assert again[1, 0] == -1
    assert again[0, 0] == 1


def test_steps_without_filters_sample_the_same(launch):
    rng = np.random.default_rng()
    cases = [random_case(rng, 45, False) for _ in range(8)]
    for index, (logits, state, history) in enumerate(cases):
        plain = SamplingState(temperature=state.temperature, min_p=state.min_p, seed=state.seed)
        cases[index] = (logits, plain, history)
    batch = Batch(45, cases, [()] * len(cases), None)
    for index, found in enumerate(batch.run(launch, 16, filtered=False)):
        check(batch, index, found)


@pytest.mark.slow
def test_a_vocabulary_of_152_thousand_tokens(launch):
    rng = np.random.default_rng()
    cases = [random_case(rng, 151936, ties) for ties in (False, True, False)]
    batch = Batch(151936, cases, [()] * 3, None)
    for index, found in enumerate(batch.run(launch, 2048)):
        check(batch, index, found)


def test_a_step_is_opened_from_the_permanent_rows(launch):
    pages, page = 300, 4
    tables = make_tables(empty, 4, 8, (pages,))
    tables.tables[0][:] = torch.arange(4 * pages).reshape(4, pages)
    for row, token in enumerate([3, 6, 7, -1]):
        tables.state[row, LAST_TOKEN] = token
    tables.state[3, HAS_FAILED] = 1
    sampler = DeviceSampler(launch)
    sampler.change_pages(int32([[1, 2, 77], [2, 299, -1]]), tables.tables[0])
    # The last known token of a row, nobody's, two that are given, and one of a row that failed.
    given = (int32([2, -1, 1, 1, 0, 3]), int32([-1, 5, -1, 4, 2, -1]), int32([1199, 9, 8, 9, 0, 4]))
    ids, positions, slots = (empty((6,), "int64") for _ in range(3))
    table = torch.full((6, pages), -9, device=DEVICE)
    sampler.open_step(given, tables, ids, positions, [(table, slots, page)])
    assert ids.tolist() == [7, 0, 6, 4, 2, 0]
    assert positions.tolist() == [1199, 0, 8, 9, 0, 4]
    assert slots.tolist() == [-1, -1, 77 * page, 77 * page + 1, 0, -1]
    assert table[0, :300].tolist() == [*range(2 * pages, 2 * pages + 299), -1]
    assert table[1, :2].tolist() == [-1, -9]
    assert table[2, :4].tolist() == table[3, :4].tolist() == [300, 301, 77, -9]
    filled = torch.tensor([4, -1, -1], device=DEVICE)
    sampler.fill_ids(filled, int32([0, 2, 3]), tables.state)
    assert filled.tolist() == [4, 7, 0]


def test_a_segment_without_logit_rows_is_nobodys(launch):
    """As recorded steps have them behind those of a smaller step."""
    rng = np.random.default_rng()
    batch = Batch(45, [random_case(rng, 45, False)], [()], None)
    batch.samples = replace(batch.samples, first=int32([1, 1]), count=int32([1, 0]))
    before = int(batch.tables.state[1, LENGTH])
    space, results = make_space(empty, 2, 45, 16), torch.full((2, 8), 9, dtype=torch.int32, device=DEVICE)
    logits = torch.tensor(rng.normal(size=(2, 45)), dtype=torch.float32, device=DEVICE)
    DeviceSampler(launch, 16).sample(logits, batch.samples, batch.tables, space, results, filtered=True)
    assert results[:, 0].tolist() in ([1, 0], [-1, 0])
    assert int(batch.tables.state[1, LENGTH]) == before + max(0, int(results[0, 0]))
