"""The reference executor and the corner cases of its protocol: samples, drafts, masks, logprobs, pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.ir.weights import Constant
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors import reference_products
from llmc.runtime.executors.reference import make_executor, source_of_program
from llmc.runtime.executors.reference_model import without_head
from llmc.runtime.protocol import (
    BlockChange,
    BlockCopy,
    LogitsWanted,
    RowDiff,
    RowEntry,
    SamplingState,
    Segment,
    StepPlan,
    TokenSource,
)
from llmc.spec.errors import InternalError, TargetError

PROMPT = (5, 17, 33, 2, 60, 41, 8, 8, 90, 12, 77)
CONFIG = RuntimeConfig(max_requests=4, max_step_tokens=64, num_threads=1)


class Driver:
    """Plays the engine: one page per 8 tokens, handed out in a fixed order that is not ascending."""

    def __init__(self, source, config=CONFIG):
        self.executor = make_executor(source, config)
        self.pages = {}
        self.step_id = 0

    def enter(self, row, token_ids, **sampling):
        entry = RowEntry(
            row=row, request_id=row, token_ids=tuple(token_ids), num_prompt_tokens=len(token_ids),
            sampling=SamplingState(**sampling),
        )  # fmt: skip
        self.executor.apply(RowDiff(enter=(entry,), leave=(row,)))
        self.pages[row] = 0

    def step(self, *segments, **fields):
        changes = list(fields.pop("block_changes", ()))
        for segment in segments:
            while self.pages[segment.row] * 8 < segment.start + segment.num_tokens:
                index = self.pages[segment.row]
                page = 60 - (segment.row * 20 + index)
                changes.append(BlockChange(group=0, row=segment.row, index=index, block=page))
                self.pages[segment.row] += 1
        self.step_id += 1
        plan = StepPlan(
            step_id=self.step_id,
            epoch=self.step_id,
            segments=segments,
            block_changes=tuple(changes),
            **fields,
        )
        result = self.executor.collect(self.executor.submit(plan))
        assert (result.step_id, result.epoch) == (plan.step_id, plan.epoch)
        return result.rows


def whole(row, count, logits=LogitsWanted.LAST, start=0, **fields):
    return Segment(row=row, start=start, num_tokens=count, logits=logits, **fields)


def decode(row, start):
    return Segment(row=row, start=start, num_tokens=1, source=TokenSource.LAST_SAMPLED)


@pytest.fixture(scope="module")
def source(build_program):
    return source_of_program(build_program())


@pytest.fixture
def driver(source):
    return Driver(source)


def greedy(driver, row, prompt, count, **sampling):
    driver.enter(row, prompt, **sampling)
    (result,) = driver.step(whole(row, len(prompt)))
    tokens = list(result.token_ids)
    while len(tokens) < count:
        (result,) = driver.step(decode(row, len(prompt) + len(tokens) - 1))
        tokens.extend(result.token_ids)
    return tokens


def test_unfinished_chunks_say_nothing(driver):
    driver.enter(0, PROMPT)
    (first,) = driver.step(whole(0, 6, LogitsWanted.NONE))
    assert first.token_ids == ()
    assert first.finite
    (last,) = driver.step(whole(0, 5, start=6, token_ids=PROMPT[6:]))
    driver.enter(1, PROMPT)
    (at_once,) = driver.step(whole(1, 11))
    assert last.token_ids == at_once.token_ids


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_drafts_are_accepted_up_to_the_first_that_differs(driver, sampling):
    expected = greedy(driver, 0, PROMPT, 6, **sampling)
    for right in range(4):
        wrong = (expected[1 + right] + 1) % 97
        drafts = (*expected[1 : 1 + right], wrong, 3)[:4]
        driver.enter(1, PROMPT, **sampling)
        driver.step(whole(1, 11))
        (result,) = driver.step(
            Segment(
                row=1, start=11, num_tokens=1 + len(drafts), source=TokenSource.LAST_SAMPLED,
                draft_ids=drafts, logits=LogitsWanted.ALL,
            )
        )  # fmt: skip
        assert result.num_accepted == right
        assert list(result.token_ids) == expected[1 : 2 + right]
        (after,) = driver.step(decode(1, 12 + right))
        if right < 4:
            assert after.token_ids[0] == expected[2 + right]


def test_prompt_logprobs_do_not_depend_on_chunks(driver):
    driver.enter(0, PROMPT, logprobs=3)
    (at_once,) = driver.step(whole(0, 11, LogitsWanted.PROMPT))
    assert len(at_once.prompt_logprobs) == 10
    assert [entry.token_id for entry in at_once.prompt_logprobs] == list(PROMPT[1:])
    assert len(at_once.token_ids) == len(at_once.logprobs) == 1
    driver.enter(1, PROMPT, logprobs=3)
    (first,) = driver.step(whole(1, 4, LogitsWanted.PROMPT))
    assert first.token_ids == ()
    (second,) = driver.step(whole(1, 7, LogitsWanted.PROMPT, start=4))
    assert first.prompt_logprobs + second.prompt_logprobs == at_once.prompt_logprobs
    assert second.token_ids == at_once.token_ids
    assert second.logprobs == at_once.logprobs


def test_grammar_masks_apply_row_by_row(driver):
    expected = greedy(driver, 0, PROMPT, 3)
    driver.enter(1, PROMPT)
    driver.enter(2, PROMPT)
    driver.step(whole(1, 11), whole(2, 11))
    allowed = np.full((4, 4), 0xFFFFFFFF, dtype=np.uint32)
    allowed[2] = 0
    allowed[2, 1] = 1 << 7  # token 39 alone
    drafts = Segment(
        row=2, start=11, num_tokens=3, source=TokenSource.LAST_SAMPLED,
        draft_ids=(expected[1], expected[2]), logits=LogitsWanted.ALL,
    )  # fmt: skip
    free, masked = driver.step(decode(1, 11), drafts, grammar_mask=allowed)
    assert free.token_ids == (expected[1],)
    assert masked.token_ids == (expected[1], 39)
    assert masked.num_accepted == (1 if expected[2] != 39 else 2)
    none = np.zeros((1, 4), dtype=np.uint32)
    (stuck,) = driver.step(decode(1, 12), grammar_mask=none)
    assert not stuck.finite
    assert stuck.token_ids == ()
    with pytest.raises(InternalError, match="grammar mask"):
        driver.step(decode(0, 13), grammar_mask=allowed)


def test_a_row_of_nan_fails_alone(build_program):
    program = build_program(tied=False)
    table = program.weights["model.embed_tokens.weight"].value.clone()
    table[50] = torch.nan
    weights = program.weights.with_entries({"model.embed_tokens.weight": Constant(table)})
    driver = Driver(source_of_program(program.replace(weights=weights)))
    expected = greedy(driver, 0, PROMPT, 2)
    driver.enter(0, PROMPT)
    driver.enter(1, (5, 50, 3))
    driver.enter(2, (5, 50, 3))
    good, bad, worse = driver.step(whole(0, 11), whole(1, 3), whole(2, 3, LogitsWanted.PROMPT))
    assert good.token_ids == (expected[0],)
    assert (bad.finite, bad.token_ids) == (False, ())
    assert (worse.finite, worse.prompt_logprobs) == (False, ())
    driver.enter(1, PROMPT)
    (clean,) = driver.step(whole(1, 11))
    assert clean.token_ids == (expected[0],), "pages that held NaN do not harm their next owner"


def test_copied_pages_hold_the_same_keys(driver):
    expected = greedy(driver, 0, PROMPT, 3)
    driver.enter(1, PROMPT)
    driver.pages[1] = 2
    changes = tuple(BlockChange(group=0, row=1, index=i, block=5 + i) for i in range(2))
    copies = (BlockCopy(group=0, source=60, target=5), BlockCopy(group=0, source=59, target=6))
    (result,) = driver.step(whole(1, 3, start=8), block_changes=changes, block_copies=copies)
    assert result.token_ids == (expected[0],)


def test_penalties_count_what_was_generated_before_a_preemption(driver):
    sampling = {"frequency_penalty": 2.0, "repetition_penalty": 1.5}
    expected = greedy(driver, 0, PROMPT, 6, **sampling)
    entry = RowEntry(
        row=1, request_id=1, token_ids=(*PROMPT, *expected[:3]), num_prompt_tokens=11,
        sampling=SamplingState(**sampling),
    )  # fmt: skip
    driver.executor.apply(RowDiff(enter=(entry,)))
    driver.pages[1] = 0
    (result,) = driver.step(whole(1, 14))
    assert result.token_ids == (expected[3],)


def test_threads_are_given_back(source):
    before = torch.get_num_threads()
    driver = Driver(source, RuntimeConfig(max_requests=4, max_step_tokens=64, num_threads=2))
    greedy(driver, 0, PROMPT, 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "fields", [{}, {"hidden": 1160, "head_dim": 20, "generic": True}, {"ffn": 1111, "dtype": torch.bfloat16}]
)
def test_threads_change_no_bit(build_program, monkeypatch, fields):
    monkeypatch.setattr(reference_products, "_THREADED_SIZE", 0)
    source = source_of_program(build_program(windows=(0,), **fields))
    results = []
    for num_threads in (1, 2):
        driver = Driver(source, RuntimeConfig(max_requests=4, max_step_tokens=64, num_threads=num_threads))
        driver.enter(0, PROMPT, logprobs=5)
        results.append(driver.step(whole(0, 11, LogitsWanted.PROMPT)))
    assert results[0] == results[1]


@pytest.mark.parametrize("fields", [{}, {"experts": 5, "ffn": 27}], ids=["dense", "experts"])
def test_quantised_weights_give_the_same_bits_kept_or_not(build_program, fields):
    source = source_of_program(build_program(scheme="int4_g32_asym", **fields))
    results = []
    for dense_bytes in (0, 50_000, 2**30):
        driver = Driver(source)
        driver.executor = make_executor(source, CONFIG, dense_bytes=dense_bytes)
        driver.enter(0, PROMPT, logprobs=5)
        results.append(driver.step(whole(0, 11, LogitsWanted.PROMPT)))
    assert results[0] == results[1] == results[2]


def test_the_head_is_left_out_where_nobody_wants_logits(build_program):
    program = build_program()
    body = without_head(program.graph)
    assert body.lint() is None
    targets = [str(node.target) for node in body.nodes]
    assert targets.count("llmc.kv_write.default") == 2
    assert "llmc.gather_rows.default" not in targets
    assert "out_rows" not in targets


@pytest.mark.parametrize(
    ("segments", "why"),
    [
        ([whole(3, 1)], "row 3 is empty"),
        ([whole(0, 12)], "the row has not"),
        ([whole(0, 4)], "before the row's last known token"),
        ([whole(0, 11, token_ids=(1,) * 11)], "not those of the row"),
        ([whole(0, 11, draft_ids=(1,))], "before the row's last known token"),
        ([Segment(row=0, start=0, num_tokens=12, draft_ids=(1,))], "does not ask for all"),
        ([whole(0, 11)] * 6, "too many for a step"),
    ],
)
def test_plans_that_break_the_contract_are_refused(driver, segments, why):
    driver.enter(0, PROMPT)
    with pytest.raises(InternalError, match=why):
        driver.step(*segments) if segments[0].row in driver.pages else driver.executor.submit(
            StepPlan(step_id=1, epoch=1, segments=tuple(segments))
        )


def test_a_token_without_a_page_is_refused(driver):
    driver.enter(0, PROMPT)
    with pytest.raises(InternalError, match="no page"):
        driver.executor.submit(StepPlan(step_id=1, epoch=1, segments=(whole(0, 11),)))


def test_one_step_at_a_time(driver):
    driver.enter(0, PROMPT)
    driver.step(whole(0, 11))
    plan = StepPlan(step_id=9, epoch=9, segments=(decode(0, 11),))
    ticket = driver.executor.submit(plan)
    with pytest.raises(InternalError, match="not collected"):
        driver.executor.submit(plan)
    driver.executor.collect(ticket)
    with pytest.raises(InternalError, match="no step"):
        driver.executor.collect(ticket)
    with pytest.raises(InternalError, match="drafts"):
        driver.executor.propose([0], 3)
    driver.executor.close()
    driver.executor.close()
    with pytest.raises(InternalError, match="closed"):
        driver.executor.submit(plan)


def test_a_cache_without_room_for_a_page_is_a_target_error(source):
    config = RuntimeConfig(max_requests=1, max_step_tokens=8, cache_bytes=100)
    with pytest.raises(TargetError, match="100 bytes"):
        make_executor(source, config)
