"""How far logprobs may be from an oracle's: what rounding alone does to them, and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from llmc.compiler.oracle import make_oracle, oracle_prompts
from llmc.compiler.trace import trace_config
from llmc.passes.base import PassContext
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of, with_random_weights
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.select_kernels import SelectKernels
from llmc.spec.target import ONNX

LAYERS = 6
STEADY = 2e-3


@pytest.fixture(scope="module")
def program():
    """`program(inputs)`: a deep model with random weights whose products round their inputs, or do not."""
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    traced = with_random_weights(trace_config(config, dtype=torch.float32), 0)

    def make(inputs):
        passes = (
            *canonicalise(), *fuse(), Rtn(bits=4, group_size=32), KvLayout(page_tokens=16), PagedAttention(),
            SelectKernels(inputs=inputs),
        )  # fmt: skip
        return run_passes(traced, passes, PassContext(target=ONNX))

    return make


def test_float32_without_codes_is_held_to_the_steady_bound(program):
    assert make_oracle(program("accurate"), None).tolerance == STEADY


def test_rounding_inputs_to_codes_is_allowed_what_it_does(program):
    """No code can be asked to be nearer than a program whose weights differ in their last place."""
    rounding = program("fast")
    oracle = make_oracle(rounding, None)
    prompts = oracle_prompts(None, 300)

    def logprobs(one):
        logits = torch.log_softmax(logits_of(one, prompts).double(), -1).split(list(map(len, prompts)))
        return np.concatenate(
            [
                rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
                for rows, ids in zip(logits, prompts, strict=True)
            ]
        )

    found = np.concatenate([prompt.logprobs for prompt in oracle.prompts])
    assert np.abs(logprobs(rounding) - found).max() <= oracle.tolerance
    unrounded = np.abs(logprobs(program("accurate")) - found).max()
    assert STEADY <= oracle.tolerance < 6 * unrounded
