"""A program traced in bfloat16, computed in float32: what its float32 trace says with the same weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmc.compiler.trace import trace_config
from llmc.ir.widened import widened
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of, with_random_weights
from llmc.passes.quantize.rtn import Rtn

PAGED = (KvLayout(dtype="float32", page_tokens=4), PagedAttention())
IDS = [tuple(range(5, 30)), (9, 8, 7)]


def traced(name, dtype, *quantisers):
    """A program of the family whose weights are those of bfloat16 in either dtype."""
    family = next(family for family in FAMILIES if family.name == name)
    config = getattr(transformers, family.config)(**family.options)
    low = with_random_weights(trace_config(config, dtype=torch.bfloat16), 0)
    if dtype == torch.bfloat16:
        program = low
    else:
        wide = trace_config(config, dtype=dtype)
        entries = {weight: widened(low).weights[weight] for weight in wide.weights}
        program = wide.replace(weights=wide.weights.with_entries(entries))
    return run_passes(program, (*canonicalise(), *fuse(), *quantisers, *PAGED), PassContext())


@pytest.mark.parametrize("name", ["llama3", "gpt_oss"])
def test_a_widened_program_says_what_a_float32_trace_says(name):
    low, wide = traced(name, torch.bfloat16), traced(name, torch.float32)
    expected, found = logits_of(wide, IDS), logits_of(widened(low), IDS)
    assert found.dtype == torch.float32
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert (logits_of(low, IDS).float() - expected).abs().max() > 1e-4 * scale


def test_quantised_tables_and_products_are_widened_too():
    low = traced("llama3", torch.bfloat16, Rtn(bits=4, group_size=32, head_bits=4, embedding_bits=4))
    done = widened(low)
    assert done.spec.compute_dtype == "float32"
    floats = [node.meta["val"] for node in done.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {value.dtype for value in floats if value.is_floating_point()} == {torch.float32}
    assert {expr.dtype for expr in done.weights.entries.values()} <= {torch.float32, torch.uint8, torch.int8}
    exact, rounded = logits_of(done, IDS), logits_of(low, IDS).float()
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert {node.name for node in low.graph.nodes} == {node.name for node in done.graph.nodes}
