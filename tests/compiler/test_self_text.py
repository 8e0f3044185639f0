"""Text that a model writes itself: the attention it takes against the operator's, and repeatability."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.self_text import attend_together, write_sequences
from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, layout
from llmc.passes.probe import with_random_weights


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_one_token_a_sequence_attends_as_the_operator_says(window, chunk, softcap, with_sinks):
    draw = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 7, 19, 31])
    pages, page_tokens, heads, kv_heads, width = 16, 8, 6, 2, 4
    q = torch.randn(4, heads, width, generator=draw)
    caches = [torch.randn(pages, page_tokens, kv_heads, width, generator=draw) for _ in range(2)]
    table = torch.randperm(pages, generator=draw).reshape(4, 4)
    for sequence, position in enumerate(positions.tolist()):
        table[sequence, position // page_tokens + 1 :] = -1
    sinks = torch.randn(heads, generator=draw) if with_sinks else None
    args = (q, *caches, q.new_empty(0), table, torch.arange(5), positions, sinks, 0.5, window, softcap, chunk)
    expected = torch.ops.llmc.paged_attention(*args)
    assert torch.allclose(attend_together(*args), expected, atol=1e-5)


def test_the_same_seed_writes_the_same_text_and_keeps_the_openings():
    import transformers

    family = next(family for family in FAMILIES if family.name == "llama3")
    config = getattr(transformers, family.config)(**family.options)
    traced = with_random_weights(trace_config(config, dtype=torch.float32), 0)
    program = run_passes(traced, (*canonicalise(), *layout()), PassContext())
    openings = [(1,), (2, 3, 4), (5, 6)]

    def written(seed):
        return write_sequences(program, openings, 20, seed=seed, watch=lambda *_: None)

    first = written(0)
    assert first == written(0)
    assert first != written(1)
    assert [len(sequence) for sequence in first] == [20, 20, 20]
    for opening, sequence in zip(openings, first, strict=True):
        assert sequence[: len(opening)] == opening
