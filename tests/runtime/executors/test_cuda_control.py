"""What recorded steps are told of tokens and samples, against steps written out by hand; which steps are
launched instead, and how many are recorded at load."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.runtime.executors import cuda_control as control
from llmc.runtime.executors.rows import Row, SegmentOutput
from llmc.runtime.protocol import LogitsWanted, RowEntry, SamplingState, Segment
from llmc.spec.cache import CacheGroup, CacheLayout

GROUP = {"layers": (0,), "num_kv_heads": 1, "k_dim": 8, "v_dim": 8, "dtype": "float32", "page_tokens": 8}
LAYOUT = CacheLayout(groups=(CacheGroup(kind="full", **GROUP),))


def output(number, tokens, start, drafts=(), logits=LogitsWanted.LAST, known=1):
    entry = RowEntry(
        row=number,
        request_id=number,
        token_ids=tuple(tokens),
        num_prompt_tokens=1,
        sampling=SamplingState(),
    )
    segment = Segment(
        row=number,
        start=start,
        num_tokens=known + len(drafts),
        draft_ids=tuple(drafts),
        logits=LogitsWanted.ALL if drafts else logits,
    )
    return SegmentOutput(segment, Row(entry, LAYOUT))


def written(outputs, tokens=10, **settings):
    array = np.full((control.FIELDS, tokens), 77, np.int32)
    places = control.write_control(array, outputs, **settings)
    return places, {name: array[getattr(control, name)].tolist() for name in (
        "ROW", "TOKEN", "POSITION", "SAMPLED", "AHEAD", "DRAFT", "MASK", "FIRST", "COUNT")}  # fmt: skip


MIXED = (
    output(3, [5, 6, -1], 2),  # its last token is still being sampled
    output(0, [1, 2, 3, 4], 1, logits=LogitsWanted.NONE, known=2),
    output(2, [9, 8], 1, drafts=(7, 6)),
    output(1, [4, 4, 4], 1, known=2),
)


def test_tokens_and_samples_of_a_mixed_step_stand_where_kernels_look():
    places, found = written(MIXED, has_masks=True)
    assert places == {0: [0], 2: [3, 4, 5], 3: [7]}
    assert found["ROW"] == [3, 0, 0, 2, 2, 2, 1, 1, -1, -1]
    assert found["TOKEN"][:8] == [-1, 2, 3, 8, 7, 6, 4, 4]
    assert found["POSITION"][:8] == [2, 1, 2, 1, 2, 3, 1, 2]
    assert found["SAMPLED"] == [3, -1, -1, 2, 2, 2, -1, 1, -1, -1]
    assert found["AHEAD"] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0]
    assert found["DRAFT"] == [-1, -1, -1, 7, 6, -1, -1, -1, -1, -1]
    # The segment that samples nothing has a mask, too, which nobody reads.
    assert found["MASK"] == [0, -1, -1, 2, 3, 4, -1, 5, -1, -1]
    assert found["FIRST"][:3] == [0, 3, 7]
    assert found["COUNT"] == [1, 3, 1, 0, 0, 0, 0, 0, 0, 0]


def test_without_masks_nothing_is_forbidden():
    _, found = written(MIXED, has_masks=False)
    assert found["MASK"] == [-1] * 10


def test_only_tokens_of_one_sequence_read_its_keys_again():
    assert control.keys_read_again([MIXED[0]] * 5) == 0
    # The second of two tokens at positions 1 and 2 reads three keys; drafts at 2 and 3 at most four each.
    assert control.keys_read_again([MIXED[1]]) == 3
    assert control.keys_read_again(MIXED) == 3 + 2 * 4 + 3


class Clock:
    """A second passes whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def graphs_of():
    """`graphs_of(capture)`: recorded steps of 1 to 8 tokens of a model that computes nothing."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from llmc.artifact.cuda import ArenaPlan
    from llmc.kernels.cuda.sampler import make_space, make_tables
    from llmc.runtime.executors.cuda_device import Device
    from llmc.runtime.executors.cuda_steps import StepGraphs

    device = Device("cpu")
    model = SimpleNamespace(
        layout=LAYOUT,
        operators=lambda empty: None,
        graph_by=lambda operators: None,
        compute=lambda graph, inputs: torch.zeros(len(inputs["input_ids"]), 40),
    )

    def record(work):
        work()
        return SimpleNamespace(close=lambda: None)

    def make(capture):
        return StepGraphs(
            model,
            make_tables(device.zeros, 4, 40, (3,)),
            make_space(device.zeros, 8, 40),
            device.zeros((8, 4), "int32"),
            device=device,
            launcher=lambda launch: None,
            recorder=record,
            plans=[ArenaPlan(rows=rows, offsets=(), num_bytes=16) for rows in (1, 2, 4, 8)],
            capture=capture,
            clock=Clock(),
        )

    return make


@pytest.mark.parametrize(("load_seconds", "recorded"), [(0.5, 0), (2.5, 2), (60.0, 3)])
def test_recording_at_load_ends_with_its_time_and_goes_on_when_a_step_is_wanted(
    graphs_of, load_seconds, recorded
):
    from llmc.spec.plans import CapturePlan

    capture = CapturePlan(decode_rows=(1, 2, 4, 8), at_load=(1, 2, 4), load_seconds=load_seconds)
    graphs = graphs_of(capture)
    assert graphs.num_recorded == recorded
    graph = graphs.graph(8, filtered=True)
    assert graphs.num_recorded == recorded + 1
    assert graphs.graph(8, filtered=True) is graph


def test_steps_that_no_graph_holds_or_that_read_too_many_keys_again_are_launched(graphs_of):
    from llmc.spec.plans import CapturePlan

    graphs = graphs_of(CapturePlan(decode_rows=(1, 2, 4, 8), keys_read_again=100))
    assert [graphs.bucket(tokens, 0) for tokens in (1, 3, 8, 9)] == [1, 4, 8, None]
    assert graphs.bucket(3, 100) == 4
    assert graphs.bucket(3, 101) is None


def test_sizes_beyond_what_requests_fill_take_little_memory():
    pytest.importorskip("torch")
    from llmc.artifact.cuda import ArenaPlan
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.executors.cuda import step_plans

    arenas = [ArenaPlan(rows=rows, offsets=(), num_bytes=1000 * rows) for rows in (1, 2, 4, 8, 16, 32)]

    def sizes(free_bytes, **settings):
        config = RuntimeConfig(max_requests=3, max_step_tokens=16, draft_tokens=3, **settings)
        return [plan.rows for plan in step_plans(arenas, config, free_bytes)]

    assert sizes(0) == [1, 2, 4]
    assert sizes(32 * 8000) == [1, 2, 4, 8]
    assert sizes(1 << 40) == [1, 2, 4, 8, 16]  # a step has no more tokens
    assert sizes(0, speculation="ngram") == [1, 2, 4, 8, 16]  # three requests with three drafts each
